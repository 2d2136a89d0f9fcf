"""Inputs of a task from a model and a data set: each rank encodes its share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gapkern import _check, datasets, prompts
from gapkern.datasets import TASKS
from gapkern.embeddings import keys, loading
from gapkern.evaluation.inputs import integers, whole
from gapkern.models import Model, zero_shot_classifier
from gapkern.ranks import Ranks, Rows

CHOICE = "{q} {a}"
Tick = Callable[[str, int, int], None]


class Encoder:
    """A model that embeds images and texts, in batches that do not depend on the number of ranks.

    Args:
        model: from `gapkern.models.load`, on the device of `ranks`.
        batch_size: images or texts at a time.
        workers: processes that read images; 0 reads them here.
        tick: called with a stage, how much of it is done, and of how much.

    Raises:
        ValueError: the model is on another device; a number out of range.
    """

    def __init__(
        self, model: Model, ranks: Ranks, batch_size: int = 64, workers: int = 0, tick: Tick = lambda *_: None
    ):
        if model.device != ranks.device:
            raise ValueError(f"model: expected one on {ranks.device}, got one on {model.device}")
        self.model, self.ranks, self.tick = model, ranks, tick
        self.batch_size = _check.integer("batch_size", batch_size, low=1)
        self.workers = _check.integer("num_workers", workers, low=0)

    def images(self, image: Callable[[int], Any], count: int) -> Rows:
        """This rank's rows of the embeddings (count, D) of image(0), image(1), ..."""

        def batches(whole: range) -> Iterator[Any]:
            spans = [whole[first : first + self.batch_size] for first in range(0, len(whole), self.batch_size)]
            for batch in loading.batches(loading.Unsigned(image), self.model.preprocess, spans, self.workers):
                if batch.problems or batch.images is None:
                    raise ValueError(next(iter(batch.problems.values())))
                yield batch.images

        return self._rows("images", count, batches, self.model.encode_images)

    def texts(self, texts: Sequence[str]) -> Rows:
        """This rank's rows of the embeddings (len(texts), D)."""

        def batches(whole: range) -> Iterator[Sequence[str]]:
            for start in range(whole.start, whole.stop, self.batch_size):
                yield texts[start : min(whole.stop, start + self.batch_size)]

        return self._rows("texts", len(texts), batches, self.model.encode_texts)

    def _rows(self, stage: str, count: int, batches: Callable[[range], Iterator[Any]], encode: Any) -> Rows:
        mine, size = self.ranks.share(count), self.batch_size
        # Whole batches as one rank would take them, even where a neighbour has some of their rows: a row's embedding
        # then is the same to the bit.
        start, stop = mine.start // size * size, min(count, -(-mine.stop // size) * size)
        parts, done = [], 0
        # At least one batch, which tells a rank without rows how wide they are.
        for batch in batches(range(start, stop) if stop > start else range(min(size, count))):
            parts.append(encode(batch, normalize=False))
            done += len(parts[-1])
            self.tick(stage, done, max(stop - start, done))
        values = torch.cat(parts)[mine.start - start : mine.stop - start]
        return Rows(_check.finite(stage, values, mine.start), mine.start, count)


def from_model(
    task: str,
    encoder: Encoder,
    data: Any,
    templates: prompts.Templates | None = None,
    classnames: Sequence[str] | dict[str, str] | None = None,
    choice: str = CHOICE,
) -> dict[str, Any]:
    """Inputs of a task from a model and a data set.

    Args:
        task: one of `TASKS`.
        encoder: the model.
        data: from `datasets.load`.
        templates: see `prompts.load_templates`; `prompts.DEFAULT` where there are none.
        classnames: instead of the data set's, in any order where they are the same; or a mapping of those to others.
        choice: how a question and an answer make a text, with {q} and {a}.

    Raises:
        ValueError: the task is not one of this data set, labels or names that do not fit.
    """
    _check.choice("task", task, TASKS)
    templates = list(prompts.DEFAULT) if templates is None else templates
    kinds: dict[str, Any] = {"zeroshot_retrieval": datasets.Captioned, "multiple_choice": datasets.Questions}
    kind = kinds.get(task, datasets.Labelled)
    if not isinstance(data, kind):
        raise ValueError(f"task: expected for {task} a data set of kind {kind.__name__}, got {type(data).__name__}")
    ranks = encoder.ranks
    if task == "multiple_choice":
        texts = [
            choice_text(choice, q, a) for q, offered in zip(data.questions, data.choices, strict=True) for a in offered
        ]
        sizes = torch.tensor([len(offered) for offered in data.choices])
        return {
            "images": encoder.images(data.image, len(data)),
            "choices": encoder.texts(texts),
            "question_of": torch.arange(len(data)).repeat_interleave(sizes),
            "answers": torch.tensor(data.answers),
        }
    if task == "zeroshot_retrieval":
        return {
            "images": encoder.images(data.image, len(data)),
            "texts": encoder.texts(data.captions),
            "image_of": torch.tensor(data.image_of),
        }
    names = list(data.classes)
    labels = integers("labels", torch.tensor(data.labels), len(data), "image")
    if classnames:
        names = list(classnames.values()) if isinstance(classnames, dict) else list(classnames)
        labels = torch.tensor(keys.classes_of(data.classes, classnames))[labels]
    filled = prompts.fill(templates, names)
    if task == "template_robustness" and isinstance(templates, dict):
        raise ValueError("templates: expected a list with {c} for template_robustness, got prompts of each class")
    vectors = whole(encoder.texts([text for texts in filled for text in texts]), ranks)
    images = encoder.images(data.image, len(data))
    if task == "template_robustness":
        by_template = vectors.view(len(names), len(templates), -1).transpose(0, 1).contiguous()
        return {"images": images, "labels": labels, "prompts": by_template, "names": list(templates)}
    parts = vectors.split([len(texts) for texts in filled])
    return {
        "images": images,
        "labels": labels,
        "classes": torch.cat([zero_shot_classifier(part[None]) for part in parts]),
    }


def choice_text(template: str, question: str, answer: str) -> str:
    """A question and an answer as one text.

    Raises:
        ValueError: a template without {a}, or with other places than {q} and {a}.

    Example:
        >>> choice_text("{q} {a}", "What colour?", "red")
        'What colour? red'
    """
    try:
        if "{a}" not in template:
            raise KeyError("no {a}")
        return template.format(q=question, a=answer)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"choice_template: expected a string with {{q}} and {{a}}, got {template!r} ({error})"
        ) from None
