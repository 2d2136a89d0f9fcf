"""`gapkern project fit` and `apply`: queries on the gallery's hull, in files."""

import argparse
from typing import Any

from gapkern.cli import moves


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "project",
        help="fit the projection of queries on the gallery's hull and apply it to embedding files",
        description="Moves each query to the nearest point of the gallery's hull: no neighbour changes, noise and "
        "codes change fewer of them, and the gallery and its indexes stay as they are. 'gapkern index', 'search', "
        "'eval' and 'robust' take its file where they take a shift's.",
    )
    actions = parser.add_subparsers(dest="action", metavar="fit|apply", required=True)

    fit = actions.add_parser("fit", help="learn the hull of a gallery, or as much of it as keeps the neighbours")
    moves.add_sides(fit)
    fit.add_argument("--out", required=True, help="the projection, as a .safetensors file")
    fit.add_argument(
        "--metric",
        choices=("l2", "ip", "cosine"),
        default="l2",
        help="what the gallery is searched by (default: %(default)s)",
    )
    fit.add_argument(
        "--reduce", action="store_true", help="rotate both sides into k dimensions: the same answers, k / D the size"
    )
    fit.add_argument(
        "--centred",
        action="store_true",
        help="by inner product and cosine, keep queries near the gallery's mean: for RaBitQ's codes",
    )
    fit.add_argument(
        "--neighbours",
        type=int,
        default=1,
        metavar="K",
        help="for --components auto: how many of a query's first rows --agreement is about (default: %(default)s)",
    )
    moves.add_fit(fit)
    fit.set_defaults(run=run_fit)

    apply = actions.add_parser("apply", help="project the embeddings of a file or of a folder's shards")
    apply.add_argument("projection", help="a file from 'gapkern project fit'")
    moves.add_apply(apply, None)
    apply.set_defaults(run=lambda arguments: moves.apply(arguments, arguments.projection))


def run_fit(arguments: argparse.Namespace) -> int:
    from gapkern import Projection
    from gapkern.embeddings import provenance

    model, said = moves.fitting(arguments)
    projection = Projection(
        arguments.components,
        arguments.metric,
        arguments.agreement,
        arguments.reduce,
        model,
        arguments.centred,
        arguments.neighbours,
    ).check_parameters()
    moves.learn(projection, arguments)
    made_from = {side: provenance.made_from(getattr(arguments, side), name=side) for side in ("gallery", "queries")}
    projection.save(arguments.out, made_from=made_from)
    facts = {
        "offset": projection.offset_,
        "components": projection.n_components_,
        "dims": projection.n_features_in_,
        "agreement": projection.agreement_,
        "metric": projection.metric,
        "reduce": projection.reduce,
        "centred": projection.centred,
        "neighbours": projection.neighbours,
        "model": model,
        "inputs": made_from,
    }
    moves.show(arguments, "projection", facts, said)
    if projection.n_components_ == projection.n_features_in_ and not arguments.json:
        print("nothing to gain: the hull of this gallery is the whole space; give --components fewer than D")
    return 0
