"""The command `gapkern`, before anything is imported: how PyTorch's threads wait is read as OpenMP is loaded."""

import os
import sys

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main() -> int:
    """Runs `gapkern`. Its threads spin a short while where they wait for each other, unless the environment says how.

    GNU's OpenMP has them spin 30 times as long: beside busy processes that multiplies the time of every parallel
    region. A hundred steps of a small model, two threads beside ten busy processes on two cores: 12 to 14 s of
    processor time as OpenMP has it, 1.9 s so, .5 s where they sleep at once (PASSIVE), which costs a tenth of a
    training step on a machine with nothing else to do.
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = "10000"
    from gapkern.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
