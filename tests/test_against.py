"""The comparison of two commits, of this checkout with itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def test_a_checkout_against_itself(tmp_path):
    out = tmp_path / "against.json"
    options = ["--built", ROOT, "--only", "robustness", "retrieval", "--processes", "1", "--rounds", "2", "--out", out]
    command = [sys.executable, "bench/against.py", "HEAD", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert result["before"] == "HEAD"
    assert result["clock"] == "processor time of one thread"
    assert [row["case"] for row in result["rows"]] == [
        "robustness l2 groups of ten",
        "robustness l2 equally far",
        "robustness ip groups of ten",
        "robustness ip equally far",
        "recall 5000 x 1000",
        "GapIndex Flat l2 1000 x 10,000",
        "GapIndex Flat ip 1000 x 10,000",
    ]
    for row in result["rows"]:
        assert "failed" not in row
        assert row["seconds"] > 0
        assert row["least"] <= row["ratio"] <= row["most"]
        assert row["ratio"] == pytest.approx(row["seconds"] / row["before"])
    assert all(row["case"] in run.stdout for row in result["rows"])


def test_what_a_commit_lacks_is_left_out_with_its_reason(monkeypatch, tmp_path):
    import argparse
    import os

    from bench import against

    code = "import gapkern\ncase('there', lambda: lambda: None)\ncase('missing', lambda: gapkern.no_such_loss)"
    monkeypatch.setitem(against.CASES, "retrieval", code)
    options = argparse.Namespace(isa=None, processes=1, rounds=1)
    rows = against.measure((ROOT, ROOT), "retrieval", options)
    assert [row["case"] for row in rows] == ["there", "missing"]
    assert "no_such_loss" in rows[1]["failed"]
    assert "no_such_loss" in against.report(rows)
    with pytest.raises(SystemExit, match="against: "):
        against.Side(tmp_path, code, {**os.environ, "PYTHONPATH": str(ROOT)})
