"""Timing that can be believed: contenders take turns, results are checked first, and the machine is written down.

Each case runs every contender once to warm up and to compare its result, then in rounds, one call each in turn, so that
other load on the machine falls on all alike. Reported: median and the 20th and 80th percentile of the calls.
"""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import LIMITS
from gapkern import files
from gapkern.experiments import environment

RESULTS = Path(__file__).resolve().parent / "results"
_cpu_clock = time.perf_counter


def use_processor_time() -> None:
    """From now on calls on the CPU are timed as processor time of one thread, which other work disturbs less."""
    global _cpu_clock
    _cpu_clock = time.process_time
    torch.set_num_threads(1)


@dataclass
class Contender:
    """One way to do a case's work.

    Attributes:
        name: as tables show it.
        call: does the work once.
        role: "ours", "baseline", or "limit" for the least that any implementation must do.
    """

    name: str
    call: Callable[[], Any]
    role: str = "ours"


@dataclass
class Case:
    """What is timed: its parameters, the contenders, and a check of their results against each other.

    The check raises where a result is wrong. It may instead return what is wrong by name, of contenders that are not
    ours, whose times then count for nothing.
    """

    parameters: dict[str, Any]
    contenders: list[Contender]
    check: Callable[[dict[str, Any]], dict[str, str] | None] = field(default=lambda results: None)
    baseline: str = ""
    traffic: int | None = None  # bytes that must move, for bandwidths


def equal_to(baseline: str, where: str, other_results: tuple[str, ...] = ("limit", "other")):
    """All against the baseline, but for names that start as `other_results`."""

    def check(results: dict[str, Any]) -> None:
        expected = results[baseline]
        for name, found in results.items():
            if name.startswith(other_results):
                continue
            tolerance = 2e-2 if "bfloat16" in name else 2e-5
            for ours, theirs in zip(found, expected, strict=True):
                # The gradient of logit_scale is a small difference of large sums: it is judged by the loss.
                size = theirs.norm() if theirs.dim() else expected[0].abs()
                error = float((ours - theirs).norm() / size)
                assert error < tolerance, f"{name} at {where}: relative error {error:.1e}"

    return check


def stopwatch(device: str) -> Callable[[Callable[[], Any]], Callable[[], float]]:
    """Times one call; the seconds are asked for once the round is over, so that CUDA's calls queue up.

    On CUDA by events; a buffer larger than the cache is written first, so that the call finds none of its inputs there
    and is submitted while the device is still busy.
    """
    if device == "cpu":

        def on_the_cpu(call):
            started = _cpu_clock()
            call()
            spent = _cpu_clock() - started
            return lambda: spent

        return on_the_cpu
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(2**28, 4 * cache), dtype=torch.uint8, device=device)

    def on_cuda(call):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        call()
        end.record()

        def seconds():
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return seconds

    return on_cuda


def reason(error: Exception) -> str:
    """An exception in one line of bounded length."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class _Guard:
    """Runs contenders' calls. Guarded, one that raises is out of the race and its reason is kept."""

    def __init__(self, guarded: bool):
        self.guarded, self.failed = guarded, dict[str, str]()

    def __call__(self, contender: Contender, call: Callable[[], Any]) -> Any:
        if contender.name in self.failed:
            return None
        try:
            return call()
        except Exception as error:
            if not self.guarded:
                raise
            self.failed[contender.name] = reason(error)
        torch.cuda.empty_cache()  # what ran out of memory must leave it to the next
        return None


def _checked(case: Case, guard: _Guard) -> None:
    results = {c.name: guard(c, c.call) for c in case.contenders}
    results = {name: value for name, value in results.items() if name not in guard.failed}
    try:
        guard.failed.update(case.check(results) or {})
    except KeyError as missing:
        if missing.args[0] not in guard.failed:
            raise
        print(f"not checked: {missing.args[0]} failed", flush=True)


