"""Processes that share the tests: one that dies takes one test with it, and the run ends."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.scenes import HANGS

FILE = """
import os
def test_first(): pass
def test_second():
    if {dies}: os._exit(3)
def test_third(): pass
"""


def test_a_process_that_dies_fails_one_test_and_the_run_ends(tmp_path):
    pytest.importorskip("xdist")
    dying = (0, 3)
    for number in range(4):
        (tmp_path / f"test_{number}.py").write_text(FILE.format(dies=number in dying))
    plugins = [word for name in ("xdist.plugin", "tests.sharing", "no:cacheprovider") for word in ("-p", name)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", *plugins, str(tmp_path), f"--rootdir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == len(dying)
    for number in dying:
        assert any(f"test_{number}.py::test_second" in line for line in failed)
    assert "2 failed, 10 passed" in done.stdout
