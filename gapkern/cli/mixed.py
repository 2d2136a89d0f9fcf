"""`gapkern gap mixed`: images and texts in one gallery, as they are and with each modality's gap closed."""

import argparse
from typing import Any

from gapkern import files
from gapkern.cli import common


def parser(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    made = kind(
        prog="gapkern gap mixed",
        description="Searches in one gallery of IMAGES and TEXTS, row i of both one document: as they are ('none'), "
        "with the mean of each modality and of the queries taken off ('means', GR-CLIP), and each modality moved by "
        "its own mean shift ('shift'). Rows are scaled to unit length first. No labels are used in fitting.",
    )
    made.add_argument("images", help="embeddings of the images, (N, D)")
    made.add_argument("texts", help="embeddings of the texts, (N, D)")
    made.add_argument("queries", help="embeddings that ask, (Q, D)")
    made.add_argument(
        "--labels",
        default="paired",
        help="'paired' where query i asks for document i, or a file of each query's document (Q,): .npy, .npz, "
        ".safetensors, .json, .csv, lines (default: %(default)s)",
    )
    made.add_argument("--fused", type=float, metavar="WEIGHT", help="documents of both, too: the weight of the text")
    made.add_argument(
        "--split", action="store_true", help="each document in one modality, by lot, instead of in each (MixBench)"
    )
    made.add_argument("--seed", type=int, default=0, help="of --split (default: %(default)s)")
    made.add_argument("--k", type=int, nargs="+", default=[1, 5, 10], help="of recall@k (default: 1 5 10)")
    made.add_argument("--save", metavar="FILE", help="write the means to this .safetensors file")
    made.add_argument("--out", help="write the figures to this JSON file too")
    common.add_json(made)
    made.set_defaults(run=run)
    return made


def run(arguments: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from gapkern._rows import unit
    from gapkern.cli import moves
    from gapkern.embeddings.labels import Side, check_paired, load
    from gapkern.embeddings.provenance import made_from
    from gapkern.evaluation import mixed_retrieval
    from gapkern.gap import MixedShift, fuse
    from gapkern.layout import place

    if arguments.save:
        moves.transforms_file(arguments.save)
    kinds = {"images": "img_emb", "texts": "text_emb", "queries": "text_emb"}
    places = {name: str(place(getattr(arguments, name), kind, name=name)) for name, kind in kinds.items()}
    model, _ = common.model(None, **places)
    images, texts, queries = (unit(files.load_embeddings(path, name=name)) for name, path in places.items())
    count = len(images)
    check_paired(Side(places["images"], count, "images"), Side(places["texts"], len(texts), "texts"))
    asking = Side(places["queries"], len(queries), "queries")
    labels = load(arguments.labels, asking, count, "documents", fewer=True)
    parts: dict[str, Any] = {"image": images, "text": texts}
    weight = 0.5
    if arguments.fused is not None:
        weight = arguments.fused
        parts["fused"] = fuse(texts, images, weight)
    chosen = {name: np.arange(count) for name in parts}
    if arguments.split:
        order = np.random.default_rng(arguments.seed).permutation(count)
        chosen = {name: np.sort(order[i :: len(parts)]) for i, name in enumerate(parts)}
    gallery = torch.cat([parts[name][torch.from_numpy(rows)] for name, rows in chosen.items()])
    names = [name for name, rows in chosen.items() for _ in rows]
    documents = np.concatenate(list(chosen.values()))
    told: dict[str, Any] = {"queries": len(queries), "rows": len(gallery), "methods": {}}
    means = MixedShift("means", weight, model=model).fit(gallery, queries, names)
    methods = {"none": None, "means": means, "shift": MixedShift("shift", weight).fit(gallery, queries, names)}
    for method, shift in methods.items():
        found = mixed_retrieval(
            queries,
            gallery,
            names,
            labels,
            documents,
            arguments.k,
            metric="l2" if method == "shift" else "cosine",
            shift=shift,
        )
        told["methods"][method] = found.to_dict()
    if arguments.out or arguments.json:
        told["inputs"] = {name: made_from(path, name=name) for name, path in places.items()}
    if arguments.save:
        means.save(arguments.save)
    if arguments.out:
        files.write_json(arguments.out, told)
    if arguments.json:
        common.print_json(told)
        return 0
    first = next(iter(told["methods"].values()))
    figures = [name for name in first if name != "modalities"]
    common.table(
        ["gap", *figures], [[method, *(one[name] for name in figures)] for method, one in told["methods"].items()]
    )
    print()
    columns = [name for name in next(iter(first["modalities"].values())) if name != "queries"]
    common.table(
        ["gap, modality", *columns],
        [
            [f"{method}, {name}", *(one[column] for column in columns)]
            for method, found in told["methods"].items()
            for name, one in found["modalities"].items()
        ],
    )
    print("outranked: a wrong row of another modality lies before the right one")
    return 0
