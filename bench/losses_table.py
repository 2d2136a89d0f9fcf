"""The table of docs/losses.md: formulas, who else has them, and the speed and memory that bench_losses measured."""

from typing import Any

from bench import harness
from bench.markdown import machine, table

# The call, its formula, who else has it, and its name in bench/bench_losses.py.
LOSSES = (
    ("contrastive_loss(x, y, s)", "mean of both ways of lse_j S_ij - S_ii", "open_clip, memeff", "contrastive_loss"),
    (
        "contrastive_loss(..., ids=)",
        'lse_j S_ij - mean over positives of S_ip; "in": - log mean exp S_ip',
        "UniCL",
        "contrastive_loss, ids",
    ),
    (
        "contrastive_loss(..., label_smoothing=eps)",
        "+ eps (S_ii - mean_j S_ij)",
        "memeff",
        "contrastive_loss, label smoothing",
    ),
    ("sigmoid_loss(x, y, s, b)", "sum_j softplus(-z_ij (S_ij + b))", "open_clip, siglip-kernel", "sigmoid_loss"),
    (
        'sigmoid_loss(..., ids=, positives="mean")',
        "positives weighted (1/k_i + 1/k_j) / 2; N and M may differ",
        "siglip-kernel's SigLIP+ (over M)",
        "sigmoid_loss, ids",
    ),
    (
        "sigmoid_loss(..., soft_label=True)",
        "those weights a as targets: a softplus(-S) + (1 - a) softplus(S)",
        "siglip-kernel",
        "",
    ),
    ("sigmoid_loss(..., symmetric=False)", "a = 1/k_i", "siglip-kernel", ""),
    (
        "info_nce_loss(q, d, s)",
        "lse_j S_ij - S_ii",
        "sentence-transformers `MultipleNegativesRankingLoss`, memeff",
        "info_nce_loss",
    ),
    (
        "info_nce_loss(..., hard_negatives=, share_hard_negatives=True)",
        "all rows' hard negatives below too",
        "sentence-transformers",
        "info_nce_loss, hard negatives",
    ),
    (
        "info_nce_loss(..., directions=, partition=)",
        "one softmax, or one a side, over q-d, d-q, q-q, d-d",
        "sentence-transformers",
        "info_nce_loss, four directions",
    ),
    (
        "info_nce_loss(..., margin=m)",
        "without t_ij > t_ii + m",
        "memeff's Qwen3 loss",
        "info_nce_loss, four directions, margin",
    ),
    (
        "info_nce_loss(..., debias=tau)",
        "negatives' mean as max((mean - tau e^S_ii) / (1 - tau), e^-s)",
        "memeff",
        "info_nce_loss, debias",
    ),
    (
        "info_nce_loss(..., hardness=a)",
        "negatives' S + a t, the second held constant",
        "sentence-transformers",
        "info_nce_loss, hardness",
    ),
    (
        "ntxent_loss(x, y, s)",
        "each of 2N rows against the other 2N - 1",
        "lightly, pytorch-metric-learning",
        "ntxent_loss",
    ),
    (
        "ntxent_loss(..., decoupled=True)",
        "the same without the pair itself below",
        "lightly `DCLLoss`",
        "ntxent_loss, decoupled",
    ),
    (
        "supcon_loss(x, labels, s)",
        'lse_{j != i} S_ij - mean over positives of S_ip; "in" too',
        "pytorch-metric-learning",
        "supcon_loss",
    ),
    (
        "mil_nce_loss(x, y, s)",
        "-log(P / (P + Q)), y (N, K, D)",
        "MIL-NCE's own code (which counts P twice below)",
        "mil_nce_loss",
    ),
    (
        "gist_loss(q, d, s, guide_q, guide_d)",
        "without pairs that a guide finds closer than the pair itself",
        "sentence-transformers `GISTEmbedLoss`",
        "gist_loss",
    ),
    ("uniformity_loss(x, t)", "log mean_{i != j} exp(-t distance^2)", "Wang and Isola", "uniformity_loss"),
    ("Matryoshka(loss, dims)", "sum over prefixes, normalised again", "sentence-transformers, memeff", "Matryoshka"),
)


def _load(name: str) -> dict[str, Any] | None:
    """A result, or None before it was measured."""
    return harness.load(name) if (harness.RESULTS / f"{name}.json").exists() else None


def _by_loss(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["loss"]: row for row in rows}


def losses() -> str:
    """Formulas, other libraries, and how the losses compare with the first of them in time and memory."""
    result, narrow = _load("losses"), _load("losses-avx2")
    timed = _by_loss(result["cases"]) if result else {}
    timed_narrow = _by_loss(narrow["cases"]) if narrow else {}
    peaks = _by_loss(result["peak_memory_mib"]) if result else {}
    rows = []
    for call, formula, who, name in LOSSES:
        cells = [_faster(timed.get(name)), _faster(timed_narrow.get(name)), _less(peaks.get(name))]
        rows.append([f"`{call}`", formula, who, *cells])
    header = ["loss", "formula of row i", "who else has it", "faster than", "with AVX2", "memory, MiB"]
    return table(header, rows) + (_measured(result, narrow) if result else "")


def _faster(case: dict[str, Any] | None) -> str:
    if case is None:
        return ""
    taken = {who: r["median"] for who, r in case["results"].items()}
    return f"{case['baseline']}: {taken[case['baseline']] / taken['gapkern']:.1f}x"


def _less(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    theirs, ours = [v for k, v in row.items() if k not in ("loss", "N", "D") and not k.startswith("other")]
    return f"{'too many' if theirs is None else f'{theirs:,.0f}'} → {ours:,.0f}"


def _measured(result: dict[str, Any], narrow: dict[str, Any] | None) -> str:
    n, d, peak = result["cases"][0]["N"], result["cases"][0]["D"], result["peak_memory_mib"][0]["N"]
    with_avx2 = f" With AVX2 at most, PyTorch's part too: {machine(narrow)}" if narrow else ""
    return (
        f"\n\nA training step of {n:,} x {d}, float32. {machine(result)}{with_avx2} Memory is the peak above inputs "
        f"and gradients at {peak:,} x {d}. In it are unit vectors that a loss is called with where its inputs are not "
        f"({peak * d * 4 // 2**20} MiB a side, and as much for their gradients), and up to 256 MiB of logits that "
        f"`contrastive_loss` keeps for the backward pass."
    )
