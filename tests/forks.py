"""Command lines run in forks of one process that has imported everything: hundreds in a minute."""

import io
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HANG = 60.0  # seconds


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def everything(module: str) -> None:
    """Imports what the verbs import when they need it, in a process of one thread: in a fork OpenMP waits for others.

    Args:
        module: the script, which is started anew where there may be more threads.
    """
    if any(os.environ.get(name) != "1" for name in THREADS):
        sys.stdout.flush()
        os.execve(
            sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **dict.fromkeys(THREADS, "1")}
        )
    import faiss  # noqa: F401
    import h5py  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import open_clip  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import gapkern.cli

    gapkern.cli.parser()


def forked(work: Callable[[], None], what: str) -> None:
    """Runs `work` in a fork: its threads are not this process's."""
    child = os.fork()
    if child == 0:
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(what)


@dataclass
class Outcome:
    """What a run of the command line came to."""

    status: int  # negative: the signal that ended it
    out: str
    err: str
    growth: int  # bytes of memory beyond those of before
    seconds: float


def run(words: list[str], folder: Path, log: Path, *, kill: float = HANG, largest: int | None = None) -> Outcome:
    """Runs `gapkern WORDS` in a fork, in `folder`; its streams go to files beside `log`.

    Args:
        kill: seconds after which it is killed.
        largest: bytes that a file may have: what is written beyond fails.
    """
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(words, folder, log, largest)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > kill:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    out, err = (Path(f"{log}.{name}").read_text("utf-8", "surrogateescape") for name in ("out", "err"))
    return Outcome(code, out, err, usage.ru_maxrss * 1024 - before, time.monotonic() - started)


def _child(words: list[str], folder: Path, log: Path, largest: int | None) -> None:
    code = 70
    try:
        os.chdir(folder)
        for number, name in ((0, os.devnull), (1, f"{log}.out"), (2, f"{log}.err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), number)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(n, "w"), encoding="utf-8", line_buffering=n == 2) for n in (1, 2)
        )
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        from gapkern.cli import main

        try:
            code = main(words)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
