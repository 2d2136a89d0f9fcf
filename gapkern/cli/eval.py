"""`gapkern eval`: zero-shot classification, retrieval, multiple choice and templates, before and after the shift."""

import argparse
import itertools
import os
import sys
import time
from typing import Any

from gapkern import _progress
from gapkern.cli import common


def add(verbs: Any) -> None:
    from gapkern import datasets

    parser = verbs.add_parser(
        "eval",
        help="zero-shot classification, retrieval, multiple choice; with and without the shift and perturbations",
        description="Evaluates embeddings (--images, --texts), or a model on a data set (--dataset, --model, "
        "--pretrained). Metrics, files of templates and class names and the result files are CLIP_benchmark's. Start "
        "it as `torchrun --nproc_per_node=K -m gapkern eval ...` to spread images and texts over K ranks.",
    )
    parser.add_argument(
        "--images", help="image embeddings (N, D): a file, a folder of shards, or what 'gapkern embed' wrote"
    )
    parser.add_argument(
        "--texts",
        help="text embeddings: class vectors (C, D), prompts (templates, C, D), captions, "
        "or the choices of all questions in order",
    )
    parser.add_argument(
        "--labels",
        help="the images' classes, for retrieval each text's image: a file (.npy, .npz, "
        ".safetensors, .json, .csv, lines); for retrieval also 'paired' or the number of captions per "
        "image",
    )
    parser.add_argument(
        "--dataset", nargs="+", default=[], help="data sets by name; with --images the name that the result bears"
    )
    parser.add_argument("--dataset_root", default=".", help="where it lies; {dataset} stands for the name")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument(
        "--annotation_file", help="captions (COCO's or Karpathy's JSON, see --split) or questions (A-OKVQA's JSON)"
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        help="open_clip's name, local-dir:PATH, hf-hub:ORG/NAME, "
        "or a configuration's JSON; with --images the name that the result bears",
    )
    parser.add_argument(
        "--pretrained",
        nargs="+",
        default=[],
        help="open_clip's tag, or a local checkpoint; none for local-dir: and hf-hub:",
    )
    parser.add_argument("--task", choices=("auto", *datasets.TASKS), default="auto", help="default: by the data set")
    parser.add_argument("--recall_k", type=int, nargs="+", default=[5], help="k of recall@k (default: 5)")
    parser.add_argument("--custom_template_file", help="JSON: templates with {c}, a list or by data set")
    parser.add_argument(
        "--custom_classname_file",
        help="class names, in any order where they are the data set's: one "
        "per line, or JSON: a list, an object {class: name}, or either by data set",
    )
    parser.add_argument(
        "--choice_template", default="{q} {a}", help="text of a question and an answer (default: '%(default)s')"
    )
    parser.add_argument("--language", default="en", help="what the result bears (default: %(default)s)")
    parser.add_argument(
        "--shift",
        help="close the gap: a file of 'gapkern shift fit TEXTS IMAGES' or of 'gapkern "
        "project fit', or auto, exact, or components of a shift fitted here; everything is measured "
        "without it too",
    )
    common.add_perturbations(parser, of=" on what is searched")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the noise; metrics are their means")
    parser.add_argument(
        "--output",
        help="result files, one per setting: a path with {dataset}, {pretrained}, {model}, "
        "{language}, {task} and {variant} (shift and perturbation)",
    )
    parser.add_argument(
        "--out", help="a folder, for --output DIR/{dataset}_{pretrained}_{model}_{language}_{task}{variant}.json"
    )
    parser.add_argument("--skip_existing", action="store_true", help="leave result files that are there as they are")
    parser.add_argument("--dump_classnames", action="store_true", help="class names in the result files")
    parser.add_argument("--dump_templates", action="store_true", help="templates in the result files")
    parser.add_argument("--batch_size", type=int, default=64, help="for a model (default: %(default)s)")
    common.add_workers(parser)
    parser.add_argument("--no_amp", action="store_false", dest="amp", help="no float16 on a GPU, but float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="after which a rank no longer waits for another (default: %(default)s)",
    )
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from gapkern.ranks import RankLost, Ranks

    device = ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device == "auto" else arguments.device
    settings = _settings(arguments)
    runs = _runs(arguments)
    try:
        with Ranks(arguments.timeout, device) as ranks:
            records = [_one(arguments, facts, settings, ranks) for facts in runs]
    except (RankLost, getattr(torch.distributed, "DistError", RankLost)) as error:
        # It says itself why it has gone or is late. Nothing is left that this one could do in order.
        print(f"gapkern eval: rank {os.environ.get('RANK')}: lost another rank ({error})", file=sys.stderr, flush=True)
        os._exit(1)
    if ranks.rank == 0:
        _show(arguments, [record for some in records for record in some])
    return 0


