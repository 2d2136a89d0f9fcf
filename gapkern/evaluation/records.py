"""Result files: one JSON per setting with CLIP_benchmark's keys and ours beside them, and one CSV of many."""

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gapkern import files, layout
from gapkern.evaluation.settings import Outcome
from gapkern.perturb import title

REQUIRED = ("dataset", "model", "pretrained", "task", "metrics", "language")
NAME = "{dataset}_{pretrained}_{model}_{language}_{task}{variant}.json"
_HEAD = ("dataset", "model", "pretrained", "model_fullname", "task", "language", "transform", "perturbation")
_LEFT_OUT = ("metrics", "per_seed", "details", "classnames", "templates", "inputs", "env")


def slug(text: str) -> str:
    """`text` as part of a file's name.

    Example:
        >>> slug("gaussian 0.04 total"), slug("a/b c")
        ('gaussian-0.04-total', 'a_b-c')
    """
    return re.sub(r"[^\w.+-]+", "-", text.replace("/", "_")).strip("-")


def variant(transform: str | None, perturbation: dict[str, Any] | None) -> str:
    """What a file's name says of a setting: nothing for neither shift nor perturbation.

    Example:
        >>> variant(None, None), variant("auto", {"perturbation": "quantize", "bins": 32})
        ('', '_auto_quantize-32')
    """
    parts = [part for part in (transform, perturbation and title(perturbation)) if part]
    return "".join(f"_{slug(part)}" for part in parts)


def path(template: str, facts: dict[str, str], variant: str, several: bool) -> Path:
    """The file of a setting.

    Args:
        template: with any of {dataset}, {model}, {pretrained}, {language}, {task} and {variant}.
        facts: what they stand for.
        variant: from `variant`.
        several: whether there are settings to tell apart.

    Raises:
        ValueError: another place in the template, or no {variant} where there are several settings.
    """
    if several and "{variant}" not in template:
        raise ValueError(f"output: expected {{variant}} in the template of several results, got {template!r}")
    try:
        return Path(template.format(**{key: slug(value) for key, value in facts.items()}, variant=variant))
    except (KeyError, IndexError, ValueError) as error:
        places = ", ".join(f"{{{key}}}" for key in (*facts, "variant"))
        raise ValueError(f"output: expected places among {places}, got {template!r} ({error})") from None


def record(facts: dict[str, str], outcome: Outcome, env: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What a result file holds."""
    return {
        "dataset": facts["dataset"],
        "model": facts["model"],
        "pretrained": facts["pretrained"],
        "task": facts["task"],
        "metrics": outcome.metrics,
        "language": facts["language"],
        "transform": outcome.transform,
        "perturbation": outcome.perturbation,
        "per_seed": outcome.per_seed,
        "details": outcome.details,
        **more,
        "env": env,
    }


def read(file: str | os.PathLike[str]) -> dict[str, Any]:
    """A result file, ours or CLIP_benchmark's.

    Raises:
        ValueError: not one.
    """
    try:
        found = files.read_json(file, name="files")
    except OSError as error:
        raise ValueError(f"files: cannot read {file}: {error.strerror}") from None
    missing = [key for key in REQUIRED if not isinstance(found, dict) or key not in found]
    if missing or not isinstance(found["metrics"], dict):
        got = f"without {missing[0]}" if missing else "whose metrics have no names"
        raise ValueError(f"files: expected a result with {', '.join(REQUIRED)}, got {file} {got}")
    for name, value in found["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"files: expected numbers for metrics, got {value!r:.40} for {name} in {file}")
    return found


def find(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[tuple[Path, dict[str, Any]]], list[Path]]:
    """The results among files and folders, and the JSON files of the folders that are none.

    Raises:
        ValueError: a file that was named is no result, or there are none at all.
    """
    results, others = [], []
    for place in map(Path, paths):
        if not place.is_dir():
            results.append((place, read(place)))
            continue
        for file in sorted(place.glob("*.json")):
            try:
                results.append((file, read(file)))
            except ValueError:
                others.append(file)
    if not results:
        looked = ", ".join(map(str, paths))
        raise ValueError(f"files: expected result files *.json, got none in {looked} ({len(others)} other JSON files)")
    return results, others


def row(result: dict[str, Any]) -> dict[str, Any]:
    """A result as one line of a table: metrics under their names, settings in words."""
    transform, perturbation = result.get("transform"), result.get("perturbation")
    flat = {key: value for key, value in result.items() if key not in _LEFT_OUT}
    flat["model_fullname"] = f"{result['model']} {result['pretrained']}"
    flat["transform"] = transform_title(transform)
    flat["perturbation"] = title(perturbation) if isinstance(perturbation, dict) else "none"
    if isinstance(perturbation, dict) and "seeds" in perturbation:
        flat["seeds"] = " ".join(map(str, perturbation["seeds"]))
    return flat | result["metrics"]


def transform_title(transform: Any) -> str:
    """One word or two for a table.

    Example:
        >>> transform_title({"name": "mean_shift", "shift": "auto", "alpha": 0.5}), transform_title(None)
        ('mean_shift auto α=0.5', 'none')
    """
    if not isinstance(transform, dict) or transform.get("name", "none") == "none":
        return "none"
    alpha = "" if transform.get("alpha", 1.0) == 1.0 else f" α={transform['alpha']:g}"
    return f"{transform['name']} {transform.get('shift', '')}".strip() + alpha


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Settings first, then everything else in natural order."""
    rest = {key for row in rows for key in row} - set(_HEAD)
    return [*_HEAD, *sorted(rest, key=layout.natural)]


def write_csv(out: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> Path:
    """A CSV of `row`s."""

    def save(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns(rows))
            writer.writeheader()
            writer.writerows(rows)

    return files.write(out, save)
