"""A model by its name: which library it is of, on which device, in which precision."""

import os

import torch

from gapkern import _check
from gapkern.models import open_clip, sentence_transformers, transformers
from gapkern.models.model import Model

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIBRARIES = {"hf:": transformers.load, "st:": sentence_transformers.load}


def load(
    model: str,
    pretrained: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
) -> Model:
    """Loads a model of open_clip, transformers or sentence-transformers.

    Each one is shown what its library documents: images by its own preprocessing, texts padded and cut by its own
    tokenizer, with sentence-transformers' default prompt. Code that comes with a model is not run.

    Args:
        model: open_clip's name ("ViT-B-16"); "local-dir:PATH", a folder with open_clip_config.json and weights;
            "hf-hub:ORG/NAME" of open_clip; a JSON file with a model's configuration. "hf:ORG/NAME" or "hf:FOLDER" for
            transformers 5 (CLIP, SigLIP, SigLIP 2, ALIGN and others with get_image_features and get_text_features),
            "st:ORG/NAME" or "st:FOLDER" for sentence-transformers; either may end in @REVISION.
        pretrained: open_clip's tag ("laion2b_s34b_b88k") or a local checkpoint; None for the others.
        device: "auto" takes CUDA where there is one.
        precision: "float32", "bfloat16" or "float16" for products under autocast; "auto" is float32 on the CPU and
            bfloat16, or float16 where a device lacks it, on CUDA. Parameters are float32.

    Raises:
        ValueError: no such model, tag or file; weights that do not fit; no weights at all.
        ImportError: the library is not installed.
    """
    _check.choice("precision", precision, ("auto", *PRECISIONS))
    if not isinstance(model, str):
        raise TypeError(f"model: expected a name, got {type(model).__name__}")
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    pretrained = None if pretrained is None else os.fspath(pretrained)
    library = LIBRARIES.get(model[:3])
    if library is not None and pretrained is not None:
        raise ValueError(
            f"pretrained: expected none, as the weights come with the model, got {pretrained!r} for {model}"
        )
    try:
        parts = open_clip.load(model, pretrained) if library is None else library(model)
    except Exception as error:
        if isinstance(error, ImportError) and "gapkern[" in str(error):
            raise
        # A configuration and weights that are the user's: the libraries and PyTorch raise whatever they lead to.
        if isinstance(error, ValueError) and str(error).startswith(("model: ", "pretrained: ")):
            raise
        reason = (str(error).split("\n")[0] or type(error).__name__) if not isinstance(error, KeyError) else repr(error)
        raise ValueError(f"model: cannot load {model} ({pretrained or 'its own weights'}): {reason}") from None
    if precision == "auto":
        if place.type != "cuda":
            precision = "float32"
        else:
            precision = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    parts["module"] = parts["module"].to(place).eval()
    return Model(**parts, device=place, autocast=PRECISIONS[precision])
