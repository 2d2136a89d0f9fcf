"""`gapkern shift fit`, `apply` and `compare`: close the gap in files."""

import argparse
import os
from pathlib import Path

from gapkern import files, layout
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


def add(verbs) -> None:
    parser = verbs.add_parser("shift", help="fit the mean shift and apply it to embedding files")
    actions = parser.add_subparsers(dest="action", metavar="fit|apply|compare", required=True)

    fit = actions.add_parser("fit", help="learn the shift that closes the gap between a gallery and queries")
    _add_sides(fit)
    fit.add_argument("--out", required=True, help="the shift, as a .safetensors file")
    fit.add_argument("--alpha", type=strength, default=1.0,
                     help="how much to close (default: %(default)s, all of it), or best:VARIANCE for what makes "
                     "neighbours most robust to Gaussian noise of that total variance")  # fmt: skip
    fit.add_argument("--components", type=components, default="auto",
                     help="exact, auto, a number, or a share of the variance (default: %(default)s)")  # fmt: skip
    fit.add_argument("--moves", choices=("gallery", "queries"), default="gallery",
                     help="the side that moves (default: %(default)s)")  # fmt: skip
    fit.add_argument("--normalize", action="store_true", help="L2-normalise what was moved")
    fit.add_argument("--agreement", type=float, default=0.99,
                     help="share of neighbours that --components auto keeps (default: %(default)s)")  # fmt: skip
    fit.add_argument("--model", help="what made the embeddings; apply then refuses another's (default: what a "
                     "folder's manifest says)")  # fmt: skip
    common.add_json(fit)
    fit.set_defaults(run=run_fit)

    apply = actions.add_parser("apply", help="move the embeddings of a file or of a folder's shards")
    apply.add_argument("shift", help="a file from 'gapkern shift fit'")
    apply.add_argument("embeddings", help="(N, D), a file or a folder")
    apply.add_argument("--out", required=True, help="the result: .npy or .safetensors; a folder for a folder, whose "
                       "finished shards are not done again")  # fmt: skip
    apply.add_argument("--side", choices=("gallery", "queries"), default="gallery",
                       help="what the embeddings are (default: %(default)s)")  # fmt: skip
    apply.add_argument("--alpha", type=float, help="instead of the fitted one")
    apply.add_argument("--model", help="what made the embeddings (default: what the folder's manifest says)")
    apply.set_defaults(run=run_apply)

    compare = actions.add_parser("compare", help="what each number of components costs and buys")
    _add_sides(compare)
    compare.add_argument("--components", type=components, nargs="+", default=["exact", "auto", 0.95, 0.9, 0.5, 0],
                         help="as for fit (default: exact auto 0.95 0.9 0.5 0)")  # fmt: skip
    common.add_labels(compare)
    common.add_json(compare)
    compare.set_defaults(run=run_compare)


def _add_sides(parser) -> None:
    parser.add_argument("gallery", help="embeddings that are searched, (G, D), a file or a folder of shards")
    parser.add_argument("queries", help="embeddings that ask, (Q, D), a file or a folder of shards")


def run_fit(arguments) -> int:
    from gapkern import Gaussian, MeanShift, best_alpha
    from gapkern.embeddings import described, folder

    if (ending := Path(arguments.out).suffix) not in ("", ".safetensors"):
        raise ValueError(f"out: expected a name ending in .safetensors, got one in {ending}")
    files.writable(arguments.out)
    best = arguments.alpha if isinstance(arguments.alpha, tuple) else None
    model, said = common.model(arguments.model, gallery=arguments.gallery, queries=arguments.queries)
    for side in ("gallery", "queries"):
        if described(getattr(arguments, side), name=side).get("transforms"):
            layout.note(f"{side}: a shift has moved these already")
    shift = MeanShift(
        1.0 if best else arguments.alpha, arguments.components, arguments.moves, arguments.normalize,
        arguments.agreement, model,
    )  # fmt: skip
    noise = Gaussian(best[1]) if best else None
    with common.progress({"gallery": "reading the gallery", "queries": "reading the queries"}) as step:
        for side in ("gallery", "queries"):
            path = getattr(arguments, side)
            total, done = files.size(path, name=side)[0], 0
            for rows in files.chunks(path, name=side, finite=True):
                shift.partial_fit(**{side: rows})
                done += len(rows)
                step(side, done, total)
    if noise is not None:
        gallery, queries = shift.samples()
        shift = shift.at(round(best_alpha(queries, gallery, noise, shift=shift), 2))
    made_from = {side: folder.made_from(getattr(arguments, side), name=side) for side in ("gallery", "queries")}
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
    if arguments.json:
        common.print_json(facts)
    else:
        shown = {name: value for name, value in facts.items() if value is not None and name != "inputs"}
        common.table(["fitted shift", "value"], [[name, value] for name, value in shown.items()])
        if said:
            print(f"model: {model}, {said}")
        print(f"shift: {arguments.out}")
    return 0