def time_case(
    case: Case, *, seconds: float, least: int = 3, most: int = 50, device: str = "cpu", guarded: bool = False
) -> dict[str, Any]:
    """Times one case within about `seconds`, in `least` to `most` rounds.

    Guarded, a contender that raises (another version's signature, a package that is absent, no memory) is reported as
    {"role", "failed": reason} and the others are timed.
    """
    guard = _Guard(guarded)
    _checked(case, guard)
    spent: dict[str, list[float]] = {c.name: [] for c in case.contenders}
    watch = stopwatch(device)
    begin = time.perf_counter()
    for turn in range(most):
        # Every round starts elsewhere, so that nobody always follows the same neighbour.
        running = []
        for i in range(len(case.contenders)):
            contender = case.contenders[(i + turn) % len(case.contenders)]
            running.append((contender, guard(contender, lambda call=contender.call: watch(call))))
        for contender, taken in running:
            if contender.name not in guard.failed:
                spent[contender.name].append(guard(contender, taken))
        if turn + 1 >= least and time.perf_counter() - begin > seconds:
            break
    results: dict[str, dict[str, Any]] = {}
    for contender in case.contenders:
        if contender.name in guard.failed:
            results[contender.name] = {"role": contender.role, "failed": guard.failed[contender.name]}
            continue
        times = sorted(spent[contender.name])
        results[contender.name] = {
            "role": contender.role,
            "median": statistics.median(times),
            "p20": times[int(0.2 * (len(times) - 1))],
            "p80": times[int(0.8 * (len(times) - 1) + 0.5)],
            "calls": len(times),
        }
    return {**case.parameters, "baseline": case.baseline, "traffic": case.traffic, "results": results}


def limit_inductor(isa: str) -> None:
    """torch.compile's code for the CPU in vectors of an instruction set's width; fails where ours are others."""
    import torch._inductor.config

    from gapkern import _load

    torch._inductor.config.cpp.simdlen = {"avx2": 256}[isa]
    if (_load.active_isa(), torch.backends.cpu.get_cpu_capability()) != (isa, isa.upper()):
        raise SystemExit(f"bench: {isa} was asked for, {_load.active_isa()} runs; is the processor without it?")


def commit() -> str | None:
    """The commit that is measured, marked where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return None
    dirty = subprocess.run([*git, "status", "--porcelain", "--", ":/csrc", ":/gapkern"], capture_output=True, text=True)
    return found.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def run(name: str, cases: Iterable[Case], *, seconds: float) -> dict[str, Any]:
    """Times all cases and prints a line for each as it is done."""
    measured = []
    for case in cases:
        result = time_case(case, seconds=seconds)
        measured.append(result)
        print_case(result)
    return {**facts(name), "cases": measured}


def facts(name: str) -> dict[str, Any]:
    """What a result says of its run."""
    return {
        "benchmark": name,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "clock": "processor time of one thread" if _cpu_clock is time.process_time else "time",
        "limits": {name: os.environ[name] for names in LIMITS.values() for name in names if name in os.environ},
        "env": environment.describe(),
    }


def print_case(result: dict[str, Any]) -> None:
    parameters = ", ".join(
        f"{k}={v}" for k, v in result.items() if k not in ("baseline", "traffic", "results") and v is not None
    )
    print(parameters)
    base = result["results"].get(result["baseline"], {}).get("median")
    for name, r in result["results"].items():
        if "failed" in r:
            print(f"  {name:<34} failed: {r['failed']}", flush=True)
            continue
        line = f"  {name:<34} {1e3 * r['median']:10.2f} ms  [{1e3 * r['p20']:.2f}, {1e3 * r['p80']:.2f}]"
        if base:
            line += f"  {base / r['median']:6.2f}x"
        if result["traffic"]:
            line += f"  {result['traffic'] / r['median'] / 1e9:6.1f} GB/s"
        print(line, flush=True)


def write(result: dict[str, Any], name: str | None = None) -> Path:
    """Writes bench/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    return files.write_json(RESULTS / f"{name or result['benchmark']}.json", result)


def load(name: str) -> dict[str, Any]:
    """What `write` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random rows of unit length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)
