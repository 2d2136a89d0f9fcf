"""The CPU library's tests under sanitizers: python tests/sanitize.py [address|thread] [pytest's arguments].

The library is built with the sanitizer into a folder of its own, the tests run against it, and what a sanitizer finds
ends them. AddressSanitizer and UBSan see every operator on the CPU, ThreadSanitizer the losses.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ["test_contrastive.py", "test_contrastive_contract.py", "test_losses.py", "test_work_space.py"]
LOSSES += ["test_masked_lse.py", "test_masked_sigmoid.py", "test_class_sums.py", "test_prefixes.py"]
TESTS = {
    "address": [*LOSSES, "test_meanshift.py", "test_perturb.py", "test_robustness_ops.py"],
    "thread": LOSSES,
}
# Python and PyTorch leak by themselves; what they allocate and free is not ours to judge.
OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    },
    "thread": {
        "TSAN_OPTIONS": f"suppressions={ROOT / 'tests' / 'tsan.supp'}:halt_on_error=1:report_signal_unsafe=0"
        ":ignore_noninstrumented_modules=1"
    },
}
RUNTIME = {"address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so"]}


def runtime(sanitizer: str) -> str:
    """What has to be loaded ahead of Python, which is built without it."""
    compiler = os.environ.get("CXX", "c++").split()
    found = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in RUNTIME[sanitizer]
    ]
    return " ".join(path.strip() for path in found)


def build(sanitizer: str) -> Path:
    """A folder with the package and its sanitized libraries."""
    site = ROOT / "build" / f"sanitize-{sanitizer}"
    shutil.rmtree(site, ignore_errors=True)
    environment = {**os.environ, "GAPKERN_SANITIZE": sanitizer, "GAPKERN_CUDA": "off"}
    for step in ("build_py", "build_ext"):
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", step, "--build-lib", site], cwd=ROOT, env=environment, check=True
        )
    return site


def main(sanitizers: list[str], arguments: list[str]) -> int:
    for sanitizer in sanitizers:
        site = build(sanitizer)
        # Safe path: the checkout's own package would come before it, here and in the processes that tests start.
        environment = {
            **os.environ,
            **OPTIONS[sanitizer],
            "LD_PRELOAD": runtime(sanitizer),
            "PYTHONPATH": str(site),
            "PYTHONSAFEPATH": "1",
            "GAPKERN_SANITIZED": sanitizer,
        }
        tests = [f"tests/{name}" for name in TESTS[sanitizer]]
        print(f"{sanitizer}: {' '.join(tests)}", flush=True)
        # A sanitizer's report goes past pytest, which ends with it.
        command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", *tests, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    wanted = [a for a in sys.argv[1:2] if a in TESTS]
    sys.exit(main(wanted or list(TESTS), sys.argv[1 + len(wanted) :]))
