"""`make bench`: times the kernels, prints tables of ratios, writes bench/results/*.json and plots.

python bench/run.py [--quick] [--only indexes projection robustness ...] [--isa avx2] [--processor-time] [--no-write]
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import LIMITS  # noqa: E402

BENCHMARKS = (
    "contrastive",
    "indexes",
    "losses",
    "meanshift",
    "noise",
    "perturb",
    "precision",
    "projection",
    "quantisers",
    "retrieval",
    "robustness",
)
TABLES = ("indexes", "losses", "noise", "precision", "projection")  # without a plot
WITH_ISA = ("contrastive", "losses", "meanshift", "perturb", "robustness")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute, nothing written")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, metavar="NAME")
    parser.add_argument(
        "--isa", choices=LIMITS, help=f"no better instruction set, for PyTorch too; of {', '.join(WITH_ISA)}"
    )
    parser.add_argument("--processor-time", action="store_true", help="one thread, and its processor time")
    parser.add_argument("--no-write", action="store_true", help="leave bench/results as it is")
    arguments = parser.parse_args()
    if arguments.isa:
        os.environ.update(LIMITS[arguments.isa])  # read as libraries are loaded

    from bench import harness, plots

    if arguments.isa:
        harness.limit_inductor(arguments.isa)
    if arguments.processor_time:
        harness.use_processor_time()
    for name in arguments.only:
        if arguments.isa and name not in WITH_ISA:
            continue
        print(f"\n{name}")
        module = importlib.import_module(f"bench.bench_{name}")
        result = module.run("quick" if arguments.quick else arguments.isa or "full")
        if not arguments.quick and not arguments.no_write:
            path = harness.write(result, f"{name}-{arguments.isa}" if arguments.isa else None)
            plotted = name not in TABLES and not arguments.isa
            if plotted:
                plots.draw(result, path.with_suffix(".png"))
            print(f"written: {path.relative_to(ROOT)}{' and its plot' if plotted else ''}")


if __name__ == "__main__":
    main()