def _settings(arguments: argparse.Namespace) -> Any:
    from gapkern.cli.moves import components
    from gapkern.evaluation.settings import Settings
    from gapkern.gap import transforms

    shift, label = arguments.shift, arguments.shift
    if shift is not None and (os.path.exists(shift) or shift.endswith(".safetensors")):
        label = os.path.basename(shift).removesuffix(".safetensors")
        shift = transforms.load(shift)
    elif shift is not None:
        try:
            shift = components(shift)
        except argparse.ArgumentTypeError:
            raise ValueError(f"shift: expected a file, 'auto', 'exact' or components, got {shift!r}") from None
    return Settings(shift, common.perturbations(arguments), arguments.seeds, label)


def _runs(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Data set, model and the rest of what names each run."""
    from gapkern import datasets

    stored = arguments.images is not None or arguments.texts is not None
    if stored and (arguments.images is None or arguments.texts is None):
        raise ValueError("images and texts: expected both, got one")
    if stored:
        for name in ("dataset", "model", "pretrained"):
            if len(getattr(arguments, name)) > 1:
                raise ValueError(f"{name}: expected one with --images, got {len(getattr(arguments, name))}")
    elif not (arguments.dataset and arguments.model):
        raise ValueError("expected --images and --texts, or --dataset and --model")
    result = []
    names = itertools.product(
        arguments.dataset or ["embeddings"],
        arguments.model or ["embeddings"],
        [pretrained or "none" for pretrained in arguments.pretrained or ["none"]],
    )
    for dataset, model, pretrained in names:
        if not stored:
            datasets.check(dataset)
        task = arguments.task
        if task == "auto":
            task = datasets.DATASETS[dataset][0] if dataset in datasets.DATASETS else datasets.TASKS[0]
        result.append(
            {"dataset": dataset, "model": model, "pretrained": pretrained, "language": arguments.language, "task": task}
        )
    return result


def _one(arguments: argparse.Namespace, facts: dict[str, str], settings: Any, ranks: Any) -> list[dict[str, Any]]:
    """The records of one run; read back where they were there already."""
    from gapkern import files
    from gapkern.evaluation import inputs, records
    from gapkern.experiments import environment

    targets = _targets(arguments, facts, settings)
    there = ranks.first([os.path.exists(t) for t in targets] if targets and arguments.skip_existing else [])
    if there and all(there):
        return [records.read(target) for target in targets] if ranks.rank == 0 else []
    if arguments.out and ranks.rank == 0:
        files.folder(arguments.out)
    started = time.perf_counter()
    given, more = _inputs(arguments, facts, settings.shift, ranks)
    outcomes = inputs.measure(facts["task"], given, settings, ranks, arguments.recall_k)
    env = environment.describe() | {
        "ranks": ranks.world,
        "device": str(ranks.device),
        "seconds": time.perf_counter() - started,
    }
    result = [records.record(facts, outcome, env, **more) for outcome in outcomes]
    if ranks.rank == 0:
        for i, target in enumerate(targets):
            if not (there and there[i]):
                files.write_json(target, result[i])
    return result


def _targets(arguments: argparse.Namespace, facts: dict[str, str], settings: Any) -> list[Any]:
    from gapkern.evaluation import records

    template = arguments.output
    if template is None and arguments.out is None:
        if arguments.skip_existing:
            raise ValueError("skip_existing: expected --out or --output beside it")
        return []
    template = template or records.NAME
    if arguments.out:
        template = os.path.join(arguments.out.replace("{", "{{").replace("}", "}}"), template)
    variants = [
        records.variant(transform, perturbation and perturbation.describe())
        for transform in ([None] if settings.shift is None else [None, settings.label or str(settings.shift)])
        for perturbation in (None, *settings.perturbations)
    ]
    targets = [records.path(template, facts, variant, len(variants) > 1) for variant in variants]
    if len(set(targets)) < len(targets):
        raise ValueError(f"output: expected a file for each setting, got {targets[0]} twice")
    return targets


def _inputs(
    arguments: argparse.Namespace, facts: dict[str, str], shift: Any, ranks: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the task takes, and what the records say beside its facts."""
    from gapkern import datasets, layout, prompts
    from gapkern.embeddings.shifted import check_unmoved
    from gapkern.evaluation import encode, inputs

    dataset, task = facts["dataset"], facts["task"]
    templates: Any = list(prompts.DEFAULT)
    if arguments.custom_template_file:
        templates = prompts.load_templates(arguments.custom_template_file, dataset)
    names = None
    if arguments.custom_classname_file:
        names = prompts.load_classnames(arguments.custom_classname_file, dataset)
    if arguments.images is not None:
        told: dict[str, Any] = {
            "model_id": inputs.model_of(arguments.images, arguments.texts),
            "inputs": _made_from(arguments, ranks),
        }
        if shift is not None:
            for name in ("images", "texts"):
                check_unmoved(layout.place(getattr(arguments, name), inputs.KINDS[name], name=name), name=name)
        inputs.same_model(shift, facts["model"] if arguments.model else None, told["model_id"])
        known = list(templates) if arguments.custom_template_file else None
        given = inputs.from_files(
            task, arguments.images, arguments.texts, ranks, arguments.labels, arguments.annotation_file, known, names
        )
        names = list(names.values()) if isinstance(names, dict) else names
        dumped = {"classnames": names, "templates": templates if known else None}
    else:
        with _progress.shown(
            {"images": "embedding images", "texts": "embedding texts"}, {"images": "images", "texts": "texts"}
        ) as step:
            data = datasets.load(dataset, arguments.dataset_root, arguments.split, arguments.annotation_file)
            encoder = _encoder(arguments, facts, ranks, step)
            told = {
                "model_id": encoder.model.id,
                "precision": encoder.model.precision,
                "inputs": _read(arguments, data) if ranks.rank == 0 else {},
            }
            inputs.same_model(shift, facts["model"], encoder.model.id)
            given = encode.from_model(task, encoder, data, templates, names, arguments.choice_template)
        names = list(names.values()) if isinstance(names, dict) else names
        dumped = {"classnames": names or getattr(data, "classes", None), "templates": templates}
    kept = {key: value for key, value in dumped.items() if getattr(arguments, f"dump_{key}") and value}
    return given, {key: value for key, value in told.items() if value} | kept


def _made_from(arguments: argparse.Namespace, ranks: Any) -> dict[str, Any]:
    from gapkern.evaluation import inputs

    return inputs.made_from(arguments.images, arguments.texts, arguments.labels) if ranks.rank == 0 else {}


def _read(arguments: argparse.Namespace, data: Any) -> dict[str, Any]:
    """The hashes of what a data set's task was made from: images, labels and texts, and the files of words."""
    from gapkern import datasets, files

    given = ("annotation_file", "custom_template_file", "custom_classname_file")
    named = {name: getattr(arguments, name) for name in given if getattr(arguments, name)}
    return {
        "dataset": {"sha256": datasets.fingerprint(data), "rows": len(data)},
        **{name: {"sha256": files.digest(path)} for name, path in named.items()},
    }


def _encoder(arguments: argparse.Namespace, facts: dict[str, str], ranks: Any, step: Any) -> Any:
    from gapkern import models
    from gapkern.evaluation.encode import Encoder

    pretrained = None if facts["pretrained"] == "none" else facts["pretrained"]
    # On a GPU in float16, as CLIP_benchmark has it.
    precision = "float16" if arguments.amp and ranks.device.type == "cuda" else "float32"
    model = models.load(facts["model"], pretrained, device=ranks.device, precision=precision)
    quiet = step if ranks.rank == 0 else lambda *_: None
    return Encoder(model, ranks, arguments.batch_size, common.workers(arguments), quiet)


def _show(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    from gapkern.evaluation import records

    if arguments.json:
        common.print_json({"results": results})
        return
    for (dataset, model, pretrained, task), some in itertools.groupby(
        results, lambda r: (r["dataset"], r["model"], r["pretrained"], r["task"])
    ):
        group = list(some)
        rows = [records.row(record) for record in group]
        names = list(group[0]["metrics"])
        common.table(
            ["shift", "perturbation", *names],
            [[r["transform"], r["perturbation"], *(r[name] for name in names)] for r in rows],
            f"{task}: {dataset}, {model} {pretrained}",
        )
        worst = [
            min(r["details"]["templates"], key=lambda t: t["acc1"]) for r in group if r["details"].get("templates")
        ]
        for row, template in zip(rows, worst, strict=False):
            print(
                f"worst template, {row['transform']}, {row['perturbation']}: {template['template']!r} "
                f"{template['acc1']:.4f}"
            )
