"""transformers' image-text models with gapkern's losses: their own forward would form the matrix of logits."""

import functools
import inspect
import types
import typing
from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses.functional import contrastive_loss, sigmoid_loss


class patch_transformers:
    """Makes `model(**batch, return_loss=True)` return the loss without the logits.

    For models of transformers with `get_image_features`, `get_text_features` and `logit_scale`, such as CLIPModel and
    SiglipModel. In effect at once, for this model alone; `undo()` or leaving a `with` block takes it back. Calls
    without return_loss are the model's own. Trainers, DistributedDataParallel and copies of the model see the patched
    forward.

    Args:
        model: a model, changed in place.
        loss: (images, texts, logit_scale, logit_bias, **options) -> loss; None: `sigmoid_loss` for models with a
            logit_bias, `contrastive_loss` for others, which is what they are trained with.
        options: of the loss: group, exchange, positives, ... A batch may hold `ids`, for the loss.

    The patched forward returns the model's output class with loss, image_embeds, text_embeds and the encoders' outputs;
    its logits are None.

    Raises:
        TypeError: a model without these parts.

    Example:
        >>> from transformers import CLIPConfig, CLIPModel
        >>> small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> text, vision = {**small, "vocab_size": 9, "eos_token_id": 2}, {**small, "image_size": 8, "patch_size": 4}
        >>> model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
        >>> batch = {"input_ids": torch.tensor([[0, 3, 2], [0, 4, 2]]), "pixel_values": torch.ones(2, 3, 8, 8)}
        >>> with patch_transformers(model):
        ...     output = model(**batch, return_loss=True)
        >>> output.loss.shape, output.logits_per_image is None
        (torch.Size([]), True)
    """

    def __init__(self, model: torch.nn.Module, *, loss: Any = None, **options: Any):
        for name in ("get_image_features", "get_text_features", "logit_scale"):
            if not hasattr(model, name):
                raise TypeError(f"model: expected transformers' CLIP, SigLIP or alike, got {type(model).__name__}")
        self.model = model
        patched: Any = model
        forward = _forward_of(patched.__class__)
        patched._gapkern_loss = loss, options
        patched.forward = types.MethodType(forward, patched)

    def undo(self) -> None:
        """Gives the model its own forward back."""
        for name in ("forward", "_gapkern_loss"):
            self.model.__dict__.pop(name, None)

    def __enter__(self) -> "patch_transformers":
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()


def _output_class(model_class: Any) -> Any:
    """What the forward of a model's class returns: a dataclass with a loss."""
    found = typing.get_type_hints(inspect.unwrap(model_class.forward)).get("return")
    for kind in (found, *typing.get_args(found)):
        if {"loss", "image_embeds", "text_embeds"} <= set(getattr(kind, "__dataclass_fields__", ())):
            return kind
    raise TypeError(f"model: expected a forward that returns a loss and embeddings, got {model_class.__name__}'s")


@functools.cache
def _forward_of(model_class: Any) -> Any:
    theirs, output_class = model_class.forward, _output_class(model_class)
    image_names, text_names, names = (
        list(inspect.signature(f).parameters)[1:]
        for f in (model_class.get_image_features, model_class.get_text_features, theirs)
    )

    @functools.wraps(theirs)
    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        named |= zip(names, arguments, strict=False)
        ids = named.pop("ids", None)
        if not named.pop("return_loss", None):
            return theirs(self, **named)
        as_tuple = named.pop("return_dict", None) is False
        of_images = {k: v for k, v in named.items() if k in image_names or k not in text_names}
        of_texts = {k: v for k, v in named.items() if k in text_names or k not in image_names}
        image_output, text_output = self.get_image_features(**of_images), self.get_text_features(**of_texts)
        images, texts = (_embeddings(output) for output in (image_output, text_output))
        loss, options = self._gapkern_loss
        bias = getattr(self, "logit_bias", None)
        if loss is None:
            loss = contrastive_loss if bias is None else sigmoid_loss
        if ids is not None:
            options = {**options, "ids": ids}
        texts = texts.to(images.device)
        value = loss(images, texts, self.logit_scale.exp(), *(() if bias is None else (bias,)), **options)
        found = output_class(loss=value, image_embeds=images, text_embeds=texts)
        for name, output in (("vision_model_output", image_output), ("text_model_output", text_output)):
            if name in output_class.__dataclass_fields__ and not isinstance(output, Tensor):
                found[name] = output
        return found.to_tuple() if as_tuple else found

    return forward


def _embeddings(output: Any) -> Tensor:
    """(n, D) unit vectors of what get_*_features returns: a tensor before transformers 5."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(_check.matrix("features", features), dim=-1)
