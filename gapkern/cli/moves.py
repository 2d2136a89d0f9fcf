"""What `gapkern shift` and `gapkern project` share: reading both sides in pieces, and moving files and folders."""

import argparse
from pathlib import Path
from typing import Any

from gapkern import _progress, files, layout
from gapkern._lock import locked
from gapkern.cli import common


def components(text: str) -> int | float | str:
    """`exact`, `auto`, a number of components, or a share of the variance between 0 and 1."""
    if text in ("exact", "auto"):
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected 'exact', 'auto', a number of components or a share of the variance, got {text!r}"
        ) from None


def add_sides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gallery", help="embeddings that are searched, (G, D), a file or a folder of shards")
    parser.add_argument("queries", help="embeddings that ask, (Q, D), a file or a folder of shards")


def add_fit(parser: argparse.ArgumentParser) -> None:
    """What both are fitted by."""
    parser.add_argument(
        "--components",
        type=components,
        default="auto",
        help="exact, auto, a number, or a share of the variance (default: %(default)s)",
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=0.99,
        help="share of neighbours that --components auto keeps (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        help="what made the embeddings; apply then refuses another's (default: what a folder's manifest says)",
    )
    common.add_json(parser)


def add_apply(parser: argparse.ArgumentParser, side: str | None) -> None:
    """What both are applied by; without a usual side it must be given."""
    parser.add_argument("embeddings", help="(N, D), a file or a folder")
    parser.add_argument(
        "--out",
        required=True,
        help="the result: .npy, .safetensors or .parquet, which keeps a table's other columns; a folder for a folder, "
        "whose finished shards are not done again",
    )
    default = "" if side is None else " (default: %(default)s)"
    parser.add_argument(
        "--side",
        choices=("gallery", "queries"),
        default=side,
        required=side is None,
        help=f"what the embeddings are{default}",
    )
    parser.add_argument("--model", help="what made the embeddings (default: what the folder's manifest says)")
    common.add_json(parser)


def transforms_file(path: str) -> None:
    """Checks where a shift or a projection is to be written."""
    if (ending := Path(path).suffix) not in ("", ".safetensors"):
        raise ValueError(f"out: expected a name ending in .safetensors, got one in {ending}")
    files.writable(path)


def fitting(arguments: argparse.Namespace) -> tuple[str | None, str]:
    """Checks the sides and --out before anything is read; what made the embeddings, and where that is said."""
    from gapkern.embeddings import described

    transforms_file(arguments.out)
    found = common.model(arguments.model, gallery=arguments.gallery, queries=arguments.queries)
    for side in ("gallery", "queries"):
        if described(getattr(arguments, side), name=side).get("transforms"):
            layout.note(f"{side}: a shift or a projection has moved these already")
    return found


def learn(estimator: Any, arguments: argparse.Namespace) -> None:
    """Has it see both sides, some rows at a time."""
    with _progress.shown(
        {"gallery": "reading the gallery", "queries": "reading the queries"}, {"gallery": "rows", "queries": "rows"}
    ) as step:
        for side in ("gallery", "queries"):
            path = getattr(arguments, side)
            total, done = files.size(path, name=side)[0], 0
            for rows in files.chunks(path, name=side, finite=True):
                estimator.partial_fit(**{side: rows})
                done += len(rows)
                step(side, done, total)


def show(arguments: argparse.Namespace, what: str, facts: dict[str, Any], said: str) -> None:
    """The fitted one's facts."""
    if arguments.json:
        common.print_json(facts)
        return
    common.table(
        [f"fitted {what}", "value"],
        [[name, value] for name, value in facts.items() if value is not None and name != "inputs"],
    )
    if said:
        print(f"model: {facts['model']}, {said}")
    print(f"{what}: {arguments.out}")


def apply(arguments: argparse.Namespace, moved_by: str, alpha: float | None = None) -> int:
    """Moves a file or a folder's shards by a shift's or a projection's file."""
    if not layout.is_folder(arguments.embeddings):
        files.writable(arguments.out)
        return _apply(arguments, moved_by, alpha)
    with locked(arguments.out):
        return _apply(arguments, moved_by, alpha)


def _apply(arguments: argparse.Namespace, moved_by: str, alpha: float | None) -> int:
    from gapkern import MeanShift
    from gapkern.embeddings import shifted
    from gapkern.gap import transforms

    transform = transforms.load(moved_by)
    if alpha is not None:
        if not isinstance(transform, MeanShift):
            raise ValueError(f"alpha: expected none for a projection, which has no strength, got {alpha:g}")
        transform = transform.at(alpha)
    move = transform.transform if arguments.side == "gallery" else transform.transform_queries
    rows, dims = files.size(arguments.embeddings, name="embeddings")
    if dims != transform.n_features_in_:
        raise ValueError(f"embeddings: expected D = {transform.n_features_in_} as fitted, got ({rows}, {dims})")
    model, _ = common.model(arguments.model, embeddings=arguments.embeddings)
    target = shifted.Target(
        arguments.embeddings, arguments.out, shifted.transform(transform, arguments.side), model or transform.model
    )
    done = 0
    with _progress.shown({"apply": f"moving the {arguments.side}"}, {"apply": "rows"}) as step:
        for source, goal in target.pairs:
            count = files.size(source, name="embeddings")[0]
            if goal is not None:
                for n in files.convert(source, goal, lambda x: move(x, model=model), name="embeddings"):
                    step("apply", done + n, rows)
                target.done(source, goal)
            done += count
            step("apply", done, rows)
    told = target.finish()
    if arguments.json:
        common.print_json({"out": arguments.out, **told})
        return 0
    finished = sum(goal is None for _, goal in target.pairs)
    print(
        f"{arguments.side}: {rows} x {told['dims']} moved to {arguments.out}"
        + (f" ({finished} of {len(target.pairs)} shards were there already)" if finished else "")
    )
    return 0
