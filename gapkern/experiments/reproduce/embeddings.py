"""What the figures are drawn from: synthetic captions, the digits, files, or a model on a folder of images."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _check, _formats, datasets, files
from gapkern.embeddings import labels as loader
from gapkern.embeddings.provenance import made_from
from gapkern.experiments import digits
from gapkern.gap import MeanShift
from gapkern.perturb import Gaussian
from gapkern.robustness import robustness

# What a user might type for a class; the first is the one a gallery is made with.
TEMPLATES = (
    "a photo of a {c}",
    "a {c}",
    "{c}",
    "a picture of the {c}",
    "an image of one {c}",
    "there is a {c} here",
    "a bad photo of a {c}",
    "a close-up of the {c}",
)
QUICK_STEPS, STEPS = 150, 300
QUICK_IMAGES = 500
FEW = 50  # gallery rows up to which they are taken for class prompts, and all of their hull is kept

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Queries, a gallery, and what is known of them.

    Args:
        name: for titles.
        queries: (Q, D), images.
        gallery: (G, D), texts: class prompts or captions.
        labels: (Q,) the right gallery row of each query, or None.
        about: one sentence for the report: what this is.
        rewordings: name to (G, D): the gallery in other words; the first entry is `gallery` itself where there are any.
        components: what `MeanShift` is to keep: "exact" for a few prompts, "auto" for a large gallery.
    """

    name: str
    queries: Tensor = field(repr=False)
    gallery: Tensor = field(repr=False)
    labels: Tensor | None = field(repr=False)
    about: str
    rewordings: dict[str, Tensor] = field(default_factory=dict, repr=False)
    components: int | float | str = "exact"

    @cached_property
    def shift(self) -> MeanShift:
        """Fitted on the gallery and the queries, alpha = 1."""
        return MeanShift(n_components=self.components).fit(self.gallery, self.queries)

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return "".join(c if c.isalnum() else "_" for c in self.name.lower()).strip("_")


def noise_that_keeps(share: float, data: Embeddings) -> Gaussian:
    """The Gaussian noise at which `share` of the unmoved gallery's neighbours survive, to three digits."""
    low, high = 1e-8, 1e4  # of the gallery's own spread
    spread = float(data.gallery.double().var(0, correction=0).sum())
    for _ in range(40):
        middle = (low * high) ** 0.5
        kept = robustness(data.queries, data.gallery, Gaussian(middle * spread)).robustness
        low, high = (middle, high) if kept > share else (low, middle)
        if high / low < 1.001:
            break
    return Gaussian(float(f"{(low * high) ** 0.5 * spread:.3g}"))


@dataclass(frozen=True)
class Source:
    """Embeddings that are not there yet: `facts` say what they will be, `load` makes or reads them."""

    facts: dict[str, Any]
    load: Callable[[Progress], Embeddings]


def synthetic(seed: int) -> Source:
    """Captions and images of a world that is known: a gap of which 0.8 is orthogonal to the captions."""
    return Source({"kind": "synthetic", "seed": seed}, lambda progress: _synthetic(seed))


def _synthetic(seed: int, count: int = 400, dims: int = 128, rank: int = 32) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(draw(dims, dims)).Q
    inside, outside = basis[:, :rank], basis[:, rank]
    captions = draw(count, rank) / math.sqrt(rank) @ inside.T  # E||caption||^2 = 1
    tilt = inside @ torch.nn.functional.normalize(draw(rank), dim=0)
    images = captions + 0.14 * draw(count, rank) @ inside.T + 0.02 * draw(count, dims)
    images += 1.5 * (0.8 * outside + 0.6 * tilt)
    reworded = {"as fitted": captions}
    for n in range(1, 5):
        reworded[f"rewording {n}"] = captions + 0.1 * draw(dims) / math.sqrt(dims) + 0.03 * draw(count, dims)
    return Embeddings(
        "Synthetic captions",
        images.float(),
        captions.float(),
        torch.arange(count),
        f"{count} Gaussian captions in {rank} of {dims} dimensions, and an image near each, moved away by a gap of "
        "length 1.5, of which 80 % lies outside the captions' hull. A rewording moves all captions alike, and each a "
        "little further.",
        {name: x.float() for name, x in reworded.items()},
        "exact",
    )


