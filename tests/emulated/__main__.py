"""`python -m tests.emulated [neon|neonbf16] [pytest's arguments]`: the operators' tests on an emulated 64-bit Arm."""

import os
import subprocess
import sys

from tests import emulated

# What calls operators in this process, on problems that an emulator ends in minutes.
TESTS = (
    "test_contrastive.py",
    "test_contrastive_contract.py",
    "test_masked_sigmoid.py",
    "test_meanshift.py",
    "test_perturb.py",
    "test_robustness_ops.py",
    "test_range.py",
)


def main(arguments: list[str]) -> int:
    if absent := emulated.missing():
        print(f"emulated: skipped, {absent}")
        return 0
    folder = emulated.build(emulated.ROOT / "build" / "emulated")
    isas = [name for name in arguments[:1] if name in emulated.PROCESSORS]
    rest = arguments[len(isas) :] or [f"tests/{name}" for name in TESTS]
    for isa in isas or emulated.PROCESSORS:
        environment = {**os.environ, "GAPKERN_EMULATED": f"{folder}:{isa}", "PYTHONPATH": str(emulated.ROOT)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulated.plugin", "-p", "no:cacheprovider"]
        status = subprocess.run([*command, *rest], cwd=emulated.ROOT, env=environment).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
