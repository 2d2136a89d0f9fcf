"""`gapkern index`: an index of embedding files, or what each quantiser would cost and keep."""

import argparse
from typing import Any

from gapkern import _check, _progress, files
from gapkern.cli import common, repair


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "index",
        help="build a FAISS index of embedding files, or compare quantisers",
        description="Builds a FAISS index of GALLERY, with the gap closed where a shift is given, block by block: the "
        "same command again goes on where it was interrupted. With inverted lists (--factory IVF...) it may be larger "
        "than memory. --compare shows instead what quantisers keep of the neighbours, before and after the shift. "
        "'gapkern index repair --help': what projecting the queries buys in an index that exists.",
    )
    parser.add_argument("gallery", help="embeddings that are searched, (G, D), a file or a folder of shards")
    parser.add_argument("--out", help="folder of the index; with --compare of quantisers.json, .csv and .png")
    parser.add_argument(
        "--factory", nargs="+", metavar="STRING", help="FAISS factory string, several with --compare (default: Flat)"
    )
    parser.add_argument("--metric", choices=("l2", "ip"), default="l2", help="(default: %(default)s)")
    parser.add_argument("--shift", help="a file from 'gapkern shift fit' or 'gapkern project fit'")
    parser.add_argument("--ids", help="a .npy of integers, one for each row (default: 0, 1, ...)")
    parser.add_argument(
        "--model", help="what made the embeddings (default: what the folder's manifest, or the shift, says)"
    )
    parser.add_argument(
        "--sample", type=int, help="rows to learn lists and codes from (default: 131072; with --compare all)"
    )
    parser.add_argument("--block", type=int, help="rows of a block (default: 67 million numbers)")
    parser.add_argument("--compare", metavar="QUERIES", help="embeddings that ask: compare quantisers by them")
    parser.add_argument("--k", type=int, default=10, help="neighbours that --compare looks at (default: %(default)s)")
    common.add_labels(parser)
    common.add_json(parser)
    parser.set_defaults(run=run)
    parser.actions["repair"] = repair.parser(type(parser))


def run(arguments: argparse.Namespace) -> int:
    from gapkern.embeddings.shifted import check_unmoved
    from gapkern.gap import transforms

    shift = transforms.load(arguments.shift) if arguments.shift else None
    if shift is not None:
        check_unmoved(arguments.gallery, name="gallery")
    if arguments.compare:
        return _compare(arguments, shift)
    if not arguments.out:
        raise ValueError("out: expected a folder for the index, got none")
    if len(arguments.factory or []) > 1:
        raise ValueError(f"factory: expected one without --compare, got {len(arguments.factory)}")
    from gapkern.retrieval import disk

    model, said = common.model(arguments.model, gallery=arguments.gallery)
    stages = {"train": "learning", "add": "adding vectors", "merge": "merging"}
    with _progress.shown(stages, {"add": "rows"}) as step:
        manifest = disk.build(
            arguments.gallery,
            arguments.out,
            (arguments.factory or ["Flat"])[0],
            arguments.metric,
            shift,
            ids=arguments.ids,
            model=model,
            block=arguments.block,
            progress=step,
            sample=disk.SAMPLE if arguments.sample is None else arguments.sample,
        )
    if arguments.json:
        common.print_json(manifest)
    else:
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        print(
            f"index: {manifest['count']} x {manifest['dims']}, {manifest['factory']}, {size / 2**20:.1f} MiB "
            f"in {arguments.out}"
        )
        if said:
            print(f"model: {model}, {said}")
    return 0


def _compare(arguments: argparse.Namespace, shift: Any) -> int:
    from gapkern.embeddings import labels as loader
    from gapkern.embeddings import provenance
    from gapkern.retrieval import compare_quantisers

    common.model(arguments.model, gallery=arguments.gallery, queries=arguments.compare)
    out = files.folder(arguments.out) if arguments.out else None
    if out is not None:
        _check.extra("matplotlib", "matplotlib", "demo")
    gallery = files.load_embeddings(arguments.gallery, name="gallery")
    queries = files.load_embeddings(arguments.compare, name="queries")
    positives = common.labels(arguments, len(queries), len(gallery), "compare", fewer=True)
    with _progress.shown({"compare": "quantisers"}, {"compare": "indexes"}) as step:
        result = compare_quantisers(
            queries,
            gallery,
            arguments.factory,
            shift=shift,
            metric=arguments.metric,
            positives=positives,
            k=arguments.k,
            sample=arguments.sample,
            progress=lambda done, total: step("compare", done, total),
        )
    inputs = {
        name: provenance.made_from(path, name=name)
        for name, path in (("gallery", arguments.gallery), ("compare", arguments.compare))
    }
    inputs |= loader.made_from(arguments.labels)
    if out is not None:
        result.to_json(out / "quantisers.json")
        files.write_json(out / "inputs.json", inputs)
        result.to_csv(out / "quantisers.csv")
        result.plot(out / "quantisers.png")
    if arguments.json:
        common.print_json({"inputs": inputs, **result.to_dict()})
        return 0
    common.table(list(result.rows[0]), [list(row.values()) for row in result.rows])
    for factory, reason in result.left_out.items():
        print(f"left out: {factory} ({reason})")
    if out is not None:
        print(f"written: {out}/quantisers.json, .csv, .png")
    return 0
