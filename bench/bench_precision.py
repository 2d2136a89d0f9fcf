"""What `torch.set_float32_matmul_precision("medium")` does to a training: the demo's model, three seeds, its own data.

"highest"; "medium" for the loss alone; "medium" for everything, PyTorch's products in the encoders too. The loss is the
mean of the last twenty steps', the accuracy that of the 597 held-out scans by the first template's prompts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from bench import harness
from gapkern import ClipLoss, datasets
from gapkern.experiments import digits

SEEDS = {"quick": 1, "full": 3}
STEPS = {"quick": 60, "full": 300}
SETTINGS = ("highest", "medium, the loss alone", "medium, all of it")


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class MediumLoss(ClipLoss):
    """The backward pass keeps the forward pass's precision."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        with precision("medium"):
            return super().forward(*arguments, **options)


def trained(setting: str, seed: int, steps: int) -> dict[str, float]:
    data = datasets.scans(seed)
    loss = MediumLoss if setting == "medium, the loss alone" else ClipLoss
    everywhere = "medium" if setting == "medium, all of it" else "highest"
    with mock.patch.object(digits, "ClipLoss", loss), precision(everywhere):
        made = digits.train(data, seed=seed, steps=steps)
    with precision("highest"):
        images = digits.embed_images(made, data.test_images)
        prompts = digits.embed_prompts(made, digits.TEMPLATES)[0]
    right = (images @ prompts.T).argmax(1) == data.test_digits
    return {
        "first loss": made.history[0]["loss"],
        "loss": sum(entry["loss"] for entry in made.history[-20:]) / 20,
        "accuracy": float(right.double().mean()),
        "gap": float((images.mean(0) - prompts.mean(0)).norm()),
    }


def run(mode: str) -> dict[str, Any]:
    cases = []
    for setting in SETTINGS:
        for seed in range(SEEDS[mode]):
            cases.append({"setting": setting, "seed": seed, **trained(setting, seed, STEPS[mode])})
            print(cases[-1], flush=True)
    return {**harness.facts("precision"), "cases": cases}
