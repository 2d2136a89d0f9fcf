"""This checkout against another commit: `python bench/against.py COMMIT [--isa avx2] [--only contrastive ...]`.

Both are measured in turns on the same machine: processes of the two alternate, within a round so do their calls, one
thread each, in processor time. The other commit's tree is built in a temporary folder without CUDA, or taken built:
`--built FOLDER`. Written to bench/results/against.json, or `--out`. What a checkout lacks is left out with its reason.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import LIMITS, ONE_THREAD  # noqa: E402

# By capability: a name, and a function without arguments. Only what any commit has: public names, and torch.
CASES = {
    "contrastive": """
import gapkern
from gapkern import losses
from gapkern.ops import contrastive
def pair(n, d, dtype=torch.float32):
    return [torch.nn.functional.normalize(draw(n, d), dim=1).to(dtype).requires_grad_() for _ in range(2)]
def step(loss, *leaves):
    return lambda: torch.autograd.grad(loss(*leaves), leaves)
for dtype in (torch.float32, torch.bfloat16):
    short = str(dtype)[6:]
    for n in (512, 3072):
        for memory in ("recompute", "keep"):
            case(f"contrastive_loss {n} {short} {memory}", lambda n=n, m=memory, t=dtype: step(
                lambda x, y: gapkern.contrastive_loss(x, y, 50.0, memory=m), *pair(n, 512, t)))
    case(f"sigmoid_loss 3072 {short}", lambda t=dtype: step(
        lambda x, y: gapkern.sigmoid_loss(x, y, 10.0, -10.0), *pair(3072, 512, t)))
case("contrastive_loss 2048 sqeuclidean", lambda: step(
    lambda x, y: gapkern.contrastive_loss(x, y, 50.0, similarity="sqeuclidean"), *pair(2048, 512)))
case("contrastive_loss 1024 float64", lambda: step(
    lambda x, y: gapkern.contrastive_loss(x, y, 50.0), *pair(1024, 512, torch.float64)))
case("contrastive_loss 3072 forward", lambda: (lambda x, y: lambda: gapkern.contrastive_loss(x, y, 50.0))(
    *(t.detach() for t in pair(3072, 512))))
