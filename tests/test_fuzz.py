"""A slice of what `make fuzz` does in full."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for module in ("open_clip", "faiss", "pandas", "pyarrow", "PIL"):
    pytest.importorskip(module)
pytestmark = [pytest.mark.slow, pytest.mark.open_clip, pytest.mark.faiss]

KINDS = (
    "npy",
    "safetensors",
    "fit",
    "project",
    "projection",
    "repair",
    "beside",
    "theirs",
    "fbin",
    "hdf5",
    "shift",
    "note",
    "journal",
    "replace",
    "manifest",
    "shard",
    "parquet",
    "folder",
    "faiss",
    "ivf",
    "index",
    "ids",
    "labels",
    "eval",
    "result",
    "captions",
    "classnames",
    "templates",
    "words",
    "image",
    "tar",
    "weights",
    "drawn-arrow",
    "drawn-bare",
    "drawn-datasets",
    "drawn-hdf5",
    "drawn-npy",
    "drawn-npz",
    "drawn-parquet",
    "drawn-pt",
    "drawn-safetensors",
)


def script(name, *options):
    command = [sys.executable, "-m", f"tests.{name}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_damaged_files_are_a_line_or_the_right_answer():
    done = script("fuzz", "--cases", "100", "--commands", "0", "--seed", "1", "--only", *KINDS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hostile_command_lines_are_a_line_or_an_answer():
    done = script("fuzz", "--cases", "0", "--commands", "30", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr


def test_kills_and_full_disks_leave_what_the_same_command_completes():
    done = script("disasters", "--kills", "3", "--disks", "3", "--only", "embed", "shift", "robust")
    assert done.returncode == 0, done.stdout + done.stderr
