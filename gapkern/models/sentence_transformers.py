"""Models of sentence-transformers: of texts, or of images too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern._logs import quiet
from gapkern.models import transformers


def load(model: str) -> dict[str, Any]:
    """The parts of a `Model` of "st:NAME_OR_FOLDER"; see `gapkern.models.load`."""
    library = _check.extra("sentence_transformers", "sentence-transformers", "models")
    where, options, known_as = transformers.place(model, "modules.json", "config.json")
    with quiet(), transformers.without_bars():
        module = library.SentenceTransformer(where, device="cpu", **options).float()
    modalities = tuple(kind for kind in ("image", "text") if kind in module.modalities)
    if not modalities:
        raise ValueError(f"expected a model of images or texts, got one of {', '.join(map(str, module.modalities))}")
    context = module.max_seq_length
    known = context is not None and math.isfinite(context) and "text" in modalities
    return {
        "module": Towers(module),
        "preprocess": itself,
        "tokenizer": itself,
        "id": known_as,
        "modalities": modalities,
        "context": int(context) if known else None,
        "longer": Longer(module, int(context)) if known else None,
    }


def itself(value: Any) -> Any:
    """The library takes images and strings as they are."""
    return value


class Towers(torch.nn.Module):
    """`SentenceTransformer.encode` by open_clip's names: its prompts, its limits, its dimensions."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def encode_image(self, images: Sequence[Any]) -> Tensor:
        return self._encode(images)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self._encode(texts)

    def _encode(self, inputs: Sequence[Any]) -> Tensor:
        found: Tensor = self.model.encode(
            list(inputs), batch_size=len(inputs), convert_to_tensor=True, show_progress_bar=False
        )
        return found


@dataclass(frozen=True)
class Longer:
    """Which texts have more tokens than the model reads, with the prompt that it puts before them."""

    model: Any
    context: int

    def __call__(self, texts: list[str]) -> list[bool]:
        prompt = (self.model.prompts or {}).get(self.model.default_prompt_name) or ""
        tokenizer = self.model.tokenizer
        given = [prompt + text for text in texts]
        if not callable(tokenizer):  # of the tokenizers package
            return [len(found.ids) > self.context for found in tokenizer.encode_batch(given)]
        found = tokenizer(given, truncation=False, padding=False, verbose=False)["input_ids"]
        return [len(tokens) > self.context for tokens in found]
