"""Puts what `gapkern reproduce` found into the pages, so that no number is copied by hand."""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "reproduction"
VERDICTS = {True: "yes", False: "**no**", None: "cannot tell"}


def claims(report: dict) -> str:
    """Every claim as a row of a table."""
    lines = ["| where | claim | what was run | number | holds? |", "| --- | --- | --- | --- | --- |"]
    for claim in report["claims"]:
        found = "<br>".join(
            f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name} –"
            for name, value in claim["number"].items()
        )
        verdict = VERDICTS[claim["holds"]] + (f": {claim['reason']}" if claim["reason"] else "")
        cells = (claim["target"], claim["claim"], claim["run"], found or "–", verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def count(report: dict) -> str:
    """How many claims held."""
    held = [sum(claim["holds"] is verdict for claim in report["claims"]) for verdict in VERDICTS]
    return f"{sum(held)} tests: {held[0]} hold, {held[1]} do not, {held[2]} cannot be told from this run."


def filled(markdown: str) -> str:
    """A page with its `<!-- claims -->`, `<!-- count -->` and `<!-- command -->` replaced, without other markers."""
    markdown = re.sub(r"^<!-- /?(?!claims|count|command)\w+ -->\n", "", markdown, flags=re.M)
    if "<!-- c" not in markdown:
        return markdown
    report = json.loads((FOLDER / "report.json").read_text())
    parts = {"claims": claims(report), "count": count(report), "command": report["command"]}
    for name, text in parts.items():
        markdown = markdown.replace(f"<!-- {name} -->", text)
    return markdown


def on_page_markdown(markdown: str, **_) -> str:
    return filled(markdown)
