"""What `make fuzz` runs: each kind of files, the verb that reads them, and what is wrong with its answer."""

import csv
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.forks import Outcome

ROWS, DIMS = 30, 16
Check = Callable[[Path, Outcome], str | None]


@dataclass
class Kind:
    """A verb on a folder of good files, one of which is damaged."""

    words: list[str]
    damaged: str  # a file, or a pattern of which one is drawn
    check: Check
    outputs: tuple[str, ...] = ()  # not there after exit status 2
    weight: int = 1


def vectors(path: Path) -> np.ndarray:
    """The matrix of a `.npy` or `.safetensors` file, read without gapkern's and safetensors' help."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    ((_, facts),) = [(k, v) for k, v in json.loads(data[8 : 8 + size]).items() if k != "__metadata__"]
    first, last = facts["data_offsets"]
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    values = np.frombuffer(data[8 + size + first : 8 + size + last], kinds[facts["dtype"]])
    if facts["dtype"] == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(facts["shape"])


def close(found: float, wanted: float) -> bool:
    return bool(np.isclose(found, wanted, rtol=1e-4, atol=1e-5)) or (not np.isfinite(wanted) and found is None)


def gap_of(first: str, second: str) -> Check:
    def check(folder: Path, outcome: Outcome) -> str | None:
        x, y = (vectors(folder / name).astype(np.float64) for name in (first, second))
        wanted = float(np.linalg.norm(x.mean(0) - y.mean(0)))
        found = json.loads(outcome.out)
        value = found.get("centroid_distance", found.get("gap_norm"))
        return None if close(value, wanted) else f"a gap of {value}, not {wanted}"

    return check


def labelled(folder: Path, outcome: Outcome) -> str | None:
    x, y = vectors(folder / "images.npy"), vectors(folder / "texts.npy")
    nearest = ((x[:, None] - y[None]).astype(np.float64) ** 2).sum(2).argmin(1)
    labels = np.load(folder / "labels.npy", allow_pickle=False)
    if labels.shape != (ROWS,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= ROWS:
        return f"labels of {labels.dtype} {labels.shape} were taken"
    wanted, found = float((nearest == labels).mean()), json.loads(outcome.out)["clean_accuracy"]
    return None if close(found, wanted) else f"an accuracy of {found}, not {wanted}"


def moved(folder: Path, outcome: Outcome) -> str | None:
    data = (folder / "shift.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    first, last = header["shift_vector"]["data_offsets"]
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[header["shift_vector"]["dtype"]]
    shift = np.frombuffer(data[8 + size + first : 8 + size + last], kind).astype(np.float64)
    facts = header["__metadata__"]
    x = vectors(folder / "texts.npy").astype(np.float64)
    wanted = x + float(facts["alpha"]) * shift if facts["moves"] == "gallery" else x
    if facts["normalize"] == "True":
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    return None if np.allclose(vectors(folder / "moved.npy"), wanted, 1e-4, 1e-4) else "other rows than x + alpha g'"


def projected(folder: Path, outcome: Outcome) -> str | None:
    data = (folder / "projection.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])

    def tensor(name: str) -> np.ndarray:
        first, last = header[name]["data_offsets"]
        return np.frombuffer(data[8 + size + first : 8 + size + last], "<f8").reshape(header[name]["shape"])

    mean, basis, y = tensor("mean"), tensor("basis"), np.load(folder / "images.npy").astype(np.float64)
    by_l2 = header["__metadata__"]["metric"] == "'l2'"
    wanted = mean + (y - mean) @ basis @ basis.T if by_l2 else y @ basis @ basis.T
    if header["__metadata__"]["reduce"] == "True":
        wanted = (y - mean if by_l2 else y) @ basis
    return None if np.allclose(vectors(folder / "moved.npy"), wanted, 1e-4, 1e-4) else "other rows than on the hull"


def repaired(folder: Path, outcome: Outcome) -> str | None:
    found = json.loads(outcome.out)
    shares = [found[f"{name}_{when}"] for name in ("agreement", "recall") for when in ("before", "after")]
    whole = (found["vectors"], found["dims"], found["held_out"]) == (ROWS, DIMS, ROWS // 2)
    return None if whole and all(0 <= share <= 1 for share in shares) else f"{found}"


def searched_as_it_is(folder: Path, outcome: Outcome) -> str | None:
    """FAISS's file has no hash: the answer is that of the vectors in it, by the metric that it names."""
    data = (folder / "knn.index").read_bytes()
    (by,) = struct.unpack("<i", data[33:37])
    y = np.frombuffer(data[45 : 45 + 4 * ROWS * DIMS], "<f4").reshape(ROWS, DIMS).astype(np.float64)
    x = np.load(folder / "images.npy").astype(np.float64)
    cost = ((x[:, None] - y[None]) ** 2).sum(2) if by == 1 else -x @ y.T
    wanted = cost.argsort(1, kind="stable")[:, :3]
    found = np.array(json.loads(outcome.out)["ids"])
    # Of enormous vectors float32 leaves the order open.
    return None if (found == wanted).mean() > 0.9 or np.abs(y).max() > 1e6 else "other neighbours than the vectors' own"


