"""Models of transformers with both towers: CLIP, SigLIP, SigLIP 2, ALIGN and what else has their two methods."""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern._logs import quiet
from gapkern.models import identity

METHODS = ("get_image_features", "get_text_features")
PADDED = ("siglip", "siglip2")  # trained on padded texts alone, as their documentation says


def load(model: str) -> dict[str, Any]:
    """The parts of a `Model` of "hf:NAME_OR_FOLDER"; see `gapkern.models.load`."""
    library = _check.extra("transformers", "transformers", "models")
    _check.extra("torchvision", "torchvision", "models")
    where, options, known_as = place(model, "config.json")
    with quiet(), without_bars():
        # In float32 whatever the file holds: lower precision is autocast's.
        module, told = library.AutoModel.from_pretrained(
            where, dtype=torch.float32, output_loading_info=True, **options
        )
        processor = library.AutoProcessor.from_pretrained(where, **options)
    if absent := [name for name in METHODS if not hasattr(module, name)]:
        raise ValueError(
            f"expected a model with {' and '.join(METHODS)}, got {type(module).__name__} without {absent[0]}"
        )
    if missing := sorted(told.get("missing_keys") or ()):
        raise ValueError(f"expected weights of all its parameters, got none of {missing[0]} ({len(missing)} missing)")
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"expected a processor with a tokenizer, got {type(processor).__name__}")
    options = _text_options(module.config, processor, tokenizer)
    return {
        "module": Towers(module),
        "preprocess": Preprocess(processor),
        "tokenizer": Tokenizer(processor, options),
        "id": known_as,
        "context": options.get("max_length"),
        "longer": Longer(tokenizer, options["max_length"]) if "max_length" in options else None,
    }


def place(model: str, *configs: str) -> tuple[str, dict[str, Any], str]:
    """What the library calls the model, the revision, and the id for manifests."""
    kind, where = model.split(":", 1)
    if where and Path(where).is_dir():
        if not any((Path(where) / config).is_file() for config in configs):
            raise ValueError(f"expected a folder with {' or '.join(configs)}, got {where}")
        return where, {}, f"{kind}/sha256:{identity.of_folder(Path(where), '**/*')}"
    if not where or where.startswith((".", "/", "~")) or where.count("/") > 1:
        raise ValueError(f"expected {kind}:NAME or {kind}:FOLDER, got no folder {where!r}")
    name, _, revision = where.partition("@")
    return name, {"revision": revision} if revision else {}, model


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without the library's bars of progress, which would break into ours."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _text_options(config: Any, processor: Any, tokenizer: Any) -> dict[str, Any]:
    """How the library documents texts to be padded and cut: its processor's defaults, else the model's limits."""
    given = getattr(type(processor), "text_kwargs", None)
    if not isinstance(given, dict):  # before 5.24
        given = getattr(getattr(type(processor), "valid_processor_kwargs", None), "_defaults", {}).get(
            "text_kwargs", {}
        )
    result = {"padding": "max_length" if config.model_type in PADDED else True, **given, "truncation": True}
    places = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    limits = [n for n in (result.get("max_length"), tokenizer.model_max_length, places) if n and n < 10**9]
    if limits:
        result["max_length"] = min(limits)
    return {key: result[key] for key in ("padding", "truncation", "max_length") if key in result}


class Towers(torch.nn.Module):
    """Both towers by open_clip's names. Their methods return a tensor, or from 5.0 on an output that holds it."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def encode_image(self, images: Any) -> Tensor:
        given = images if isinstance(images, dict) else {"pixel_values": images}
        return features(self.model.get_image_features(**given))

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        return features(self.model.get_text_features(**tokens))


def features(found: Any) -> Tensor:
    """The embeddings in what get_image_features and get_text_features return: a tensor, an output, or a tuple.

    Raises:
        ValueError: an output without pooler_output.

    Example:
        >>> from types import SimpleNamespace
        >>> x = torch.ones(2, 3)
        >>> features(x) is x, features(SimpleNamespace(pooler_output=x)) is x
        (True, True)
    """
    if isinstance(found, Tensor):
        return found
    pooled = found[1] if isinstance(found, tuple) and len(found) > 1 else getattr(found, "pooler_output", None)
    if not isinstance(pooled, Tensor):
        raise ValueError(f"model: expected a tensor or an output with pooler_output, got {type(found).__name__}")
    return pooled


@dataclass(frozen=True)
class Preprocess:
    """A PIL image as the model's processor sees it, alone: its pixels, or all that the processor says of them."""

    processor: Any

    def __call__(self, image: Any) -> Any:
        found = {key: value[0] for key, value in self.processor(images=image, return_tensors="pt").items()}
        return found["pixel_values"] if list(found) == ["pixel_values"] else found


@dataclass(frozen=True)
class Tokenizer:
    """Texts as the model's processor sees them."""

    processor: Any
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(self.processor(text=list(texts), return_tensors="pt", **self.options))


@dataclass(frozen=True)
class Longer:
    """Which texts have more tokens than the context."""

    tokenizer: Any
    context: int

    def __call__(self, texts: list[str]) -> list[bool]:
        # `verbose` would say of the first that it is too long for the model.
        found = self.tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
        return [len(tokens) > self.context for tokens in found]
