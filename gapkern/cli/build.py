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
    parser.add_argument(
        "--out", "--output", help="the CSV (default: results.csv), or the folder of open_clip's two (.)"
    )
    parser.add_argument(
        "--format",
        choices=("csv", "open_clip"),
        default="csv",
        help="open_clip: its tables openclip_results.csv and openclip_retrieval_results.csv, a row per model "
        "(default: %(default)s)",
    )
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from gapkern.evaluation import open_clip_tables, records

    results, others = records.find(arguments.files)
    rows = [records.row(result) for _, result in results]
    if arguments.format == "open_clip":
        out = arguments.out or "."
        written = [str(path) for path in open_clip_tables.write(out, [result for _, result in results])]
    else:
        out = arguments.out or "results.csv"
        records.write_csv(out, rows)
        written = [out]
    if others:
        print(
            f"gapkern build: {len(others)} JSON files are no results and were left out: "
            + ", ".join(map(str, others[:5])),
            file=sys.stderr,
        )
    if arguments.json:
        common.print_json({"out": out, "rows": rows})
    else:
        print(f"{len(rows)} results: {', '.join(map(str, written))}")
    return 0
