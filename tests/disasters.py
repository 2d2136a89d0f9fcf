"""`make fuzz`, its second half: runs that are killed at any moment, and disks that become full, verb by verb.

Afterwards the same command must end with the bytes of a run that nothing disturbed, and leave nothing temporary. A full
disk must be one line and exit status 2. Disks are small tmpfs where they can be mounted; elsewhere files may not grow
beyond a limit.

    python -m tests.disasters --kills 25 --disks 10 --seed 0 --only index
"""

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests import forks

ROWS, DIMS, SHARDS = 4000, 64, 40
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
COMMANDS = {
    "embed": [
        "embed",
        "--model",
        "local-dir:model",
        "--texts",
        "words.txt",
        "--num_workers",
        "0",
        "--shard_rows",
        "50",
        "--out",
    ],
    "shift": ["shift", "apply", "shift.safetensors", "shards", "--out"],
    "project": ["project", "apply", "projection.safetensors", "shards", "--side", "queries", "--out"],
    "repair": [
        "index",
        "repair",
        "knn.index",
        "--queries",
        "off.npy",
        "--components",
        "16",
        "--embeddings",
        "in.npy",
        "--out",
    ],
    "index": ["index", "shards", "--factory", "IVF8,Flat", "--block", "500", "--out"],
    "robust": ["robust", "images.npy", "texts.npy", "--gaussian", "0.1", "0.2", "0.3", "--alphas", "0:1:20", "--out"],
}


def make(folder: Path) -> None:
    """What the commands read."""
    import faiss
    import open_clip
    import torch
    from safetensors.torch import save_file

    from gapkern import MeanShift, Projection

    os.chdir(folder)
    draw = np.random.default_rng(0)
    texts = draw.standard_normal((ROWS, DIMS)).astype(np.float32)
    images = texts[:200] + 1
    np.save("texts.npy", texts[:200])
    np.save("images.npy", images)
    Path("shards").mkdir()
    for i, part in enumerate(np.split(texts, SHARDS)):
        np.save(f"shards/text_emb_{i}.npy", part)
    MeanShift(n_components=4).fit(texts, images).save("shift.safetensors")
    Projection(4).fit(texts, images).save("projection.safetensors")
    # Rows in 16 dimensions, queries off them: codes of a bit gain from the projection.
    inside = (texts[:, :16] @ draw.standard_normal((16, DIMS))).astype(np.float32)
    np.save("in.npy", inside)
    np.save("off.npy", inside[:400] + 2 * draw.standard_normal((400, DIMS)).astype(np.float32) + 1)
    index = faiss.index_factory(DIMS, "RaBitQ")
    index.train(inside)
    index.add(inside)
    faiss.write_index(index, "knn.index")
    torch.manual_seed(0)
    state = open_clip.model.CLIP(**MODEL).state_dict()
    Path("model").mkdir()
    Path("model/open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in state.items()}, "model/open_clip_model.safetensors")
    Path("words.txt").write_text("".join(f"word {i}\n" for i in range(1000)))


def contents(folder: Path) -> dict[str, object]:
    """Every file's bytes; of tables and lists of rows what does not depend on the clock."""
    found: dict[str, object] = {".": folder.read_bytes()} if folder.is_file() else {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = None
        elif path.name == "robustness.json":
            found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads(path.read_text())]
        elif path.name == "robustness.csv":
            with open(path, encoding="utf-8", newline="") as file:
                found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
        else:
            found[name] = path.read_bytes()
    return found


class Disasters:
    """Runs that something happens to, in a folder of inputs."""

    def __init__(self, place: Path, seed: int):
        self.place, self.inputs, self.rng = place, place / "inputs", random.Random(seed)
        self.inputs.mkdir()
        forks.forked(lambda: make(self.inputs), "the inputs cannot be made")

    def run(self, verb: str, out: Path, **options) -> forks.Outcome:
        return forks.run([*COMMANDS[verb], str(out)], self.inputs, self.place / "log", **options)

    def undisturbed(self, verb: str) -> tuple[dict[str, object], float, int]:
        """The right bytes, the seconds that they take, and their number."""
        out = self.place / f"{verb}-whole"
        outcome = self.run(verb, out)
        if outcome.status != 0:
            raise SystemExit(f"gapkern {verb} fails undisturbed: {outcome.err}")
        size = sum(path.stat().st_size for path in (out, *out.rglob("*")) if path.is_file())
        return contents(out), outcome.seconds, size

    def killed(self, verb: str, right: dict[str, object], seconds: float) -> str | None:
        """What is wrong after a kill at a random moment and the same command again."""
        out = self.place / "out"
        out.unlink() if out.is_file() else shutil.rmtree(out, ignore_errors=True)
        for _ in range(self.rng.choice((1, 1, 2))):
            outcome = self.run(verb, out, kill=self.rng.uniform(0, 1.1 * seconds))
            if outcome.status not in (0, -9):
                return f"exit status {outcome.status} after a kill: {outcome.err}"
        return self.again(verb, out, right)

    def again(self, verb: str, out: Path, right: dict[str, object]) -> str | None:
        outcome = self.run(verb, out)
        if outcome.status != 0:
            return f"the same command ends with {outcome.status}: {outcome.err}"
        found = contents(out)
        if found.keys() != right.keys():
            return f"other files: {sorted(found.keys() ^ right.keys())}"
        others = [name for name in right if found[name] != right[name]]
        return f"other bytes in {', '.join(others)}" if others else None

    def full(self, verb: str, right: dict[str, object], size: int) -> str | None:
        """What is wrong on a disk with room for a part, and once there is room for all."""
        out = self.place / "disk" / "out"
        room = self.rng.randrange(4096, 2 * size)
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(out.parent)], capture_output=True, check=False
        )
        small = mounted.returncode == 0
        try:
            outcome = self.run(verb, out, largest=None if small else self.rng.randrange(200, size))
            lines = outcome.err.strip().split("\n")
            if outcome.status not in (0, 2) or (outcome.status == 2 and (len(lines) != 1 or "Traceback" in lines[0])):
                return f"exit status {outcome.status} with room for {room} of {size} bytes: {outcome.err}"
            if small:
                subprocess.run(["mount", "-o", f"remount,size={64 * size + 2**24}", str(out.parent)], check=True)
            return self.again(verb, out, right)
        finally:
            if small:
                subprocess.run(["umount", str(out.parent)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="of each verb (default: %(default)s)")
    parser.add_argument("--disks", type=int, default=10, help="of each verb (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and sizes (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="verbs (default: all)")
    arguments = parser.parse_args()
    forks.everything("tests.disasters")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="gapkern-disasters-") as place:
        disasters = Disasters(Path(place), arguments.seed)
        for verb in arguments.only:
            right, seconds, size = disasters.undisturbed(verb)
            problems = [(f"kill {i}", disasters.killed(verb, right, seconds)) for i in range(arguments.kills)]
            problems += [(f"disk {i}", disasters.full(verb, right, size)) for i in range(arguments.disks)]
            for name, problem in problems:
                if problem:
                    failed += 1
                    print(f"FAILED {verb}, {name}: {problem}", flush=True)
            print(
                f"{verb}: {arguments.kills} kills within {seconds:.1f} s, {arguments.disks} full disks of up to "
                f"{2 * size} bytes",
                flush=True,
            )
    print(f"seed {arguments.seed}: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
