"""Results as the two tables that open_clip publishes: zero-shot performance by data set, and retrieval by recall.

Columns and averages are those of docs/openclip_results.csv and docs/openclip_retrieval_results.csv in its repository;
which metric stands for a data set is DataComp's choice, as there.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gapkern import files
from gapkern.evaluation import records

CLASSIFICATION, RETRIEVAL = "openclip_results.csv", "openclip_retrieval_results.csv"
TITLES = {
    "imagenet1k": "ImageNet 1k",
    "caltech101": "Caltech-101",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "clevr_count_all": "CLEVR Counts",
    "clevr_closest_object_distance": "CLEVR Distance",
    "country211": "Country211",
    "dtd": "Describable Textures",
    "eurosat": "EuroSAT",
    "fgvc_aircraft": "FGVC Aircraft",
    "food101": "Food-101",
    "gtsrb": "GTSRB",
    "imagenet_sketch": "ImageNet Sketch",
    "imagenetv2": "ImageNet v2",
    "imagenet-a": "ImageNet-A",
    "imagenet-o": "ImageNet-O",
    "imagenet-r": "ImageNet-R",
    "kitti_closest_vehicle_distance": "KITTI Vehicle Distance",
    "mnist": "MNIST",
    "objectnet": "ObjectNet",
    "flowers": "Oxford Flowers-102",
    "pets": "Oxford-IIIT Pet",
    "voc2007": "Pascal VOC 2007",
    "pcam": "PatchCamelyon",
    "renderedsst2": "Rendered SST2",
    "resisc45": "RESISC45",
    "cars": "Stanford Cars",
    "stl10": "STL-10",
    "sun397": "SUN397",
    "svhn": "SVHN",
    "flickr30k": "Flickr",
    "mscoco_captions": "MSCOCO",
}
BY_CLASS = {"caltech101", "fgvc_aircraft", "flowers", "pets"}  # mean recall of the classes instead of accuracy
RECALLS = [f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)]


def short(dataset: str) -> str:
    """A data set's name without the collection that it was read from.

    Example:
        >>> short("wds/vtab/clevr_count_all"), short("mnist")
        ('clevr_count_all', 'mnist')
    """
    return dataset.rpartition("/")[2]


def title(result: Mapping[str, Any]) -> str:
    """What the column of a result's data set is called."""
    name = TITLES.get(short(result["dataset"]), result["dataset"])
    return name if result["language"] == "en" else f"{name} ({result['language']})"


def score(result: Mapping[str, Any]) -> float | None:
    """The number that stands for a data set: accuracy, the classes' mean recall, or the mean of both recalls at 1."""
    metrics = result["metrics"]
    if result["task"] == "zeroshot_retrieval":
        both = [metrics.get(f"{side}_retrieval_recall@1") for side in ("image", "text")]
        return None if None in both else sum(both) / 2
    wanted = "mean_per_class_recall" if short(result["dataset"]) in BY_CLASS else "acc1"
    found = next((metrics[name] for name in (wanted, "acc1") if metrics.get(name) is not None), None)
    return None if found is None else float(found)


def tables(results: Sequence[Mapping[str, Any]]) -> dict[str, list[list[Any]]]:
    """Both tables by their files' names, each with its head; those without a result are left out.

    A model is a row; with its gap closed or its gallery perturbed it is another, whose name says so. Averages are of
    all data sets of the table, and empty for a model that lacks one.

    Raises:
        ValueError: two results of one model and data set.
    """
    whole: dict[tuple[str, str], dict[str, float | None]] = {}
    recalls: dict[tuple[str, str], dict[str, float | None]] = {}
    seen: set[tuple[Any, ...]] = set()
    for result in results:
        row, column = _row(result), title(result)
        if (row, column) in seen:
            raise ValueError(f"files: expected one result of {row[0]} {row[1]} on {result['dataset']}, got two")
        seen.add((row, column))
        if (value := score(result)) is not None:
            whole.setdefault(row, {})[column] = value
        if result["task"] == "zeroshot_retrieval":
            for name in RECALLS:
                side, _, k = name.partition("_retrieval_recall@")
                if name in result["metrics"]:
                    recalls.setdefault(row, {})[f"{column} {side} retr. R@{k}"] = result["metrics"][name]
    order = {name: i for i, name in enumerate(TITLES.values())}
    columns = sorted({c for row in whole.values() for c in row}, key=lambda c: (order.get(c, len(order)), c))
    found = {}
    if whole:
        head = f"Average perf. on {len(columns)} datasets"
        found[CLASSIFICATION] = _table(["name", "pretrained", head], [], columns, whole)
    if recalls:
        names = list(dict.fromkeys(c for row in recalls.values() for c in row))
        # Parameters and operations are not in a result: their columns stay empty.
        found[RETRIEVAL] = _table(
            ["name", "pretrained", "params (M)", "FLOPs (B)", "Average score"], ["", ""], names, recalls
        )
    return found


def _row(result: Mapping[str, Any]) -> tuple[str, str]:
    told = records.row(dict(result))
    changed = ", ".join(told[key] for key in ("transform", "perturbation") if told[key] != "none")
    return f"{result['model']} + {changed}" if changed else result["model"], result["pretrained"]


def _table(
    head: list[str], empty: list[str], columns: list[str], rows: Mapping[tuple[str, str], Mapping[str, float | None]]
) -> list[list[Any]]:
    body: list[tuple[float, list[Any]]] = []
    for (name, pretrained), values in rows.items():
        cells = [values.get(column) for column in columns]
        numbers = [value for value in cells if value is not None]
        average = sum(numbers) / len(columns) if len(numbers) == len(columns) else None
        told = [name, pretrained, *empty, "" if average is None else average]
        told += ["" if value is None else f"{value:.4f}" for value in cells]
        body.append((-1.0 if average is None else average, told))
    return [[*head, *columns], *(row for _, row in sorted(body, key=lambda each: -each[0]))]


def write(out: str | os.PathLike[str], results: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Writes the tables into a folder.

    Raises:
        ValueError: see `tables`; nothing that either of them holds.
    """
    made = tables(results)
    if not made:
        raise ValueError("files: expected results of classification or retrieval, got none")
    folder = files.folder(Path(out))
    written = []
    for name, lines in made.items():

        def save(temporary: Path, lines: list[list[Any]] = lines) -> None:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(lines)

        written.append(files.write(folder / name, save))
    return written
