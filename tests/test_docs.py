"""The documentation: examples run, command lines work, numbers are those measured, links lead somewhere."""

import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern import losses
from gapkern.experiments.reproduce import TARGETS

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {**PAGES, "README.md": (ROOT / "README.md").read_text()}
BLOCKS = [
    (name, *block) for name, text in TEXTS.items() for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
]
EXAMPLES = [(name, i, code) for i, (name, kind, code) in enumerate(BLOCKS) if kind == "python" and name in PAGES]
# In reading order: what a line reads, one above it has written.
LINES = list(
    dict.fromkeys(line.split("#")[0].strip() for _, kind, code in BLOCKS if not kind for line in code.splitlines())
)
OURS = [line for line in LINES if line.startswith("gapkern ")]
# Too long for a test; that they parse is tested, and what they do elsewhere.
LONG = ("reproduce all",)
SHORT = ["--steps", "3"]  # for the demo


STATED = re.findall(r'(\w+)="(\w+)"`?, the default', "".join(TEXTS.values()))


@pytest.mark.parametrize(("argument", "value"), sorted(set(STATED)))
def test_the_losses_defaults_are_as_stated(argument, value):
    found = [inspect.signature(vars(losses)[name]).parameters.get(argument) for name in losses.__all__]
    assert {parameter.default for parameter in found if parameter is not None} == {value}


def test_there_is_something_to_test():
    assert len(STATED) > 1
    named = set(re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert set(PAGES) == named
    assert len(EXAMPLES) >= 10
    assert len(OURS) >= 9


@pytest.mark.parametrize(("name", "number", "code"), EXAMPLES, ids=[f"{n}-{i}" for n, i, _ in EXAMPLES])
def test_examples_run(name, number, code):
    torch.manual_seed(0)
    exec(compile(code, f"{name}, example {number}", "exec"), {})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files that the pages' command lines name."""
    folder = tmp_path_factory.mktemp("work")
    generator = np.random.default_rng(0)
    texts = generator.standard_normal((40, 8)) @ np.eye(8, 24)
    images = texts + 0.1 * generator.standard_normal((40, 24)) + np.eye(24)[20]
    for name, array in (("texts", texts), ("images", images)):
        np.save(folder / f"{name}.npy", array.astype(np.float32))
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "data").mkdir()
    rows = {
        "id": list(range(40)),
        "image": images.astype(np.float32).tolist(),
        "text": texts.astype(np.float32).tolist(),
    }
    parquet.write_table(pytest.importorskip("pyarrow").table(rows), folder / "data" / "0.parquet")
    if importlib.util.find_spec("faiss"):
        import faiss

        index = faiss.index_factory(24, "SQ4")
        index.train(texts.astype(np.float32))
        index.add(texts.astype(np.float32))
        faiss.write_index(index, str(folder / "knn.index"))
    return folder


def test_the_command_lines_run_in_their_order(workplace, monkeypatch, capsys, undrawn):
    from gapkern.cli import main, parser

    monkeypatch.chdir(workplace)
    for line in OURS:
        words = shlex.split(line)[1:]
        parser().parse_args(words)
        if words[0] == "demo":
            words += SHORT
        if not any(" ".join(words).startswith(long) for long in LONG):
            assert main(words) == 0, (line, capsys.readouterr().err)
    assert (workplace / "mine" / "report.html").exists()


def test_other_command_lines_are_known():
    from gapkern.cli import parser

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in LINES:
        if line and not line.startswith("gapkern "):
            words = shlex.split(line)
            if words[0] == "torchrun":
                parser().parse_args(words[words.index("gapkern") + 1 :])
            else:
                assert words[0] == "pip" or (words[0] == "make" and words[1] in targets), line


def test_links_and_pictures_are_there():
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not target.startswith("http"):
                assert (ROOT / "docs" / target).exists(), f"{name}: {target}"


def test_everything_public_is_in_the_reference():
    import gapkern

    named = {line.rsplit(".", 1)[-1] for line in re.findall(r"^::: (\S+)", PAGES["api.md"], re.M)}
    assert set(gapkern.__all__) - {"__version__"} <= named


def test_the_claims_are_those_of_the_result_file():
    import json

    report = json.loads((ROOT / "docs" / "reproduction" / "report.json").read_text())
    page = PAGES["science.md"]
    for claim in report["claims"]:
        assert claim["claim"].replace("|", "\\|") in page
    assert f"`{report['command']}`" in page
    assert report["command"].startswith("gapkern reproduce all ")
    assert {claim["target"] for claim in report["claims"]} == set(TARGETS), "of all targets"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert {name.replace(".md", ".html") for name in PAGES} <= pages
    api = (tmp_path / "site" / "api.html").read_text()
    for name in ("ClipLoss", "MeanShift", "gap_metrics", "RobustnessResult"):
        assert (
            f'id="gapkern.{ {"ClipLoss": "losses", "RobustnessResult": "robustness"}.get(name, "gap") }.{name}"' in api
        )
    assert not list((tmp_path / "site").rglob("hooks*"))
