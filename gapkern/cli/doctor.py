"""`gapkern doctor`: versions, devices, libraries, and every operator against its reference."""

import argparse
import os
import sys
from typing import Any

from gapkern.cli import common

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # read as OpenMP is loaded: see gapkern_command

# What the project's tests have run the CUDA kernels on (tests/software_gpu).
_EXECUTED = (
    "every CUDA kernel, instruction by instruction in emulation, with memory and race checking; on a GPU: none yet"
)


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "doctor",
        help="check this installation",
        description="Versions, devices, which libraries and kernels loaded and why others did not, and every operator "
        "against its plain PyTorch reference. Exit status 1 when something is wrong.",
    )
    common.add_json(parser)
    parser.set_defaults(run=run)


def examine() -> dict[str, Any]:
    """What `doctor` knows, with `healthy` as its verdict."""
    import torch

    from gapkern import _load, selfcheck
    from gapkern.experiments import environment
    from gapkern.ops.contrastive import dispatch

    checks = [vars(check) for check in selfcheck.checks()]
    libraries = [vars(library) for library in _load.status()]
    return {
        "healthy": all(check["passed"] for check in checks),
        "versions": environment.versions(),
        "processor": environment.processor(),
        "threads": torch.get_num_threads(),
        "waiting": {name: os.environ[name] for name in WAITING if name in os.environ},
        "kernels": _load.active_isa(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "compiled": dispatch.compiled(),
        "executed": _EXECUTED,
        "contrastive": dispatch.in_use(),
        "libraries": libraries,
        "build": _load.build_facts(),
        "checks": checks,
    }


def run(arguments: argparse.Namespace) -> int:
    found = examine()
    if arguments.json:
        common.print_json(found)
        return 0 if found["healthy"] else 1
    print("versions   " + ", ".join(f"{name} {version or '(absent)'}" for name, version in found["versions"].items()))
    print(f"processor  {found['processor']}, {found['threads']} threads, {found['kernels']} kernels")
    waiting = ", ".join(f"{name}={value}" for name, value in found["waiting"].items())
    print(f"waiting    threads wait for each other as {waiting or 'OpenMP has it: spinning at first'}")
    print("devices    " + (", ".join(found["devices"]) or "no CUDA device is visible"))
    for device, kernel in found["contrastive"].items():
        print(f"contrastive {device}: {kernel}")
    print(f"built      with torch {found['build']['torch']}, {found['build']['compiler']}")
    for library in found["libraries"]:
        print(f"library    {'loaded ' if library['loaded'] else 'absent '} {library['name']}: {library['detail']}")
    kernels = {"chunked": "every device (chunked)", "sm90": "Hopper (sm90)"}
    print("compiled   CUDA kernels for " + (", ".join(kernels[name] for name in found["compiled"]) or "no device"))
    print(f"executed   {found['executed']}")
    for check in found["checks"]:
        print(f"check      {'passed ' if check['passed'] else 'FAILED '} {check['name']}: {check['detail']}")
    if not found["healthy"]:
        print("gapkern doctor: something is wrong; see FAILED above", file=sys.stderr)
    return 0 if found["healthy"] else 1
