"""Data sets as they lie on disk: CIFAR, folders of classes, COCO's captions, A-OKVQA's questions, the bundled digits.

Nothing is downloaded. Images are read when they are asked for, by any process: `image` is an object that pickles.
Labels, captions and questions are read at once.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _check, captions
from gapkern.embeddings import keys, pictures
from gapkern.embeddings import sources as rows
from gapkern.prompts import read_json

Image = Any  # PIL.Image.Image
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCANS_TO_TRAIN = 1200
TASKS = ("zeroshot_classification", "zeroshot_retrieval", "multiple_choice", "template_robustness")


@dataclass(frozen=True)
class Labelled:
    """Images of classes: `image(i)` is one, `labels[i]` its class, `classes` the names; `names` the files, if any."""

    image: Callable[[int], Image]
    labels: list[int]
    classes: list[str]
    names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Captioned:
    """Images with captions: `captions[t]` belongs to image `image_of[t]`; `names` are files, `keys` captions' ids."""

    image: Callable[[int], Image]
    count: int
    captions: list[str]
    image_of: list[int]
    names: list[str] | None = None
    keys: list[str] | None = None

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


@dataclass(frozen=True)
class Arrays:
    """Images of an array of greys (N, H, W) or colours (N, H, W, 3), uint8."""

    pixels: Any

    def raw(self, i: int) -> bytes:
        found: bytes = self.pixels[i].tobytes()
        return found

    def __call__(self, i: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.pixels[i]).convert("RGB")


@dataclass(frozen=True)
class ImageFiles:
    """Images of files below a folder; one that cannot be read is named."""

    root: Path
    names: Sequence[str]

    def content(self, i: int) -> bytes:
        try:
            return (self.root / self.names[i]).read_bytes()
        except OSError as error:
            raise self._unread(i, error.strerror) from None

    def __call__(self, i: int) -> Image:
        content = self.content(i)
        try:
            return pictures.decode(content, self.names[i])
        except ValueError as error:
            raise self._unread(i, str(error).partition("(")[2].removesuffix(")")) from None

    def _unread(self, i: int, reason: str | None) -> ValueError:
        return ValueError(f"dataset_root: cannot read the image {self.root / self.names[i]} ({reason})")


@dataclass(frozen=True)
class Scans:
    """Real scans (N, 3, 8, 8) in [0, 1] and their digits, split once by the seed."""

    train_images: Tensor
    train_digits: Tensor
    test_images: Tensor
    test_digits: Tensor


def scans(seed: int) -> Scans:
    """The digits, shuffled by `seed`: 1200 for training, 597 for testing."""
    digits = _check.extra("sklearn.datasets", "scikit-learn", "demo").load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1).repeat(1, 3, 1, 1)
    classes = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:SCANS_TO_TRAIN], order[SCANS_TO_TRAIN:]
    return Scans(images[train], classes[train], images[test], classes[test])


def digits(root: Path, split: str, annotations: str | None) -> Labelled:
    """scikit-learn's 1797 scans, split as the demo splits them by seed 0; nothing on disk is needed."""
    data = scans(0)
    chosen, labels = (
        (data.train_images, data.train_digits) if split == "train" else (data.test_images, data.test_digits)
    )
    return Labelled(Arrays((chosen[:, 0] * 255).round().byte().numpy()), labels.tolist(), list(DIGITS))


def cifar(name: str) -> Callable[..., Labelled]:
    """CIFAR-10 or -100 as torchvision reads it: the Python version's batches under `root`."""

    def load(root: Path, split: str, annotations: str | None) -> Labelled:
        sets = _check.extra("torchvision.datasets", "torchvision", "demo")
        try:
            whole = getattr(sets, name)(root=root, train=split == "train", download=False)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"dataset_root: expected {name}'s Python version in {root} ({error})") from None
        return Labelled(Arrays(whole.data), list(whole.targets), [c.replace("_", " ") for c in whole.classes])

    return load


def folders(root: Path, split: str, annotations: str | None) -> Labelled:
    """A folder of images per class, in the order of their names, below `root/split` (or root/val for "test", or root).

    ImageNet's folders are named by WordNet ids: give class names in a file.
    """
    names = [split, "val"] if split == "test" else [split]
    place = next((root / name for name in names if (root / name).is_dir()), root)
    expected = f"dataset_root: expected a folder of images for each class in {place}"
    if not place.is_dir():
        raise ValueError(f"{expected}, which is no folder")
    try:
        found = rows.images(place)
    except ValueError as error:
        raise ValueError(f"{expected} ({error})") from None
    if found.labels is None or found.classes is None:
        raise ValueError(f"{expected}, got images beside folders")
    return Labelled(
        ImageFiles(place, list(found.names)),
        list(found.labels),
        [c.replace("_", " ") for c in found.classes],
        list(found.names),
    )


def coco_captions(root: Path, split: str, annotations: str | None) -> Captioned:
    """Captions in any format of `gapkern.captions`; their images lie in `root`.

    Images in the order of their ids, as torchvision and CLIP_benchmark have them; captions in the file's.
    """
    found = captions.read(_wanted(annotations, "COCO's captions JSON"), split)
    # Karpathy's file names the folder of the download too.
    names = [name if (root / name).exists() else Path(name).name for name in found.images]
    names = names if len(set(names)) == len(names) else found.images
    return Captioned(ImageFiles(root, names), len(names), found.texts, found.image_of, names, found.keys)


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
    return Questions(ImageFiles(root, names), questions, choices, answers)


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


def load(name: str, root: str | os.PathLike[str] = ".", split: str = "test", annotation_file: str | None = None) -> Any:
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


def embeddable(
    name: str, root: str | os.PathLike[str] = ".", split: str = "test", annotation_file: str | None = None
) -> tuple[rows.Images, rows.Texts | None]:
    """A data set as `gapkern.embeddings.embed` takes it: its images with labels, and its captions where it has some.

    Raises:
        ValueError: no such data set, or it does not lie there; one of questions, which have images many times.
        ImportError: torchvision or scikit-learn is needed and not installed.
    """
    found = load(name, root, split, annotation_file)
    if isinstance(found, Questions):
        raise ValueError(f"dataset: expected one of images with labels or captions, got {name}, which has questions")
    names = found.names or [f"{name}/{split}/{i}" for i in range(len(found))]
    content = getattr(found.image, "content", None)
    if isinstance(found, Captioned):
        told = rows.Texts(found.captions, found.image_of, names, found.keys)
        return rows.Images(found.image, names, content, _identity(name, split, found.captions)), told
    identity = _identity(name, split, found.labels)
    return rows.Images(found.image, names, content, identity, found.labels, found.classes), None


def _identity(name: str, split: str, facts: Sequence[Any]) -> str:
    return keys.order([name, split, *map(str, facts)])


def fingerprint(data: Labelled | Captioned | Questions) -> str:
    """SHA-256 of a data set: its images' bytes, one after the other, and all that is said of them.

    Raises:
        ValueError: an image that cannot be read.

    Example:
        >>> fingerprint(load("digits")) == fingerprint(load("digits")) != fingerprint(load("digits", split="train"))
        True
    """
    facts = {field.name: getattr(data, field.name) for field in fields(data) if field.name not in ("image", "names")}
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for i in range(len(data)):
        content = (getattr(data.image, "content", None) or data.image.raw)(i)  # type: ignore[attr-defined]
        found.update(hashlib.sha256(content).digest())
    return found.hexdigest()


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
