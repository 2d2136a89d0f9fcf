"""The reproduction's page: every claim with what was run, what came out and whether it holds; then the figures."""

import html as escaping
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gapkern.experiments import report as html
from gapkern.experiments.reproduce import TARGETS

PAPER = (
    "Chowers, Naparstek, Barzelay and Weiss, “Is the Modality Gap a Bug or a Feature? A Robustness Perspective”, "
    "CVPR 2026 (arXiv 2603.29080)"
)
VERDICTS = {True: ("yes", "holds"), False: ("no", "does not hold"), None: ("unknown", "cannot tell")}

WORDS = (
    (
        "image, text",
        "a vector (embedding) that a model such as CLIP made of an image or of a text; where the vectors "
        "come from files, whatever the files hold. Images ask; texts are the gallery that is searched, by Euclidean "
        "distance",
    ),
    ("gap", "the difference of the two modalities' means"),
    ("α", "how much of the gap is closed by moving all texts alike: 0 leaves it, 1 closes it, more overshoots"),
    (
        "projected shift",
        "the paper's method: only that part of the gap is closed which is orthogonal to the texts' "
        "leading principal components, so that no text moves past another",
    ),
    (
        "robustness",
        "share of images whose nearest text stays the same once the texts are disturbed (by noise, by "
        "rounding, by rewording)",
    ),
    (
        "hull",
        "all points that texts can be mixed into; what is orthogonal to it is at right angles to every difference "
        "between two texts",
    ),
    ("accuracy", "share of images whose nearest text is the right one"),
)


def narrow(folder: Path, figure: str) -> Path:
    """Where a figure's drawing for narrow screens lies."""
    return folder / "narrow" / f"{figure}.png"


def number(value: Any) -> str:
    """A number as the table shows it; what it is exactly stands in the element's `value`."""
    return f'<data value="{escaping.escape(repr(value))}">{escaping.escape(html.number(value))}</data>'


def render(report: Mapping[str, Any], folder: Path) -> str:
    """The page as a string of HTML; `folder` is where the figures' files lie."""
    claims, settings, env = report["claims"], report["settings"], report["env"]
    count = {verdict: sum(c["holds"] is verdict for c in claims) for verdict in VERDICTS}
    lead = (
        "A model that is trained to match images and texts leaves them in two separate regions: the modality gap. The "
        "paper says why training leaves it there, and that it does no harm to what is found but makes it fragile; "
        f"closing it the right way makes it robust again. Here its claims are put to {len(claims)} tests: "
        f"{count[True]} hold, {count[False]} do not, and {count[None]} cannot be told from this run."
    )
    parts = [
        html.numbers(
            [
                (str(count[True]), "tests in which the claim holds"),
                (str(count[False]), "in which it does not"),
                (str(count[None]), "that this run cannot judge"),
                (str(sum(len(e["figures"]) for e in report["targets"].values())), "figures"),
            ]
        ),
        html.section(
            "Claims",
            html.paragraph(
                "One row for each claim and set of embeddings it was tried on. A click on a heading sorts; “where” "
                "leads to the figure. The words are explained below."
            ),
            _claims(claims),
            name="claims",
        ),
        html.section("Words", _words(), name="words"),
        *(_target(name, entry, folder) for name, entry in report["targets"].items()),
        html.section("How this page was made", *_made(report), name="made"),
    ]
    footer = (
        f"gapkern {env['versions']['gapkern']}, PyTorch {env['versions']['torch']}, {env['processor']}, "
        f"{env['threads']} threads, seed {settings['seed']}. Paper: {PAPER}."
    )
    return html.page("The modality gap: the paper's claims, run again", lead, parts, footer)


def _claims(claims: list[dict[str, Any]]) -> str:
    rows = []
    for place, claim in enumerate(claims):
        kind, verdict = VERDICTS[claim["holds"]]
        entries = "".join(
            f'<span class="entry"><span>{escaping.escape(name)}</span> {number(value)}</span>'
            for name, value in claim["number"].items()
        )
        reason = f": {html.inline(claim['reason'])}" if claim["reason"] else ""
        first = next((v for v in claim["number"].values() if v is not None), "")
        link = f'<a href="#{escaping.escape(claim["target"])}">{_short(claim["target"])}</a>'
        rows.append(
            [
                (link, place),
                (html.inline(claim["claim"]), claim["claim"]),
                (html.inline(claim["run"]), claim["run"]),
                (entries or "–", first),
                (f'<span class="{kind}">{verdict}</span>{reason}', verdict),
            ]
        )
    return html.sortable(["where", "claim", "what was run", "number", "holds?"], rows)


def _short(target: str) -> str:
    kind = {"fig": "Figure ", "thm": "Theorem "}.get(target[:3])
    return target.capitalize() if kind is None else (kind + target[3:]).replace("Theorem 3.3", "Assumption 3.3")


def _words() -> str:
    entries = "".join(f"<dt>{escaping.escape(word)}</dt><dd>{escaping.escape(meaning)}</dd>" for word, meaning in WORDS)
    return f"<dl>{entries}</dl>"


def _target(name: str, entry: Mapping[str, Any], folder: Path) -> str:
    question = TARGETS[name].question
    parts = [html.paragraph(question, "question")] if question else []
    parts += [html.paragraph(text) for text in entry["text"].split("\n\n") if text]
    for figure in entry["figures"]:
        wide, tall = (folder / f"{figure['name']}.png").read_bytes(), narrow(folder, figure["name"]).read_bytes()
        parts.append(html.picture(wide, tall, figure["caption"]))
    parts += [html.details(table["heading"], html.table(table["rows"], table["columns"])) for table in entry["tables"]]
    heading = (
        entry["title"] if name.startswith("thm") or not name[-1].isdigit() else f"Figure {name[3:]}: {entry['title']}"
    )
    return html.section(heading, *parts, name=name)


def _made(report: Mapping[str, Any]) -> list[str]:
    settings = report["settings"]
    sizes = "small sizes (`--quick`)" if settings["quick"] else "full sizes"
    slowest = [f"{name} {entry['seconds']:.1f} s" for name, entry in report["targets"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in report["env"]["versions"].items() if version)
    one = next(iter(report["targets"]), "fig1")
    return [
        html.paragraph(f"Seed {settings['seed']}, {sizes}. The whole page, and one figure of it:"),
        html.command(report["command"], single(report["command"], one)),
        html.paragraph(
            "Beside this page lie each figure as PNG and PDF, the numbers drawn in it as CSV, and all numbers as JSON. "
            "The same seed gives the same numbers. A second run takes up what is finished."
        ),
        html.details(
            "Versions, machine and times",
            html.paragraph(versions + "."),
            html.paragraph(
                f"{report['env']['processor']}, {report['env']['threads']} threads, {report['env']['system']}."
            ),
            html.paragraph("Computed in: " + ", ".join(slowest) + "."),
        ),
    ]


def single(command: str, target: str) -> str:
    """The command for one target alone.

    Example:
        >>> single("gapkern reproduce all --out there --seed 0", "fig8")
        'gapkern reproduce fig8 --out there --seed 0'
    """
    words = shlex.split(command)
    rest = [i for i, word in enumerate(words) if word.startswith("--")]
    return shlex.join([*words[:2], target, *words[rest[0] if rest else len(words) :]])
