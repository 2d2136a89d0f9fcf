"""The machine itself: tiny PTX programs for every instruction form that the library's PTX has, and random ones."""

import numpy as np
import torch

from .device import Device, DeviceError
from .scalars import SCALARS, Scalar, draw, width

TEXT = ".version 9.0\n.target sm_90a\n.address_size 64\n"
LOAD = {"h": "ld.global.u16", "w": "ld.global.u32", "d": "ld.global.u64"}
STORE = {"h": "st.global.u16", "w": "st.global.u32", "d": "st.global.u64"}
REGISTER = {"p": ".pred", "h": ".b16", "w": ".b32", "d": ".b64"}


def program(body: str, pointers: int, threads: int = 32, parameters: str = "", before: str = "") -> str:
    """A kernel `k` of pointers %a0 ... , with %t its thread and %o eight times that."""
    names = [f".param .u64 p{i}" for i in range(pointers)] + ([parameters] if parameters else [])
    loads = "\n".join(f"ld.param.u64 %a{i}, [p{i}];" for i in range(pointers))
    return f"""{TEXT}{before}
.visible .entry k({", ".join(names)}) .maxntid {threads}, 1, 1 {{
.reg .b64 %a<{pointers + 1}>;
.reg .b32 %t;
.reg .b64 %o;
mov.u32 %t, %tid.x;
mul.wide.u32 %o, %t, 8;
{loads}
{body}
ret;
}}
"""


def cells(values: np.ndarray) -> torch.Tensor:
    """Eight bytes for each value, the upper ones zero."""
    if values.dtype == bool:
        values = values.astype(np.uint32)
    bits = values.view(f"u{values.itemsize}").astype(np.uint64)
    return torch.from_numpy(bits.view(np.int64).copy())


def values_of(out: torch.Tensor, kind: str) -> np.ndarray:
    bits = out.numpy().view(np.uint64)
    if kind == "pred":
        return bits != 0
    from .scalars import TYPES

    size = np.dtype(TYPES[kind]).itemsize
    return bits.astype(f"u{size}").view(TYPES[kind])


def agree(found: np.ndarray, expected: np.ndarray, within: float) -> np.ndarray:
    if found.dtype.kind != "f":
        return found == expected
    same = (found == expected) & (np.signbit(found) == np.signbit(expected)) | np.isnan(found) & np.isnan(expected)
    if within:
        # 0 and a number that is all but subnormal are one flush apart.
        with np.errstate(invalid="ignore"):
            near = np.abs(found - expected) <= within * np.abs(expected) + 1.3e-38 * (found.dtype == np.float32)
        same |= near & np.isfinite(expected) & np.isfinite(found)
        same |= np.isinf(found) & (np.abs(expected) > 3.39e38) | np.isinf(expected) & (np.abs(found) > 3.39e38)
    return same


def fetch(name: str, kind: str, pointer: int, offset: str = "%o") -> str:
    w = width(kind)
    at = f"{{ .reg .b64 x; add.s64 x, %a{pointer}, {offset}; "
    if w == "p":
        return f"{at}.reg .b32 y; ld.global.u32 y, [x]; setp.ne.s32 {name}, y, 0; }}"
    return f"{at}{LOAD[w]} {name}, [x]; }}"


def keep(name: str, kind: str, pointer: int) -> str:
    w = width(kind)
    at = f"{{ .reg .b64 x; add.s64 x, %a{pointer}, %o; "
    if w == "p":
        return f"{at}.reg .b32 y; selp.u32 y, 1, 0, {name}; st.global.u32 [x], y; }}"
    return f"{at}{STORE[w]} [x], {name}; }}"


