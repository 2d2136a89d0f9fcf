"""The README: its examples run, its numbers are those measured, its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number):
    torch.manual_seed(0)
    exec(compile(EXAMPLES[number], f"README.md, example {number}", "exec"), {})


def test_numbers_are_those_of_the_result_files():
    from bench import tables

    for name, sections in tables.PAGES.items():
        page = (ROOT / name).read_text()
        assert tables.filled(page, sections, name) == page, f"{name}: run python bench/tables.py"


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_shown_command_lines_parse():
    from gapkern.cli import parser

    lines = [line.split("#")[0].split() for line in README.splitlines() if line.startswith("gapkern ")]
    assert len(lines) >= 5
    for line in lines:
        parser().parse_args(line[1:])


def test_one_extra_brings_all_that_the_shown_commands_need():
    """Whatever the code asks for, by the extra that its message names; `demo` holds all of them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    listed = dict(re.findall(r"^(\w+) = (\[.*\])$", section, re.M))
    asked = set()
    for path in (ROOT / "gapkern").rglob("*.py"):
        asked |= set(re.findall(r"extra\(\"[\w.]+\", \"([\w-]+)\", \"(\w+)\"\)", path.read_text(encoding="utf-8")))
    assert {"demo", "retrieval", "tables"} <= {name for _, name in asked} <= listed.keys()
    for package, name in asked - {("torchvision", "demo")}:  # open_clip_torch brings it
        assert f'"{package}>=' in listed[name], f"gapkern[{name}] lacks {package}"
    assert '"gapkern[retrieval,tables]"' in listed["demo"]
