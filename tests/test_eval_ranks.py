"""`gapkern eval` in several processes: any number writes the same, one that leaves ends all."""

import contextlib
import json
import subprocess
import sys

import pytest

from tests.evaluated import environment, port
from tests.scenes import HANGS


@contextlib.contextmanager
def started(command, world, folder):
    """The processes of all ranks; killed, where they are still there, at the end."""
    place = environment(WORLD_SIZE=str(world))
    ranks = [
        subprocess.Popen(command, cwd=folder, env=place | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


MANY = """
import json, sys
from gapkern.cli import main
from gapkern.ranks import Ranks
with Ranks(60):
    with open("commands.json") as file:
        commands = json.load(file)
    for command in commands:
        status = main(["eval", *command, "--out", sys.argv[1]])
        assert status == 0, status
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback interface")
def test_any_number_of_ranks_writes_the_same(files_of_all_tasks, tmp_path):
    (tmp_path / "commands.json").write_text(json.dumps(files_of_all_tasks))
    (tmp_path / "many.py").write_text(MANY)
    results = {}
    for world in (1, 2, 4):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={world}",
            "--master_port",
            port(),
            "many.py",
            f"out{world}",
        ]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=HANGS)
        assert done.returncode == 0, done.stderr
        found = {file.name: json.loads(file.read_text()) for file in (tmp_path / f"out{world}").glob("*.json")}
        assert {record.pop("env")["ranks"] for record in found.values()} == {world}
        results[world] = found
    assert len(results[1]) == 4 * 6
    assert results[2] == results[1]
    assert results[4] == results[1]


LEAVES = """
import os, signal, sys, time
from gapkern.cli import main
from gapkern.ranks import Ranks
if os.environ["RANK"] == "1":
    ranks = Ranks(60)
    if sys.argv[1] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback interface")
@pytest.mark.parametrize(("how", "timeout"), [("dies", 1800), ("hangs", 5)])
def test_a_rank_that_leaves_takes_the_others_with_it(how, timeout, files_of_all_tasks, tmp_path):
    (tmp_path / "leaves.py").write_text(LEAVES)
    command = [sys.executable, "leaves.py", how, "eval", *files_of_all_tasks[0], "--timeout", str(timeout)]
    with started(command, 3, tmp_path) as ranks:
        for rank in (0, 2):
            _, error = ranks[rank].communicate(timeout=HANGS)
            assert ranks[rank].returncode == 1, error
            assert f"gapkern eval: rank {rank}: lost another rank" in error
            assert "Traceback" not in error


ENDS = """
from pathlib import Path
from gapkern.ranks import Ranks
with Ranks(60) as ranks:
    import torch.distributed.nn  # as the libraries of models do, when a model is loaded
    ranks.agree("nothing", 0)
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads")
def test_no_thread_of_the_group_is_left(tmp_path):
    """Some processes would abort as they exit."""
    with started([sys.executable, "-c", ENDS], 2, tmp_path) as ranks:
        for process in ranks:
            _, error = process.communicate(timeout=HANGS)
            assert process.returncode == 0, error
