"""Puts measured numbers into README and docs, between their markers: `python bench/tables.py [--check]`.

`--demo FOLDER` first takes what `gapkern demo --out FOLDER` wrote into docs/demo, `--reproduction FOLDER` what `gapkern
reproduce all --out FOLDER` wrote into docs/reproduction.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import found, harness  # noqa: E402
from bench.losses_table import losses  # noqa: E402
from bench.markdown import machine, table  # noqa: E402


def demo() -> str:
    from gapkern.experiments.demo_report import at, moved

    report = json.loads((ROOT / "docs/demo/report.json").read_text())
    rows = []
    for alpha in (0.0, 0.5, 1.0, 1.5):
        row = at(report, alpha, perturbation="gaussian", scale="per_coordinate", variance=0.001)
        rows.append([f"{alpha:g}", *(f"{row[k]:.3f}" for k in ("robustness", "accuracy", "clean_accuracy"))])
    lines = table(["share of the gap closed, α", "robustness", "accuracy under noise", "clean accuracy"], rows)
    return (
        f"Gap norm {report['gap_norm']:.3f}, of which {report['orthogonality']:.1%} can be closed without touching a "
        f"neighbour. Gaussian noise of variance 0.001 per coordinate on the class prompts:\n\n{lines}\n\n"
        "Each image projected on the prompts' hull, which goes [beyond the paper](#close-the-gap); robustness / "
        f"accuracy under noise:\n\n{_moves(report, moved)}"
    )


def _moves(report: dict[str, Any], moved: Any) -> str:
    variances = (0.0005, 0.001, 0.002, 0.004)
    columns = [moved(report, perturbation="gaussian", scale="per_coordinate", variance=v) for v in variances]
    rows = [
        [row["moved"], *(f"{c[i]['robustness']:.3f} / {c[i]['accuracy']:.3f}" for c in columns)]
        for i, row in enumerate(columns[0])
    ]
    return table(["variance per coordinate", *(f"{v:g}" for v in variances)], rows)


CONTENDERS = {
    "open_clip": "open_clip, ms",
    "eager, one logit matrix": "eager, one matrix",
    "torch.compile": "torch.compile",
    "gapkern, recompute": "**recompute**",
    "gapkern, keep": "**keep**",
    "gapkern, bfloat16 products": "**bfloat16**",
    "gapkern, bfloat16, keep": "**bfloat16, keep**",
    "limit: 4 bare products": "4 products",
    "limit: 3 bare products": "3 products",
    "limit: 4 bare bfloat16 products": "4 in bfloat16",
    "limit: 3 bare bfloat16 products": "3 in bfloat16",
}


def _against_open_clip(cases: Iterable[dict[str, Any]], names: dict[str, str]) -> str:
    """A case a row: open_clip's time, and how many times faster the others of `names` are."""
    base, *others = names
    rows = []
    for case in cases:
        taken = {name: r["median"] for name, r in case["results"].items()}
        cells = [f"{taken[base] / taken[name]:.2f}x" for name in others]
        rows.append([str(case["N"]), f"{1e3 * taken[base]:.{1 if taken[base] < 1 else 0}f}", *cells])
    return table(["batch", *names.values()], rows)


def contrastive() -> str:
    result = harness.load("contrastive")
    wanted = [c for c in result["cases"] if c["D"] == 512 and c["pass"] == "forward+backward"]
    dot = {c["N"]: c for c in wanted if c["similarity"] == "dot"}
    theirs = dot[8192]["results"]["open_clip"]
    lines = _against_open_clip(dot.values(), CONTENDERS)
    return (
        f"{lines}\n\n{machine(result)} open_clip's matrices are fresh memory in "
        f"every step, and its time varies with how fast the system hands that out: {theirs['p20']:.1f} to "
        f"{theirs['p80']:.1f} s at 8192 (20th to 80th percentile).\n\n{_distances(wanted)}"
    )


