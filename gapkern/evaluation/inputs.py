"""What a task needs, from embedding files: each rank reads its share of rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _check, datasets, embeddings, files, layout, prompts
from gapkern.datasets import TASKS
from gapkern.embeddings import Embeddings, keys, provenance, sides
from gapkern.embeddings import labels as loader
from gapkern.embeddings.labels import Side, array
from gapkern.embeddings.provenance import agreed
from gapkern.evaluation.settings import Outcome, Settings
from gapkern.evaluation.tasks import classification, multiple_choice, retrieval
from gapkern.evaluation.tasks import templates as template_robustness
from gapkern.models import zero_shot_classifier
from gapkern.ranks import Ranks, Rows

KINDS = {"images": "img_emb", "texts": "text_emb"}

FUNCTIONS: dict[str, Callable[..., list[Outcome]]] = dict(
    zip(TASKS, (classification, retrieval, multiple_choice, template_robustness), strict=True)
)


def measure(
    task: str, inputs: dict[str, Any], settings: Settings, ranks: Ranks, ks: Sequence[int] = (5,)
) -> list[Outcome]:
    """Runs a task on what `from_files` or `from_model` gave."""
    more = {"ks": ks} if task == "zeroshot_retrieval" else {}
    return FUNCTIONS[task](**inputs, **more, settings=settings, ranks=ranks)


def own_rows(name: str, path: str, ranks: Ranks) -> Rows:
    """This rank's rows of a file or folder of embeddings, which must be as its manifest says; others' are not read."""
    stored = Embeddings(path, KINDS[name], name=name)
    mine = ranks.share(len(stored))
    values = _check.finite(name, stored[mine].float(), mine.start)
    return Rows(values.to(ranks.device), mine.start, len(stored))


def model_of(images: str, texts: str) -> str | None:
    """The id of the model that made both sides, from the folders' manifests; None where neither has one.

    Raises:
        ValueError: two models made them.
    """
    paths = given(images, texts)
    return agreed({name: embeddings.model_of(path, KINDS[name], name=name) for name, path in paths.items()})


def integers(name: str, value: Tensor, count: int, what: str) -> Tensor:
    """(count,) int64.

    Raises:
        ValueError: another shape, or no integers.
    """
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {value.dtype}")
    if value.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), one per {what}, got {tuple(value.shape)}")
    return value.long()


def from_files(
    task: str,
    images: str,
    texts: str,
    ranks: Ranks,
    labels: str | None = None,
    annotation_file: str | None = None,
    names: Sequence[str] | None = None,
    classnames: Sequence[str] | dict[str, str] | None = None,
) -> dict[str, Any]:
    """Inputs of a task from embeddings.

    Args:
        task: one of `TASKS`.
        images: (N, D), a file or a folder of shards; a folder that `embed` wrote is taken for its img_emb, or text_emb.
        texts: class vectors (C, D) or prompts (T, C, D); captions (M, D); or all questions' choices in order (M, D).
        labels: each image's class, a file; for retrieval each text's image: "paired", a number of captions per image
            in order, or a file (`embeddings.labels.load`). What is known by name is joined by name. Not for multiple
            choice.
        annotation_file: A-OKVQA's JSON, for multiple choice; `images` has a row per question, or per distinct image in
            the order in which the questions first name them.
        names: the templates, for template robustness.
        classnames: what the class vectors are called, in their order.

    Raises:
        ValueError: what was given does not fit together.
    """
    _check.choice("task", task, TASKS)
    rows = own_rows("images", images, ranks)
    if task == "multiple_choice":
        return _choices(images, rows, own_rows("texts", texts, ranks), annotation_file, ranks)
    if labels is None:
        raise ValueError(
            "labels: expected a file of integers"
            + (", 'paired' or captions per image" if "retr" in task else ", the images' classes")
            + ", got none"
        )
    if task == "zeroshot_retrieval":
        captions = own_rows("texts", texts, ranks)
        ranks.agree("texts", (captions.total, captions.values.shape[1]))
        of, to = Side(texts, captions.total, "texts", "text_emb"), Side(images, rows.total, "images", "img_emb")
        image_of = loader.load(labels, of, rows.total, "images", to=to)
        return {"images": rows, "texts": captions, "image_of": image_of}
    vectors = _vectors(texts)
    if not vectors.dtype.is_floating_point or vectors.dim() not in (2, 3):
        raise ValueError(
            f"texts: expected (C, D) or (T, C, D) of floats, got {tuple(vectors.shape)} of {vectors.dtype}"
        )
    vectors = _check.finite("texts", vectors.flatten(0, -2).float()).view(vectors.shape).to(ranks.device)
    known = class_names(texts, vectors.shape[-2], classnames)
    side = Side(images, rows.total, "images", "img_emb")
    classes = loader.load(labels, side, vectors.shape[-2], "classes", names=known)
    if task == "zeroshot_classification":
        whole = vectors if vectors.dim() == 2 else zero_shot_classifier(vectors.transpose(0, 1))
        return {"images": rows, "labels": classes, "classes": whole}
    if vectors.dim() != 3:
        raise ValueError(f"texts: expected (T, C, D), T templates of C classes, got {tuple(vectors.shape)}")
    names = list(names or map(str, range(len(vectors))))
    return {"images": rows, "labels": classes, "prompts": vectors, "names": names}


def _vectors(texts: str) -> Tensor:
    """Class vectors as they are stored, of any dimensions where a file may hold them."""
    if layout.is_folder(texts):
        return Embeddings(texts, "text_emb", name="texts")[:]
    if Path(layout.parted(texts)[0]).suffix in layout.SUFFIXES:
        return array("texts", texts)
    return files.load_embeddings(texts, name="texts")


def class_names(texts: str, count: int, given: Sequence[str] | dict[str, str] | None) -> list[str] | None:
    """What class vectors are called, in their order: what stands beside them, or what was given; None where nothing.

    Raises:
        ValueError: another number of names than of vectors, names of another order.
    """
    if isinstance(given, dict):
        given = list(given.values())
    if given is not None and len(given) != count:
        raise ValueError(f"classnames: expected {count}, one for each class vector, got {len(given)}")
    known = sides.of(texts.partition("[")[0], name="texts").get("names") if not layout.is_folder(texts) else None
    if known is not None and given is not None and known != list(given):
        of = keys.classes_of(known, list(given))
        if of != list(range(len(of))):
            raise ValueError(f"classnames: expected the order of {texts}, {known[0]!r} first, got {given[0]!r} first")
    return known if known is not None else None if given is None else list(given)


def _choices(path: str, images: Rows, choices: Rows, annotation_file: str | None, ranks: Ranks) -> dict[str, Any]:
    data = datasets.load("aokvqa", annotation_file=annotation_file)
    entries = prompts.read_json("annotation_file", annotation_file or "")
    sizes = torch.tensor([len(offered) for offered in data.choices])
    if choices.total != int(sizes.sum()):
        raise ValueError(f"texts: expected {int(sizes.sum())} rows, one per choice, got {choices.total}")
    of = _images_of(path, images.total, data.image.names, entries)
    if of != list(range(len(data))):
        mine = ranks.share(len(data))
        images = Rows(whole(images, ranks)[torch.tensor(of, device=ranks.device)][mine], mine.start, len(data))
    question_of = torch.arange(len(data)).repeat_interleave(sizes)
    return {"images": images, "choices": choices, "question_of": question_of, "answers": torch.tensor(data.answers)}


def _images_of(path: str, total: int, names: Sequence[str], entries: Sequence[Any]) -> list[int]:
    """Each question's row among the images: by name where they have keys, else by the order of the questions."""
    there = Side(path, total, "images", "img_emb").keys()
    if there is not None:
        rows = keys.rows_of(names, there, name="annotation_file")
        if None not in rows:
            return [int(row or 0) for row in rows]
        if missing := [name for name, row in zip(names, rows, strict=True) if row is None]:
            raise ValueError(f"images: expected those of all questions in {path}, got none of the name {missing[0]!r}")
    known = list(dict.fromkeys(str(entry.get("image", entry.get("image_id"))) for entry in entries))
    if total == len(entries):
        return list(range(total))
    if total != len(known):
        raise ValueError(
            f"images: expected {len(entries)} rows, one per question, or {len(known)}, one per image, got {total}"
        )
    place = {name: i for i, name in enumerate(known)}
    return [place[str(entry.get("image", entry.get("image_id")))] for entry in entries]


