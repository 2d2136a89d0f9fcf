"""Models of open_clip: by its names, checkpoints, configurations and folders."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapkern import _check, files
from gapkern._logs import quiet
from gapkern.models import identity

BUNDLED = ("local-dir:", "hf-hub:")  # whose weights come with the model


def load(model: str, pretrained: str | None) -> dict[str, Any]:
    """The parts of a `Model`; see `gapkern.models.load`."""
    open_clip = _check.extra("open_clip", "open_clip_torch", "demo")
    bundled = model.startswith(BUNDLED)
    if bundled == (pretrained is not None):
        expected = "none, as the weights come with the model" if bundled else "a tag or a checkpoint"
        raise ValueError(f"pretrained: expected {expected}, got {pretrained!r} for {model}")
    name, known_as = _identify(open_clip, model, pretrained)
    with quiet():  # open_clip logs what it raises too; one of the two is enough
        module, preprocess = open_clip.create_model_from_pretrained(name, pretrained)
        tokenizer = open_clip.get_tokenizer(name)
    context = getattr(tokenizer, "context_length", None)
    return {
        "module": module,
        "preprocess": preprocess,
        "tokenizer": tokenizer,
        "id": known_as,
        "context": context,
        "longer": Longer(tokenizer, context) if context else None,
    }


@dataclass(frozen=True)
class Longer:
    """Which texts have more tokens than the context: those that fill one more column."""

    tokenizer: Callable[..., Any]
    context: int

    def __call__(self, texts: list[str]) -> list[bool]:
        found = self.tokenizer(texts, context_length=self.context + 1)
        padding = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", None) or 0
        # The last token of a full row is the end's, which some tokenizers blank afterwards.
        column = -2 if getattr(self.tokenizer, "strip_sep_token", False) else -1
        return [bool(full) for full in found[:, column] != padding]


def _identify(open_clip: Any, model: str, pretrained: str | None) -> tuple[str, str]:
    """The name under which open_clip knows the model, and the id for manifests."""
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise ValueError(f"model: expected a folder with open_clip_config.json, got {folder}")
        return model, f"local-dir/sha256:{identity.of_folder(folder, kept=identity.KEPT[:5])}"
    name = model
    if model.endswith(".json"):
        try:
            config = files.read_json(model, name="model")
        except OSError as error:
            raise ValueError(f"model: expected JSON of a model's configuration in {model}, got {error}") from None
        if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
            raise ValueError(f"model: expected embed_dim, vision_cfg and text_cfg in {model}")
        open_clip.add_model_config(model)
        name = Path(model).stem
    if model.startswith("hf-hub:"):
        return name, model
    if os.path.isfile(pretrained or ""):
        return name, f"{name}/sha256:{files.digest(pretrained or '')[:16]}"
    return name, f"{name}/{pretrained}"