def speed() -> str:
    """One training step in time and memory: what most readers want to know."""
    result = harness.load("contrastive")
    names = ("torch.compile", "gapkern, recompute", "gapkern, keep", "gapkern, bfloat16 products")
    peaks = {row["N"]: row for row in result["peak_memory_mib"]}
    rows = []
    for case in result["cases"]:
        if (case["D"], case["pass"], case["similarity"]) != (512, "forward+backward", "dot") or case["N"] not in peaks:
            continue
        taken = {name: 1e3 * r["median"] for name, r in case["results"].items()}
        base, peak = taken["open_clip"], peaks[case["N"]]
        times = [f"{taken[name]:,.0f} ms ({base / taken[name]:.1f}x)" for name in names]
        mib = [f"{peak[name]:,.0f} MiB" for name in ("open_clip", "gapkern, recompute", "gapkern, keep")]
        rows.append([f"{case['N']:,}", f"{base:,.0f} ms", *times, *mib])
    times = ["open_clip", "torch.compile", "**gapkern**", "kept", "bfloat16"]
    header = ["batch", *times, "memory: open_clip", "**gapkern**", "kept"]
    return f"{table(header, rows)}\n\n{machine(result)} {_largest_with_avx2()}"


def _largest_with_avx2() -> str:
    result = harness.load("contrastive-avx2")
    case = max((c for c in result["cases"] if c["similarity"] == "dot"), key=lambda c: c["N"])
    taken = {name: r["median"] for name, r in case["results"].items()}
    names = ("gapkern, recompute", "gapkern, keep", "torch.compile")
    ours, kept, compiled = (f"{taken['open_clip'] / taken[name]:.1f}x" for name in names)
    return (
        f"Where neither library may use more than AVX2: {ours}, kept {kept}, torch.compile {compiled} at "
        f"{case['N']:,} ({result['env']['processor']}, {result['clock']})."
    )


def avx2() -> str:
    """The loss where neither our kernels nor PyTorch's may use more than AVX2."""
    result = harness.load("contrastive-avx2")
    names = {name: title for name, title in CONTENDERS.items() if "bfloat16" not in name}
    lines = _against_open_clip((case for case in result["cases"] if case["similarity"] == "dot"), names)
    return f"{lines}\n\n{machine(result)}\n\n{_distances(result['cases'])}"


def _distances(cases: list[dict[str, Any]]) -> str:
    case = next(c for c in cases if c["similarity"] == "sqeuclidean")
    taken = {name: r["median"] for name, r in case["results"].items()}
    ours, kept = taken["gapkern, recompute"], taken["gapkern, keep"]
    over_dot = ours / taken["gapkern, recompute, of dot products"]
    norms, cdist = ([taken[name] / t for t in (ours, kept)] for name in ("norms and a product", "torch.cdist"))
    return (
        f"With squared Euclidean similarity, {case['N']} pairs take {over_dot:.2f} times as long as with dot "
        f"products: {norms[0]:.1f}x as fast as PyTorch's norms and product, {cdist[0]:.1f}x as fast as `torch.cdist` "
        f"({norms[1]:.1f}x and {cdist[1]:.1f}x with kept logits)."
    )


def memory() -> str:
    rows = harness.load("contrastive")["peak_memory_mib"]
    names = [name for name in rows[0] if name not in ("N", "D")]
    cells = [[f"{row[name]:.0f}" if name in row else "" for name in names] for row in rows]
    return table(["batch", *names], [[str(row["N"]), *line] for row, line in zip(rows, cells, strict=True)])


