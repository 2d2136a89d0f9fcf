"""`make fuzz`: damaged files and hostile command lines against every verb that reads files.

Each case is a fork of one process that has imported everything: a verb, run on copies of good files of which one is
damaged. It must end within a minute with the right answer, which is computed here from the damaged bytes alone, or with
one line and exit status 2; without a traceback, a half-written file, or memory beyond twice the files.

    python -m tests.fuzz --cases 2000 --commands 200 --seed 0       python -m tests.fuzz --only npy:17 --show
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests import forks, fuzz_formats, mutations
from tests.forks import HANG, Outcome, forked

SLACK = 256 * 2**20  # bytes that libraries and models may take beside twice the files
ROWS, DIMS = 30, 16
MODEL = {
    "embed_dim": DIMS,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


# The good files, and what is run on them. A check returns what is wrong with the answer, or None.

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


def make(folder: Path) -> None:
    """The good files."""
    import tarfile

    import faiss
    import h5py
    import open_clip
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from gapkern.cli import main

    folder.mkdir()
    os.chdir(folder)
    draw = np.random.default_rng(0)
    texts = draw.standard_normal((ROWS, DIMS)).astype(np.float32)
    images = (texts + 0.05 * draw.standard_normal((ROWS, DIMS)) + np.eye(DIMS)[0]).astype(np.float32)
    np.save("texts.npy", texts)
    np.save("other.npy", texts + 0.1)
    np.save("images.npy", images)
    np.save("pairs.npy", images[:6])
    np.save("labels.npy", np.arange(ROWS))
    save_file({"images": torch.from_numpy(images)}, "images.safetensors")
    (Path("images.fbin")).write_bytes(struct.pack("<II", ROWS, DIMS) + images.tobytes())
    with h5py.File("both.hdf5", "w") as file:
        file["train"], file["test"], file["neighbors"] = texts, images, np.zeros((ROWS, 3), np.int32)
    for name, factory in (("knn", "Flat"), ("text", "SQ4")):
        index = faiss.index_factory(DIMS, factory)
        index.train(texts)
        index.add(texts)
        faiss.write_index(index, f"{name}.index")
    Path("text_emb").mkdir()
    np.save("text_emb/text_emb_0.npy", texts)
    torch.manual_seed(0)
    state = open_clip.model.CLIP(**MODEL).state_dict()
    Path("model").mkdir()
    Path("model/open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in state.items()}, "model/open_clip_model.safetensors")
    Path("pics").mkdir()
    for i in range(6):
        picture = Image.fromarray(draw.integers(0, 255, (12, 9, 3), dtype=np.uint8))
        picture.save(f"pics/{i}.{'jpg' if i % 2 else 'png'}")
    with tarfile.open("pics.tar", "w") as tar:
        for path in sorted(Path("pics").iterdir()):
            tar.add(path, path.name)
    Path("words.txt").write_text("".join(f"word {i}\n" for i in range(6)))
    Path("classnames.json").write_text(json.dumps(["cat", "dog", "é"]))
    Path("templates.json").write_text(json.dumps(["a {c}", "the {c}."]))
    named = [{"id": i, "file_name": path.name} for i, path in enumerate(sorted(Path("pics").iterdir()))]
    said = [{"id": i, "image_id": i % 6, "caption": f"caption {i}"} for i in range(12)]
    Path("captions.json").write_text(json.dumps({"images": named, "annotations": said}))
    commands = [
        ["shift", "fit", "texts.npy", "images.npy", "--out", "shift.safetensors", "--components", "4"],
        ["project", "fit", "texts.npy", "images.npy", "--out", "projection.safetensors", "--components", "4"],
        ["index", "texts.npy", "--out", "index"],
        ["index", "texts.npy", "--out", "ivf", "--factory", "IVF2,Flat"],
        [*EMBED[:-1], "emb", "--images", "pics", "--texts", "words.txt"],
        ["shift", "apply", "shift.safetensors", "emb/text_emb", "--out", "shifted"],
        ["robust", "images.npy", "texts.npy", "--gaussian", ".1", "--alphas", "0,1", "--out", "swept"],
        ["eval", "--images", "images.npy", "--texts", "texts.npy", "--labels", "labels.npy", "--output", "result.json"],
    ]
    for words in commands:
        if main(words) != 0:
            raise SystemExit(f"the good files cannot be made: gapkern {' '.join(words)}")
    rows = json.loads(Path("swept/robustness.json").read_text())
    Path("swept/unfinished.jsonl").write_text('{"other": "facts"}\n' + json.dumps([["x"], rows[0]]) + "\n")
    np.save("nan.npy", np.full((ROWS, DIMS), np.nan, np.float32))
    np.save("ints.npy", np.zeros((ROWS, DIMS), np.int64))
    os.mkfifo("pipe.npy")
    for name in ("folder.npy", "locked"):
        Path(name).mkdir()
    Path("link.npy").symlink_to("nothing.npy")
    Path("loop.npy").symlink_to("loop.npy")
    np.save("ü\udcff.npy", texts)


def wrong(kind: Kind | None, folder: Path, outcome: Outcome, size: int) -> str | None:
    """What is wrong with an outcome, or None."""
    lines = [x for x in outcome.err.strip().split("\n") if x]
    if outcome.status == -signal.SIGKILL and outcome.seconds > HANG:
        return "hangs"
    if outcome.status not in (0, 2):
        return f"exit status {outcome.status}"
    if "Traceback" in outcome.err:
        return "a traceback"
    if outcome.status == 2 and len(lines) != 1:
        return f"{len(lines)} lines of error"
    if outcome.growth > 2 * size + SLACK:
        return f"{outcome.growth / 2**20:.0f} MiB more memory"
    left = [str(p.relative_to(folder)) for p in folder.rglob("*") if ".gapkern" in p.name or ".tmp" in p.name]
    if left:
        return f"leaves {', '.join(left)}"
    if kind is None:
        return None
    if outcome.status == 2:
        there = [name for name in kind.outputs if (folder / name).exists()]
        return f"leaves {', '.join(there)}" if there else None
    try:
        return kind.check(folder, outcome)
    except Exception as error:
        return f"a wrong answer: what was read cannot be read otherwise ({type(error).__name__}: {error})"


class Fuzzer:
    """Cases by name, `KIND:NUMBER`, each drawn from the seed and its name alone."""

    def __init__(self, place: Path, seed: int):
        self.place, self.seed = place, seed
        self.good = place / "good"
        forked(lambda: make(self.good), "the good files cannot be made")
        self.others = [
            path.read_bytes() for path in sorted(self.good.rglob("*")) if path.is_file() and path.stat().st_size < 2**16
        ]

    def case(self, name: str) -> tuple[str | None, Outcome, list[str], Path]:
        """What is wrong with a case, its outcome, its command line, and its folder."""
        rng = random.Random(f"{self.seed} {name}")
        folder = self.place / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(
            self.good, folder, symlinks=True, ignore=lambda path, names: [n for n in names if n == "pipe.npy"]
        )
        os.mkfifo(folder / "pipe.npy")
        sort, drawn = name.split(":")[0], None
        if sort in fuzz_formats.DRAWN:
            kind, drawn = None, fuzz_formats.draw(sort, folder, self.others, rng)
            words = fuzz_formats.command(drawn, rng)
        elif sort == "command":
            kind = None
            base = KINDS[rng.choice(sorted(KINDS))]
            words = mutations.command_line(base.words, folder, rng)
        else:
            kind = KINDS[sort]
            words = kind.words
            path = rng.choice(sorted(p for p in folder.glob(kind.damaged) if p.is_file()))
            path.write_bytes(mutations.mutated(path.read_bytes(), path.suffix, self.others, rng))
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        outcome = forks.run(words, folder, self.place / "log")
        outcome.err = fuzz_formats.said(sort, outcome.err)
        found = wrong(kind, folder, outcome, size)
        if drawn and not found:
            try:
                found = fuzz_formats.problem(drawn, folder, outcome.status, outcome.out)
            except Exception as error:
                found = f"what was read cannot be read otherwise ({type(error).__name__}: {error})"
        return found, outcome, words, folder


def names(cases: int, commands: int) -> list[str]:
    weights = {sort: kind.weight for sort, kind in KINDS.items()} | dict.fromkeys(fuzz_formats.DRAWN, 8)
    found = []
    for sort, weight in weights.items():
        found += [f"{sort}:{i}" for i in range(-(-cases * weight // sum(weights.values())))]
    random.Random(0).shuffle(found)
    return [*found[:cases], *(f"command:{i}" for i in range(commands))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="damaged files (default: %(default)s)")
    parser.add_argument("--commands", type=int, default=200, help="command lines (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="cases by name, or all of a kind: npy:17, npy")
    parser.add_argument("--show", action="store_true", help="show what each case says")
    parser.add_argument("--keep", help="a folder in which each case that fails is kept")
    arguments = parser.parse_args()
    forks.everything("tests.fuzz")
    chosen = names(arguments.cases, arguments.commands)
    if arguments.only:
        chosen = [n for n in chosen if n in arguments.only or n.split(":")[0] in arguments.only]
        chosen += [n for n in arguments.only if ":" in n and n not in chosen]
    failed, statuses, started = 0, {0: 0, 2: 0}, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gapkern-fuzz-") as place:
        fuzzer = Fuzzer(Path(place), arguments.seed)
        for name in chosen:
            problem, outcome, words, folder = fuzzer.case(name)
            statuses[outcome.status] = statuses.get(outcome.status, 0) + 1
            if problem or arguments.show:
                print(
                    f"{'FAILED' if problem else 'passed'} {name} ({outcome.seconds:.1f} s): "
                    f"{problem or outcome.status}\n  {words!r}\n  {outcome.err.strip()[-1500:]!r}",
                    flush=True,
                )
            if problem:
                failed += 1
                if arguments.keep:
                    kept = Path(arguments.keep) / name.replace(":", "-")
                    shutil.rmtree(kept, ignore_errors=True)
                    shutil.copytree(folder, kept, symlinks=True, ignore=lambda path, found: ["pipe.npy"])
    print(
        f"{len(chosen)} cases in {time.monotonic() - started:.0f} s, seed {arguments.seed}: {statuses[0]} answered, "
        f"{statuses[2]} refused, {failed} failed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
