"""The CUDA kernels against their limits: `bash bench/gpu.sh` runs this, each section in a process of its own.

python bench/bench_gpu.py SECTION --out FOLDER [--device cpu] [--quick] [--seconds 60]
python bench/bench_gpu.py smoke [--device cpu]      every operator and loss once, against the CPU
python bench/bench_gpu.py collect --out FOLDER      one gpu.json of all sections, and a short table

Limits are measured in the same run: bytes over the rate of a device copy, 2 operations a product over the rate of an
8192^3 matrix product in the inputs' dtype. Before each timed call a buffer larger than the cache is written. A
contender that raises or runs out of memory is recorded as failed, with the reason, and the others go on.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench import harness  # noqa: E402
from bench.gpu import losses, masked, operators, results, rivals, rowwise  # noqa: E402
from gapkern import files  # noqa: E402

SECTIONS: dict[str, Callable[[str, bool], Iterator[Any]]] = {
    "ours": losses.ours,
    "ceilings": rowwise.ceilings,
    "rivals": rivals.fused,
    "contrastive": losses.contrastive,
    "sigmoid": losses.sigmoid,
    "float32": losses.float32,
    "masked": masked.masked,
    "largest": losses.largest,
    "rowwise": rowwise.rowwise,
    "search": rowwise.search,
    "memory": losses.memory,
}


def run(section: str, device: str, quick: bool, seconds: float, out: Path | None) -> list[dict[str, Any]]:
    """Times a section's cases; what fails is recorded beside the rest. Written after every case to `out`."""
    done: list[dict[str, Any]] = []
    begin = time.monotonic()
    cases = SECTIONS[section](device, quick)
    while True:
        about: dict[str, Any] = {}
        try:
            case = next(cases)
            result, about = (case, {}) if isinstance(case, dict) else ({}, case.parameters)
            if not isinstance(case, dict):
                result = harness.time_case(case, seconds=0.05 if quick else 1.0, most=20, device=device, guarded=True)
                harness.print_case(result)
        except StopIteration:
            break
        except Exception as error:  # whatever is wrong with a case is a result too
            result = {**about, "error": harness.reason(error)}
            print(result, flush=True)
            if device != "cpu":
                torch.cuda.empty_cache()
        case = None  # its inputs make room for the next one's
        done.append(result)
        if out is not None:
            files.write_json(out / f"section-{section}.json", done)
        if time.monotonic() - begin > seconds:
            print(f"{section}: its {seconds:.0f} s are over", flush=True)
            break
    return done


def _ours_failed(case: dict[str, Any]) -> bool:
    return any(r["role"] == "ours" and "failed" in r for r in case.get("results", {}).values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=[*SECTIONS, "smoke", "collect"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--also", type=Path, help="collect: write gpu.json into this folder too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; bench/results is left as it is")
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    if arguments.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"argument --device: expected cpu or cuda, got {arguments.device!r}")
    if arguments.section == "collect" and arguments.out is None:
        parser.error("argument --out: needed by collect")
    if arguments.section == "smoke":
        operators.smoke(arguments.device)
    elif arguments.section == "collect":
        result = results.collect(arguments.out)
        for folder in filter(None, (None if arguments.quick else harness.RESULTS, arguments.also)):
            folder.mkdir(parents=True, exist_ok=True)
            files.write_json(folder / "gpu.json", result)
        print("\n".join(results.table(result)))
    else:
        done = run(arguments.section, arguments.device, arguments.quick, arguments.seconds, arguments.out)
        return 1 if any("error" in case or _ours_failed(case) for case in done) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