def others() -> str:
    rows = []
    for name in ("robustness", "meanshift", "perturb", "retrieval"):
        for case in harness.load(name)["cases"]:
            base = case["results"][case["baseline"]]["median"]
            by = {"l2": "", "ip": " by inner product"}[case.get("metric") or "l2"]
            what = case.get("operation") or f"exact robustness{by}, gallery {case['gallery']}"
            size = " x ".join(f"{case[k]:,}" for k in ("Q", "G", "N", "D") if k in case)
            ours = next(r["median"] for r in case["results"].values() if r["role"] == "ours")
            limit = next((f"{ours / r['median']:.2f}" for r in case["results"].values() if r["role"] == "limit"), "")
            row = [what, f"{size} {case.get('dtype', 'float32')}", case["baseline"], f"{base / ours:.1f}x", limit]
            rows.append(row)
    peak = harness.load("retrieval")["peak_memory_mib"][-1]
    return table(["operation", "size", "against", "faster", "time over the limit"], rows) + (
        "\n\nThe limit is a plain clone of the data, into fresh memory as the operators write it (they ask for huge "
        "pages, a clone does not), for robustness one search without noise, for recall one product into a matrix that "
        f"is there. Recall of {peak['Q']:,} texts and {peak['G']:,} images takes {peak['gapkern']:.0f} MiB beside them "
        f"(FAISS {peak['FAISS, two flat searches']:.0f} MiB)."
    )


def quantisers() -> str:
    result = harness.load("quantisers")
    rows = []
    for case in result["cases"]:
        if case["data"] not in ("CLIP", "synthetic"):
            continue
        k = case["k"]
        for name in dict.fromkeys(row["factory"] for row in case["rows"]):
            before, after = sorted((r for r in case["rows"] if r["factory"] == name), key=lambda r: r["shift"])
            both = [f"{before[key]:.3f} → {after[key]:.3f}" for key in ("agreement", f"overlap@{k}", f"recall@{k}")]
            speed = (before["queries_per_second"] + after["queries_per_second"]) / 2
            gallery, size = f"{case['data']}, {case['G']:,} x {case['D']}", f"{after['bytes_per_vector']:.0f}"
            rows.append([gallery, name, size, *both, f"{float(f'{speed:.2g}'):,.0f}"])
    header = [
        "gallery",
        "index",
        "bytes a row",
        "first neighbour kept",
        f"of {k} neighbours kept",
        f"recall@{k}",
        "queries/s",
    ]
    lines = table(header, rows)
    return f"{lines}\n\n{result['env']['processor']}, {result['cores']} cores, {result['date']}."


def projection() -> str:
    result = harness.load("projection")
    rows = []
    for case in result["cases"]:
        l2 = [case["l2 none"], case["l2 shift"], case["l2 projection"]]
        ip = [case["ip none"], case["ip projection"]]
        cells = [" → ".join(f"{v:.3f}" for v in values) for values in (l2, ip)]
        kept = f"{case['identical']:.0%}"
        gallery = f"{case['G']} x {case['D']}"
        rows.append([f"{case['data']}, {case['direction']}", gallery, f"{case['components']}", kept, *cells])
    header = [
        "embeddings",
        "gallery",
        "k",
        "of the first 10 neighbours kept",
        "L2: none → shift → projection",
        "inner product: none → projection",
    ]
    return f"{table(header, rows)}\n\nNoise of total variance {result['variance']:g}; {result['date']}."


def reduced() -> str:
    """Indexes of the hull's k columns in place of D."""
    rows = []
    for case in harness.load("projection")["reduced"]:
        speed = [f"{float(f'{v:.2g}'):,.0f}" for v in case["queries_per_second"]]
        size = [f"{v:.0f}" for v in case["bytes_per_vector"]]
        gallery = f"{case['G']:,} x {case['D']}"
        cells = [" → ".join(size), " → ".join(speed)]
        rows.append(
            [case["data"], case["metric"], gallery, f"{case['components']}", f"{case['identical']:.2%}", *cells]
        )
    header = ["embeddings", "metric", "gallery", "k", "of the first 10 neighbours kept", "bytes a row", "queries/s"]
    return table(header, rows)


