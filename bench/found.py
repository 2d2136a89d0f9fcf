"""Sections of pages that say what came out, and not how fast: noise, precision, and the paper's claims."""

import json
from pathlib import Path
from typing import Any

from bench import harness
from bench.markdown import table

ROOT = Path(__file__).resolve().parent.parent


def noise() -> str:
    """A change a row: its size on each side, and the neighbours that it and Gaussian noise of that size leave."""
    result = harness.load("noise")
    rows = []
    for case in result["cases"]:
        sizes = [f"{case[side]:.2g}" if case[side] else "" for side in ("images", "prompts")]
        sizes = [f"{float(size):.1g}".replace("e-0", "e-") if size and float(size) < 1e-4 else size for size in sizes]
        rows.append([case["change"], *sizes, f"{case['kept']:.3f}", f"{case['under noise']:.3f}"])
    header = ["change", "size: images", "size: prompts", "neighbours kept", "kept under Gaussian noise of that size"]
    return f"{table(header, rows)}\n\n`python bench/run.py --only noise`, {result['date']}."


def training() -> str:
    """A setting a row: mean and range over the seeds."""
    result = harness.load("precision")
    settings = list(dict.fromkeys(case["setting"] for case in result["cases"]))
    rows = []
    for setting in settings:
        cases = [case for case in result["cases"] if case["setting"] == setting]
        cells = []
        for key, digits in (("first loss", 4), ("loss", 3), ("accuracy", 3), ("gap", 3)):
            values = [case[key] for case in cases]
            mean, least, most = sum(values) / len(values), min(values), max(values)
            cells.append(f"{mean:.{digits}f} ({least:.{digits}f} – {most:.{digits}f})")
        rows.append([setting, *cells])
    header = ["precision", "first loss", "loss of the last 20 steps", "zero-shot accuracy", "gap norm"]
    kernels = result["env"]["kernels"]["libgapkern_cpu"]
    return f"{table(header, rows)}\n\n`python bench/run.py --only precision`, {kernels}, {result['date']}."


def _reproduction() -> dict[str, Any]:
    report: dict[str, Any] = json.loads((ROOT / "docs/reproduction/report.json").read_text())
    return report


def command() -> str:
    made = f"The figures and claims on this page were made by `{_reproduction()['command']}`"
    return (
        f"{made}: on synthetic captions, and on a\nsmall CLIP model trained on real handwritten digits. Tables of "
        "CLIP, ConVIRT and VideoCLIP use the embeddings that Liang et\nal. (2022) published."
    )


VERDICTS = {True: "yes", False: "**no**", None: "cannot tell"}


def count() -> str:
    """How many claims held."""
    claims = _reproduction()["claims"]
    held = [sum(claim["holds"] is verdict for claim in claims) for verdict in VERDICTS]
    return f"{sum(held)} tests: {held[0]} hold, {held[1]} do not, {held[2]} cannot be told from this run."


def claims() -> str:
    """Every claim as a row."""
    rows = []
    for claim in _reproduction()["claims"]:
        found = "<br>".join(
            f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name} –"
            for name, value in claim["number"].items()
        )
        verdict = VERDICTS[claim["holds"]] + (f": {claim['reason']}" if claim["reason"] else "")
        cells = (claim["target"], claim["claim"], claim["run"], found or "–", verdict)
        rows.append([cell.replace("|", "\\|") for cell in cells])
    return table(["where", "claim", "what was run", "number", "holds?"], rows)
