"""What the verbs share: argument types, tables, JSON."""

import argparse
import io
import json
import os
import sys
from typing import Any

from gapkern import files, layout
from gapkern.cli import answer
from gapkern.cli.boundary import spelled

WIDEST = 2**20  # columns of a terminal that cuts no table
MOST_ALPHAS = 10_000
MOST_WORKERS = 4


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else on stdout")


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num_workers",
        type=int,
        help=f"processes that read images (default: as many as processors are available, at most {MOST_WORKERS})",
    )


def workers(arguments: argparse.Namespace) -> int:
    """What --num_workers says, else a process for each processor that this one may use, up to `MOST_WORKERS`."""
    if arguments.num_workers is not None:
        given: int = arguments.num_workers
        return given
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MOST_WORKERS)


def add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels",
        help="'paired' where row i belongs to row i, or a file of each query's right "
        "gallery row (Q,): .npy, .npz, .safetensors, .json, .csv, .parquet, lines",
    )


def labels(
    arguments: argparse.Namespace, queries: int, gallery: int, asking: str = "queries", *, fewer: bool = False
) -> Any:
    """What --labels says: each query's right gallery row (Q,), or None.

    Args:
        queries, gallery: the rows of both.
        asking: the argument of the queries.
        fewer: whether "paired" may leave gallery rows without a query.

    Raises:
        ValueError: see `gapkern.embeddings.labels.load`.
    """
    from gapkern.embeddings import sides
    from gapkern.embeddings.labels import Side, load

    names = None if layout.is_folder(arguments.gallery) else sides.of(arguments.gallery, name="gallery").get("names")
    rows, to = Side(getattr(arguments, asking), queries, "queries"), Side(arguments.gallery, gallery, "gallery")
    found = load(arguments.labels, rows, gallery, "gallery rows", names=names, to=to, fewer=fewer)
    return None if found is None else found.numpy()


def model(given: str | None, **paths: str) -> tuple[str | None, str]:
    """What made the embeddings: --model, else what the manifests of `paths` say; and where that is said.

    Raises:
        ValueError: two of them differ.
    """
    from gapkern import embeddings
    from gapkern.embeddings.provenance import agreed

    known = {name: embeddings.model_of(path, name=name) for name, path in paths.items()}
    found = agreed({"--model": given, **known})
    if given or found is None:
        return found, ""
    said = [str(layout.place(paths[name], name=name)) for name in known if known[name]]
    return found, "as the manifest of " + " and of ".join(said) + " says"


def add_perturbations(parser: argparse.ArgumentParser, of: str = "") -> None:
    noise: dict[str, Any] = {"type": float, "nargs": "+", "default": [], "metavar": "VARIANCE"}
    parser.add_argument("--gaussian", **noise, help=f"Gaussian noise{of}")
    parser.add_argument("--uniform", **noise, help=f"uniform noise{of}")
    parser.add_argument(
        "--scale",
        choices=("total", "per_coordinate"),
        default="total",
        help="what the variances are of: the whole noise vector or one coordinate",
    )
    parser.add_argument("--quantize", type=int, nargs="+", default=[], metavar="BINS", help=f"quantisation{of}")
    parser.add_argument(
        "--range",
        choices=("per_dimension", "global"),
        default="per_dimension",
        help="of the quantisation (default: %(default)s)",
    )


def perturbations(arguments: argparse.Namespace) -> list[Any]:
    """What the options of `add_perturbations` ask for, in the order of their help."""
    from gapkern import Gaussian, Quantize, Uniform

    return [
        *(Gaussian(v, arguments.scale) for v in arguments.gaussian),
        *(Uniform(v, arguments.scale) for v in arguments.uniform),
        *(Quantize(b, arguments.range) for b in arguments.quantize),
    ]


def print_json(value: Any) -> None:
    print(json.dumps(files.plain(value), indent=2, allow_nan=False), file=answer.stream())


def table(columns: list[str], rows: list[list[Any]], title: str | None = None) -> None:
    """A table on stdout: drawn on a terminal, plain columns elsewhere. No cell is cut, however narrow the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gapkern.experiments.report import number

    def cell(text: str) -> Text:  # not markup: file names hold brackets
        return Text(spelled(text, sys.stdout.encoding))

    console = Console()
    drawn = Table(
        title=None if title is None else cell(title),
        title_justify="left",
        box=box.SIMPLE_HEAD if console.is_terminal else None,
    )
    for i, column in enumerate(columns):
        drawn.add_column(cell(column), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(cell(number(value)) for value in row))
    needed = console.measure(drawn, options=console.options.update(width=WIDEST)).maximum
    text = io.StringIO()  # rich would end the process where a pipe is closed
    width = max(needed, console.width if console.is_terminal else 0)
    Console(file=text, width=width, force_terminal=console.is_terminal).print(drawn)
    print(text.getvalue(), end="")


def alphas(text: str) -> list[float]:
    """`0:1.5:13`: 13 values from 0 to 1.5; or values between commas.

    Example:
        >>> alphas("0:1:3"), alphas("0,1")
        ([0.0, 0.5, 1.0], [0.0, 1.0])
    """
    try:
        if ":" in text:
            low, high, count = text.split(":")
            first, last, n = float(low), float(high), int(count)
            if not 2 <= n <= MOST_ALPHAS:
                raise ValueError
            return [first + (last - first) * i / (n - 1) for i in range(n)]
        return [float(value) for value in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected FIRST:LAST:COUNT, 2 to {MOST_ALPHAS} of them, or values between commas, got {text!r}"
        ) from None
