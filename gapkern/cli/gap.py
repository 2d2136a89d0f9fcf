"""`gapkern gap`: the metrics of a pair of embedding files."""

import argparse
from typing import Any

from gapkern import files, layout
from gapkern.cli import common, mixed


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "gap",
        help="measure the modality gap of paired embeddings",
        description="Measures the modality gap of paired embeddings: row i of IMAGES belongs to row i of TEXTS, which "
        "is checked where both are known by name. A folder of 'gapkern embed' stands for its images, or texts. Files "
        "are .npy, .safetensors, Parquet, ... (docs/formats.md); 'file.npy[0]' takes the first matrix of a stack, "
        "'file.safetensors[key]' a tensor, 'file.parquet[column]' and 'folder[column]' a column. "
        "'gapkern gap mixed --help': images and texts in one gallery.",
    )
    parser.add_argument("images", help="embeddings of the first modality, (N, D)")
    parser.add_argument("texts", help="embeddings of the second, (N, D)")
    parser.add_argument("--logit-scale", type=float, default=100.0, help="of the softmax (default: %(default)s)")
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        choices=("clustering", "fisher", "dimension"),
        help="what takes longer: whether k-means finds the modalities, which dimensions tell them apart, intrinsic "
        "dimensions",
    )
    parser.add_argument(
        "--assess",
        choices=("texts", "images"),
        metavar="GALLERY",
        help="which theorems hold where 'texts' or 'images' are searched, and what projecting the others buys",
    )
    parser.add_argument("--out", help="write the metrics to this JSON file too")
    common.add_json(parser)
    parser.set_defaults(run=run)
    parser.actions["mixed"] = mixed.parser(type(parser))


def run(arguments: argparse.Namespace) -> int:
    from gapkern import gap_metrics
    from gapkern.embeddings.labels import Side, check_paired
    from gapkern.embeddings.provenance import made_from

    sides = {"images": "img_emb", "texts": "text_emb"}
    places = {name: str(layout.place(getattr(arguments, name), kind, name=name)) for name, kind in sides.items()}
    common.model(None, **places)
    images, texts = (files.load_embeddings(path, name=name) for name, path in places.items())
    check_paired(Side(places["images"], len(images), "images"), Side(places["texts"], len(texts), "texts"))
    metrics = gap_metrics(images, texts, logit_scale=arguments.logit_scale)
    if arguments.also:
        from gapkern.gap import gap_structure

        metrics |= gap_structure(images, texts, arguments.also)
    verdicts = []
    if arguments.assess:
        from gapkern.theory import assess

        verdicts = assess(images, texts, arguments.logit_scale, gallery=arguments.assess)
    if arguments.out or arguments.json:
        told: dict[str, Any] = metrics | {"inputs": {name: made_from(path, name=name) for name, path in places.items()}}
        if verdicts:
            told["verdicts"] = [vars(verdict) for verdict in verdicts]
    if arguments.out:
        files.write_json(arguments.out, told)
    if arguments.json:
        common.print_json(told)
    else:
        common.table(["metric", "value"], [[name, value] for name, value in metrics.items()])
        for verdict in verdicts:
            print(f"{verdict.statement}: {'holds' if verdict.applies else 'does not hold'}. {verdict.sentence}")
    return 0
