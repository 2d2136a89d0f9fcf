"""What products of float32 may round to, as PyTorch's settings say."""

import torch

from gapkern.ops.constant import constant


@constant
def matmul_precision(device: str) -> str:
    """ "highest", "high" or "medium" for this type of device; asked once per compiled graph.

    `torch.get_float32_matmul_precision()` raises where the settings of single backends say more than it could, and
    where it does not, theirs may be newer.

    Example:
        >>> matmul_precision("cpu")
        'highest'
    """
    backend = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(device)
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if device == "cpu" and setting is not None:
        return {"bf16": "medium", "tf32": "high"}.get(setting, "highest")
    if setting in ("ieee", "none"):
        return "highest"
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest" if setting is None else "high"
