"""Python processes that start with PyTorch imported: forked from one that has done nothing else.

For code that needs a process of its own (an environment variable, a setting, memory), and not the start of one: to
import PyTorch takes two seconds. gapkern is not imported there yet.
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

_SERVER = """
import json, os, runpy, sys, traceback, warnings
import torch
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for number, name in enumerate(("in", "out", "err")):
                os.dup2(os.open(job[name], os.O_RDONLY if name == "in" else os.O_WRONLY), number)
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


def run(code: str, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True)`."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch(), err.touch()
        job = {"in": os.devnull, "out": str(out), "err": str(err), "cwd": os.getcwd(), "code": code}
        job |= {"environment": dict(os.environ if env is None else env), "arguments": [str(a) for a in arguments]}
        root = str(Path(__file__).resolve().parent.parent)
        print(json.dumps({**job, "path": [root]}), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(["python", "-c", code], status, out.read_text(), err.read_text())