def run_apply(arguments) -> int:
    if not os.path.isdir(arguments.embeddings):
        files.writable(arguments.out)
        return _apply(arguments)
    with locked(arguments.out):
        return _apply(arguments)


def _apply(arguments) -> int:
    from gapkern import MeanShift
    from gapkern.embeddings import shifted

    shift = MeanShift.load(arguments.shift)
    if arguments.alpha is not None:
        shift = shift.at(arguments.alpha)
    move = shift.transform if arguments.side == "gallery" else shift.transform_queries
    rows, dims = files.size(arguments.embeddings, name="embeddings")
    if dims != len(shift.shift_vector_):
        raise ValueError(f"embeddings: expected D = {len(shift.shift_vector_)} as fitted, got ({rows}, {dims})")
    model, _ = common.model(arguments.model, embeddings=arguments.embeddings)
    target = shifted.Target(
        arguments.embeddings, arguments.out, shifted.transform(shift, arguments.side), model or shift.model
    )
    done = 0
    with common.progress({"apply": f"moving the {arguments.side}"}) as step:
        for source, goal in target.pairs:
            count = files.size(source, name="embeddings")[0]
            if goal is not None:
                for n in files.convert(source, goal, lambda x: move(x, model=model), name="embeddings"):
                    step("apply", done + n, rows)
                target.done(source, goal)
            done += count
            step("apply", done, rows)
    target.finish()
    finished = sum(goal is None for _, goal in target.pairs)
    print(f"{arguments.side}: {rows} x {dims} moved to {arguments.out}"
          + (f" ({finished} of {len(target.pairs)} shards were there already)" if finished else ""))  # fmt: skip
    return 0


def run_compare(arguments) -> int:
    from gapkern import MeanShift
    from gapkern._nearest import nearest
    from gapkern.embeddings import folder
    from gapkern.embeddings import labels as loader

    common.model(None, gallery=arguments.gallery, queries=arguments.queries)
    gallery = files.load_embeddings(arguments.gallery, name="gallery")
    queries = files.load_embeddings(arguments.queries, name="queries")
    labels = common.labels(arguments, len(queries), len(gallery))
    rows: list[dict] = []
    with common.progress({"compare": "components"}) as step:
        for i, wanted in enumerate(arguments.components):
            shift = MeanShift(n_components=wanted).fit(gallery, queries)
            if not rows:
                before = nearest(queries, gallery)
            after = nearest(queries, shift.transform(gallery))
            rows.append({
                "components": str(wanted),
                "k": shift.n_components_,
                "closed": shift.orthogonality_,
                "agreement": float((after == before).double().mean()),
                "accuracy": None if labels is None else float((after.numpy() == labels).mean()),
            })  # fmt: skip
            step("compare", i + 1, len(arguments.components))
    unmoved = None if labels is None else float((before.numpy() == labels).mean())
    if arguments.json:
        sides = {side: folder.made_from(getattr(arguments, side), name=side) for side in ("gallery", "queries")}
        inputs = sides | loader.made_from(arguments.labels)
        common.print_json({"clean_accuracy": unmoved, "inputs": inputs, "rows": rows})
        return 0
    common.table(
        ["components", "k", "share of the gap closed", "neighbours kept", "accuracy"], [list(r.values()) for r in rows]
    )
    if unmoved is not None:
        print(f"accuracy without a shift: {unmoved:.4f}")
    return 0
