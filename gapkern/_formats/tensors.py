"""Files of PyTorch's tensors: `.safetensors`, and `.pt` where nothing but tensors is in it; read by mapping."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern._formats.reading import UNREADABLE, Matrix, chosen, matrix, opened, reason

PICKLED = (".pt", ".pth")
NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_safetensors(file: Path, key: str | None, name: str, rows: slice = slice(None)) -> Tensor:
    """A tensor of a `.safetensors` file, mapped: its only one, or that of `key`; or those of its rows, in memory.

    Raises:
        ValueError: there is no such file or key, several tensors and no key, or another format.
    """
    from safetensors import SafetensorError, safe_open

    opened(file, name)
    try:
        with safe_open(file, "pt") as found:
            there = list(found.keys())
            if (key is None and len(there) == 1) or key in there:
                meant = there[0] if key is None else key
                return found.get_tensor(meant) if rows == slice(None) else found.get_slice(meant)[rows]
    except (SafetensorError, *UNREADABLE) as error:
        raise ValueError(f"{name}: expected a .safetensors file, got {file}: {reason(error)}") from None
    chosen(dict.fromkeys(there, True), key, "tensor", file, name)
    raise AssertionError


def safetensors(file: Path, key: str | None, name: str) -> Matrix:
    """The matrix of a `.safetensors` file: its only tensor, or that of `key`; float8 as float32."""
    whole = read_safetensors(file, key, name)

    def part(first: int, last: int) -> Tensor:
        return read_safetensors(file, key, name)[first:last]

    return matrix(file, name, tuple(whole.shape), whole.dtype, part)


def pickled(file: Path, key: str | None, name: str) -> Matrix:
    """A matrix of what `torch.save` wrote: a tensor, or a dict's or list's only matrix or that of `key`; mapped.

    Nothing but tensors and plain containers is unpickled (`weights_only`).

    Raises:
        ValueError: there is no such file or tensor, several and no key, other objects, or another format.
    """
    opened(file, name)

    def whole() -> Tensor:
        found = _tensors(file, name)
        return found[meant].detach()

    tensors = _tensors(file, name)
    fits = {k: t.dim() == 2 and t.dtype.is_floating_point for k, t in tensors.items()}
    if list(tensors) == [""]:
        if key is not None:
            raise ValueError(f"{name}: expected no [key] of a single tensor, got [{key}] of {file}")
        meant = ""
    else:
        meant = chosen(fits, key, "matrix of floating-point numbers", file, name)
    tensor = tensors[meant]
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor in {file}, got one of {tensor.layout}")
    return matrix(file, name, tuple(tensor.shape), tensor.dtype, lambda a, b: whole()[a:b])


def _tensors(file: Path, name: str) -> dict[str, Tensor]:
    """A file's tensors by their names; a single one's is empty."""
    try:
        with warnings.catch_warnings():
            # Of sparse tensors and of other pickle protocols, which are refused below.
            warnings.simplefilter("ignore")
            found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise ValueError(
            f"{name}: expected tensors alone in {file}, got no such file, or other objects, which are not loaded"
        ) from None
    except (RuntimeError, AttributeError, IndexError, *UNREADABLE) as error:
        raise ValueError(f"{name}: expected a file of torch.save, got {file}: {reason(error)}") from None
    if isinstance(found, Tensor):
        return {"": found}
    entries = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list | tuple) else ()
    tensors = {str(key): value for key, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{name}: expected a tensor, or a dict of them, in {file}, got {type(found).__name__}")
    return tensors
