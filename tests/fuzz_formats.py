"""Files of every format that embeddings are read from, drawn: some right, some with a fault, some damaged after that.

What a file holds is drawn first, so that the right answer is known: the matrix, or that the file must be refused. Of a
damaged file an answer is right where the format's own library reads the same matrix from the same bytes.
"""

import importlib.util
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests import mutations
from tests.fuzz_drawn import DIMS, REFUSED, ROWS, Drawn, rows_of, values, whole
from tests.fuzz_tables import arrow, lance, parquet, saved_by_datasets


def _array(rng: random.Random) -> np.ndarray:
    """A matrix of floating-point numbers in any order of bytes and of the memory."""
    array = values(rng, rows_of(rng), rng.choice((DIMS, DIMS, DIMS, DIMS, 7))).astype(rng.choice(("<f2", "<f4", "<f8")))
    if rng.random() < 0.3:
        array = array.astype(array.dtype.newbyteorder(">"))
    if rng.random() < 0.1 and array.size:
        array[rng.randrange(len(array)), 0] = rng.choice((np.nan, np.inf))
    return np.asfortranarray(array) if rng.random() < 0.3 else array


def npy(folder: Path, rng: random.Random) -> Drawn:
    array, path = _array(rng), folder / "drawn.npy"
    if rng.random() < 0.3:  # an array (K, N, D), of which one is chosen
        stacked = np.stack([array, array + 1, array + 2])
        stacked = np.asfortranarray(stacked) if rng.random() < 0.5 else stacked
        np.save(path, stacked)
        which = rng.choice((0, 1, 2, 3, -1, "x"))
        right = whole(array + which) if which in (0, 1, 2) else REFUSED
        return Drawn(f"drawn.npy[{which}]", path, right, lambda: np.load(path, allow_pickle=False)[int(which)])
    if rng.random() < 0.15:
        np.save(path, array.astype(rng.choice(("i4", "c8", "O", "U5", "?"))), allow_pickle=True)
        return Drawn("drawn.npy", path, REFUSED, lambda: np.load(path, allow_pickle=False))
    np.save(path, array)
    return Drawn("drawn.npy", path, whole(array), lambda: np.load(path, allow_pickle=False))


def npz(folder: Path, rng: random.Random) -> Drawn:
    array, path = _array(rng), folder / "drawn.npz"
    others = {"labels": np.arange(5), "name": np.array("x"), "flat": np.ones(3)}
    arrays = {name: others[name] for name in rng.sample(sorted(others), rng.randrange(4))} | {"x": array}
    key, right = rng.choice((("", whole(array)), ("[x]", whole(array)), ("[y]", REFUSED)))
    if rng.random() < 0.2:
        arrays["x2"] = array + 1
        right = REFUSED if not key else right
    if rng.random() < 0.1:
        arrays["pickled"] = np.array([{"a": 1}], object)
    (np.savez_compressed if rng.random() < 0.5 else np.savez)(path, **arrays)
    if rng.random() < 0.1:  # a member that is no array
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("readme.txt", "none")
    return Drawn(f"drawn.npz{key}", path, right, lambda: np.load(path, allow_pickle=False)["x"])


class Calls:
    """What a pickle runs when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def pt(folder: Path, rng: random.Random) -> Drawn:
    import torch

    path = folder / "drawn.pt"
    kind = rng.choice((torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64))
    tensor = torch.from_numpy(values(rng, rows_of(rng))).to(kind)
    matrix = whole(tensor.double().numpy()) if kind.is_floating_point else REFUSED
    hostile = rng.random() < 0.15
    held: Any = tensor
    way, key = rng.randrange(8), ""
    if way == 1:
        held, key = {"x": tensor, "n": 3, "labels": torch.arange(4)}, rng.choice(("", "[x]"))
    elif way == 2:
        held, key = {"x": tensor, "y": tensor + 1}, rng.choice(("", "[x]", "[z]"))
        matrix = matrix if key == "[x]" else REFUSED
    elif way == 3:
        held = [tensor, "text"]
    elif way == 4:
        held, matrix = tensor.to_sparse() if kind.is_floating_point else tensor, REFUSED
    elif way == 5:
        held = tensor.repeat(1, 2)[:, ::2] if rng.random() < 0.5 else tensor.T.contiguous().T
        matrix = whole(held.double().numpy()) if kind.is_floating_point else REFUSED
    elif way == 6:
        held = torch.nn.Parameter(tensor) if kind.is_floating_point else tensor
    if hostile:
        held, matrix = {"x": tensor, "run": Calls(folder / "ran")}, REFUSED
    if rng.random() < 0.1:
        path.write_bytes(pickle.dumps(held))  # a bare pickle
        matrix = REFUSED
    else:
        torch.save(held, path, _use_new_zipfile_serialization=rng.random() < 0.8)

    def read() -> np.ndarray:
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found["x"] if isinstance(found, dict) else found[0] if isinstance(found, list) else found
        return found.detach().double().numpy()

    return Drawn(f"drawn.pt{key}", path, matrix, read)


def bare(folder: Path, rng: random.Random) -> Drawn:
    """big-ann's files, with a header that may lie."""
    suffix, kind, most = rng.choice(((".fbin", "<f4", 1), (".u8bin", "u1", 255), (".i8bin", "i1", 127)))
    rows = rows_of(rng)
    matrix = values(rng, rows)
    matrix = (matrix if suffix == ".fbin" else np.clip(40 * matrix + most - 127, 0, most)).astype(kind)
    told = [rows, DIMS]
    if rng.random() < 0.3:
        told[rng.randrange(2)] = rng.choice((0, 1, 15, 17, 29, 2**31, 2**32 - 1))
    path = folder / f"drawn{suffix}"
    path.write_bytes(struct.pack("<II", *told) + matrix.tobytes())
    right = whole(matrix.astype(np.float64)) if told == [rows, DIMS] else REFUSED

    def read() -> np.ndarray:
        data = path.read_bytes()
        return np.frombuffer(data[8:], kind).reshape(struct.unpack("<II", data[:8])).astype(np.float64)

    return Drawn(path.name, path, right, read)


