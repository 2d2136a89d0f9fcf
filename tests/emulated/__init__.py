"""The CPU library on a processor that is not here: cross-compiled, and run under qemu without PyTorch.

`torch.cpp` is as much of PyTorch's C ABI as the library asks for, `run.cpp` calls its operators on what it is sent.
`python -m tests.emulated` puts them in the place of this processor's, and runs the operators' own tests: plugin.py.
"""

import functools
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.native import tool

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
_INTEGERS = {torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4, torch.bool: 11}
DTYPES = {**_INTEGERS, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
# With FEAT_BF16 and without; what both have, the least that any 64-bit Arm has, is NEON.
PROCESSORS = {"neonbf16": "max", "neon": "cortex-a72"}


def missing() -> str | None:
    """What is not installed that this needs."""
    absent = [name for name in (COMPILER, EMULATOR, "cmake") if tool(name) is None]
    return f"{', '.join(absent)} not installed (apt install g++-aarch64-linux-gnu qemu-user)" if absent else None


def build(folder: Path) -> Path:
    """The library for 64-bit Arm, the program that runs it and PyTorch's stand-in, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    common = [COMPILER, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC"]
    for name, sources in (("libtorch_cpu.so", [HERE / "torch.cpp"]), ("libc10.so", ["-x", "c++", os.devnull])):
        _run([*common, "-shared", *sources, f"-Wl,-soname,{name}", "-o", folder / name])
    _run([*common, HERE / "run.cpp", f"-L{folder}", "-ltorch_cpu", "-Wl,-rpath,$ORIGIN", "-o", folder / "run"])
    configure = [
        *(tool("cmake"), "-S", ROOT, "-B", folder / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *(f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}", "-DGAPKERN_CUDA=off"),
        f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}",
        *(f"-DGAPKERN_TORCH={Path(torch.__file__).parent}", f"-DGAPKERN_TORCH_LIB={folder}"),
    ]
    _run(configure)
    _run([tool("cmake"), "--build", folder / "build", "--target", "gapkern_cpu", "--parallel", os.cpu_count() or 1])
    shutil.copy(folder / "build" / "libgapkern_cpu.so", folder)
    return folder


def _run(command: list[Any]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


class Processor:
    """Runs operators on one emulated processor, in a process that waits for the next one.

    Attributes:
        isa: the instruction set that the library chose there.
    """

    def __init__(self, folder: Path, processor: str, wish: str | None = None):
        environment = {"QEMU_LD_PREFIX": "/usr/aarch64-linux-gnu", "PATH": os.environ["PATH"]}
        if wish:
            environment["GAPKERN_ISA"] = wish
        command = [EMULATOR, "-cpu", processor, folder / "run", folder / "libgapkern_cpu.so"]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.isa = self._text()

    def close(self) -> None:
        self._process.communicate()

    def __call__(self, name: str, *arguments: Any, outputs: int = 1) -> list[torch.Tensor]:
        """What an operator returns, called with all of its arguments."""
        packed = b"".join(map(_argument, arguments))
        self._process.stdin.write(_text(name) + _number(outputs) + _number(len(arguments)) + packed)
        self._process.stdin.flush()
        error = self._text()
        if error:
            raise RuntimeError(error)
        return [self._tensor() for _ in range(outputs)]

    def _take(self, size: int) -> bytes:
        data = self._process.stdout.read(size)
        assert len(data) == size, f"the emulator ended with {self._process.wait()}"
        return data

    def _number(self) -> int:
        return struct.unpack("<q", self._take(8))[0]

    def _text(self) -> str:
        return self._take(self._number()).decode()

    def _tensor(self) -> torch.Tensor:
        dtype = {number: dtype for dtype, number in DTYPES.items()}[self._number()]
        shape = [self._number() for _ in range(self._number())]
        count = torch.Size(shape).numel()
        data = bytearray(self._take(count * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


def _number(n: int) -> bytes:
    return struct.pack("<q", n)


def _text(s: str) -> bytes:
    return _number(len(s.encode())) + s.encode()


@functools.singledispatch
def _argument(value: Any) -> bytes:
    raise TypeError(f"no argument of type {type(value)}")


@_argument.register
def _(value: torch.Tensor) -> bytes:
    shape = b"".join(map(_number, (DTYPES[value.dtype], value.dim(), *value.shape)))
    return _number(0) + shape + value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@_argument.register(bool)
@_argument.register(int)
def _(value: int) -> bytes:
    return _number(1) + _number(int(value))


@_argument.register
def _(value: float) -> bytes:
    return _number(1) + struct.pack("<d", value)


@_argument.register
def _(value: str) -> bytes:
    return _number(2) + _text(value)


@_argument.register(list)
def _(value: list[int]) -> bytes:
    return _number(3) + _number(len(value)) + b"".join(_number(int(item)) for item in value)
