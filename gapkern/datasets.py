"""Data sets as they lie on disk: CIFAR, folders of classes, COCO's captions, A-OKVQA's questions, the bundled digits.

Nothing is downloaded. Images are read when they are asked for; labels, captions and questions at once.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapkern import _check
from gapkern.prompts import read_json

Image = Any  # PIL.Image.Image


@dataclass(frozen=True)
class Labelled:
    """Images of classes: `image(i)` is one, `labels[i]` its class, `classes` the names."""

    image: Callable[[int], Image]
    labels: list[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Captioned:
    """Images with captions: `captions[t]` belongs to image `image_of[t]`."""

    image: Callable[[int], Image]
    count: int
    captions: list[str]
    image_of: list[int]

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Questions:
    """Questions about images: `choices[q]` are the answers offered to `questions[q]`, `answers[q]` the right one."""

    image: Callable[[int], Image]
    questions: list[str]
    choices: list[list[str]]
    answers: list[int]

    def __len__(self) -> int:
        return len(self.questions)


def digits(root: Path, split: str, annotations: str | None) -> Labelled:
    """scikit-learn's 1797 scans, split as the demo splits them by seed 0; nothing on disk is needed."""
    from gapkern.experiments import digits

    data = digits.load(0)
    scans, labels = (data.train_images, data.train_digits) if split == "train" else (data.test_images, data.test_digits)

    def image(i: int) -> Image:
        from PIL import Image

        return Image.fromarray((scans[i, 0] * 255).round().byte().numpy()).convert("RGB")

    return Labelled(image, labels.tolist(), list(digits.NAMES))


def cifar(name: str) -> Callable[..., Labelled]:
    """CIFAR-10 or -100 as torchvision reads it: the Python version's batches under `root`."""

    def load(root: Path, split: str, annotations: str | None) -> Labelled:
        sets = _check.extra("torchvision.datasets", "torchvision", "demo")
        try:
            whole = getattr(sets, name)(root=root, train=split == "train", download=False)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"dataset_root: expected {name}'s Python version in {root} ({error})") from None
        return Labelled(lambda i: whole[i][0], list(whole.targets), [c.replace("_", " ") for c in whole.classes])

    return load


def folders(root: Path, split: str, annotations: str | None) -> Labelled:
    """A folder of images per class, in the order of their names, below `root/split` (or root/val for "test", or root).

    ImageNet's folders are named by WordNet ids: give class names in a file.
    """
    sets = _check.extra("torchvision.datasets", "torchvision", "demo")
    names = [split, "val"] if split == "test" else [split]
    place = next((root / name for name in names if (root / name).is_dir()), root)
    try:
        whole = sets.ImageFolder(place)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"dataset_root: expected a folder of images for each class in {place} ({error})") from None
    return Labelled(lambda i: whole.loader(whole.samples[i][0]).convert("RGB"), list(whole.targets),
                    [c.replace("_", " ") for c in whole.classes])  # fmt: skip


def coco_captions(root: Path, split: str, annotations: str | None) -> Captioned:
    """COCO's captions JSON (`images` with id and file_name, `annotations` with image_id and caption); images in `root`.

    Images in the order of their ids, as torchvision and CLIP_benchmark have them; captions in the file's.
    """
    found = read_json("annotation_file", _wanted(annotations, "COCO's captions JSON"))
    try:
        names = {int(entry["id"]): entry["file_name"] for entry in found["images"]}
        captions: dict[int, list[str]] = {key: [] for key in sorted(names)}
        for entry in found["annotations"]:
            captions[int(entry["image_id"])].append(entry["caption"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"annotation_file: expected COCO's captions (images: id, file_name; annotations: image_id, caption), got "
            f"{annotations}: {type(error).__name__} {error}"
        ) from None
    order = [key for key in captions if captions[key]]
    if not order:
        raise ValueError(f"annotation_file: expected at least one caption, got none in {annotations}")
    image_of = [i for i, key in enumerate(order) for _ in captions[key]]
    return Captioned(_files(root, [names[key] for key in order]), len(order),
                     [text for key in order for text in captions[key]], image_of)  # fmt: skip


def aokvqa(root: Path, split: str, annotations: str | None) -> Questions:
    """A-OKVQA's JSON (a list of image_id, question, choices, correct_choice_idx); images are COCO's, in `root`.

    An image is `root/<split>2017/<id, twelve digits>.jpg`, or lies in `root` itself; an entry's own "image" goes first.
    """
    file = _wanted(annotations, "A-OKVQA's JSON")
    entries = read_json("annotation_file", file)
    try:
        if not isinstance(entries, list) or not entries:
            raise TypeError("no list of questions")
        questions = [str(entry["question"]) for entry in entries]
        choices = [[str(choice) for choice in entry["choices"]] for entry in entries]
        answers = [int(entry["correct_choice_idx"]) for entry in entries]
        names = [_coco_name(root, entry) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"annotation_file: expected a list of questions (image_id, question, choices, correct_choice_idx), got "
            f"{annotations}: {type(error).__name__} {error}"
        ) from None
    for i, (offered, answer) in enumerate(zip(choices, answers, strict=True)):
        if not 0 <= answer < len(offered):
            raise ValueError(
                f"annotation_file: expected correct_choice_idx in [0, {len(offered)}), got {answer} in question {i}"
            )
    return Questions(_files(root, names), questions, choices, answers)


DATASETS: dict[str, tuple[str, Callable[..., Any]]] = {
    "aokvqa": ("multiple_choice", aokvqa),
    "cifar10": ("zeroshot_classification", cifar("CIFAR10")),
    "cifar100": ("zeroshot_classification", cifar("CIFAR100")),
    "digits": ("zeroshot_classification", digits),
    "imagefolder": ("zeroshot_classification", folders),
    "imagenet1k": ("zeroshot_classification", folders),
    "mscoco_captions": ("zeroshot_retrieval", coco_captions),
}


def check(name: str) -> None:
    """Raises ValueError unless a data set of that name can be loaded."""
    _check.choice("dataset", name, sorted(DATASETS))


def load(name: str, root: str | os.PathLike = ".", split: str = "test", annotation_file: str | None = None) -> Any:
    """A data set by name.

    Args:
        name: one of `DATASETS`.
        root: where it lies; {dataset} stands for the name.
        split: "test", "train" or what the data set's folders are called.
        annotation_file: of captions and questions.

    Raises:
        ValueError: no such data set, or it does not lie there as expected.
        ImportError: torchvision or scikit-learn is needed and not installed.

    Example:
        >>> data = load("digits")
        >>> len(data), data.classes[data.labels[0]], data.image(0).size
        (597, 'one', (8, 8))
    """
    check(name)
    return DATASETS[name][1](Path(os.fspath(root).replace("{dataset}", name)), split, annotation_file)


def _wanted(annotations: str | None, what: str) -> str:
    if not annotations:
        raise ValueError(f"annotation_file: expected {what}, got none")
    return annotations


def _coco_name(root: Path, entry: dict[str, Any]) -> str:
    if "image" in entry:
        return str(entry["image"])
    name = f"{int(entry['image_id']):012d}.jpg"
    nested = f"{entry['split']}2017/{name}" if "split" in entry else name
    return nested if (root / nested).exists() else name


def _files(root: Path, names: list[str]) -> Callable[[int], Image]:
    def image(i: int) -> Image:
        from PIL import Image

        try:
            with Image.open(root / names[i]) as opened:
                return opened.convert("RGB")
        except OSError as error:
            raise ValueError(f"dataset_root: cannot read the image {root / names[i]} ({error})") from None

    return image