def bare(folder: Path, outcome: Outcome) -> str | None:
    data = (folder / "images.fbin").read_bytes()
    rows, dims = struct.unpack("<II", data[:8])
    x = np.frombuffer(data[8:], "<f4").reshape(rows, dims).astype(np.float64)
    wanted = float(np.linalg.norm(x.mean(0) - np.load(folder / "texts.npy").astype(np.float64).mean(0)))
    value = json.loads(outcome.out)["centroid_distance"]
    return None if close(value, wanted) else f"a gap of {value}, not {wanted}"


def searched(folder: Path, outcome: Outcome) -> str | None:
    x, y = (np.load(folder / f"{name}.npy").astype(np.float64) for name in ("images", "texts"))
    wanted = ((x[:, None] - y[None]) ** 2).sum(2).argsort(1, kind="stable")[:, :3]
    found = json.loads(outcome.out)["ids"]
    return None if np.array_equal(found, wanted) else "other neighbours than the vectors' own"


def unchanged(pattern: str, fields: tuple[str, ...] = ()) -> Check:
    """Verification may only pass where nothing that it speaks of was changed."""

    def check(folder: Path, outcome: Outcome) -> str | None:
        for path in folder.glob(pattern):
            before, after = (folder.parent / "good" / path.relative_to(folder)).read_bytes(), path.read_bytes()
            if fields and all(json.loads(before).get(f) == json.loads(after).get(f) for f in fields):
                continue
            if before != after:
                return f"{path.name} was changed and passed"
        return None

    return check


def swept(folder: Path, outcome: Outcome) -> str | None:
    good = json.loads((folder.parent / "good" / "swept" / "robustness.json").read_text())
    found = json.loads((folder / "swept" / "robustness.json").read_text())
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    return None if drop(found) == drop(good) else "other rows than an undisturbed sweep's"


def embedded(kind: str, count: Callable[[Path], int | None], damaged_row: Callable[[Path], int] | None = None) -> Check:
    """As many rows as the input has, and the undamaged ones as they were."""

    def check(folder: Path, outcome: Outcome) -> str | None:
        x = np.load(folder / "new" / kind / f"{kind}_0.npy")
        wanted = count(folder)
        if wanted is None or len(x) != wanted:
            return f"{len(x)} rows, not {wanted}"
        if damaged_row is not None:
            good = np.load(folder.parent / "good" / "emb" / kind / f"{kind}_0.npy")
            same = np.isclose(x, good, atol=1e-5).all(1) | (np.arange(len(x)) == damaged_row(folder))
            return None if same.all() else "an undamaged row is another"
        return None

    return check


