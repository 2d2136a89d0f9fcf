"""A small image-text model of handwritten digits: scikit-learn's 1797 real scans, open_clip's model and tokenizer."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _check, files
from gapkern.datasets import DIGITS, Scans
from gapkern.experiments import towers
from gapkern.losses import ClipLoss

TEMPLATES = (
    "a photo of the digit {}",
    "a handwritten {}",
    "the number {}",
    "an image of a {}",
    "{}",
    "a scan of the numeral {}",
    "digit {}",
)
# Never seen in training: what a user of the model might type.
UNSEEN_TEMPLATES = (
    "someone wrote the number {}",
    "a small picture of {}",
    "this is the digit {}",
    "a drawing of a {}",
    "the figure shows {}",
    "a pencil sketch of number {}",
)
CONTEXT = 16
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 8, "patch_size": 2, "layers": 2, "width": 128, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}  # the vocabulary is that of open_clip's SimpleTokenizer
BATCH = 256


@dataclass(frozen=True)
class Trained:
    """A trained model, its tokenizer, and its training: step, loss, gap norm and accuracy within the batch."""

    model: Any
    tokenizer: Any
    history: list[dict[str, float]]


def captions(tokenizer: Any, templates: tuple[str, ...] = TEMPLATES) -> Tensor:
    """(10, len(templates), CONTEXT) tokens: every digit's name in every template."""
    return torch.stack([tokenizer([t.format(name) for t in templates]) for name in DIGITS])


def train(
    data: Scans,
    *,
    seed: int = 0,
    steps: int = 300,
    scale: float = 100.0,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Trained:
    """Trains open_clip's CLIP (D = 128) with `gapkern.ClipLoss`, the logit scale fixed; the same weights for a seed.

    Args:
        data: from `gapkern.datasets.scans`.
        seed: of the weights and of the batches.
        steps: batches of 256 pairs of a scan and a caption in a template drawn anew.
        scale: the logit scale 1 / T.
        on_step: called with each entry of the history.
    """
    steps = _check.integer("steps", steps, low=1)
    open_clip = _check.extra("open_clip", "open_clip_torch", "demo")
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    tokens = captions(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(**CONFIG, init_logit_scale=math.log(scale))
    model.logit_scale.requires_grad_(False)
    small = towers.Captions(model, tokens.flatten(0, 1)) if towers.fits(model) else None
    parameters = small.parameters() if small else model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(steps, 2), pct_start=0.2)
    loss_function = ClipLoss()
    history = []
    for step in range(steps):
        rows = torch.randint(len(data.train_images), (BATCH,), generator=generator)
        templates = torch.randint(len(TEMPLATES), (BATCH,), generator=generator)
        digits = data.train_digits[rows]
        with towers.first_token_alone(model) if small else contextlib.nullcontext():
            images = model.encode_image(data.train_images[rows], normalize=True)
        # There are 70 captions: each is encoded once, however often the batch holds it.
        distinct = small.encode() if small else model.encode_text(tokens.flatten(0, 1), normalize=True)
        texts = distinct.index_select(0, digits * len(TEMPLATES) + templates)
        loss = loss_function(images, texts, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        if small:
            small.shrink(optimizer)
        optimizer.step()
        schedule.step()
        entry = {"step": step, "loss": loss.item(), **_in_batch(images.detach(), texts.detach(), digits)}
        history.append(entry)
        if on_step:
            on_step(entry)
    if small:
        small.settle()
    model.eval()
    return Trained(model, tokenizer, history)


def export(trained: Trained, data: Scans, folder: str | Path, seed: int = 0) -> None:
    """Writes what `gapkern embed` takes: the model as a folder for local-dir:, the test images, and their words.

    `model/`; `images/<digit>/<number>.png`; `captions.txt`, a caption per image in the images' order, in templates
    drawn by the seed; `classnames.json`; `templates.json` with {c}.
    """
    from PIL import Image
    from safetensors.torch import save_file

    folder = files.folder(folder)
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.0] * 3, "std": [1.0] * 3}}
    files.write_json(files.folder(folder / "model") / "open_clip_config.json", config)
    weights = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    files.write(folder / "model" / "open_clip_model.safetensors", lambda p: save_file(weights, p))
    order = sorted(range(len(data.test_digits)), key=lambda i: (int(data.test_digits[i]), i))
    drawn = torch.randint(len(TEMPLATES), (len(order),), generator=torch.Generator().manual_seed(seed)).tolist()
    captions = []
    for i, template in zip(order, drawn, strict=True):
        digit = int(data.test_digits[i])
        picture = Image.fromarray((data.test_images[i] * 255).round().byte().permute(1, 2, 0).numpy())
        files.write(files.folder(folder / "images" / str(digit)) / f"{i:04d}.png", picture.save)
        captions.append(TEMPLATES[template].format(DIGITS[digit]))
    files.write(folder / "captions.txt", lambda p: p.write_text("\n".join(captions) + "\n", encoding="utf-8"))
    files.write_json(folder / "classnames.json", DIGITS)
    files.write_json(folder / "templates.json", [template.format("{c}") for template in TEMPLATES])


def _in_batch(images: Tensor, texts: Tensor, digits: Tensor) -> dict[str, float]:
    gap = images.mean(0) - texts.mean(0)
    right = digits[torch.cdist(images, texts).argmin(1)] == digits
    return {"gap": gap.norm().item(), "accuracy": right.float().mean().item()}


@torch.no_grad()
def embed_images(trained: Trained, images: Tensor) -> Tensor:
    """L2-normalised (N, 128) float32 embeddings."""
    return torch.cat([trained.model.encode_image(chunk, normalize=True) for chunk in images.split(512)])


@torch.no_grad()
def embed_prompts(trained: Trained, templates: tuple[str, ...]) -> Tensor:
    """L2-normalised (len(templates), 10, 128) embeddings of every digit's name in every template."""
    tokens = captions(trained.tokenizer, templates).transpose(0, 1)
    return torch.stack([trained.model.encode_text(t, normalize=True) for t in tokens])
