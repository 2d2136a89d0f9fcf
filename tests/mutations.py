"""Damage to files and hostile command lines, drawn from a seed."""

import json
import random
from pathlib import Path
from typing import Any

HOSTILE_JSON: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    "",
    "\ud800",
    "a\nb",
    "é" * 300,
    [],
    {},
    [[]],
    [None],
    {"": None},
    "../../x",
    "\u2028",
]


def mutated(data: bytes, suffix: str, others: list[bytes], rng: random.Random) -> bytes:
    """`data` damaged in one or several ways: as bytes, as numbers, as JSON, or another file in its place."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if suffix == ".json" and rng.random() < 0.7:
            data = _json(data, rng)
        else:
            data = rng.choice(_WAYS)(data, rng)
    if rng.random() < 0.03:
        data = rng.choice(others)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[_at(changed, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _at(data: bytes | bytearray, rng: random.Random) -> int:
    """A place, more often near the start, where headers are."""
    return rng.randrange(min(len(data), 256) if rng.random() < 0.6 else len(data))


def _number(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(
        (0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1, rng.getrandbits(8 * size))
    )
    place = _at(data, rng)
    return data[:place] + value.to_bytes(size, rng.choice(("little", "big"))) + data[place + size :]


def _digits(data: bytes, rng: random.Random) -> bytes:
    """A number in a header that is text becomes another."""
    places = [i for i, byte in enumerate(data[:400]) if 48 <= byte < 58]
    if not places:
        return _flip(data, rng)
    place = rng.choice(places)
    return data[:place] + rng.choice((b"0", b"9", b"-1", b"99999999999", b"1e9", b"")) + data[place + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, 7, len(data) // 2, max(0, len(data) - 1), rng.randrange(len(data) + 1)))]


def _longer(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\0" * 512, rng.randbytes(100), data[:1024], b"\n", b"}"))


def _middle(data: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data) + 1)
    last = min(len(data), first + rng.choice((1, 16, 512, 1024)))
    inside = rng.choice((b"", b"\0" * (last - first), rng.randbytes(last - first), data[first:last] * 2))
    return data[:first] + inside + data[last:]


_WAYS = (_flip, _flip, _number, _digits, _cut, _longer, _middle)


def _json(data: bytes, rng: random.Random) -> bytes:
    """A value somewhere in a document becomes another, vanishes or comes twice."""
    try:
        whole = [json.loads(data)]
    except (ValueError, RecursionError):
        return data
    inside: Any = whole
    while True:
        keys = list(inside.keys()) if isinstance(inside, dict) else list(range(len(inside)))
        key = rng.choice(keys)
        if not isinstance(inside[key], dict | list) or not inside[key] or rng.random() < 0.2:
            break
        inside = inside[key]
    way = rng.randrange(10)
    if way < 6 or inside is whole:
        inside[key] = rng.choice(HOSTILE_JSON)
    elif way < 8:
        del inside[key]
    elif isinstance(inside, list):
        inside.insert(key, inside[rng.randrange(len(inside))])
    else:
        inside[key] = str(inside[key])
    if rng.random() < 0.02:
        return b"[" * 100_000
    text = json.dumps(whole[0], ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def command_line(words: list[str], folder: Path, rng: random.Random) -> list[str]:
    """A command line that works, with some of its words replaced, left out, doubled or joined by hostile ones."""
    words = list(words)
    hostile = [
        "",
        " ",
        "-1",
        "0",
        "1e400",
        "nan",
        "inf",
        "-inf",
        "1000000000",
        "99999999999999999999",
        "1.5",
        "x" * 300,
        "\n",
        "[0]",
        "α",
        "\udcff\udcfe",
        "--",
        "--out",
        "--json",
        "--k",
        "/dev/null",
        "/dev/full",
        "/",
        "/proc/self/mem",
        "/dev/stdin",
        ".",
        "..",
        "a:b",
        "0:1:0",
        "best:",
        "best:nan",
        "Flat",
        "IVF0,Flat",
        "IVF99999999999,Flat",
        "HNSW0",
        "PQ0",
        "PQ7x99",
        "{c}",
        str(folder),
        str(folder / "pipe.npy"),
        str(folder / "folder.npy"),
        str(folder / "no" / "such.npy"),
        str(folder / "link.npy"),
        str(folder / "loop.npy"),
        str(folder / "ints.npy"),
        str(folder / "nan.npy"),
        str(folder / "locked"),
        str(folder / "images.npy") + "[0]",
        str(folder / "ü\udcff.npy"),
    ]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(1, len(words) + 1)
        way = rng.randrange(8)
        if way < 5 and place < len(words):
            words[place] = rng.choice(hostile)
        elif way < 6 and place < len(words):
            del words[place]
        elif way < 7:
            words.insert(place, rng.choice(hostile))
        elif place < len(words):
            words.insert(place, words[rng.randrange(1, len(words))])
    return words
