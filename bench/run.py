"""`make bench`: times the kernels, prints tables of ratios, writes bench/results/*.json and plots.

python bench/run.py [--quick] [--only indexes projection robustness ...] [--no-write]
"""

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BENCHMARKS = ("contrastive", "indexes", "meanshift", "perturb", "projection", "quantisers", "retrieval", "robustness")
TABLES = ("indexes", "projection")  # without a plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute, nothing written")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, metavar="NAME")
    parser.add_argument("--no-write", action="store_true", help="leave bench/results as it is")
    arguments = parser.parse_args()

    from bench import harness, plots

    for name in arguments.only:
        print(f"\n{name}")
        module = importlib.import_module(f"bench.bench_{name}")
        result = module.run("quick" if arguments.quick else "full")
        if not arguments.quick and not arguments.no_write:
            path = harness.write(result)
            if name not in TABLES:
                plots.draw(result, path.with_suffix(".png"))
            print(f"written: {path.relative_to(ROOT)}{'' if name in TABLES else ' and its plot'}")


if __name__ == "__main__":
    main()
