"""`gapkern demo`: the paper's effect on real handwritten digits."""

import argparse
from pathlib import Path
from typing import Any

from gapkern import _progress
from gapkern.cli import common


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "demo",
        help="train on handwritten digits, measure the gap, close it, write a report",
        description="Trains a small image-text model on real handwritten digits with gapkern.ClipLoss, measures its "
        "modality gap, closes it, and writes a report with the robustness gained.",
    )
    parser.add_argument("--out", default="demo-report", help="folder for the report (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, weights and batches (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--export",
        action="store_true",
        help="also write the model, images, captions and class names, for 'gapkern embed'",
    )
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from gapkern.experiments import demo, demo_report
    from gapkern.perturb import title

    with _progress.shown({"train": "training", "sweep": "sweeping α"}, {"train": "steps"}) as step:
        report = demo.run(
            arguments.out, seed=arguments.seed, steps=arguments.steps, export=arguments.export, on_progress=step
        )
    if arguments.json:
        common.print_json(report)
        return 0
    shown = [
        row for row in report["sweep"] if row["perturbation"] == "gaussian" and row["alpha"] in (0.0, 0.5, 1.0, 1.5)
    ]
    shown.sort(key=lambda row: (row["scale"], row["variance"], row["alpha"]))
    common.table(
        ["perturbation", "α", "robustness", "accuracy", "clean accuracy"],
        [[title(r), r["alpha"], r["robustness"], r["accuracy"], r["clean_accuracy"]] for r in shown],
    )
    moves = [row for row in report["projection"] if row["perturbation"] == "gaussian"]
    common.table(
        ["perturbation", "moved", "robustness", "accuracy", "clean accuracy"],
        [[title(r), r["moved"], r["robustness"], r["accuracy"], r["clean_accuracy"]] for r in moves],
    )
    head = demo_report.headline(report)
    print(
        f"gap norm {report['gap_norm']:.3f}, of which {report['orthogonality']:.1%} can be closed; closing it moves "
        f"robustness from {head['before']['robustness']:.3f} to {head['after']['robustness']:.3f} "
        f"and clean accuracy from {head['before']['clean_accuracy']:.4f} to {head['after']['clean_accuracy']:.4f}"
    )
    print(f"report: {Path(arguments.out).resolve() / 'report.html'}")
    return 0