def hdf5(folder: Path, rng: random.Random) -> Drawn:
    import h5py

    array, path = _array(rng), folder / f"drawn{rng.choice(('.h5', '.hdf5'))}"
    two = rng.random() < 0.4
    key = rng.choice(("", "[group/x]", "[group/y]", "[group]"))
    options = {"chunks": True, "compression": "gzip"} if array.size and rng.random() < 0.5 else {}
    with h5py.File(path, "w") as file:
        file.create_dataset("group/x", data=array, **options)
        file["neighbors"] = np.zeros((3, 4), np.int32)
        if two:
            file["z"] = array[:, :3]
    right = whole(array) if key == "[group/x]" or (key == "" and not two) else REFUSED

    def read() -> np.ndarray:
        with h5py.File(path) as file:
            return file["group/x"][:]

    return Drawn(f"{path.name}{key}", path, right, read)


def safetensors(folder: Path, rng: random.Random) -> Drawn:
    import torch
    from safetensors.torch import load_file, save_file

    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    kinds += (torch.int8, torch.uint8)
    kind = rng.choice((*kinds, torch.int32))
    tensor = torch.from_numpy(values(rng, rows_of(rng), rng.choice((DIMS, DIMS, DIMS, 7))))
    if rng.random() < 0.1 and tensor.numel():
        tensor[0, 0] = float("nan")
    tensor = (tensor.float() if kind.is_floating_point else (10 * tensor).abs().nan_to_num()).to(kind)
    path, held = folder / "drawn.safetensors", {"x": tensor}
    key = rng.choice(("", "[x]", "[y]"))
    right = whole(tensor.float().double().numpy()) if kind in kinds and key != "[y]" else REFUSED
    if rng.random() < 0.2:
        held["labels"] = torch.arange(4)
        right = right if key else REFUSED
    save_file(held, path)
    if rng.random() < 0.15:  # a header that says otherwise
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        header["x"]["shape"] = rng.choice(([len(tensor) + 1, DIMS], [-1, DIMS], [DIMS], [2**62, 4], "x"))
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        right = REFUSED
    return Drawn(f"drawn.safetensors{key}", path, right, lambda: load_file(path)["x"].float().double().numpy())


DRAWN: dict[str, Callable[[Path, random.Random], Drawn]] = {
    "drawn-parquet": parquet,
    "drawn-arrow": arrow,
    "drawn-datasets": saved_by_datasets,
    "drawn-npy": npy,
    "drawn-npz": npz,
    "drawn-pt": pt,
    "drawn-bare": bare,
    "drawn-hdf5": hdf5,
    "drawn-safetensors": safetensors,
}
if importlib.util.find_spec("lance"):
    DRAWN["drawn-lance"] = lance


def draw(sort: str, folder: Path, others: list[bytes], rng: random.Random) -> Drawn:
    """A file of a kind; one in three is damaged."""
    drawn = DRAWN[sort](folder, rng)
    if rng.random() < 1 / 3:
        drawn.file.write_bytes(mutations.mutated(drawn.file.read_bytes(), drawn.file.suffix, others, rng))
        drawn.damaged = True
    return drawn


def command(drawn: Drawn, rng: random.Random) -> list[str]:
    """Reads all of it at once, or a part at a time."""
    if (drawn.matrix is not REFUSED and len(drawn.matrix) != ROWS) or rng.random() < 0.5:
        fit = ["shift", "fit", "texts.npy", drawn.argument, "--out", "fitted.safetensors"]
        return [*fit, "--json", "--components", "4"]
    return ["gap", drawn.argument, "texts.npy", "--json"]


def said(sort: str, err: str) -> str:
    """What a command says, without the lines that Lance's own logger and its panics write."""
    if sort != "drawn-lance" or "Traceback" in err:
        return err
    return "".join(line for line in err.splitlines(keepends=True) if line.startswith("gapkern"))


def problem(drawn: Drawn, folder: Path, status: int, out: str) -> str | None:
    """What is wrong with the command's answer, or None."""
    if (folder / "ran").exists():
        return "a pickle was run"
    if status == 2:
        return None if drawn.damaged or drawn.matrix is REFUSED else f"a whole file is refused: {drawn.argument}"
    if drawn.damaged:
        matrix = np.asarray(drawn.read(), np.float64)
    elif drawn.matrix is REFUSED:
        return f"taken, though it has a fault: {drawn.argument}"
    else:
        matrix = np.asarray(drawn.matrix, np.float64)
    wanted = float(np.linalg.norm(matrix.mean(0) - np.load(folder / "texts.npy").astype(np.float64).mean(0)))
    told = json.loads(out)
    found = told.get("centroid_distance", told.get("gap_norm"))
    same = np.isclose(found, wanted, rtol=1e-4, atol=1e-5) if found is not None else not np.isfinite(wanted)
    return None if same else f"a gap of {found}, not {wanted}"