def members(folder: Path) -> int | None:
    """Images in pics.tar, read block by block; None where it is damaged."""
    data, place, count = (folder / "pics.tar").read_bytes(), 0, 0
    while True:
        header = data[place : place + 512]
        if header == b"\0" * 512:
            return count if data[place : place + 1024] == b"\0" * 1024 and not any(data[place:]) else None
        if len(header) < 512:
            return None
        told = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
        if told != sum(header[:148]) + sum(header[156:]) + 8 * 32:
            return None
        size = int(header[124:136].split(b"\0")[0].strip() or b"0", 8)
        count += header[:100].split(b"\0")[0].endswith((b".png", b".jpg"))
        place += 512 + -(-size // 512) * 512


def strings(name: str) -> Callable[[Path], int | None]:
    def count(folder: Path) -> int | None:
        found = json.loads((folder / name).read_text("utf-8-sig"))
        return len(found) if isinstance(found, list) and all(isinstance(x, str) for x in found) else None

    return count


def classes(folder: Path, outcome: Outcome) -> str | None:
    found = len(np.load(folder / "new" / "classes.npy"))
    wanted = strings("classnames.json")(folder)
    return None if found == wanted else f"{found} class vectors, not {wanted}"


def built(folder: Path, outcome: Outcome) -> str | None:
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return None
    found = json.loads((folder / "result.json").read_text("utf-8-sig"))
    wanted = found["metrics"].get("acc1")
    told = rows[0].get("acc1") or None
    right = len(rows) == 1 and (told is None if wanted is None else told is not None and close(float(told), wanted))
    return None if right else f"{rows}, not {wanted}"


def anything(folder: Path, outcome: Outcome) -> str | None:
    return None


EMBED = ["embed", "--model", "local-dir:model", "--num_workers", "0", "--out", "new"]
KINDS = {
    "npy": Kind(
        ["gap", "images.npy", "texts.npy", "--json", "--out", "gap.json"],
        "images.npy",
        gap_of("images.npy", "texts.npy"),
        ("gap.json",),
        14,
    ),
    "safetensors": Kind(
        ["gap", "images.safetensors", "texts.npy", "--json"],
        "images.safetensors",
        gap_of("images.safetensors", "texts.npy"),
        (),
        12,
    ),
    "fit": Kind(
        ["shift", "fit", "texts.npy", "images.npy", "--out", "fitted.safetensors", "--json", "--components", "4"],
        "texts.npy",
        gap_of("images.npy", "texts.npy"),
        ("fitted.safetensors",),
        8,
    ),
    "labels": Kind(
        ["shift", "compare", "texts.npy", "images.npy", "--components", "0", "--labels", "labels.npy", "--json"],
        "labels.npy",
        labelled,
        (),
        8,
    ),
    "shift": Kind(
        ["shift", "apply", "shift.safetensors", "texts.npy", "--out", "moved.npy"],
        "shift.safetensors",
        moved,
        ("moved.npy",),
        10,
    ),
    "project": Kind(
        ["project", "fit", "texts.npy", "images.npy", "--out", "fitted.safetensors", "--json", "--components", "4"],
        "texts.npy",
        anything,
        ("fitted.safetensors",),
        4,
    ),
    "projection": Kind(
        ["project", "apply", "projection.safetensors", "images.npy", "--side", "queries", "--out", "moved.npy"],
        "projection.safetensors",
        projected,
        ("moved.npy",),
        8,
    ),
    "repair": Kind(
        [
            "index",
            "repair",
            "knn.index",
            "--queries",
            "images.npy",
            "--json",
            "--k",
            "3",
            "--out",
            "fitted.safetensors",
        ],
        "knn.index",
        repaired,
        ("fitted.safetensors",),
        8,
    ),
    "beside": Kind(
        ["index", "repair", "text.index", "--queries", "images.npy", "--json", "--out", "fitted.safetensors"],
        "text_emb/*.npy",
        anything,
        ("fitted.safetensors",),
        3,
    ),
    "theirs": Kind(["search", "knn.index", "images.npy", "--k", "3", "--json"], "knn.index", searched_as_it_is, (), 8),
    "fbin": Kind(["gap", "images.fbin", "texts.npy", "--json"], "images.fbin", bare, (), 6),
    "hdf5": Kind(["gap", "both.hdf5[test]", "texts.npy", "--json"], "both.hdf5", anything, (), 6),
    "note": Kind(
        ["shift", "apply", "shift.safetensors", "emb/text_emb", "--out", "shifted"], "shifted/*.json", anything, (), 4
    ),
    "journal": Kind(
        ["robust", "images.npy", "texts.npy", "--gaussian", ".1", "--alphas", "0,1", "--out", "swept"],
        "swept/unfinished.jsonl",
        swept,
        (),
        2,
    ),
    "replace": Kind(
        ["robust", "images.npy", "texts.npy", "--replace", "other.npy", "--alphas", "0", "--json"],
        "other.npy",
        anything,
        (),
        4,
    ),
    "manifest": Kind(
        ["embed", "--verify", "emb"],
        "emb/*/manifest.json",
        unchanged("emb/*/manifest.json", ("rows", "dims", "dtype", "shards", "metadata")),
        (),
        8,
    ),
    "shard": Kind(["embed", "--verify", "emb"], "emb/*/*.npy", unchanged("emb/*/*.npy"), (), 6),
    "parquet": Kind(["embed", "--verify", "emb"], "emb/*/*.parquet", unchanged("emb/*/*.parquet"), (), 6),
    "folder": Kind(["gap", "emb/img_emb", "pairs.npy", "--json"], "emb/img_emb/manifest.json", anything, (), 4),
    "faiss": Kind(["search", "index", "images.npy", "--k", "3", "--json"], "index/*.faiss", searched, (), 8),
    "ivf": Kind(
        ["search", "ivf", "images.npy", "--k", "3", "--parameters", "nprobe=4", "--json"], "ivf/*", searched, (), 8
    ),
    "index": Kind(["search", "index", "images.npy", "--k", "3", "--json"], "index/manifest.json", searched, (), 8),
    "ids": Kind(["index", "texts.npy", "--out", "named", "--ids", "labels.npy"], "labels.npy", anything, (), 4),
    "result": Kind(["build", "result.json", "--out", "results.csv"], "result.json", built, (), 8),
    "eval": Kind(
        ["eval", "--images", "images.npy", "--texts", "texts.npy", "--labels", "labels.npy", "--json"],
        "labels.npy",
        anything,
        (),
        6,
    ),
    "captions": Kind([*EMBED, "--captions", "captions.json"], "captions.json", anything, (), 3),
    "classnames": Kind(
        [*EMBED, "--classnames", "classnames.json"], "classnames.json", classes, ("new/classes.npy",), 3
    ),
    "templates": Kind(
        [*EMBED, "--classnames", "classnames.json", "--templates", "templates.json"],
        "templates.json",
        classes,
        ("new/classes.npy",),
        3,
    ),
    "words": Kind([*EMBED, "--texts", "words.txt"], "words.txt", anything, (), 2),
    "image": Kind(
        [*EMBED, "--images", "pics"],
        "pics/3.*",
        embedded("img_emb", lambda folder: len(list((folder / "pics").iterdir())), lambda folder: 3),
        (),
        8,
    ),
    "tar": Kind([*EMBED, "--images", "pics.tar"], "pics.tar", embedded("img_emb", members), (), 8),
    "weights": Kind([*EMBED, "--texts", "words.txt"], "model/*", anything, (), 2),
}
