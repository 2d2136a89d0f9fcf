"""What Gaussian noise of a given size stands for: how far real changes move embeddings, and which neighbours stay.

The demo's model and its 597 held-out scans of digits; ten class prompts are searched. What is changed is the scans, the
words of the prompts, or the numbers of both sides' embeddings. The size of a change is the mean squared distance by
which it moves a row of unit length, v for `Gaussian(v)`; the neighbours kept under such noise stand beside it.
"""

import io
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from bench import harness
from gapkern import datasets
from gapkern.experiments import digits
from gapkern.perturb import Gaussian, perturb
from gapkern.robustness import robustness

DRAWS, STEPS = 20, {"quick": 60, "full": 300}


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(x) for x in (images * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def scans(found: list[Image.Image]) -> Tensor:
    flat = torch.stack([torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in found])
    return flat.view(-1, 8, 8, 3).permute(0, 3, 1, 2) / 255


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def change(picture: Image.Image) -> Image.Image:
        held = io.BytesIO()
        picture.save(held, "JPEG", quality=quality)
        return Image.open(held).convert("RGB")

    return change


def to_the_right(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda x: x.transform(x.size, Image.Transform.AFFINE, (1, 0, -8 * share, 0, 1, 0), Image.Resampling.BILINEAR)


def cropped(pixels: float) -> Callable[[Image.Image], Image.Image]:
    return lambda x: x.resize(x.size, Image.Resampling.BICUBIC, (pixels, pixels, 8 - pixels, 8 - pixels))


OF_SCANS = {
    "scan: JPEG, quality 90": jpeg(90),
    "scan: JPEG, quality 50": jpeg(50),
    "scan: JPEG, quality 10": jpeg(10),
    "scan: blurred, σ = 0.5 pixels": lambda x: x.filter(ImageFilter.GaussianBlur(0.5)),
    "scan: blurred, σ = 1 pixel": lambda x: x.filter(ImageFilter.GaussianBlur(1.0)),
    "scan: moved by half a pixel": to_the_right(1 / 16),
    "scan: moved by one pixel": to_the_right(1 / 8),
    "scan: 3 % cropped at each side": cropped(0.25),
    "scan: 6 % cropped at each side": cropped(0.5),
    "scan: 10 % darker": lambda x: x.point(lambda value: 0.9 * value),
}


def in_bits(x: Tensor, bits: int) -> Tensor:
    """Each dimension in 2^bits equal steps between its least and its largest value."""
    low, high = x.min(0).values, x.max(0).values
    step = (high - low) / (2**bits - 1)
    return low + ((x - low) / step).round() * step


OF_NUMBERS = {
    "numbers: float16": lambda x: x.half().float(),
    "numbers: bfloat16": lambda x: x.bfloat16().float(),
    "numbers: float8 (e4m3)": lambda x: x.to(torch.float8_e4m3fn).float(),
    "numbers: 8 bits a dimension": lambda x: in_bits(x, 8),
    "numbers: 4 bits a dimension": lambda x: in_bits(x, 4),
    "numbers: 2 bits a dimension": lambda x: in_bits(x, 2),
}


def nearest(queries: Tensor, gallery: Tensor) -> Tensor:
    return torch.cdist(queries, gallery, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def size(before: Tensor, after: Tensor) -> float:
    return float((after - before).double().square().sum(1).mean())


def under_noise(queries: Tensor, gallery: Tensor, variances: list[float]) -> float:
    """The share of neighbours kept with noise on each side, drawn where the queries have any."""
    images, prompts = variances
    if not images:
        return robustness(queries, gallery, Gaussian(prompts)).robustness
    before = nearest(queries, gallery)
    kept = 0.0
    for seed in range(DRAWS):
        noisy = perturb(queries, Gaussian(images), seed=2 * seed)
        others = perturb(gallery, Gaussian(prompts), seed=2 * seed + 1) if prompts else gallery
        kept += float((nearest(noisy, others) == before).double().mean()) / DRAWS
    return kept


def changes(trained: digits.Trained, data: datasets.Scans) -> Any:
    """Name, the queries and the gallery after each change; the first is none."""
    images = digits.embed_images(trained, data.test_images)
    prompts = digits.embed_prompts(trained, digits.TEMPLATES + digits.UNSEEN_TEMPLATES)
    yield "none", images, prompts[0]
    for name, change in OF_SCANS.items():
        changed = scans([change(picture) for picture in pictures(data.test_images)])
        yield name, digits.embed_images(trained, changed), prompts[0]
    for name, chosen in (("seen in training", range(1, 7)), ("never seen", range(7, 13))):
        for i in chosen:
            yield f"prompt: another template, {name}", images, prompts[i]
    for name, change in OF_NUMBERS.items():
        yield name, change(images), change(prompts[0])


def run(mode: str) -> dict[str, Any]:
    data = datasets.scans(0)
    trained = digits.train(data, seed=0, steps=STEPS[mode])
    found: dict[str, list[dict[str, float]]] = {}
    (_, images, prompts), *changed = changes(trained, data)
    before = nearest(images, prompts)
    for name, queries, gallery in changed:
        sizes = [size(images, queries), size(prompts, gallery)]
        kept = float((nearest(queries, gallery) == before).double().mean())
        row = {"images": sizes[0], "prompts": sizes[1], "kept": kept}
        found.setdefault(name, []).append({**row, "under noise": under_noise(images, prompts, sizes)})
    cases = [
        {"change": name, **{key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}}
        for name, rows in found.items()
    ]
    for case in cases:
        print("  ".join(f"{value:.2g}" if isinstance(value, float) else f"{value:<45}" for value in case.values()))
    return {**harness.facts("noise"), "cases": cases}
