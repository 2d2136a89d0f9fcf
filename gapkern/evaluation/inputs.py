"""What a task needs, from embedding files: each rank reads its share of rows."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check, datasets, embeddings, prompts
from gapkern.embeddings import Embeddings
from gapkern.embeddings.folder import agreed
from gapkern.evaluation.tasks import TASKS, Outcome, Settings, classification, multiple_choice, retrieval
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
    values = _check.finite(name, stored[mine].float())
    return Rows(values.to(ranks.device), mine.start, len(stored))


def model_of(images: str, texts: str) -> str | None:
    """The id of the model that made both sides, from the folders' manifests; None where neither has one.

    Raises:
        ValueError: two models made them.
    """
    given = {"images": images, "texts": texts}
    return agreed({name: embeddings.model_of(path, KINDS[name], name=name) for name, path in given.items()})


def array(name: str, path: str) -> Tensor:
    """A tensor of any shape from `.npy`, or from `.safetensors`, as file[key] where it holds several.

    Raises:
        ValueError: no such file, or none of these.
    """
    text, _, key = path[:-1].rpartition("[") if path.endswith("]") else (path, "", "")
    try:
        if text.endswith(".safetensors"):
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(text, "pt") as opened:
                    keys = list(opened.keys())
                    if (key or keys[0]) not in keys or (not key and len(keys) > 1):
                        raise ValueError(f"{name}: expected one of {', '.join(keys)} as file[key], got {path}")
                    return opened.get_tensor(key or keys[0])
            except SafetensorError as error:
                raise ValueError(f"{name}: expected a .safetensors file, got {text}: {error}") from None
        if not text.endswith(".npy"):
            raise ValueError(f"{name}: expected a .npy or .safetensors file, got {path}")
        found = np.load(text, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{name}: cannot read {text}: {error.strerror or error}") from None
    except EOFError as error:
        raise ValueError(f"{name}: expected a .npy file, got {text}: {error}") from None
    return torch.from_numpy(found.astype(found.dtype.newbyteorder("=")))


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


def pairs(labels: str, texts: int, images: int) -> Tensor:
    """Each text's image: "paired", a number of captions per image in order, or a file of integers.

    Example:
        >>> pairs("2", 4, 2).tolist()
        [0, 0, 1, 1]
    """
    if labels == "paired" or labels.isdigit():
        each = 1 if labels == "paired" else int(labels)
        if each * images != texts or not each:
            raise ValueError(f"labels: expected {each} texts for each of {images} images, got {texts} texts")
        return torch.arange(images).repeat_interleave(each)
    return integers("labels", array("labels", labels), texts, "text")


def from_files(
    task: str, images: str, texts: str, ranks: Ranks, labels: str | None = None, annotation_file: str | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Inputs of a task from embeddings.

    Args:
        task: one of `TASKS`.
        images: (N, D), a file or a folder of shards; a folder that `embed` wrote is taken for its img_emb, or text_emb.
        texts: class vectors (C, D) or prompts (T, C, D); captions (M, D); or all questions' choices in order (M, D).
        labels: each image's class, a file; for retrieval see `pairs`; not for multiple choice.
        annotation_file: A-OKVQA's JSON, for multiple choice; `images` has a row per question, or per distinct image in
            the order in which the questions first name them.
        names: the templates, for template robustness.

    Raises:
        ValueError: what was given does not fit together.
    """
    _check.choice("task", task, TASKS)
    rows = own_rows("images", images, ranks)
    if task == "multiple_choice":
        return _choices(rows, own_rows("texts", texts, ranks), annotation_file, ranks)
    if labels is None:
        raise ValueError("labels: expected a file of integers" + (", 'paired' or captions per image" if "retr" in task
                         else ", the images' classes") + ", got none")  # fmt: skip
    if task == "zeroshot_retrieval":
        captions = own_rows("texts", texts, ranks)
        ranks.agree("texts", (captions.total, captions.values.shape[1]))
        return {"images": rows, "texts": captions, "image_of": pairs(labels, captions.total, rows.total)}
    vectors = Embeddings(texts, "text_emb", name="texts")[:] if os.path.isdir(texts) else array("texts", texts)
    if not vectors.dtype.is_floating_point or vectors.dim() not in (2, 3):
        raise ValueError(
            f"texts: expected (C, D) or (T, C, D) of floats, got {tuple(vectors.shape)} of {vectors.dtype}"
        )
    vectors = _check.finite("texts", vectors.flatten(0, -2).float()).view(vectors.shape).to(ranks.device)
    classes = integers("labels", array("labels", labels), rows.total, "image")
    if task == "zeroshot_classification":
        whole = vectors if vectors.dim() == 2 else zero_shot_classifier(vectors.transpose(0, 1))
        return {"images": rows, "labels": classes, "classes": whole}
    if vectors.dim() != 3:
        raise ValueError(f"texts: expected (T, C, D), T templates of C classes, got {tuple(vectors.shape)}")
    names = list(names or map(str, range(len(vectors))))
    return {"images": rows, "labels": classes, "prompts": vectors, "names": names}


def _choices(images: Rows, choices: Rows, annotation_file: str | None, ranks: Ranks) -> dict[str, Any]:
    data = datasets.load("aokvqa", annotation_file=annotation_file)
    entries = prompts.read_json("annotation_file", annotation_file or "")
    sizes = torch.tensor([len(offered) for offered in data.choices])
    if choices.total != int(sizes.sum()):
        raise ValueError(f"texts: expected {int(sizes.sum())} rows, one per choice, got {choices.total}")
    known = list(dict.fromkeys(str(entry.get("image", entry.get("image_id"))) for entry in entries))
    if images.total != len(data):
        if images.total != len(known):
            raise ValueError(
                f"images: expected {len(data)} rows, one per question, or {len(known)}, one per image, "
                f"got {images.total}"
            )
        place = {name: i for i, name in enumerate(known)}
        of = torch.tensor([place[str(entry.get("image", entry.get("image_id")))] for entry in entries])
        mine = ranks.share(len(data))
        images = Rows(whole(images, ranks)[of.to(ranks.device)][mine], mine.start, len(data))
    question_of = torch.arange(len(data)).repeat_interleave(sizes)
    return {"images": images, "choices": choices, "question_of": question_of, "answers": torch.tensor(data.answers)}


def whole(rows: Rows, ranks: Ranks) -> Tensor:
    """All ranks' rows on every rank: for what is small."""
    parts = [part for _, part in ranks.each(rows)]
    return torch.cat(parts) if parts else rows.values


def same_model(shift: Any, *known: str | None) -> None:
    """Raises ValueError where a fitted shift is of another model's embeddings; `known` are the names of this one."""
    names = list(dict.fromkeys(name for name in known if name))
    fitted = getattr(shift, "model", None)
    if fitted is not None and names and fitted not in names:
        raise ValueError(f"shift: expected one fitted on {' or '.join(names)}, got one of {fitted}")
