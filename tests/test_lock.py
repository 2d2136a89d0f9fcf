"""One run at a time in a folder, and what killed runs leave there."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from gapkern import _lock, files

_HOLDS = """
import os, sys, time
from gapkern import _lock, files
with _lock.locked(sys.argv[1]) as folder, files.replacing(folder / "x.npy") as temporary:
    temporary.write_bytes(b"half")
    if sys.argv[2] == "forks" and os.fork() == 0:
        os.close(1)
        time.sleep(5)
        os._exit(0)
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the folder's lock and has half written a file."""
    started = []

    def start(how="alone"):
        started.append(
            subprocess.Popen([sys.executable, "-c", _HOLDS, str(tmp_path), how], stdout=subprocess.PIPE, text=True)
        )
        assert started[-1].stdout.readline() == "holds\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_and_leaves_the_first_alone(tmp_path, holder):
    holder()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=f"out: expected a folder that no other run writes, got {tmp_path}"):
        _lock.locked(tmp_path).__enter__()
    files.write(tmp_path / "y.txt", lambda p: p.write_text("mine"))
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "y.txt"]), "the first run's half file stays"


@pytest.mark.parametrize("how", ["alone", "forks"])
def test_a_killed_run_keeps_nobody_out_and_its_files_are_removed(tmp_path, holder, how):
    process = holder(how)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(os.listdir(tmp_path)) == 2
    with _lock.locked(tmp_path):
        assert os.listdir(tmp_path) == [_lock.LOCK]
    assert os.listdir(tmp_path) == []


def test_a_write_removes_what_killed_runs_left_and_nothing_else(tmp_path, holder):
    process = holder()
    process.kill()
    process.wait()
    (tmp_path / ".x.npy.tmp.npy").write_text("somebody else's")
    files.write(tmp_path / "y.txt", lambda p: p.write_text("mine"))
    assert sorted(os.listdir(tmp_path)) == [_lock.LOCK, ".x.npy.tmp.npy", "y.txt"]


def test_threads_of_one_process_exclude_each_other(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(50):
            try:
                with _lock.locked(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except ValueError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert os.listdir(tmp_path) == []


def test_a_file_keeps_the_umask_of_its_process(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "x.json", [1])
    finally:
        os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o640


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("another thread's files would be open to all"))
    files.write_json(tmp_path / "x.json", [1])


def test_links_are_followed_and_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    files.write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "[\n  1\n]\n"
    os.mkfifo(tmp_path / "pipe")
    refused = {
        tmp_path: "it is a folder",
        tmp_path / "pipe": "it is no regular file",
        "/dev/null": "it is no regular file",
        tmp_path / "real.json" / "x": "Not a directory",
        tmp_path / "absent" / "x": "No such file or directory",
    }
    for path, why in refused.items():
        with pytest.raises(ValueError, match=f"path: cannot write {path}: {why}"):
            files.write_json(path, [1])


def test_names_as_long_as_the_file_system_takes(tmp_path):
    for name in ("é" * 125 + ".json", "x" * 255, os.fsdecode(b"\xff\xfe" * 60 + b".json")):
        assert files.write_json(tmp_path / name, [1]).exists()
    assert len(os.listdir(tmp_path)) == 3