def _recalls(case: dict[str, Any], side: str, kind: str) -> list[str]:
    """Recall by move of one kind of index, and the projection's at the others' speed where it can be traded."""
    by_move = {row["move"]: row for row in case["rows"] if (row["asks"], row["kind"]) == (side, kind)}
    recall = f"recall@{case['k']}"
    best = max(row[recall] for row in by_move.values())
    cells = [f"**{r[recall]:.3f}**" if r[recall] == best else f"{r[recall]:.3f}" for r in by_move.values()]
    none = by_move["none"]
    at_speed = by_move["projection"][f"{recall} at none's speed"]
    size, seconds = f"{none['bytes_per_vector']:.0f}", f"{none['seconds_to_build']:.2g}"
    speed = float(f"{none['queries_per_second']:.2g}")
    return [none["parameters"], *cells, "" if at_speed is None else f"{at_speed:.3f}", size, seconds, f"{speed:,.0f}"]


def _indexes(cases: list[dict[str, Any]], result: dict[str, Any], sides: tuple[str, ...]) -> str:
    rows = []
    for case in cases:
        gallery = f"{case['data']}, {case['G']:,} x {case['D']}, {case['metric']}"
        for side in sides:
            for kind in dict.fromkeys(row["kind"] for row in case["rows"]):
                rows.append([gallery, side, kind, *_recalls(case, side, kind)])
    header = [
        *("gallery, metric", "queries", "index", "parameters", "none", "shift", "projection", "centring"),
        *("projection at none's speed", "bytes a row", "s to build", "queries/s"),
    ]
    return f"{table(header, rows)}\n\n{result['env']['processor']}, {result['cores']} cores, {result['date']}."


def indexes() -> str:
    """Queries of the other modality; for the largest gallery also those of its own."""
    result = harness.load("indexes")
    largest = [case for case in result["cases"] if case["G"] == max(case["G"] for case in result["cases"])]
    own = _indexes(largest, result, ("texts",)).split("\n")[2:]
    rows = _indexes(result["cases"], result, ("images",)).split("\n")
    return "\n".join([*rows[:-2], *own])


PAGES = {
    "README.md": {"demo": demo, "speed": speed},
    "docs/benchmarks.md": {
        "contrastive": contrastive,
        "avx2": avx2,
        "memory": memory,
        "others": others,
        "quantisers": quantisers,
    },
    "docs/losses.md": {"losses": losses},
    "docs/evaluate.md": {"noise": found.noise},
    "docs/precision.md": {"training": found.training},
    "docs/projection.md": {"projection": projection, "reduced": reduced, "indexes": indexes},
    "docs/science.md": {"command": found.command, "count": found.count, "claims": found.claims},
}
DEMO = ("report.json", "pca.png", "robustness.png", "projection.png")


def filled(text: str, sections: dict[str, Callable[[], str]], page: str) -> str:
    """A page with every section's numbers as measured."""
    for name, section in sections.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, s=section: f"{m[1]}{s()}\n{m[2]}", text, flags=re.S)
        if count != 1:
            raise ValueError(f"{page}: expected one section {name}, got {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only tell whether the pages are up to date")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="what the demo wrote")
    parser.add_argument("--reproduction", type=Path, metavar="FOLDER", help="what the reproduction wrote")
    arguments = parser.parse_args()
    for source, target, names in (
        (arguments.demo, ROOT / "docs/demo", DEMO),
        (arguments.reproduction, ROOT / "docs/reproduction", [p.name for p in (ROOT / "docs/reproduction").iterdir()]),
    ):
        for name in names if source else ():
            shutil.copyfile(source / name, target / name)
    for name, sections in PAGES.items():
        current = (ROOT / name).read_text()
        wanted = filled(current, sections, name)
        if arguments.check and wanted != current:
            sys.exit(f"{name} differs from bench/results and docs/demo; run bench/tables.py")
        (ROOT / name).write_text(wanted)


if __name__ == "__main__":
    main()