case("contrastive_loss 3072 ids", lambda: step(
    lambda x, y: gapkern.contrastive_loss(x, y, 10.0, ids=torch.arange(3072) // 2), *pair(3072, 512)))
case("sigmoid_loss 3072 ids", lambda: step(
    lambda x, y: gapkern.sigmoid_loss(x, y, 10.0, -10.0, ids=torch.arange(3072) // 2), *pair(3072, 512)))
case("info_nce_loss 3072", lambda: step(lambda x, y: losses.info_nce_loss(x, y, 20.0), *pair(3072, 512)))
case("info_nce_loss 3072 four directions, margin", lambda: step(lambda x, y: losses.info_nce_loss(
    x, y, 20.0, margin=0.1, directions=("q-d", "d-q", "q-q", "d-d")), *pair(3072, 512)))
case("supcon_loss 3072", lambda: step(
    lambda x: losses.supcon_loss(x, torch.arange(3072) % 64, 10.0), pair(3072, 512)[0]))
case("Matryoshka 2048", lambda: step(
    lambda x, y: losses.Matryoshka(losses.info_nce_loss, (512, 128, 32))(x, y, 20.0), *pair(2048, 512)))
""",
    "robustness": """
from gapkern import Gaussian
from gapkern.robustness import robustness
unit = lambda *size: torch.nn.functional.normalize(draw(*size), dim=1)
for metric in ("l2", "ip"):
    for name, spread in (("groups of ten", 0.2), ("equally far", None)):
        def made(metric=metric, spread=spread):
            if spread is None:
                gallery = unit(500, 256)
                queries = 0.3 * unit(2000, 256)
            else:
                gallery = unit(50, 256).repeat_interleave(10, 0) + spread * unit(500, 256)
                queries = gallery[torch.arange(2000) % 500] + 0.3 * unit(2000, 256)
            noise = Gaussian(1e-4 if metric == "l2" else 1e-3, "per_coordinate")
            return lambda: robustness(queries, gallery, noise, metric=metric)
        case(f"robustness {metric} {name}", made)
""",
    "retrieval": """
from gapkern.retrieval import GapIndex, recall
from gapkern.testing import clip_like
def made_recall():
    gallery, first = clip_like(1000, 256)
    belongs = torch.arange(5000) // 5
    queries = torch.nn.functional.normalize(first[belongs] + 0.03 * draw(5000, 256), dim=1)
    return lambda: recall(queries, gallery, belongs, (1, 5, 10))
case("recall 5000 x 1000", made_recall)
for metric in ("l2", "ip"):
    def made_search(metric=metric):
        gallery, queries = clip_like(10_000, 256)
        index = GapIndex("Flat", metric).add(gallery)
        return lambda: index.search(queries[:1000], 10)
    case(f"GapIndex Flat {metric} 1000 x 10,000", made_search)
""",
}
# Answers lines on its input: a case's name by {"seconds"} of one call, made before, or {"failed"}.
_PROCESS = """
import json, sys, time
import torch
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
draw = lambda *size: torch.randn(*size, generator=generator)
makers, made = {}, {}
def case(name, maker): makers[name] = maker
def answer(**found): print(json.dumps(found), file=out, flush=True)
out, sys.stdout = sys.stdout, sys.stderr
try:
    import gapkern
    exec(json.loads(sys.stdin.readline()), {"torch": torch, "draw": draw, "case": case})
    answer(cases=list(makers), where=gapkern.__file__)
except Exception as error:
    answer(failed=f"{type(error).__name__}: {error}"[:200])
for line in sys.stdin:
    name = json.loads(line)
    try:
        if name not in made:
            made.clear()
            made[name] = makers[name]()
            made[name]()
        begin = time.process_time()
        made[name]()
        answer(seconds=time.process_time() - begin)
    except Exception as error:
        answer(failed=f"{type(error).__name__}: {error}"[:200])
"""


class Side:
    """A process of one checkout."""

    def __init__(self, folder: Path, code: str, environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**environment, "PYTHONPATH": str(folder)},
        )
        found = self.ask(code)
        wrong = found.get("failed", "")
        if not wrong and not Path(found["where"]).is_relative_to(folder):
            wrong = f"expected its own gapkern, got {found['where']}"
        if wrong:
            self.close()
            raise SystemExit(f"against: {folder}: {wrong}")
        self.cases: list[str] = found["cases"]

    def ask(self, text: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(text) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"against: the process ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self.process.communicate()


def built(commit: str, folder: Path) -> Path:
    """The commit's tree in `folder`, built in place without CUDA."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, check=True, env={**os.environ, "GAPKERN_CUDA": "off"})
    return folder


def measure(folders: tuple[Path, Path], capability: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a capability's cases: seconds of both, and the ratios of the pairs of processes."""
    environment = {**os.environ, **ONE_THREAD, **(LIMITS[options.isa] if options.isa else {})}
    spent: dict[str, list[list[float]]] = {}
    failed: dict[str, str] = {}
    for turn in range(options.processes):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        sides = {i: Side(folders[i], CASES[capability], environment) for i in order}
        for name in sides[0].cases:
            medians: list[float] = [0.0, 0.0]
            times: list[list[float]] = [[], []]
            for round_ in range(options.rounds):
                for i in order if round_ % 2 == 0 else order[::-1]:
                    found = {} if name in failed else sides[i].ask(name)
                    if "failed" in found:
                        failed[name] = f"{('this checkout', 'the other')[i]}: {found['failed']}"
                    times[i].append(found.get("seconds", 0.0))
            if name not in failed:
                medians = [statistics.median(t) for t in times]
                spent.setdefault(name, []).append(medians)
        for side in sides.values():
            side.close()
        print(f"{capability}: {turn + 1} of {options.processes} pairs of processes", file=sys.stderr, flush=True)
    rows = []
    for name, pairs in spent.items():
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        rows.append(
            {
                "capability": capability,
                "case": name,
                "seconds": statistics.median(ours for ours, _ in pairs),
                "before": statistics.median(theirs for _, theirs in pairs),
                "ratio": statistics.median(ratios),
                "least": ratios[0],
                "most": ratios[-1],
            }
        )
    return rows + [{"capability": capability, "case": name, "failed": reason} for name, reason in failed.items()]


def report(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['case']:<45} {row['failed']}")
            continue
        spread = f"[{row['least']:.3f}, {row['most']:.3f}]"
        times = f"{1e3 * row['seconds']:10.2f} ms, before {1e3 * row['before']:10.2f} ms"
        lines.append(f"{row['case']:<45} {times}  ratio {row['ratio']:.3f} {spread}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="what this checkout is compared with")
    parser.add_argument("--built", type=Path, metavar="FOLDER", help="that commit's checkout, built")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--isa", choices=LIMITS, help="no better instruction set")
    parser.add_argument("--processes", type=int, default=5, help="pairs of processes (5)")
    parser.add_argument("--rounds", type=int, default=9, help="calls of each in a pair of processes (9)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "against.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gapkern-against-") as temporary:
        other = options.built.resolve() if options.built else built(options.commit, Path(temporary).resolve())
        rows = []
        for capability in options.only:
            rows += measure((ROOT, other), capability, options)
            print(report([row for row in rows if row["capability"] == capability]), flush=True)
    from bench import harness

    result = {
        **harness.facts("against"),
        "date": time.strftime("%Y-%m-%d"),
        "before": options.commit,
        "isa": options.isa,
        "clock": "processor time of one thread",
        "processes": options.processes,
        "rounds": options.rounds,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
