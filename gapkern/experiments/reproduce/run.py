"""Runs targets, keeps what each has found, and goes on where an interrupted run has stopped."""

import csv
import io
import json
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gapkern import _check, files
from gapkern._lock import locked
from gapkern._version import __version__
from gapkern.experiments import environment
from gapkern.experiments import report as html
from gapkern.experiments.reproduce import TARGETS, page
from gapkern.experiments.reproduce.claims import Context, Figure, Result
from gapkern.experiments.reproduce.embeddings import Embeddings, Source, synthetic, trained_digits

Progress = Callable[[str, int, int], None]
FORMAT = 1  # of NAME.json; another one is not taken up


def choose(names: Sequence[str]) -> list[str]:
    """The targets meant by `names` in their order; "all", or none, are all.

    Raises:
        ValueError: no such target.

    Example:
        >>> choose(["thm3.5", "fig1"])
        ['fig1', 'thm3.5']
    """
    unknown = [name for name in names if name not in (*TARGETS, "all")]
    if unknown:
        raise ValueError(f"target: expected all or some of {', '.join(TARGETS)}, got {', '.join(unknown)}")
    return list(TARGETS) if not names or "all" in names else [name for name in TARGETS if name in names]


def run(
    out: str | Path,
    targets: Sequence[str] = (),
    *,
    seed: int = 0,
    quick: bool = False,
    sources: Sequence[Source] = (),
    again: bool = False,
    command: str = "",
    on_progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Reproduces targets into a folder.

    Args:
        out: folder, made where absent. Written: for each figure NAME.png, .pdf and .csv, for each target NAME.json, and
            report.json and report.html on all targets that were done there with these settings.
        targets: of `TARGETS`; none are all.
        seed: of all draws; the same seed gives the same numbers.
        quick: smaller sizes, for a first look.
        sources: the embeddings for the figures that need some; by default synthetic captions and the digits.
        again: do not take up what an earlier run with the same settings has finished.
        command: how this was called, for the report.
        on_progress: called with a target or "embeddings", how much of it is done, and of how much.

    Returns:
        What report.json holds.

    Raises:
        ValueError: an unknown target, a folder that cannot be written, bad embeddings.
        ImportError: the extra `demo` is not installed.
    """
    wanted = choose(targets)
    seed = _check.integer("seed", seed, low=0, high=2**63 - 1)
    _check.extra("matplotlib.figure", "matplotlib", "demo")
    command = command or shlex.join(["gapkern", "reproduce", *wanted, "--out", str(out), "--seed", str(seed)])
    with locked(out) as folder:
        return _run(folder, wanted, seed, quick, sources, again, command, on_progress)


def _run(
    folder: Path,
    wanted: Sequence[str],
    seed: int,
    quick: bool,
    sources: Sequence[Source],
    again: bool,
    command: str,
    on_progress: Progress,
) -> dict[str, Any]:
    started = time.perf_counter()
    sources = list(sources) or [synthetic(seed), trained_digits(seed, quick, folder / "embeddings")]
    settings = {name: _settings(name, seed, quick, sources) for name in TARGETS}

    def load() -> list[Embeddings]:
        return _distinct([source.load(lambda d, t: on_progress("embeddings", d, t)) for source in sources])

    context = Context(seed=seed, quick=quick, load=load)
    found: dict[str, Any] = {}
    for name, target in TARGETS.items():
        kept = None if again and name in wanted else _finished(folder, name, settings[name])
        if kept is None and name in wanted:
            context.progress = lambda done, total, name=name: on_progress(name, done, total)  # type: ignore[misc]
            context.progress(0, 1)
            since = time.perf_counter()
            result = target(context)
            kept = _keep(folder, name, settings[name], result, since)
        if kept is not None:
            found[name] = kept
            if name in wanted:
                on_progress(name, 1, 1)
    report = {
        "command": command,
        "settings": {"seed": seed, "quick": quick, "embeddings": [source.facts for source in sources]},
        "env": environment.describe(),
        "claims": [{"target": name, **claim} for name, entry in found.items() for claim in entry["claims"]],
        "targets": {n: {k: v for k, v in e.items() if k not in ("settings", "claims")} for n, e in found.items()},
        "seconds": time.perf_counter() - started,
    }
    report = json.loads(json.dumps(files.plain(report)))
    files.write_json(folder / "report.json", report)
    text = page.render(report, folder)
    files.write(folder / "report.html", lambda path: path.write_text(text, encoding="utf-8"))
    return report


def _settings(name: str, seed: int, quick: bool, sources: Iterable[Source]) -> dict[str, Any]:
    facts = [source.facts for source in sources] if TARGETS[name].uses_embeddings else None
    return {"format": FORMAT, "gapkern": __version__, "seed": seed, "quick": quick, "embeddings": facts}


def _distinct(sets: list[Embeddings]) -> list[Embeddings]:
    """Two sets of one name get numbers: their files must not meet."""
    seen: dict[str, int] = {}
    result = []
    for data in sets:
        count = seen[data.slug] = seen.get(data.slug, 0) + 1
        result.append(data if count == 1 else replace(data, name=f"{data.name} ({count})"))
    return result


def _finished(folder: Path, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run has left of a target, if it ended, had these settings, and all its files are there."""
    try:
        kept = files.read_json(folder / f"{name}.json")
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or kept.get("settings") != settings:
        return None
    try:
        written = [path for figure in kept["figures"] for path in _paths(folder, figure["name"]).values()]
        whole = (
            all(claim["claim"] for claim in kept["claims"]) and {"title", "text", "tables", "numbers"} <= kept.keys()
        )
    except (KeyError, TypeError):
        return None
    return kept if whole and all(path.exists() for path in written) else None


def _paths(folder: Path, figure: str) -> dict[str, Path]:
    named = {kind: folder / f"{figure}.{kind}" for kind in ("png", "pdf", "csv")}
    return {**named, "narrow": page.narrow(folder, figure)}


def _keep(folder: Path, name: str, settings: dict[str, Any], result: Result, since: float) -> dict[str, Any]:
    """Writes a target's files, NAME.json last: where it is there, so are the others."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    for figure in result.figures:
        if not figure.name.startswith(name):
            raise ValueError(f"figure: expected a name that begins with {name!r}, got {figure.name!r}")
        _draw(figure, _paths(folder, figure.name))
    entry = {
        "settings": settings,
        "title": TARGETS[name].title,
        "text": result.text,
        "claims": [vars(claim) for claim in result.claims],
        "figures": [{"name": figure.name, "caption": figure.caption} for figure in result.figures],
        "tables": [vars(table) for table in result.tables],
        "numbers": result.numbers,
        "seconds": time.perf_counter() - since,
    }
    entry = json.loads(json.dumps(files.plain(entry)))
    files.write_json(folder / f"{name}.json", entry)
    return entry


def _draw(figure: Figure, paths: Mapping[str, Path]) -> None:
    files.folder(paths["narrow"].parent)
    wide = figure.draw(tall=False)
    files.write(paths["png"], lambda path: path.write_bytes(html.png(wide)))
    files.write(paths["pdf"], lambda path: wide.savefig(path, format="pdf", metadata={"CreationDate": None}))
    files.write(paths["narrow"], lambda path: path.write_bytes(html.png(figure.draw(tall=True))))
    text = io.StringIO()
    rows = [files.plain(dict(row)) for row in figure.rows]
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write(paths["csv"], lambda path: path.write_text(text.getvalue(), encoding="utf-8"))
