"""What scalar instructions must give: the PTX ISA's words in numpy and exact fractions, apart from the device's C++."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

TYPES = {
    "s16": np.int16,
    "u16": np.uint16,
    "b16": np.uint16,
    "s32": np.int32,
    "u32": np.uint32,
    "b32": np.uint32,
    "s64": np.int64,
    "u64": np.uint64,
    "b64": np.uint64,
    "f32": np.float32,
    "f64": np.float64,
}
WIDTH = {1: "p", 2: "h", 4: "w", 8: "d"}
SPECIAL = {
    np.float32: [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, 0.5, 2.5],
    np.float64: [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 5e-324, -1e-310, 2.2250738585072014e-308, 1.7e308, 0.5],
}


@dataclass(frozen=True)
class Scalar:
    """An instruction: the types of result and operands ("pred" for predicates), and the function of arrays."""

    form: str
    result: str
    operands: tuple[str, ...]
    of: Callable
    within: float = 0.0  # the relative error that the ISA allows


def width(kind: str) -> str:
    return "p" if kind == "pred" else WIDTH[np.dtype(TYPES[kind]).itemsize]


def draw(rng, kind: str, n: int) -> np.ndarray:
    """Values of a type, the difficult ones among them."""
    if kind == "pred":
        return rng.integers(0, 2, n).astype(bool)
    dtype = TYPES[kind]
    size = np.dtype(dtype).itemsize
    bits = rng.integers(0, 2**64, n, dtype=np.uint64)
    if dtype in SPECIAL:
        values = (rng.standard_normal(n) * 2.0 ** rng.integers(-20, 20, n)).astype(dtype)
        values[: n // 4] = bits[: n // 4].astype(f"u{size}").view(dtype)
        chosen = rng.integers(0, len(SPECIAL[dtype]), n // 4)
        values[n // 4 : n // 2] = np.array(SPECIAL[dtype], dtype)[chosen][: n // 2 - n // 4]
        rng.shuffle(values)
        return values
    values = (bits >> rng.integers(0, 64, n, dtype=np.uint64)).astype(f"u{size}").view(dtype)
    return np.where(rng.integers(0, 4, n) == 0, ~values, values)


def rounded(x: Fraction, dtype) -> float:
    """To nearest, ties to even, once."""
    if x == 0:
        return 0.0
    digits, least = (24, -149) if dtype == np.float32 else (53, -1074)
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = max(exponent - digits + 1, least)
    scaled = x / Fraction(2) ** unit
    whole = round(scaled)  # ties to even
    limit = 128 if dtype == np.float32 else 1024
    if abs(whole) * Fraction(2) ** unit >= Fraction(2) ** limit:
        return math.inf if x > 0 else -math.inf
    return math.ldexp(whole, unit)


def towards_zero(x: Fraction) -> float:
    near = rounded(x, np.float32)
    if math.isinf(near) or abs(Fraction(near)) > abs(x):
        near = float(np.nextafter(np.float32(near), np.float32(0)))
    return near


def each(function, dtype):
    return lambda *arrays: np.array(
        [function(*(float(v) for v in values)) for values in zip(*arrays, strict=True)], dtype
    )


def _fma(dtype):
    def of(a, b, c):
        if not all(map(math.isfinite, (a, b, c))):
            return float(np.float64(a) * np.float64(b) + np.float64(c))
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        if exact == 0:
            product_sign, other = math.copysign(1, a) * math.copysign(1, b), math.copysign(1, c)
            return -0.0 if (product_sign < 0 and other < 0 and (c == 0 or a == 0 or b == 0)) else 0.0
        return math.copysign(rounded(exact, dtype), 1 if exact > 0 else -1)

    return each(of, dtype)


def _add_to_zero(a, b):
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    exact = Fraction(a) + Fraction(b)
    return a + b if exact == 0 else math.copysign(towards_zero(exact), 1 if exact > 0 else -1)


def _least(pick):
    def of(a, b):
        both = np.where(np.isnan(a), b, np.where(np.isnan(b), a, pick(a, b)))
        zero = (a == 0) & (b == 0)
        sign = np.signbit(a) | np.signbit(b) if pick is np.minimum else np.signbit(a) & np.signbit(b)
        return np.where(zero, np.where(sign, -0.0, 0.0).astype(both.dtype), both)

    return of


def _divide(a, b, remainder=False):
    out = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        q = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        out.append(x - q * y if remainder else q)
    return np.array([v % 2 ** (8 * a.itemsize) for v in out], f"u{a.itemsize}").view(a.dtype)


def _wide(dtype):
    return lambda a, b: a.astype(dtype) * b.astype(dtype)


def _high(a, b):
    return np.array(
        [(int(x) * int(y)) >> (8 * a.itemsize) & (2 ** (8 * a.itemsize) - 1) for x, y in zip(a, b, strict=True)],
        f"u{a.itemsize}",
    ).view(a.dtype)


def _shift(left, dtype):
    bits = 8 * np.dtype(dtype).itemsize

    def of(a, n):
        out = []
        for x, by in zip(a.tolist(), n.tolist(), strict=True):
            by = min(by, bits)
            out.append((x << by if left else x >> by) % 2**bits)
        return np.array(out, f"u{bits // 8}").view(dtype)

    return of


def _permute(a, b, c):
    out = []
    for x, y, pick in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        both, r = (y << 32 | x).to_bytes(8, "little"), 0
        for i in range(4):
            nibble = pick >> 4 * i & 15
            byte = both[nibble & 7]
            r |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
        out.append(r)
    return np.array(out, np.uint32)


def _insert(a, b, position, length):
    out = []
    for x, y, p, n in zip(a.tolist(), b.tolist(), position.tolist(), length.tolist(), strict=True):
        p, n = p & 255, min(n & 255, max(0, 32 - (p & 255)))
        mask = ((1 << n) - 1) << p if p < 32 else 0
        out.append((y & ~mask | x << p & mask) & 0xFFFFFFFF)
    return np.array(out, np.uint32)


def _truncate(to):
    def of(a):
        info, out = np.iinfo(to), []
        for x in a.tolist():
            if math.isnan(x):
                wide = a.dtype == np.float64 or info.bits == 64
                out.append(-(2 ** (info.bits - 1)) if wide else 0)
            elif math.isinf(x):
                out.append(info.max if x > 0 else info.min)
            else:
                out.append(min(max(int(x), info.min), info.max))
        return np.array(out, to)

    return of


def _bfloat(a):
    bits = a.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(a), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF).astype(np.uint32)


def _half(a):
    return np.where(np.isnan(a), 0x7FFF, a.astype(np.float16).view(np.uint16)).astype(np.uint32)


def _copysign(a, b):
    return np.copysign(b, a)


def _upper_reciprocal(a):
    bits = a.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
    kept = bits.view(np.float64)
    r = 1 / kept
    small = np.abs(r) < np.finfo(np.float64).tiny
    r = np.where(small, np.copysign(0.0, kept), r)
    return np.where((np.abs(kept) < np.finfo(np.float64).tiny), np.copysign(np.inf, kept), r)


def _flushed(function):
    def of(a):
        tiny = np.finfo(np.float32).tiny
        x = np.where(np.abs(a) < tiny, np.copysign(np.float32(0), a), a).astype(np.float64)
        r = function(x)
        return np.where(np.abs(r) < tiny, np.copysign(0.0, r), r).astype(np.float32)

    return of


def _table():
    integers = ("s16", "u16", "s32", "u32", "s64", "u64")
    for t in integers:
        for name, of in (
            ("add", np.add),
            ("sub", np.subtract),
            ("mul.lo", np.multiply),
            ("min", np.minimum),
            ("max", np.maximum),
        ):
            yield Scalar(f"{name}.{t}", t, (t, t), of)
        yield Scalar(f"div.{t}", t, (t, t), _divide)
        yield Scalar(f"rem.{t}", t, (t, t), lambda a, b: _divide(a, b, True))
    for t in ("b16", "b32", "b64"):
        for name, of in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            yield Scalar(f"{name}.{t}", t, (t, t), of)
        yield Scalar(f"not.{t}", t, (t,), np.invert)
        yield Scalar(f"shl.{t}", t, (t, "u32"), _shift(True, TYPES[t]))
    for t in integers:
        yield Scalar(f"shr.{t}", t, (t, "u32"), _shift(False, TYPES[t]))
    for t in ("s32", "s64"):
        yield Scalar(f"neg.{t}", t, (t,), np.negative)
    yield Scalar("mad.lo.s32", "s32", ("s32",) * 3, lambda a, b, c: a * b + c)
    for small, large in (("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
        yield Scalar(f"mul.wide.{small}", large, (small, small), _wide(TYPES[large]))
    for t in ("s32", "u32", "s64", "u64"):
        yield Scalar(f"mul.hi.{t}", t, (t, t), _high)
    yield Scalar("popc.b32", "u32", ("b32",), lambda a: np.array([int(v).bit_count() for v in a], np.uint32))
    yield Scalar("prmt.b32", "b32", ("b32",) * 3, _permute)
    yield Scalar("bfi.b32", "b32", ("b32", "b32", "u32", "u32"), _insert)
    for t in ("f32", "f64"):
        dtype = TYPES[t]
        for name, of in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            for rounding in ("", ".rn"):
                yield Scalar(f"{name}{rounding}.{t}", t, (t, t), of)
        yield Scalar(f"div.rn.{t}", t, (t, t), np.divide)
        yield Scalar(f"fma.rn.{t}", t, (t,) * 3, _fma(dtype))
        yield Scalar(f"min.{t}", t, (t, t), _least(np.minimum))
        yield Scalar(f"max.{t}", t, (t, t), _least(np.maximum))
        yield Scalar(f"abs.{t}", t, (t,), np.abs)
        yield Scalar(f"neg.{t}", t, (t,), np.negative)
        yield Scalar(f"sqrt.rn.{t}", t, (t,), np.sqrt)
        yield Scalar(f"rcp.rn.{t}", t, (t,), lambda a, dtype=dtype: dtype(1) / a)
    yield Scalar("copysign.f64", "f64", ("f64", "f64"), _copysign)
    yield Scalar("add.rz.f32", "f32", ("f32", "f32"), each(_add_to_zero, np.float32))
    yield Scalar("ex2.approx.f32", "f32", ("f32",), lambda a: np.exp2(a.astype(np.float64)).astype(np.float32), 2**-21)
    yield Scalar("ex2.approx.ftz.f32", "f32", ("f32",), _flushed(np.exp2), 2**-21)
    # Within 2^-22 of the result outside [1/2, 2], and absolutely inside.
    yield Scalar("lg2.approx.ftz.f32", "f32", ("f32",), _flushed(np.log2), 2**-18)
    yield Scalar("rcp.approx.ftz.f32", "f32", ("f32",), _flushed(lambda x: 1 / x), 2**-22)
    yield Scalar("rcp.approx.ftz.f64", "f64", ("f64",), _upper_reciprocal, 2**-18)
    comparisons = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
    for name, of in (*comparisons.items(), ("ge", np.greater_equal)):
        for t in (*integers, "b16", "b32", "b64"):
            if t[0] != "b" or name in ("eq", "ne"):
                yield Scalar(f"setp.{name}.{t}", "pred", (t, t), of)
        for t in ("f32", "f64"):
            ordered = lambda a, b, of=of: ~np.isnan(a) & ~np.isnan(b) & of(a, b)  # noqa: E731
            yield Scalar(f"setp.{name}.{t}", "pred", (t, t), ordered)
            yield Scalar(f"setp.{name}u.{t}", "pred", (t, t), lambda a, b, of=of: np.isnan(a) | np.isnan(b) | of(a, b))
    for t in ("f32", "f64"):
        yield Scalar(f"setp.num.{t}", "pred", (t, t), lambda a, b: ~(np.isnan(a) | np.isnan(b)))
        yield Scalar(f"setp.nan.{t}", "pred", (t, t), lambda a, b: np.isnan(a) | np.isnan(b))
    for t in TYPES:
        yield Scalar(f"selp.{t}", t, (t, t, "pred"), lambda a, b, p: np.where(p, a, b))
        yield Scalar(f"mov.{t}", t, (t,), lambda a: a)
    for name, of in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        yield Scalar(f"{name}.pred", "pred", ("pred", "pred"), of)
    yield Scalar("not.pred", "pred", ("pred",), np.logical_not)
    yield Scalar("mov.pred", "pred", ("pred",), lambda a: a)
    for to, source in (("u16", "u32"), ("u32", "u16"), ("u32", "u64"), ("u64", "u32"), ("s64", "s32"), ("f64", "f32")):
        yield Scalar(f"cvt.{to}.{source}", to, (source,), lambda a, to=to: a.astype(TYPES[to]))
    for to, source in (("f32", "f64"), ("f32", "s32"), ("f32", "u32"), ("f64", "s32"), ("f64", "s64")):
        yield Scalar(f"cvt.rn.{to}.{source}", to, (source,), lambda a, to=to: a.astype(TYPES[to]))
    for to, source in (("s32", "f32"), ("s32", "f64"), ("s64", "f64")):
        yield Scalar(f"cvt.rzi.{to}.{source}", to, (source,), _truncate(TYPES[to]))
    yield Scalar("cvt.rpi.f64.f64", "f64", ("f64",), np.ceil)
    yield Scalar("cvt.rmi.f64.f64", "f64", ("f64",), np.floor)
    for name, of in (("bf16x2", _bfloat), ("f16x2", _half)):
        packed = lambda a, b, of=of: of(a) << np.uint32(16) | of(b)  # noqa: E731
        yield Scalar(f"cvt.rn.{name}.f32", "b32", ("f32", "f32"), packed)
    yield Scalar("cvta.to.global.u64", "u64", ("u64",), lambda a: a)


SCALARS = {s.form: s for s in _table()}
