"""The tasks, from embeddings: classification, retrieval, multiple choice, templates; each before and after a shift.

Embeddings are L2-normalised in float32, as CLIP_benchmark does; neighbours are Euclidean, which on the sphere is the
order of cosines. A perturbation falls on the gallery, after the shift. Metrics are ratios of counts.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._search import costs
from gapkern.embeddings.labels import in_range
from gapkern.evaluation.settings import DEFAULTS, Measured, Metrics, Outcome, Settings
from gapkern.evaluation.sharded import compared, normalized, perturbed, topk
from gapkern.gap import MeanShift, Projection
from gapkern.models import zero_shot_classifier
from gapkern.perturb import Perturbation
from gapkern.ranks import Ranks, Rows


def _texts_to(shift: MeanShift | Projection | None, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Images and texts after a shift whose gallery is the texts."""
    return (images, texts) if shift is None else (shift.transform_queries(images), shift.transform(texts))


def _images_to(shift: MeanShift | Projection | None, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Images and texts after a shift whose gallery is the images."""
    return (images, texts) if shift is None else (shift.transform(images), shift.transform_queries(texts))


def _ratio(hits: Tensor, total: int) -> float:
    return int(hits) / total if total else math.nan


@isolated
def classification(
    images: Rows, labels: Tensor, classes: Tensor, settings: Settings = DEFAULTS, ranks: Ranks | None = None
) -> list[Outcome]:
    """Zero-shot classification: each image's nearest class vector.

    Args:
        images: this rank's rows of (N, D).
        labels: (N,) int64 on every rank.
        classes: (C, D) on every rank: class vectors, see `gapkern.models.zero_shot_classifier`.

    Returns:
        One `Outcome` per setting, of acc1, acc5 (NaN for fewer than five classes) and mean_per_class_recall (over the
        classes that occur), as CLIP_benchmark has them.
    """
    ranks = ranks or Ranks()
    _widths("classes", classes, images, "C")
    images, labels = normalized(images), _own(labels, images, len(classes))
    gallery = normalized(ranks.rows(classes))
    shifts = {} if settings.shift is None else {"text_retrieval": settings.fitted(gallery, images, ranks)}

    def measure(current: dict[str, Any], perturbation: Perturbation | None, seed: int) -> Measured:
        shift = current.get("text_retrieval")
        return _classify(images, labels, gallery, shift, perturbation, seed, ranks, settings.metric), {}

    return settings.outcomes(shifts, measure)


def _classify(
    images: Rows,
    labels: Tensor,
    classes: Rows,
    shift: Any,
    perturbation: Perturbation | None,
    seed: int,
    ranks: Ranks,
    metric: str,
) -> Metrics:
    queries, gallery = _texts_to(shift, images.values, classes.values)
    found = topk(queries, perturbed(classes.of(gallery), perturbation, seed, ranks), 5, ranks, metric)
    hits = found == labels[:, None]
    counts = ranks.sum(torch.stack([hits[:, 0].sum(), hits.sum()]))
    right, all_of = ranks.sum(
        torch.stack(
            [
                torch.bincount(labels[hits[:, 0]], minlength=classes.total),
                torch.bincount(labels, minlength=classes.total),
            ]
        )
    )
    recalls = (right[all_of > 0].double() / all_of[all_of > 0]).tolist()
    return {
        "acc1": _ratio(counts[0], images.total),
        "acc5": _ratio(counts[1], images.total) if classes.total >= 5 else math.nan,
        "mean_per_class_recall": math.fsum(recalls) / len(recalls),
    }


@isolated
def templates(
    images: Rows,
    labels: Tensor,
    prompts: Tensor,
    names: Sequence[str],
    settings: Settings = DEFAULTS,
    ranks: Ranks | None = None,
) -> list[Outcome]:
    """How much classification depends on the words: the accuracy with each template alone.

    A shift is fitted on the class vectors of all templates together, and then moves each template's.

    Args:
        images, labels: as for `classification`.
        prompts: (T, C, D) on every rank.
        names: (T,) the templates.

    Returns:
        One `Outcome` per setting: the mean, standard deviation, spread (best less worst), worst and best of the
        templates' acc1, and acc1 of all templates together; `details["templates"]` has each template's.
    """
    ranks = ranks or Ranks()
    _widths("prompts", prompts, images, "T, C")
    if len(names) != len(prompts):
        raise ValueError(f"names: expected {len(prompts)}, one per template, got {len(names)}")
    images, labels = normalized(images), _own(labels, images, prompts.shape[1])
    together = ranks.rows(zero_shot_classifier(prompts.transpose(0, 1)))
    alone = [normalized(ranks.rows(prompt)) for prompt in prompts]
    shifts = {} if settings.shift is None else {"text_retrieval": settings.fitted(together, images, ranks)}

    def measure(current: dict[str, Any], perturbation: Perturbation | None, seed: int) -> Measured:
        found = [
            _classify(
                images, labels, classes, current.get("text_retrieval"), perturbation, seed, ranks, settings.metric
            )
            for classes in (together, *alone)
        ]
        each = [metrics["acc1"] for metrics in found[1:]]
        mean = math.fsum(each) / len(each)
        return {
            "acc1": found[0]["acc1"],
            "acc1_template_mean": mean,
            "acc1_template_std": math.sqrt(math.fsum((a - mean) ** 2 for a in each) / len(each)),
            "acc1_template_spread": max(each) - min(each),
            "acc1_template_worst": min(each),
            "acc1_template_best": max(each),
        }, {"templates": [{"template": name} | m for name, m in zip(names, found[1:], strict=True)]}

    return settings.outcomes(shifts, measure)


@isolated
def retrieval(
    images: Rows,
    texts: Rows,
    image_of: Tensor,
    ks: Sequence[int] = (5,),
    settings: Settings = DEFAULTS,
    ranks: Ranks | None = None,
) -> list[Outcome]:
    """Image-text retrieval with any number of captions per image: a hit where any positive is among the k nearest.

    Args:
        images: this rank's rows of (I, D).
        texts: this rank's rows of (T, D).
        image_of: (T,) int64 on every rank: each text's image.
        ks: the k of recall@k.

    Returns:
        One `Outcome` per setting, of image_retrieval_recall@k (texts ask) and text_retrieval_recall@k (images ask).
        Images without a caption are in the gallery but do not ask. A shift is fitted for each direction, on its
        gallery; a given one moves texts and images as it was fitted, in both; a given projection moves the images
        where they ask.
    """
    ranks = ranks or Ranks()
    ks = [_check.integer("ks", k, low=1) for k in ks]
    if not ks:
        raise ValueError("ks: expected at least one, got none")
    if images.values.shape[1] != texts.values.shape[1]:
        raise ValueError(f"texts: expected D = {images.values.shape[1]} as the images, got {texts.values.shape[1]}")
    if len(image_of) != texts.total:
        raise ValueError(f"image_of: expected {texts.total}, one per text, got {len(image_of)}")
    in_range("image_of", image_of, images.total, "images")
    images, texts = normalized(images), normalized(texts)
    image_of = image_of.to(images.values.device)
    captioned = torch.zeros(images.total, dtype=torch.bool, device=image_of.device)
    captioned[image_of] = True
    shifts = {}
    if settings.shift is not None:
        shifts["text_retrieval"] = settings.fitted(texts, images, ranks)
        if not isinstance(settings.shift, MeanShift | Projection):
            shifts["image_retrieval"] = settings.fitted(images, texts, ranks)

    def measure(current: dict[str, Any], perturbation: Perturbation | None, seed: int) -> Measured:
        return {
            f"{direction}_recall@{k}": value
            for direction, values in _both(current, perturbation, seed).items()
            for k, value in zip(ks, values, strict=True)
        }, {}

    def _both(current: dict[str, Any], perturbation: Perturbation | None, seed: int) -> dict[str, list[float]]:
        to_texts = _texts_to(current.get("text_retrieval"), images.values, texts.values)
        # The hull is the texts': where texts ask, nothing is projected.
        to_images = (images.values, texts.values) if isinstance(settings.shift, Projection) else to_texts
        if "image_retrieval" in current:
            to_images = _images_to(current["image_retrieval"], images.values, texts.values)
        gallery = perturbed(images.of(to_images[0]), perturbation, seed, ranks)
        found = topk(to_images[1], gallery, max(ks), ranks, settings.metric)
        mine = slice(texts.first, texts.first + len(found))
        by_texts = _hits(found == image_of[mine, None], ks, ranks, texts.total)
        gallery = perturbed(texts.of(to_texts[1]), perturbation, seed, ranks)
        found = topk(to_texts[0], gallery, max(ks), ranks, settings.metric)
        own = torch.arange(images.first, images.first + len(found), device=found.device)
        hits = (image_of[found] == own[:, None])[captioned[own]]
        return {"image_retrieval": by_texts, "text_retrieval": _hits(hits, ks, ranks, int(captioned.sum()))}

    return settings.outcomes(shifts, measure)


def _hits(hits: Tensor, ks: Sequence[int], ranks: Ranks, total: int) -> list[float]:
    counts = ranks.sum(torch.stack([hits[:, :k].any(1).sum() for k in ks]))
    return [_ratio(count, total) for count in counts]


@isolated
def multiple_choice(
    images: Rows,
    choices: Rows,
    question_of: Tensor,
    answers: Tensor,
    settings: Settings = DEFAULTS,
    ranks: Ranks | None = None,
) -> list[Outcome]:
    """Multiple choice: of each question's texts the one nearest to its image; the first of equal ones.

    Args:
        images: this rank's rows of (Q, D), one per question.
        choices: all choices (M, D), on every rank its own share.
        question_of: (M,) int64 on every rank, ascending: each choice's question.
        answers: (Q,) int64: the right choice, counted within its question.

    Returns:
        One `Outcome` per setting, of accuracy, and chance: what guessing would reach.
    """
    ranks = ranks or Ranks()
    if images.values.shape[1] != choices.values.shape[1]:
        raise ValueError(f"choices: expected D = {images.values.shape[1]} as the images, got {choices.values.shape[1]}")
    if len(question_of) != choices.total or bool((question_of.diff() < 0).any()):
        raise ValueError(f"question_of: expected {choices.total} ascending questions, got {len(question_of)}")
    in_range("question_of", question_of, images.total, "questions")
    sizes = torch.bincount(question_of, minlength=images.total)
    if int(sizes.min()) == 0 or len(answers) != images.total or bool(((answers < 0) | (answers >= sizes)).any()):
        raise ValueError("answers: expected for each question one of its choices")
    images, choices = normalized(images), normalized(choices)
    device = images.values.device
    starts = (sizes.cumsum(0) - sizes).to(device)
    question_of, answers = question_of.to(device), answers.to(device)
    right = starts + answers
    shifts = {} if settings.shift is None else {"text_retrieval": settings.fitted(choices, images, ranks)}

    def measure(current: dict[str, Any], perturbation: Perturbation | None, seed: int) -> Measured:
        queries, moved = _texts_to(current.get("text_retrieval"), images.values, choices.values)
        gallery, metric = compared(perturbed(choices.of(moved), perturbation, seed, ranks), settings.metric)
        least = queries.new_full((len(queries),), torch.inf, dtype=torch.float64)
        found = torch.full((len(queries),), -1, device=device)
        for first, rows in ranks.each(gallery):
            asking = question_of[first : first + len(rows)] - images.first
            column = ((asking >= 0) & (asking < len(queries))).nonzero()[:, 0]
            cost = costs(queries, rows, asking[column], column, metric)
            here = torch.full_like(least, torch.inf).scatter_reduce(0, asking[column], cost, "amin")
            equal = column[cost == here[asking[column]]]
            lowest = torch.full_like(found, choices.total).scatter_reduce(0, asking[equal], equal + first, "amin")
            # A question's choices may lie on two ranks; the earlier has the lower ones.
            found = torch.where(here < least, lowest, found)
            least = torch.minimum(here, least)
        mine = slice(images.first, images.first + len(queries))
        hits = ranks.sum((found == right[mine]).sum()[None])[0]
        chance = math.fsum((1 / sizes.double()).tolist()) / images.total
        return {"accuracy": _ratio(hits, images.total), "chance": chance}, {}

    return settings.outcomes(shifts, measure)


def _widths(name: str, texts: Tensor, images: Rows, rows: str) -> None:
    dims = images.values.shape[1]
    if texts.dim() != len(rows.split(",")) + 1 or texts.shape[-1] != dims:
        raise ValueError(f"{name}: expected shape ({rows}, {dims}), D as the images', got {tuple(texts.shape)}")


def _own(labels: Tensor, images: Rows, classes: int) -> Tensor:
    """This rank's labels, once all are checked."""
    if labels.shape != (images.total,):
        raise ValueError(f"labels: expected shape ({images.total},), one per image, got {tuple(labels.shape)}")
    in_range("labels", labels, classes, "classes")
    return labels[images.first : images.first + len(images.values)].to(images.values.device)