def trained_digits(seed: int, quick: bool, folder: Path) -> Source:
    """The digits' test images and prompts under a model trained here, kept in `folder`."""
    steps = QUICK_STEPS if quick else STEPS
    facts = {"kind": "digits", "seed": seed, "steps": steps}

    def load(progress: Progress) -> Embeddings:
        templates = digits.TEMPLATES + digits.UNSEEN_TEMPLATES

        def make() -> dict[str, Tensor]:
            data = datasets.scans(seed)
            trained = digits.train(data, seed=seed, steps=steps, on_step=lambda e: progress(e["step"] + 1, steps))
            return {
                "images": digits.embed_images(trained, data.test_images),
                "prompts": digits.embed_prompts(trained, templates),
                "labels": data.test_digits,
            }

        kept = _kept(folder / "digits.safetensors", facts, make)
        return Embeddings(
            "Digits",
            kept["images"],
            kept["prompts"][0],
            kept["labels"],
            f"{len(kept['images'])} real handwritten digits scikit-learn brings and ten class prompts, embedded by a "
            f"small open_clip model (D = 128) that was trained here for {steps} steps on 1200 others.",
            dict(zip(templates, kept["prompts"], strict=True)),
            "exact",
        )

    return Source(facts, load)


def _kept(path: Path, facts: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file that an earlier run with the same facts has left, else made anew and left there."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    wanted = json.dumps(facts, sort_keys=True)
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("facts") == wanted:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        pass
    tensors = {name: tensor.contiguous() for name, tensor in make().items()}
    files.folder(path.parent)
    files.write(path, lambda temporary: save_file(tensors, temporary, {"facts": wanted}))
    return tensors


def from_files(queries: str, gallery: str, *, labels: str | None = None, paraphrases: Sequence[str] = ()) -> Source:
    """Two embedding files as `files.load_embeddings` reads them.

    Args:
        queries: (Q, D), images.
        gallery: (G, D), texts.
        labels: right gallery rows (Q,) as `embeddings.labels.load` reads them, or None: row i belongs to row i where
            Q = G, which is checked where both are known by name; else nothing is known.
        paraphrases: files (G, D), the gallery in other words.

    Raises:
        ValueError: a file is absent or malformed, widths or rows do not match, or labels are no gallery rows.
    """
    x, y = files.load_embeddings(queries, name="embeddings"), files.load_embeddings(gallery, name="embeddings")
    _check.same_width(**{queries: x, gallery: y})
    others = {path: files.load_embeddings(path, name="paraphrase") for path in paraphrases}
    for path, other in others.items():
        if other.shape != y.shape:
            raise ValueError(
                f"paraphrase: expected shape {tuple(y.shape)} as {gallery}, got {tuple(other.shape)} in {path}"
            )
    right = _labels(labels, loader.Side(queries, len(x), "queries"), loader.Side(gallery, len(y), "gallery"))
    name = " / ".join(dict.fromkeys(Path(path.split("[")[0]).stem for path in (queries, gallery)))
    facts = {
        "kind": "files",
        "name": name,
        "queries": files.fingerprint(x),
        "gallery": files.fingerprint(y),
        "labels": None if right is None else files.fingerprint(right),
        "inputs": {
            "queries": made_from(queries, name="embeddings"),
            "gallery": made_from(gallery, name="embeddings"),
            **loader.made_from(labels),
        },
        "paraphrases": {path: files.fingerprint(other) for path, other in others.items()},
    }

    def load(progress: Progress) -> Embeddings:
        known = "row i belongs to row i" if labels is None else f"right rows in {Path(labels).name}"
        return Embeddings(
            name,
            _check.finite(queries, x.float()),
            _check.finite(gallery, y.float()),
            right,
            f"{len(x)} queries from {Path(queries).name} and a gallery of {len(y)} from {Path(gallery).name}, "
            f"D = {x.shape[1]}; {known if right is not None else 'which row is right is not known'}.",
            {"as fitted": y.float(), **{Path(p).name: o.float() for p, o in others.items()}} if others else {},
            "exact" if len(y) <= FEW else "auto",
        )

    return Source(facts, load)


def _labels(path: str | None, queries: loader.Side, gallery: loader.Side) -> Tensor | None:
    if path is None and queries.count == gallery.count:
        loader.check_paired(queries, gallery)
        return torch.arange(queries.count)
    return loader.load(path, queries, gallery.count, "gallery rows", to=gallery)


def from_model(model: str, pretrained: str | None, dataset: str, quick: bool, folder: Path) -> Source:
    """An open_clip model on a folder of images, one subfolder for each class, named as the class; kept in `folder`.

    Args:
        model: open_clip's name of the architecture.
        pretrained: open_clip's tag or a checkpoint's path; None leaves the weights random.
        dataset: the folder.
        quick: at most 500 images, evenly drawn.
        folder: where embeddings are kept.

    Raises:
        ValueError: no such model, weights or folder.
        ImportError: the extra `demo` is not installed.
    """
    if not os.path.isdir(dataset):
        raise ValueError(f"dataset: expected a folder with one subfolder of images for each class, got {dataset}")
    facts = {
        "kind": "model",
        "model": model,
        "pretrained": pretrained,
        "dataset": os.path.abspath(dataset),
        "quick": quick,
    }

    def load(progress: Progress) -> Embeddings:
        made: dict[str, Any] = {}

        def make() -> dict[str, Tensor]:
            return _embed(model, pretrained, dataset, quick, progress)

        made = _kept(folder / "model.safetensors", facts, make)
        weights = pretrained or "random weights"
        return Embeddings(
            f"{model} {Path(dataset).name}",
            made["images"],
            made["prompts"][0],
            made["labels"],
            f"{len(made['images'])} images of {made['prompts'].shape[1]} classes from {Path(dataset).name}, embedded "
            f"by open_clip's {model} ({weights}).",
            dict(zip((t.format(c="…") for t in TEMPLATES), made["prompts"], strict=True)),
            "exact" if made["prompts"].shape[1] <= FEW else "auto",
        )

    return Source(facts, load)


@torch.no_grad()
def _embed(model: str, pretrained: str | None, dataset: str, quick: bool, progress: Progress) -> dict[str, Tensor]:
    open_clip = _check.extra("open_clip", "open_clip_torch", "demo")
    datasets = _check.extra("torchvision.datasets", "torchvision", "demo")
    if model not in open_clip.list_models():
        raise ValueError(f"model: expected one of open_clip.list_models(), got {model!r}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained)
        images = datasets.ImageFolder(dataset, transform=preprocess)
    except (RuntimeError, FileNotFoundError, OSError) as error:
        raise ValueError(f"model or dataset: {_formats.reason(error)}") from None
    network.eval()
    tokenizer = open_clip.get_tokenizer(model)
    names = [name.replace("_", " ") for name in images.classes]
    prompts = [
        network.encode_text(tokenizer([t.format(c=name) for name in names]), normalize=True).float() for t in TEMPLATES
    ]
    count = min(len(images), QUICK_IMAGES) if quick else len(images)
    rows = [i * len(images) // count for i in range(count)]
    found, labels = [], []
    for first in range(0, count, 32):
        batch = [images[i] for i in rows[first : first + 32]]
        found.append(network.encode_image(torch.stack([image for image, _ in batch]), normalize=True).float())
        labels += [label for _, label in batch]
        progress(min(first + 32, count), count)
    return {"images": torch.cat(found), "prompts": torch.stack(prompts), "labels": torch.tensor(labels)}
