"""`make fuzz`: damaged files and hostile command lines against every verb that reads files.

Each case is a fork of one process that has imported everything: a verb, run on copies of good files of which one is
damaged. It must end within a minute with the right answer, which is computed here from the damaged bytes alone, or with
one line and exit status 2; without a traceback, a half-written file, or memory beyond twice the files.

    python -m tests.fuzz --cases 2000 --commands 200 --seed 0       python -m tests.fuzz --only npy:17 --show
"""

import argparse
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests import forks, fuzz_formats, mutations
from tests.forks import HANG, Outcome, forked
from tests.fuzz_kinds import DIMS, EMBED, KINDS, ROWS, Kind

SLACK = 256 * 2**20  # bytes that libraries and models may take beside twice the files
MODEL = {
    "embed_dim": DIMS,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
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
