"""The device from Python: built, loaded, and put in the place of the CPU's kernels for a while."""

import contextlib
import ctypes
import functools
import os
import re
import sys
import unittest.mock
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from tests import native

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@dataclass(frozen=True)
class Fault:
    """What the device objects to: the kind, the kernel, the line of its PTX and the statement there."""

    kind: str
    kernel: str
    line: int
    statement: str
    what: str


class Device:
    """A loaded device. `library` has gapkern's CUDA objects (`gapkern_cuda_software`) or none (`software_gpu`)."""

    def __init__(self, path: Path):
        self.path = path
        self.lib = ctypes.CDLL(str(path))
        for name, result, *arguments in (
            ("seed", None, ctypes.c_uint64, ctypes.c_uint64),
            ("multiprocessors", None, ctypes.c_int),
            ("check_races", None, ctypes.c_int),
            ("lane_instructions", ctypes.c_uint64),
            ("fault", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint64),
            ("clear_fault", None),
            ("patch", None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int),
            ("plant", None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64),
            ("substitute", ctypes.c_int, ctypes.c_char_p),
            ("mend", ctypes.c_int),
            ("ptx", ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64),
            ("launches", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint64),
            ("statements", ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64),
            ("report", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint64),
            ("load", ctypes.c_int, ctypes.c_char_p),
            ("unload", None, ctypes.c_int),
            ("map", ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int),
            ("unmap", None),
            (
                "encode",
                ctypes.c_int,
                *[ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64],
                *[ctypes.c_void_p] * 3,
                ctypes.c_int,
            ),
            ("launch", ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64),
            ("knows", ctypes.c_int, ctypes.c_char_p),
        ):
            function = getattr(self.lib, f"software_gpu_{name}")
            function.restype, function.argtypes = result, arguments

    def seed(self, order: int, rounding: int = 0) -> None:
        """Of the order of warps and the moments of what is asynchronous; of the bits that the ISA leaves open."""
        self.lib.software_gpu_seed(order, rounding)

    def fault(self) -> Fault | None:
        """The last one."""
        room = ctypes.create_string_buffer(16384)
        self.lib.software_gpu_fault(room, len(room))
        if not room.value:
            return None
        kind, kernel, line, *rest = room.value.decode().split("|")
        # The statement may have a bar of its own, as in %r1|%p2.
        return Fault(kind, kernel, int(line), "|".join(rest[:-1]), rest[-1])

    def report(self) -> tuple[dict[str, int], dict[str, dict[str, tuple[int, int]]], list[str]]:
        """Launches by kernel; by kernel and instruction form, statements and executions; kernels not understood."""
        room = ctypes.create_string_buffer(self.lib.software_gpu_report(None, 0) + 1)
        self.lib.software_gpu_report(room, len(room))
        kernels, forms, errors = {}, {}, []
        for line in room.value.decode().split("\n"):
            kind, *fields = line.split("\t")
            if kind == "kernel":
                kernels[fields[0]] = int(fields[1])
            elif kind == "form":
                forms.setdefault(fields[0], {})[fields[1]] = int(fields[2]), int(fields[3])
            elif kind == "error":
                errors.append(": ".join(fields))
        return kernels, forms, errors

    def launches(self) -> dict[str, int]:
        """The kernels of the library that were launched in this process, and how often."""
        room = ctypes.create_string_buffer(self.lib.software_gpu_launches(None, 0) + 1)
        self.lib.software_gpu_launches(room, len(room))
        return {name: int(count) for name, count in (row.split("\t") for row in room.value.decode().split("\n") if row)}

    def statements(self, kernel: str) -> list[tuple[int, int, str]]:
        """Line, executions by warps and text of each statement of the first such kernel."""
        room = ctypes.create_string_buffer(self.lib.software_gpu_statements(kernel.encode(), None, 0) + 1)
        self.lib.software_gpu_statements(kernel.encode(), room, len(room))
        rows = (row.split("\t", 2) for row in room.value.decode().split("\n") if "\t" in row)
        return [(int(line), int(count), text) for line, count, text in rows]

    def ptx(self, kernel: str) -> str:
        """The PTX of the first kernel whose name contains `kernel`."""
        size = self.lib.software_gpu_ptx(kernel.encode(), None, 0)
        assert size >= 0, f"no kernel {kernel}"
        room = ctypes.create_string_buffer(size + 1)
        self.lib.software_gpu_ptx(kernel.encode(), room, len(room))
        return room.value.decode()

    @contextlib.contextmanager
    def mistake(self, *changes: tuple):
        """Within, changes are planted.

        (kernel, pattern, replacement[, which]) changes matches of a regular expression in the PTX, all of them or the
        `which`th; (kernel, "grid.x", number) and the like change launches and tensor maps.
        """
        self.lib.software_gpu_clear_fault()
        try:
            for kernel, old, new, *which in changes:
                if isinstance(new, int):
                    self.lib.software_gpu_plant(kernel.encode(), old.encode(), new)
                    continue
                before = self.ptx(kernel)
                matches = list(re.finditer(old, before))
                assert matches, f"{kernel} has no {old}"
                chosen = matches if not which else [matches[which[0]]]
                after = before
                for match in reversed(chosen):
                    after = after[: match.start()] + match.expand(new) + after[match.end() :]
                self.lib.software_gpu_patch(kernel.encode(), before.encode(), after.encode(), 0)
            yield
        finally:
            used = self.lib.software_gpu_mend()
        assert used >= len(changes), f"nothing to plant the mistake in: {changes}"

    @contextlib.contextmanager
    def compiled_anew(self, ptx: str):
        """Within, the kernels of a module are those of this PTX."""
        self.lib.software_gpu_clear_fault()
        try:
            assert self.lib.software_gpu_substitute(ptx.encode()), "no module has these kernels"
            yield
        finally:
            self.lib.software_gpu_mend()

    # --- tiny programs

    def run(
        self, ptx: str, kernel: str, arguments: list, grid=(1, 1, 1), block=(32, 1, 1), cluster=(1, 1, 1), shared=0
    ):
        """Launches a kernel of a PTX text. Tensors become pointers; bytes are passed as they are; ints as 64 bits."""
        lib = self.lib
        lib.software_gpu_clear_fault()
        module = lib.software_gpu_load(ptx.encode())
        if module < 0:
            raise DeviceError(self.fault())
        packed = b""
        for a in arguments:
            if isinstance(a, torch.Tensor):
                packed += lib.software_gpu_map(a.data_ptr(), a.numel() * a.element_size(), 1).to_bytes(8, "little")
            else:
                packed += a if isinstance(a, bytes) else int(a).to_bytes(8, "little", signed=a < 0)
        shape = (ctypes.c_uint32 * 10)(*grid, *block, *cluster, shared)
        code = lib.software_gpu_launch(module, kernel.encode(), shape, packed, len(packed))
        lib.software_gpu_unmap()
        lib.software_gpu_unload(module)
        if code:
            raise DeviceError(self.fault())

    # --- gapkern's operators

    def call(self, name: str, *arguments):
        """The operator's CUDA implementation, on CPU tensors."""
        assert self._loaded
        return getattr(torch.ops.gapkern, name).default.redispatch(CUDA, *arguments)

    def on(self, function, *arguments, **options):
        """`function(*arguments, **options)`: gapkern's operators run their CUDA implementations on this device, and its
        Python chooses as it does for CUDA tensors on a Hopper."""
        from gapkern import _search
        from gapkern.ops.contrastive import dispatch

        reason = dispatch.unsupported_reason
        with contextlib.ExitStack() as changes:
            for owner, name, as_on_cuda in (
                (
                    dispatch,
                    "unsupported_reason",
                    lambda _, *rest, **named: reason(torch.device("cuda", 0), *rest, **named),
                ),
                (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
                (_search, "has_tiles", lambda gallery: gallery.dtype != torch.float64),
            ):
                changes.enter_context(unittest.mock.patch.object(owner, name, as_on_cuda))
            changes.enter_context(routed({name: functools.partial(self.call, name) for name in self.operators()}))
            return function(*arguments, **options)

    @functools.cached_property
    def _loaded(self) -> bool:
        import gapkern  # noqa: F401  (the operators' schemas)

        with quiet():
            torch.ops.load_library(self.path)
        return True

    def operators(self) -> list[str]:
        assert self._loaded
        return operators()


def operators() -> list[str]:
    """gapkern's that take tensors."""
    names = [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("gapkern::")]
    schemas = {name: getattr(torch.ops.gapkern, name).default._schema for name in names if "." not in name}
    return sorted(name for name, schema in schemas.items() if any("Tensor" in str(a.type) for a in schema.arguments))


@contextlib.contextmanager
def routed(routes: dict):
    """Within, these functions are the operators' implementations for CPU tensors."""
    library = torch.library.Library("gapkern", "IMPL")
    try:
        with warnings.catch_warnings(), quiet():  # kernels are replaced on purpose
            warnings.simplefilter("ignore")
            for name, route in routes.items():
                library.impl(name, route, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


class DeviceError(RuntimeError):
    """A launch that the device refused or stopped."""

    def __init__(self, fault: Fault | None):
        super().__init__(str(fault))
        self.fault = fault


@contextlib.contextmanager
def quiet():
    """What C++ writes to the terminal meanwhile is dropped: the dispatcher's warnings, CUTLASS's complaints."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    try:
        yield
    finally:
        for stream, number in zip((1, 2), kept, strict=True):
            os.dup2(number, stream)
            os.close(number)
        os.close(nowhere)


@functools.cache
def machine() -> Device | None:
    """The device alone, for PTX of one's own."""
    path = native.device("software_gpu")
    return Device(path) if path else None


@functools.cache
def with_library() -> Device | None:
    """The device with gapkern's CUDA objects; None where they are not built."""
    path = native.device("gapkern_cuda_software")
    if path is None:
        return None
    device = Device(path)
    assert device.operators()
    return device
