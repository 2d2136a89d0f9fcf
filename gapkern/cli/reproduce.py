"""`gapkern reproduce`: the paper's figures and theorems, run again."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from gapkern import _progress
from gapkern.cli import common


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "reproduce",
        help="run the paper's figures and theorems again, and report which claims hold",
        description="Reproduces figures and theorems of “Is the Modality Gap a Bug or a Feature?” (CVPR 2026) on "
        "synthetic captions and handwritten digits, on embedding files, or on an open_clip model. Writes each figure "
        "as PNG, PDF and CSV, every number as JSON, and report.html. The same command goes on after an interrupt.",
    )
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help="all (default), fig1 to fig6, fig8 to fig10, thm3.1 to thm3.5, baselines, projection",
    )
    parser.add_argument("--out", default="reproduction", help="folder (default: %(default)s)")
    parser.add_argument(
        "--embeddings",
        nargs="+",
        action="append",
        default=[],
        metavar="FILE",
        help="images (Q, D) and texts (G, D), or one .npy of both (2, N, D); repeatable",
    )
    parser.add_argument(
        "--labels",
        help="right gallery rows (Q,) of the embeddings, a .npy; by default row i belongs "
        "to row i where there are as many",
    )
    parser.add_argument(
        "--paraphrase", nargs="+", default=[], metavar="FILE", help="the texts in other words, for figures 1 and 10"
    )
    parser.add_argument("--model", help="an open_clip model, as ViT-B-32")
    parser.add_argument("--pretrained", help="its weights: a tag, as openai, or a checkpoint")
    parser.add_argument("--dataset", help="images for it: a folder with one subfolder for each class")
    parser.add_argument("--quick", action="store_true", help="small sizes: everything in two minutes on two cores")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="compute again what is finished")
    common.add_json(parser)
    parser.set_defaults(run=run)


def _sources(arguments: argparse.Namespace) -> list[Any]:
    from gapkern.experiments.reproduce import embeddings

    if not arguments.embeddings and (arguments.labels or arguments.paraphrase):
        raise ValueError("labels, paraphrase: expected --embeddings beside them, got none")
    if len(arguments.embeddings) > 1 and (arguments.labels or arguments.paraphrase):
        raise ValueError(
            f"labels, paraphrase: expected --embeddings once beside them, got it {len(arguments.embeddings)} times"
        )
    if bool(arguments.model) != bool(arguments.dataset):
        raise ValueError("model, dataset: expected both or neither, got one")
    if arguments.pretrained and not arguments.model:
        raise ValueError("pretrained: expected --model beside it, got none")
    found = []
    for given in arguments.embeddings:
        if len(given) > 2:
            raise ValueError(
                f"embeddings: expected one or two files, got {len(given)}; give --embeddings again for more"
            )
        pair = given if len(given) == 2 else [f"{given[0]}[0]", f"{given[0]}[1]"]
        found.append(embeddings.from_files(*pair, labels=arguments.labels, paraphrases=arguments.paraphrase))
    if arguments.model:
        found.append(
            embeddings.from_model(
                arguments.model,
                arguments.pretrained,
                arguments.dataset,
                arguments.quick,
                Path(arguments.out) / "embeddings",
            )
        )
    return found


def _command(arguments: argparse.Namespace) -> str:
    """The command line again, with every setting that matters."""
    words = ["gapkern", "reproduce", *(arguments.targets or ["all"]), "--out", arguments.out]
    for given in arguments.embeddings:
        words += ["--embeddings", *given]
    for name in ("labels", "model", "pretrained", "dataset"):
        if getattr(arguments, name):
            words += [f"--{name}", getattr(arguments, name)]
    if arguments.paraphrase:
        words += ["--paraphrase", *arguments.paraphrase]
    words += ["--quick"] if arguments.quick else []
    return shlex.join([*words, "--seed", str(arguments.seed)])


def run(arguments: argparse.Namespace) -> int:
    from gapkern.experiments.reproduce import TARGETS
    from gapkern.experiments.reproduce.run import choose
    from gapkern.experiments.reproduce.run import run as reproduce

    choose(arguments.targets)
    stages = {"embeddings": "making embeddings", **{name: f"{name}  {t.title}" for name, t in TARGETS.items()}}
    try:
        with _progress.shown(stages) as step:
            report = reproduce(
                arguments.out,
                arguments.targets,
                seed=arguments.seed,
                quick=arguments.quick,
                sources=_sources(arguments),
                again=arguments.again,
                command=_command(arguments),
                on_progress=step,
            )
    except KeyboardInterrupt:
        print(f"finished targets are kept in {arguments.out}; the same command goes on from there", file=sys.stderr)
        raise
    if arguments.json:
        common.print_json(report)
        return 0
    verdicts = {True: "holds", False: "does not hold", None: "cannot tell"}
    for claim in report["claims"]:
        print(f"{claim['target']:<9}  {verdicts[claim['holds']]:<13}  {claim['claim']}")
        print(f"{'':<26}{claim['run']}{' Why: ' + claim['reason'] + '.' if claim['reason'] else ''}")
    counts = [sum(c["holds"] is verdict for c in report["claims"]) for verdict in verdicts]
    print(f"{counts[0]} claims hold, {counts[1]} do not, {counts[2]} cannot be told from this run")
    print(f"report: {Path(arguments.out).resolve() / 'report.html'}")
    return 0
