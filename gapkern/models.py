"""open_clip's models behind one face: loaded by name, checkpoint or folder, known by an id, encoding to float32."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _check, files
from gapkern._logs import quiet
from gapkern.prompts import Templates, check_templates, fill

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Model:
    """An image-text model.

    Attributes:
        module: with encode_image and encode_text.
        preprocess: of a PIL image, to (3, H, W). Images are as PIL opens them: EXIF orientation is not applied, as in
            open_clip's training and evaluation; `PIL.ImageOps.exif_transpose` turns a picture before.
        tokenizer: of a list of strings, to (B, context).
        id: what manifests call it; of a local checkpoint it holds the hash of its bytes, and no path.
        device: where it is.
        autocast: the dtype of products under autocast; None for float32 throughout.
    """

    module: Any
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    id: str
    device: torch.device
    autocast: torch.dtype | None = None

    @property
    def precision(self) -> str:
        """The dtype of products, by name."""
        return str(self.autocast or torch.float32).removeprefix("torch.")

    def encode_images(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """(B, D) float32 embeddings of preprocessed images (B, 3, H, W), L2-normalised in float32."""
        return self._encode(self.module.encode_image, images, normalize)

    def encode_texts(self, texts: str | Sequence[str], *, normalize: bool = True) -> Tensor:
        """(B, D) float32 embeddings of strings, or (1, D) of one string, L2-normalised in float32."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise TypeError(f"texts: expected strings, got {type(wrong[0]).__name__}")
        return self._encode(self.module.encode_text, self.tokenizer(texts), normalize)

    @torch.inference_mode()
    def _encode(self, encode: Callable[[Tensor], Tensor], batch: Tensor, normalize: bool) -> Tensor:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            found = encode(batch.to(self.device, non_blocking=True))
        found = found.float()
        return torch.nn.functional.normalize(found, dim=1) if normalize else found

    def classifier(self, names: Sequence[str], templates: Templates | Sequence[str], batch_size: int = 256) -> Tensor:
        """Class vectors (C, D), float32: see `zero_shot_classifier`.

        Args:
            names: the classes, in the order of the vectors.
            templates: with {c} for the class; or each class's own prompts.
            batch_size: texts at a time.

        Raises:
            ValueError: no names or templates, a template without {c}, no prompts of a class.
        """
        if isinstance(names, str) or not names:
            raise ValueError(f"names: expected a list of at least one class, got {names!r}")
        templates = templates if isinstance(templates, dict) else check_templates(templates)
        filled = fill(templates, list(names))
        texts = [text for prompts in filled for text in prompts]
        parts = [
            self.encode_texts(texts[i : i + batch_size], normalize=False) for i in range(0, len(texts), batch_size)
        ]
        each = torch.cat(parts).split([len(prompts) for prompts in filled])
        return torch.cat([zero_shot_classifier(part[None]) for part in each])


def zero_shot_classifier(prompts: Tensor) -> Tensor:
    """Class vectors (C, D) of prompts' embeddings (C, T, D): normalise, mean over templates, normalise.

    Source: Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, 2021.

    Example:
        >>> zero_shot_classifier(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])).tolist()
        [[0.70..., 0.70...]]
    """
    prompts = _check.finite("prompts", _check.tensor("prompts", prompts))
    if prompts.dim() != 3 or 0 in prompts.shape:
        raise ValueError(f"prompts: expected shape (C, T, D), got {tuple(prompts.shape)}")
    unit = torch.nn.functional.normalize(prompts.float(), dim=2)
    return torch.nn.functional.normalize(unit.mean(1), dim=1)


def load(
    model: str,
    pretrained: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
) -> Model:
    """Loads a model of open_clip.

    Args:
        model: open_clip's name ("ViT-B-16"); "local-dir:PATH", a folder with open_clip_config.json and weights;
            "hf-hub:ORG/NAME"; or a JSON file with a model's configuration.
        pretrained: open_clip's tag ("laion2b_s34b_b88k") or a local checkpoint; None for local-dir: and hf-hub:.
        device: "auto" takes CUDA where there is one.
        precision: "float32", "bfloat16" or "float16" for products under autocast; "auto" is float32 on the CPU and
            bfloat16, or float16 where a device lacks it, on CUDA.

    Raises:
        ValueError: no such model, tag or file; weights that do not fit; no weights at all.
        ImportError: open_clip is not installed.
    """
    open_clip = _check.extra("open_clip", "open_clip_torch", "demo")
    _check.choice("precision", precision, ("auto", *PRECISIONS))
    if not isinstance(model, str):
        raise TypeError(f"model: expected a name, got {type(model).__name__}")
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    pretrained = None if pretrained is None else os.fspath(pretrained)
    bundled = model.startswith(("local-dir:", "hf-hub:"))
    if bundled == (pretrained is not None):
        expected = "none, as the weights come with the model" if bundled else "a tag or a checkpoint"
        raise ValueError(f"pretrained: expected {expected}, got {pretrained!r} for {model}")
    name, identity = _identify(open_clip, model, pretrained)
    try:
        with quiet():  # open_clip logs what it raises too; one of the two is enough
            module, preprocess = open_clip.create_model_from_pretrained(name, pretrained)
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        # A configuration and weights that are the user's: open_clip and PyTorch raise whatever they lead to.
        reason = (str(error).split("\n")[0] or type(error).__name__) if not isinstance(error, KeyError) else repr(error)
        raise ValueError(f"model: cannot load {model} ({pretrained or 'its own weights'}): {reason}") from None
    if precision == "auto":
        if place.type != "cuda":
            precision = "float32"
        else:
            precision = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return Model(module.to(place).eval(), preprocess, tokenizer, identity, place, PRECISIONS[precision])


def _identify(open_clip: Any, model: str, pretrained: str | None) -> tuple[str, str]:
    """The name under which open_clip knows the model, and the id for manifests."""
    if model.startswith("local-dir:"):
        return model, f"local-dir/sha256:{_hash_of(Path(model.removeprefix('local-dir:')))}"
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


def _hash_of(folder: Path) -> str:
    """Of a model's folder: its configuration and weights, by name; no other file changes what it is."""
    if not (folder / "open_clip_config.json").is_file():
        raise ValueError(f"model: expected a folder with open_clip_config.json, got {folder}")
    parts = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".safetensors", ".bin", ".pth", ".pt")]
    return hashlib.sha256("".join(f"{p.name} {files.digest(p)}\n" for p in parts).encode()).hexdigest()[:16]