def check_scalar(device: Device, scalar: Scalar, threads: int = 256) -> None:
    rng = np.random.default_rng(sum(scalar.form.encode()))
    inputs = [draw(rng, kind, threads) for kind in scalar.operands]
    if scalar.form.startswith("shl") or scalar.form.startswith("shr"):
        inputs[1] = rng.integers(0, 80, threads).astype(np.uint32)
    if scalar.form.startswith("bfi"):
        inputs[2:] = [rng.integers(0, 40, threads).astype(np.uint32) for _ in range(2)]
    if scalar.form.split(".")[0] in ("div", "rem") and scalar.operands[0][0] in "su":
        inputs[1] = np.where(inputs[1] == 0, inputs[1].dtype.type(3), inputs[1])
    names = [f"%x{i}" for i in range(len(inputs))]
    body = "".join(f".reg {REGISTER[width(k)]} {n};\n" for k, n in zip(scalar.operands, names, strict=True))
    body += f".reg {REGISTER[width(scalar.result)]} %r;\n"
    body += "\n".join(fetch(n, k, i) for i, (k, n) in enumerate(zip(scalar.operands, names, strict=True)))
    body += f"\n{scalar.form} %r, {', '.join(names)};\n" + keep("%r", scalar.result, len(inputs))
    out = torch.zeros(threads, dtype=torch.int64)
    text = program(body, len(inputs) + 1, threads)
    device.run(text, "k", [*map(cells, inputs), out], block=(threads, 1, 1))
    with np.errstate(all="ignore"):
        expected = scalar.of(*inputs)
    found = values_of(out, scalar.result)
    good = agree(found, np.asarray(expected), scalar.within)
    if not good.all():
        i = int(np.flatnonzero(~good)[0])
        raise AssertionError(f"{scalar.form} of {[v[i] for v in inputs]}: got {found[i]!r}, expected {expected[i]!r}")


# --- random programs

# Division by zero is not defined, and the approximations' last bits are free.
_RANDOM = [
    s for s in SCALARS.values() if not s.within and s.form.split(".")[0] not in ("div", "rem", "fma", "cvta", "mov")
]
_RANDOM += [SCALARS["div.rn.f32"], SCALARS["div.rn.f64"]]


def check_random(device: Device, seed: int, length: int = 12) -> int:
    """A random straight-line program of `length` instructions; returns how many values were compared."""
    rng = np.random.default_rng(seed)
    kinds = ["s32", "u64", "f32", "f64", "u16", "pred"]
    body, known = "", []
    inputs = [draw(rng, kind, 32) for kind in kinds]
    for i, kind in enumerate(kinds):
        body += f".reg {REGISTER[width(kind)]} %i{i};\n{fetch(f'%i{i}', kind, i)}\n"
        known.append((f"%i{i}", kind, inputs[i]))
    with np.errstate(all="ignore"):
        for step in range(length):
            scalar = _RANDOM[int(rng.integers(len(_RANDOM)))]
            chosen, names = [], []
            for kind in scalar.operands:
                of_width = [v for v in known if width(v[1]) == width(kind)]
                # The latest are taken more often, so that results feed on results.
                name, _, value = of_width[-1 - min(int(rng.geometric(0.4)) - 1, len(of_width) - 1)]
                names.append(name)
                chosen.append(value if kind == "pred" else value.view(_types(kind)))
            result = np.asarray(scalar.of(*chosen))
            if result.dtype.kind == "f" and np.isnan(result).any():  # payloads are the device's own
                canonical = np.array(
                    [0x7FFFFFFF if result.itemsize == 4 else 0x7FFFFFFFFFFFFFFF], f"u{result.itemsize}"
                )
                result = np.where(np.isnan(result), canonical.view(result.dtype)[0], result)
                if result.itemsize == 8 or scalar.form.split(".")[0] in (
                    "abs",
                    "neg",
                    "selp",
                    "min",
                    "max",
                    "copysign",
                ):
                    continue
            name = f"%s{step}"
            body += f".reg {REGISTER[width(scalar.result)]} {name};\n{scalar.form} {name}, {', '.join(names)};\n"
            known.append((name, scalar.result, result))
    kept = known[len(kinds) :]
    outs = [torch.zeros(32, dtype=torch.int64) for _ in kept]
    body += "\n".join(keep(name, kind, len(kinds) + i) for i, (name, kind, _) in enumerate(kept))
    device.run(program(body, len(kinds) + len(kept)), "k", [*map(cells, inputs), *outs])
    for (name, kind, expected), out in zip(kept, outs, strict=True):
        found = values_of(out, kind)
        size = 1 if kind == "pred" else found.itemsize
        same = found.view(f"u{size}") == np.ascontiguousarray(expected).view(f"u{size}")
        assert same.all(), f"seed {seed}, {name}: {found[~same][0]!r}, expected {expected[~same][0]!r}\n{body}"
    return 32 * len(kept)


def _types(kind):
    from .scalars import TYPES

    return TYPES[kind]


__all__ = ["DeviceError", "check_random", "check_scalar", "program"]