def whole(rows: Rows, ranks: Ranks) -> Tensor:
    """All ranks' rows on every rank: for what is small."""
    parts = [part for _, part in ranks.each(rows)]
    return torch.cat(parts) if parts else rows.values


def made_from(images: str, texts: str, labels: str | None = None) -> dict[str, dict[str, Any]]:
    """What a record says of the files that it was made from: see `embeddings.provenance.made_from`."""
    found = {name: provenance.made_from(path, KINDS[name], name=name) for name, path in given(images, texts).items()}
    return found | loader.made_from(labels)


def given(images: str, texts: str) -> dict[str, str]:
    """Both sides' paths by argument.

    Raises:
        ValueError: the images are known to be texts, and the texts to be images.
    """
    paths = {"images": images, "texts": texts}
    kinds = {name: provenance.kind_of(path, KINDS[name], name=name) for name, path in paths.items()}
    if (kinds["images"], kinds["texts"]) == ("text_emb", "img_emb"):
        raise ValueError(
            f"images and texts: expected img_emb and text_emb, got them the wrong way round: {images}, {texts}"
        )
    return paths


def same_model(shift: Any, *known: str | None) -> None:
    """Raises ValueError where a fitted shift is of another model's embeddings; `known` are the names of this one."""
    names = list(dict.fromkeys(name for name in known if name))
    fitted = getattr(shift, "model", None)
    if fitted is not None and names and fitted not in names:
        raise ValueError(f"shift: expected one fitted on {' or '.join(names)}, got one of {fitted}")
