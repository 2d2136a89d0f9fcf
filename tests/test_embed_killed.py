"""`gapkern embed` in several processes and killed: the same bytes."""

import json
import random
import socket
import subprocess
import sys
import time

import pytest

from gapkern.cli import main
from gapkern.embeddings import sources
from tests import embedded
from tests.embedded import COUNT, ENVIRONMENT, contents, line, shards
from tests.scenes import HANGS, Forks

pytest.importorskip("open_clip")
pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")
pytestmark = pytest.mark.open_clip
place, whole, one_thread = embedded.place, embedded.whole, embedded.one_thread


@pytest.mark.slow
def test_ten_kills_change_nothing(place, whole, tmp_path):
    out, chance = tmp_path / "out", random.Random(0)
    survivors: dict[str, int] = {}
    modules = "open_clip, pyarrow.parquet, torchvision, gapkern.evaluation, gapkern.embeddings.run"
    with Forks(modules, OMP_NUM_THREADS="1") as forks:
        for kill in range(10):
            child = forks.start(line(place, out))
            # Once another shard has appeared (the last time: as it starts), and a moment later: while it encodes,
            # writes a shard, its metadata or its note, or renames.
            wanted = shards(out) + 1 if kill < 9 else 0
            deadline = time.monotonic() + HANGS
            while shards(out) < wanted and time.monotonic() < deadline:
                time.sleep(0.0002)
            time.sleep(chance.random() * 0.01)
            assert forks.kill(child), "it ended before it was killed"
            for name, written in survivors.items():
                assert (out / name).stat().st_mtime_ns == written, f"{name} was computed again"
            survivors = {p.relative_to(out).as_posix(): p.stat().st_mtime_ns for p in out.glob("*/[it]*_emb_*.npy")}
        assert 9 <= len(survivors) < 19
        forks.start(line(place, out))
        assert forks.status() == 0
    assert contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in survivors} == survivors


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_write_the_same(place, whole, tmp_path):
    run = [*TORCHRUN, "-m", "gapkern", *line(place, tmp_path / "out", "--json")]
    done = subprocess.run(run, check=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert json.loads(done.stdout)["computed"] == {"img_emb": COUNT, "text_emb": 50}
    assert contents(tmp_path / "out") == whole


_DIES = """
import os, sys
from gapkern.cli import main
from gapkern.embeddings import pictures
if os.environ["RANK"] == "1":
    decode = pictures.decode
    def dying(content, name):
        if name == os.environ["DIES_AT"]:
            os.kill(os.getpid(), 9)
        return decode(content, name)
    pictures.decode = dying
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", "bare"])
def test_a_rank_that_dies_ends_the_others_and_loses_nothing(place, whole, tmp_path, launcher, one_thread):
    out, script = tmp_path / "out", tmp_path / "dies.py"
    script.write_text(_DIES)
    dying = sources.images(place / "images").names[16 * 5 + 3]  # in a shard of rank 1
    environment = {**ENVIRONMENT, "DIES_AT": dying}
    if launcher == "torchrun":
        run = subprocess.run(
            [*TORCHRUN, str(script), *line(place, out)], env=environment, capture_output=True, text=True, timeout=HANGS
        )
        assert run.returncode != 0
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        common = {**environment, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        run = [sys.executable, str(script), *line(place, out)]
        ranks = [
            subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env={**common, "RANK": r, "LOCAL_RANK": r})
            for r in ("0", "1")
        ]
        errors = [rank.communicate(timeout=HANGS)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [1, -9]
        assert "gapkern embed: rank 0: lost another rank" in errors[0]
    assert not (out / "img_emb" / "manifest.json").exists()
    assert shards(out) > 0
    assert main(line(place, out)) == 0
    assert contents(out) == whole
