"""`python -m tests.software_gpu`: every kernel, instruction form, planted mistake and seed; exit 1 unless all."""

import argparse
import concurrent.futures
import multiprocessing
import sys
import time

from . import jobs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.software_gpu", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="what is said of each planted mistake")
    options = parser.parse_args()
    from . import end_to_end, matrix_programs, problems, reductions
    from .device import machine, with_library
    from .mistakes import MISTAKES

    start = time.monotonic()
    device = with_library()
    if device is None or machine() is None:
        print("the CUDA library is not built in this checkout (nvcc, a CUDA build of PyTorch, `make build`)")
        return 1
    kernels, forms, unknown = device.report()
    every_form = sorted({form for of_kernel in forms.values() for form in of_kernel})
    todo = [("kernel_problem", i) for i in range(len(problems.KERNELS))]
    todo += [("in_blocks", i) for i in range(len(end_to_end.IN_BLOCKS))]
    todo += [("losses", seed) for seed in range(jobs.LOSSES)]
    todo += [("random", first) for first in range(0, jobs.RANDOM_PROGRAMS, 500)]
    todo += [("further", i) for i in range(len(matrix_programs.PROGRAMS) + len(reductions.PROGRAMS))]
    todo += [("mistake", i) for i in range(len(MISTAKES))] + [("form", form) for form in every_form]
    ran, failed, passed = set(), [], {}
    pool = concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"))
    with pool:
        for (function, argument), error, said, launched in pool.map(jobs.run, todo):
            if function in ("kernel_problem", "in_blocks", "losses"):
                ran |= launched
            if error:
                failed.append((function, argument))
                name = MISTAKES[argument].name if function == "mistake" else argument
                print(f"FAILED {function} {name}\n{error}", flush=True)
            else:
                passed[function] = passed.get(function, 0) + 1
            if said and options.verbose:
                print(f"{MISTAKES[argument].name}: {said}")
    for what in unknown:
        print(f"NOT UNDERSTOOD {what}")
    left = sorted(set(kernels) - ran)
    for name in left:
        print(f"NEVER RAN {name}")
    print(
        f"{passed.get('random', 0) * 500} random programs, {passed.get('losses', 0)} random losses, "
        f"{len(end_to_end.IN_BLOCKS)} in blocks of rows, {len(problems.KERNELS)} problems under each seed, "
        f"{time.monotonic() - start:.0f} s"
    )
    print(
        f"kernels executed: {len(kernels) - len(left)} of {len(kernels) + len(unknown)}; "
        f"instruction forms: {passed.get('form', 0)} of {len(every_form)}; "
        f"planted mistakes caught: {passed.get('mistake', 0)} of {len(MISTAKES)}; seeds: {jobs.SEEDS}"
    )
    return 1 if failed or left or unknown else 0


if __name__ == "__main__":
    sys.exit(main())
