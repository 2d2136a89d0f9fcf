"""A model as the rest sees it, whichever library it is of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gapkern import _check
from gapkern.prompts import Templates, check_templates, fill


def batch(images: Sequence[Any]) -> Any:
    """Preprocessed images as a batch: tensors stacked, dictionaries by name, and all else as a list.

    Example:
        >>> batch([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)]).shape
        torch.Size([2, 3, 2, 2])
        >>> batch([{"pixels": torch.zeros(4)}])["pixels"].shape
        torch.Size([1, 4])
    """
    first = images[0]
    if isinstance(first, Tensor):
        return torch.stack(list(images))
    if isinstance(first, dict):
        return {key: torch.stack([image[key] for image in images]) for key in first}
    return list(images)


@dataclass(frozen=True)
class Model:
    """An image-text model.

    Attributes:
        module: with encode_image and encode_text, of what `preprocess` and `tokenizer` give.
        preprocess: of a PIL image, to a tensor (3, H, W), a dictionary of tensors, or the image itself where the
            library wants it. Images are as PIL opens them: EXIF orientation is not applied, as in open_clip's training
            and evaluation; `PIL.ImageOps.exif_transpose` turns a picture before.
        tokenizer: of a list of strings, to (B, context), a dictionary of tensors, or the strings themselves.
        id: what manifests call it; of a local checkpoint it holds the hash of its bytes, and no path.
        device: where it is.
        autocast: the dtype of products under autocast; None for float32 throughout.
        modalities: "image", "text" or both: what it embeds.
        context: the tokens of a text that it reads, with those that mark its ends; None where nothing says it.
        longer: which of some texts have more tokens than that.
    """

    module: Any
    preprocess: Callable[[Any], Any]
    tokenizer: Callable[[list[str]], Any]
    id: str
    device: torch.device
    autocast: torch.dtype | None = None
    modalities: tuple[str, ...] = ("image", "text")
    context: int | None = None
    longer: Callable[[list[str]], list[bool]] | None = None

    @property
    def precision(self) -> str:
        """The dtype of products, by name."""
        return str(self.autocast or torch.float32).removeprefix("torch.")

    def encode_images(self, images: Any, *, normalize: bool = True) -> Tensor:
        """(B, D) float32 embeddings of B preprocessed images (`batch`), L2-normalised in float32.

        Raises:
            ValueError: the model embeds no images, or not to (B, D).
        """
        self.check("image", "images")
        return self._encode(self.module.encode_image, images, normalize)

    def encode_texts(self, texts: str | Sequence[str], *, normalize: bool = True) -> Tensor:
        """(B, D) float32 embeddings of strings, or (1, D) of one string, L2-normalised in float32."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise TypeError(f"texts: expected strings, got {type(wrong[0]).__name__}")
        self.check("text", "texts")
        return self._encode(self.module.encode_text, self.tokenizer(texts), normalize)

    def check(self, modality: str, name: str) -> None:
        """Raises ValueError unless the model embeds "image" or "text"; `name` is the argument that asks for it."""
        if modality not in self.modalities:
            raise ValueError(f"{name}: expected a model of {modality}s, got {self.id} of {self.modalities[0]}s alone")

    def truncated(self, texts: Sequence[str]) -> int | None:
        """How many of these texts are longer than the model's context, so that it reads their beginnings alone.

        None where the model does not say.
        """
        if self.context is None or self.longer is None:
            return None
        # No tokenizer makes more tokens of plain characters than there are, and at most four mark the ends.
        doubtful = [text for text in texts if not (text.isascii() and len(text) + 4 <= self.context)]
        return sum(self.longer(doubtful)) if doubtful else 0

    @torch.inference_mode()
    def _encode(self, encode: Callable[[Any], Tensor], batch: Any, normalize: bool) -> Tensor:
        batch = pytree.tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), batch)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            found = encode(batch)
        if not isinstance(found, Tensor) or found.dim() != 2:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"model: expected embeddings (B, D) of {self.id}, got {got}")
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
