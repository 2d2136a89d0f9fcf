"""The fixture `cuda_device`: the GPU where there is one, the device made of software elsewhere.

A test of CUDA kernels asks for `cuda_device` and passes it CPU tensors: `cuda_device.call("operator", x)` is the
operator's CUDA implementation, `cuda_device.on(function, x)` a whole function whose operators are CUDA's. Such tests
carry the marker `cuda`; those of Hopper's kernels `sm90` too. What only a GPU has (streams, graphs) is marked `gpu`.

The software device interprets instructions: its problems have one or two tiles and a ragged edge in every dimension.
Whatever is larger, or fills a grid of parameters, is `on_gpu(...)`.
"""

import pytest
import torch

from .device import machine, with_library
from .torch_device import TorchDevice


def on_gpu(*values) -> list:
    """These parameters where there is a GPU, none elsewhere: problems that are too large for an interpreter."""
    return list(values) if torch.cuda.is_available() else []


@pytest.fixture(scope="session")
def software_gpu():
    """The device made of software with gapkern's CUDA objects; skips where they are not built."""
    device = with_library()
    if device is None:
        pytest.skip("the CUDA library is not built in this checkout")
    return device


@pytest.fixture(scope="session")
def software_machine():
    """The device alone, for PTX of one's own; skips where the checkout has no native build."""
    device = machine()
    if device is None:
        pytest.skip("no native build in this checkout")
    return device


@pytest.fixture(scope="session")
def cuda_device(request):
    """A CUDA device for tensors in host memory: the GPU where there is one, otherwise the one made of software."""
    if torch.cuda.is_available():
        return TorchDevice("cuda")
    return request.getfixturevalue("software_gpu")


def mark(items) -> None:
    """Tests that ask for `cuda_device` run CUDA kernels, and carry the marker that says so."""
    for item in items:
        if "cuda_device" in getattr(item, "fixturenames", ()):
            item.add_marker("cuda")
