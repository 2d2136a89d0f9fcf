"""`gapkern build`: result files of `gapkern eval`, or of CLIP_benchmark, as one CSV."""

import argparse
import sys
from typing import Any

from gapkern.cli import common


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "build",
        help="collect result files into one CSV",
        description="One line per result: data set, model, task, shift, perturbation and every metric.",
    )
    parser.add_argument("files", nargs="+", help="JSON results, or folders of them")
    parser.add_argument("--out", "--output", default="results.csv", help="the CSV (default: %(default)s)")
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from gapkern.evaluation import records

    results, others = records.find(arguments.files)
    rows = [records.row(result) for _, result in results]
    records.write_csv(arguments.out, rows)
    if others:
        print(
            f"gapkern build: {len(others)} JSON files are no results and were left out: "
            + ", ".join(map(str, others[:5])),
            file=sys.stderr,
        )
    if arguments.json:
        common.print_json({"out": arguments.out, "rows": rows})
    else:
        print(f"{len(rows)} results: {arguments.out}")
    return 0
