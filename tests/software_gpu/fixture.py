"""The fixture `cuda_device`: the GPU where there is one, the device made of software elsewhere."""

import pytest
import torch

from .device import RealDevice, machine, with_library


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
        return RealDevice()
    return request.getfixturevalue("software_gpu")
