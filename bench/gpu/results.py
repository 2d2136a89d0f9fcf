"""One result of all sections, with each contender's time over its limit, and a short table of it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import gapkern
from bench import harness


def _floor(case: dict[str, Any], rates: dict[str, float]) -> float | None:
    """Seconds the case takes at least: 8NMD or bytes, at the measured rate."""
    if case.get("traffic"):
        return case["traffic"] / rates["copy"] if "copy" in rates else None
    dtype = case.get("dtype")
    return case["operations"] / rates[dtype] if case.get("operations") and dtype in rates else None


def collect(out: Path) -> dict[str, Any]:
    """One result of every section's file in `out`, with each contender's time over its floor."""
    found = {p.stem.partition("-")[2]: json.loads(p.read_text()) for p in sorted(out.glob("section-*.json"))}
    rates = {}
    for case in found.get("ceilings", []):
        for r in (r for r in case.get("results", {}).values() if "median" in r):
            rates[case["ceiling"]] = (case["traffic"] or case["operations"]) / r["median"]
    for cases in found.values():
        for case in cases:
            floor = _floor(case, rates)
            timed = [(name, r) for name, r in case.get("results", {}).items() if "median" in r]
            for name, r in timed if floor else ():
                # Kept exponentials save one product of four.
                part = 0.75 if name == "gapkern, keep" else 1.0
                r["floor"], r["over_floor"] = part * floor, r["median"] / (part * floor)
    stages = out / "stages.txt"
    return {
        "benchmark": "gpu",
        "commit": harness.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "version": gapkern.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "rates": rates,
        "stages": [line.split("\t") for line in stages.read_text().splitlines()] if stages.exists() else [],
        "sections": found,
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    for stage in result["stages"]:
        yield "stage  " + "  ".join(stage)
    for rate, value in result["rates"].items():
        yield f"limit  {rate:<10} {value / 1e12:8.2f} " + ("TB/s" if rate == "copy" else "TFLOP/s")
    for section, cases in result["sections"].items():
        for case in cases:
            about = " ".join(str(case[k]) for k in ("operation", "N", "Q", "D", "dtype") if k in case)
            if "error" in case:
                yield f"{section} {about}: {case['error'][:90]}"
            base = case.get("results", {}).get(case.get("baseline"), {}).get("median")
            for name, r in case.get("results", {}).items():
                if "failed" in r:
                    yield f"{section} {about:<36} {name:<20} failed: {r['failed'][:90]}"
                elif r["role"] == "ours":
                    faster = f"{base / r['median']:7.2f}x" if base else ""
                    over = f"{r['over_floor']:6.2f} of floor" if "over_floor" in r else ""
                    yield f"{section} {about:<36} {name:<20} {1e3 * r['median']:10.3f} ms {faster} {over}"
