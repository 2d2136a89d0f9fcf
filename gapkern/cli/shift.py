"""`gapkern shift fit` and `gapkern shift apply`: close the gap in files."""

import argparse

from gapkern import files
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


def add(verbs) -> None:
    parser = verbs.add_parser("shift", help="fit the mean shift and apply it to embedding files")
    actions = parser.add_subparsers(dest="action", metavar="fit|apply", required=True)

    fit = actions.add_parser("fit", help="learn the shift that closes the gap between a gallery and queries")
    fit.add_argument("gallery", help="embeddings that are searched, (G, D)")
    fit.add_argument("queries", help="embeddings that ask, (Q, D)")
    fit.add_argument("--out", required=True, help="the shift, as a .safetensors file")
    fit.add_argument("--alpha", type=float, default=1.0, help="how much to close (default: %(default)s, all of it)")
    fit.add_argument("--components", type=components, default="auto",
                     help="exact, auto, a number, or a share of the variance (default: %(default)s)")  # fmt: skip
    fit.add_argument("--moves", choices=("gallery", "queries"), default="gallery",
                     help="the side that moves (default: %(default)s)")  # fmt: skip
    fit.add_argument("--normalize", action="store_true", help="L2-normalise what was moved")
    fit.add_argument("--agreement", type=float, default=0.99,
                     help="share of neighbours that --components auto keeps (default: %(default)s)")  # fmt: skip
    common.add_json(fit)
    fit.set_defaults(run=run_fit)

    apply = actions.add_parser("apply", help="move the embeddings of a file")
    apply.add_argument("shift", help="a file from 'gapkern shift fit'")
    apply.add_argument("embeddings", help="(N, D)")
    apply.add_argument("--out", required=True, help="the result, .npy or .safetensors")
    apply.add_argument("--side", choices=("gallery", "queries"), default="gallery",
                       help="what the embeddings are (default: %(default)s)")  # fmt: skip
    apply.add_argument("--alpha", type=float, help="instead of the fitted one")
    apply.set_defaults(run=run_apply)


def run_fit(arguments) -> int:
    from gapkern import MeanShift

    shift = MeanShift(arguments.alpha, arguments.components, arguments.moves, arguments.normalize, arguments.agreement)
    with common.progress({"gallery": "reading the gallery", "queries": "reading the queries"}) as step:
        for side in ("gallery", "queries"):
            path = getattr(arguments, side)
            total, done = len(files.load_embeddings(path, name=side)), 0
            for rows in files.chunks(path, name=side):
                shift.partial_fit(**{side: rows})
                done += len(rows)
                step(side, done, total)
    shift.save(arguments.out)
    facts = {
        "gap_norm": float(shift.gap_vector_.norm()),
        "orthogonality": shift.orthogonality_,
        "components": shift.components_,
        "agreement": shift.agreement_,
        "alpha": shift.alpha,
        "moves": shift.moves,
    }
    if arguments.json:
        common.print_json(facts)
    else:
        common.table(["fitted shift", "value"], [[name, value] for name, value in facts.items()])
        print(f"shift: {arguments.out}")
    return 0


def run_apply(arguments) -> int:
    from gapkern import MeanShift

    shift = MeanShift.load(arguments.shift)
    if arguments.alpha is not None:
        shift = shift.at(arguments.alpha)
    x = files.load_embeddings(arguments.embeddings, name="embeddings")
    moved = shift.transform(x) if arguments.side == "gallery" else shift.transform_queries(x)
    files.save_embeddings(arguments.out, moved)
    print(f"{arguments.side}: {tuple(moved.shape)} {moved.dtype} moved to {arguments.out}")
    return 0
