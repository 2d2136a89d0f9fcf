"""`gapkern robust`: robustness over shift strengths and perturbations, from files."""

import argparse
from pathlib import Path
from typing import Any

from gapkern import _check, files
from gapkern._lock import locked
from gapkern.cli import common
from gapkern.cli.moves import components

JOURNAL, INPUTS = "unfinished.jsonl", "inputs.json"


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "robust",
        help="sweep robustness over shift strengths and perturbations",
        description="How many nearest neighbours of QUERIES in GALLERY survive a perturbation of the gallery, for each "
        "strength of the shift. Exact for Gaussian noise; nothing is sampled.",
    )
    parser.add_argument("queries", help="embeddings that ask, (Q, D)")
    parser.add_argument("gallery", help="embeddings that are searched, (G, D)")
    parser.add_argument(
        "--alphas",
        type=common.alphas,
        help="FIRST:LAST:COUNT, or values between commas (default: 0:1.5:7; of a projection 0,1: without and with it)",
    )
    common.add_perturbations(parser)
    parser.add_argument("--replace", nargs="+", default=[], metavar="FILE", help="another gallery: paraphrases")
    common.add_labels(parser)
    parser.add_argument("--components", type=components, default="auto", help="as for gapkern shift fit")
    parser.add_argument(
        "--shift", help="a file from 'gapkern shift fit' or 'gapkern project fit' instead of fitting a shift here"
    )
    parser.add_argument("--project", action="store_true", help="fit a projection of the queries here, not a shift")
    parser.add_argument(
        "--metric",
        choices=("l2", "ip", "cosine"),
        help="what is searched by (default: what a projection was fitted for, else l2)",
    )
    parser.add_argument(
        "--on", choices=("gallery", "queries"), default="gallery", help="what is perturbed (default: %(default)s)"
    )
    parser.add_argument(
        "--when", choices=("after", "before"), default="after", help="before or after the shift (default: %(default)s)"
    )
    parser.add_argument("--method", default="auto", help="auto, exact, projected or sample (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=100, help="draws for what is sampled (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        help="folder for robustness.json, .csv and .png, and inputs.json, which says what "
        "of; the same command again goes on where it was interrupted",
    )
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.out:
        return _run(arguments, None)
    for module, package, extra in (("pandas", "pandas", "tables"), ("matplotlib.figure", "matplotlib", "demo")):
        _check.extra(module, package, extra)
    with locked(arguments.out) as out:
        return _run(arguments, out)


def _run(arguments: argparse.Namespace, out: Path | None) -> int:
    from gapkern import MeanShift, Projection, Replace, sweep
    from gapkern.embeddings import labels as loader
    from gapkern.embeddings import provenance
    from gapkern.embeddings.provenance import agreed
    from gapkern.gap import transforms
    from gapkern.perturb import title

    if arguments.shift and arguments.project:
        raise ValueError("project: expected it without --shift, got both")
    model, _ = common.model(None, queries=arguments.queries, gallery=arguments.gallery)
    queries = files.load_embeddings(arguments.queries, name="queries")
    gallery = files.load_embeddings(arguments.gallery, name="gallery")
    perturbations = [
        *common.perturbations(arguments),
        *(Replace(files.load_embeddings(f, name="replace"), label=f) for f in arguments.replace),
    ]
    labels = common.labels(arguments, len(queries), len(gallery))
    if not perturbations:
        raise ValueError("expected at least one of --gaussian, --uniform, --quantize, --replace")
    metric = arguments.metric or "l2"
    if arguments.shift:
        shift = transforms.load(arguments.shift)
        agreed({"shift": shift.model, "embeddings": model})
        if isinstance(shift, Projection):
            metric = arguments.metric or shift.metric
    elif arguments.project:
        shift = Projection(n_components=arguments.components, metric=metric).fit(gallery, queries)
    else:
        shift = MeanShift(n_components=arguments.components).fit(gallery, queries)
    alphas = arguments.alphas or ([0.0, 1.0] if isinstance(shift, Projection) else common.alphas("0:1.5:7"))
    result = sweep(
        queries,
        gallery,
        alphas,
        perturbations,
        labels,
        shift=shift,
        metric=metric,
        on=arguments.on,
        when=arguments.when,
        method=arguments.method,
        trials=arguments.trials,
        seed=arguments.seed,
        progress=True,
        journal=out and out / JOURNAL,
    )
    inputs = {name: provenance.made_from(getattr(arguments, name), name=name) for name in ("queries", "gallery")}
    inputs |= {f"replace {i}": provenance.made_from(path, name="replace") for i, path in enumerate(arguments.replace)}
    inputs |= loader.made_from(arguments.labels)
    inputs["shift"] = transforms.facts(shift) | {"fitted_here": not (arguments.shift or arguments.project)}
    if out is not None:
        # Written last: where it is, the results beside it are complete.
        (out / INPUTS).unlink(missing_ok=True)
        result.to_json(out / "robustness.json")
        result.to_csv(out / "robustness.csv")
        result.plot(out / "robustness.png")
        files.write_json(out / INPUTS, inputs)
        (out / JOURNAL).unlink()
    share = transforms.closed(shift, queries)
    if arguments.json:
        facts = {"components": shift.n_components_, "orthogonality": share}
        common.print_json(facts | {"inputs": inputs, "rows": result.rows})
        return 0
    common.table(
        ["perturbation", "α", "robustness", "agreement", "accuracy", "clean accuracy", "method"],
        [
            [title(r), r["alpha"], r["robustness"], r["agreement"], r["accuracy"], r["clean_accuracy"], r["method"]]
            for r in sorted(result.rows, key=title)
        ],
    )
    what = "projection" if isinstance(shift, Projection) else "shift"
    print(f"{what}: k = {shift.n_components_} components kept, {share:.1%} of the gap can be closed")
    if out is not None:
        print(f"written: {out}/robustness.json, .csv, .png and inputs.json")
    return 0
