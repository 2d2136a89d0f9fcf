"""Python processes that start with PyTorch imported: forked from one that has done nothing else.

For code that needs a process of its own (an environment variable, a setting, memory, what C prints), and not the start
of one: to import PyTorch takes two seconds. gapkern is not imported there yet.
"""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gapkern import testing

ROOT = str(Path(__file__).resolve().parent.parent)
_SERVER = """
import json, os, runpy, sys, traceback, warnings
import torch
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for number, (name, flags) in enumerate(job["streams"]):
                os.dup2(os.open(name, flags), number)
            os.chdir(job["cwd"])
            os.environ.clear()
            os.environ.update(job["environment"])
            sys.path[:0] = job["path"]
            sys.argv = ["-c", *job["arguments"]]
            warnings.simplefilter("ignore")
            exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen:
    command = [sys.executable, "-c", _SERVER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @atexit.register
    def close() -> None:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait()
        process.stdout.close()

    return process


def run(
    code: str, *arguments: object, env: dict[str, str] | None = None, cwd: object = None, stdout: str | None = None
) -> subprocess.CompletedProcess:
    """`subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True)`.

    With `stdout`, a path such as /dev/full, what it prints goes there.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch(), err.touch()
        streams = [(os.devnull, os.O_RDONLY), (stdout or str(out), os.O_WRONLY), (str(err), os.O_WRONLY)]
        job = {"streams": streams, "cwd": str(cwd or os.getcwd()), "code": code, "path": [ROOT]}
        job |= {"environment": dict(os.environ if env is None else env), "arguments": [str(a) for a in arguments]}
        print(json.dumps(job), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(["python", "-c", code], status, out.read_text(), err.read_text())


def gapkern(*words: object, **options) -> subprocess.CompletedProcess:
    """The command line of `gapkern` in a process of its own; options as for `run`."""
    return run("import sys, gapkern.cli; sys.exit(gapkern.cli.main())", *words, **options)


def peak_memory(code: str, *, setup: str) -> float:
    """`gapkern.testing.peak_memory`, in a process that has PyTorch."""
    if "GAPKERN_SANITIZED" in os.environ:
        pytest.skip("a sanitizer's memory would count")
    done = run(testing.peak_memory_program(code, setup=setup))
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split("\n")[-2])
