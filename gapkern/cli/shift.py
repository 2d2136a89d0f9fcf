"""`gapkern shift fit`, `apply` and `compare`: close the gap in files."""

import argparse
from typing import Any

from gapkern import _progress, files
from gapkern.cli import common, moves


def strength(text: str) -> float | tuple[str, float]:
    """An alpha, or `best:VARIANCE`.

    Example:
        >>> strength("0.5"), strength("best:0.04")
        (0.5, ('best', 0.04))
    """
    try:
        return ("best", float(text[5:])) if text.startswith("best:") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or best:VARIANCE, got {text!r}") from None


def add(verbs: Any) -> None:
    parser = verbs.add_parser("shift", help="fit the mean shift and apply it to embedding files")
    actions = parser.add_subparsers(dest="action", metavar="fit|apply|compare", required=True)

    fit = actions.add_parser("fit", help="learn the shift that closes the gap between a gallery and queries")
    moves.add_sides(fit)
    fit.add_argument("--out", required=True, help="the shift, as a .safetensors file")
    fit.add_argument(
        "--alpha",
        type=strength,
        default=1.0,
        help="how much to close (default: %(default)s, all of it), or best:VARIANCE for what makes "
        "neighbours most robust to Gaussian noise of that total variance",
    )
    fit.add_argument(
        "--moves", choices=("gallery", "queries"), default="gallery", help="the side that moves (default: %(default)s)"
    )
    fit.add_argument("--normalize", action="store_true", help="L2-normalise what was moved")
    moves.add_fit(fit)
    fit.set_defaults(run=run_fit)

    apply = actions.add_parser("apply", help="move the embeddings of a file or of a folder's shards")
    apply.add_argument("shift", help="a file from 'gapkern shift fit'")
    moves.add_apply(apply, "gallery")
    apply.add_argument("--alpha", type=float, help="instead of the fitted one")
    apply.set_defaults(run=lambda arguments: moves.apply(arguments, arguments.shift, arguments.alpha))

    compare = actions.add_parser("compare", help="what each number of components costs and buys")
    moves.add_sides(compare)
    compare.add_argument(
        "--components",
        type=moves.components,
        nargs="+",
        default=["exact", "auto", 0.95, 0.9, 0.5, 0],
        help="as for fit (default: exact auto 0.95 0.9 0.5 0)",
    )
    common.add_labels(compare)
    common.add_json(compare)
    compare.set_defaults(run=run_compare)


def run_fit(arguments: argparse.Namespace) -> int:
    from gapkern import Gaussian, MeanShift, best_alpha
    from gapkern.embeddings import provenance

    model, said = moves.fitting(arguments)
    best = arguments.alpha if isinstance(arguments.alpha, tuple) else None
    shift = MeanShift(
        1.0 if best else arguments.alpha,
        arguments.components,
        arguments.moves,
        arguments.normalize,
        arguments.agreement,
        model,
    )
    noise = Gaussian(best[1]) if best else None
    moves.learn(shift, arguments)
    if noise is not None:
        gallery, queries = shift.samples()
        shift = shift.at(round(best_alpha(queries, gallery, noise, shift=shift), 2))
    made_from = {side: provenance.made_from(getattr(arguments, side), name=side) for side in ("gallery", "queries")}
    shift.save(arguments.out, made_from=made_from)
    facts = {
        "gap_norm": float(shift.gap_vector_.norm()),
        "orthogonality": shift.orthogonality_,
        "components": shift.n_components_,
        "agreement": shift.agreement_,
        "alpha": shift.alpha,
        "moves": shift.moves,
        "model": model,
        "inputs": made_from,
    }
    moves.show(arguments, "shift", facts, said)
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    from gapkern import MeanShift, Projection
    from gapkern._search import nearest
    from gapkern.embeddings import labels as loader
    from gapkern.embeddings import provenance
    from gapkern.gap import transforms

    common.model(None, gallery=arguments.gallery, queries=arguments.queries)
    gallery = files.load_embeddings(arguments.gallery, name="gallery")
    queries = files.load_embeddings(arguments.queries, name="queries")
    labels = common.labels(arguments, len(queries), len(gallery))
    found: dict[type, list[dict[str, Any]]] = {MeanShift: [], Projection: []}
    wanted = [(kind, k) for kind in found for k in arguments.components]
    before = nearest(queries, gallery)
    with _progress.shown({"compare": "components"}, {"compare": "fits"}) as step:
        for i, (kind, components) in enumerate(wanted):
            fitted = kind(n_components=components).fit(gallery, queries)
            after = nearest(fitted.transform_queries(queries), fitted.transform(gallery))
            found[kind].append(
                {
                    "components": str(components),
                    "k": fitted.n_components_,
                    "closed": transforms.closed(fitted, queries),
                    "agreement": float((after == before).double().mean()),
                    "accuracy": None if labels is None else float((after.numpy() == labels).mean()),
                }
            )
            step("compare", i + 1, len(wanted))
    unmoved = None if labels is None else float((before.numpy() == labels).mean())
    if arguments.json:
        sides = {side: provenance.made_from(getattr(arguments, side), name=side) for side in ("gallery", "queries")}
        common.print_json(
            {
                "clean_accuracy": unmoved,
                "inputs": sides | loader.made_from(arguments.labels),
                "rows": found[MeanShift],
                "projections": found[Projection],
            }
        )
        return 0
    named = {"shift": found[MeanShift], "projection": found[Projection]}
    common.table(
        ["", "components", "k", "share of the gap closed", "neighbours kept", "accuracy"],
        [["none", "-", None, 0.0, 1.0, unmoved], *([name, *r.values()] for name, rows in named.items() for r in rows)],
    )
    if unmoved is not None:
        print(f"accuracy without a shift: {unmoved:.4f}")
    return 0
