"""Every hand-written device kernel on the CPU: CUDA's threads as fibers (simt/simt.h), in both orders."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import native

SOURCES = Path(__file__).parent / "simt"
CAPABILITIES = ["classes", "contrastive", "meanshift", "perturb", "robustness", "sm90", "sm90_masked"]
FOLDERS = dict.fromkeys(("classes", "sm90", "sm90_masked"), "contrastive")  # where not named as the capability


@pytest.fixture(scope="module")
def built():
    """The folder of the emulated kernels' programs, kept: what has not changed is not compiled again."""
    if sys.platform != "linux":
        pytest.skip("fibers by ucontext")
    return native.simt()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_in_both_orders_with_every_barrier_needed(built, capability):
    done = subprocess.run([built / capability], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 5
    assert all(line.startswith("passed") for line in lines)


PLANTED = {
    "classes": [
        ("of_row == of_column[c] ?", "of_row != of_column[c] ?"),
        ("int64_t of_row = row_ids[", "int32_t of_row = row_ids["),
        ("(value[r][c] > of_row) |", "(value[r][c] < of_row) |"),
        ("| (value[r][c] > of_column[c]) ?", "?"),
        ("2 * t[r][c] - of_row -", "2 * t[r][c] + of_row -"),
        ("t[r][c] = distance > 0 ? R(0) : distance;", "t[r][c] = distance;"),
        ("return row < last ? row : last;", "return row;"),
        ("return column < last ? column : last;", "return column;"),
        ("at.row + classes.label_offset - at.column", "at.row - classes.label_offset - at.column"),
        ("first > -kWarpRows && first", "first >= 0 && first"),
        ("(1u << int(columns)) - 1", "15"),
        ("(1u << (kThreadColumns * int(rows))) - 1", "~0u"),
        ("above |= above_limits(chunk, at, u,", "above |= above_limits(chunk, at, t,"),
        ("others & ~equal & ~above", "others & ~above"),
        ("others & ~equal & ~above", "others & ~equal"),
        ("others & ~equal & ~above", "there & ~equal & ~above"),
        ("classes.positive ? others & equal : 0", "classes.positive ? there & equal : 0"),
        ("const bool upper = lane & (rows * 4);", "const bool upper = lane & rows;"),
        ("__shfl_sync(kEveryLane, row_base, r * 4)", "__shfl_sync(kEveryLane, row_base, r)"),
        ("for (int o = 2; o > 0; o /= 2) v[0]", "for (int o = 1; o > 0; o /= 2) v[0]"),
        ("* exp2_term(highest[w * kTileColumns + column] - base);", ";"),
        (
            "sum = 0;\n      for (int w = 1; w < kTileWarps; ++w) most",
            "sum = 0;\n      for (int w = 2; w < kTileWarps; ++w) most",
        ),
        ("(counts & row_bits(r)) != 0", "(counts & row_bits(0)) != 0"),
        ("(counts & column_bits(c)) != 0", "(counts & column_bits(3)) != 0"),
        ("int64_t row = at.row + at.lane / 4;", "int64_t row = at.row + at.lane % 8;"),
        ("members.negative & bit(r, c) ? weight : R(0)", "weight"),
        ("members.positive & bit(r, c) ? weight : w[c]", "weight"),
        ("lse_of_row(positive.row_lse[row])", "lse_of_row(negative.row_lse[row])"),
        ("Split<R>(positive.column_lse[column])", "column_lse[c]"),
        ("exp2_term((v - lse.high) - lse.low)", "exp2_term(v - lse.low)"),
        ("weights.grad_label[row] : w[c]", "weights.grad_label[0] : w[c]"),
        ("all += w[c];", ""),
        ("positive ? -logit : logit", "logit"),
        ("of_row + ids.column_weights", "of_row - ids.column_weights"),
        ("const bool counts = there & bit(r, c);", "const bool counts = true;"),
        ("ids.soft_targets ? 1 - a : R(0)", "ids.soft_targets ? a : R(0)"),
        ("+ rest[c] * logit", ""),
        ("if (of > 0) __syncthreads();", ""),
    ],
    "contrastive": [
        ("exp2_of(v[r][c] - base);\n    sum = warp_sum", "exp2_of(v[r][c]);\n    sum = warp_sum"),
        ("for (int w = 1; w < kTileWarps; ++w) most = larger", "for (int w = 2; w < kTileWarps; ++w) most = larger"),
        ("if (column + c < columns) t[c] = 2 * t[c] - row", "if (column + c < columns) t[c] = 2 * t[c] + row"),
        ("== row + weights.label_offset", "== row - weights.label_offset"),
        ("R sigmoid = (u < 0 ? R(1) : e)", "R sigmoid = (u < 0 ? e : R(1))"),
        ("return maximum > kNothing<R> ? maximum : R(0);", "return maximum;"),
        (
            "for (int c = 0; c < kThreadColumns; ++c) t[c] = column + c < columns ? from[c] : R(0);",
            "for (int c = 0; c < kThreadColumns; ++c) t[c] = from[c];",
        ),
        ("if (lane == 0) scratch[warp] = x;\n  __syncthreads();", "if (lane == 0) scratch[warp] = x;"),
        (
            "if (lane == 0) scratch[warp] = x;\n  __syncthreads();",
            "if (lane == 0) { scratch[warp] = x; __syncthreads(); }",
        ),
    ],
    "meanshift": [
        ("r += kSumWarps)", "r += kSumWarps + 1)"),
        ("(warp * pack + i) * kWarp + lane] = sum[i]", "(warp * pack + i) * kWarp + 31 - lane] = sum[i]"),
        ("squared += y * y;", "squared += y;"),
        ("(norm > A(1e-12) ? norm : A(1e-12))", "norm"),
    ],
    "perturb": [
        ("row = s.first_row + r;", "row = s.first_row + b;"),
        ("shared ? 0 : i % columns", "shared ? 0 : i % 3"),
        ("left < 4 ? int(left) : 4", "4"),
        ("(normalize && noise_first ? to : from)", "from"),
        ("if (noise_first && !normalize) {", "if (noise_first) {"),
        ("values.round();\n        values.add_noise", "values.add_noise"),
        ("kCount && i < left; ++i) from_wide", "kCount; ++i) from_wide"),
        ("uint32_t((column + i) / 4)", "uint32_t(column / 4)"),
        ("(norm > A(1e-12) ? norm : A(1e-12))", "norm"),
        ("i < left ? to_wide(from[i]) : A(0)", "to_wide(from[i])"),
    ],
    "robustness": [
        ("j != row.target;", "true;"),
        ("of_warp & ((1u << lane) - 1)", "of_warp & ((2u << lane) - 1)"),
        ("turn ^= kExactWarps)", "turn ^= 0)"),
        ("held > kRivals - kExactThreads ||", "false ||"),
        ("return p.w < 0 ? 1 - tail : tail;", "return tail;"),
        ("offset <= 3) weight", "offset <= 2) weight"),
        ("i = group; i < points; i += kGroups", "i = group; i < points; i += kGroups + 1"),
        ("distances + i / per_query * count", "distances + i % per_query * count"),
        ("for (int i = 0; i < 48; ++i)", "for (int i = 0; i < 12; ++i)"),
        ("second = score < best ? best : score", "second = score < best ? second : score"),
        ("other.best == best && other.row < row", "other.best == best && other.row > row"),
        ("second = loser < second ? loser : second;", ""),
        ("if (row >= g) continue;", ""),
        ("sum[i][j] = 0;\n    }", ";\n    }"),
        ("half ^= 1;\n", ""),
        ("place * 4 + i; }", "place * 4 + i % 4; }"),
        ("tile + 1 : tile", "tile + 2 : tile"),
        ("most = largest[b] > most ? largest[b] : most;", "most = largest[0];"),
        ("(d < 0 ? 0 : d) * inverse", "d * inverse"),
        ("product *= p.w < 0 ? 1 - tail : tail;", "product *= tail;"),
        ("for (int w = 1; w < kNormWarps; ++w)", "for (int w = 2; w < kNormWarps; ++w)"),
        ("if (row >= rows || column >= columns) return;", "if (column >= columns) return;"),
        ("found.beaten ? 0. : 1.;\n      return;", "1.;\n      return;"),
        ("found.beaten ? 0. : 1.;\n    return;", "1.;\n    return;"),
        ("return deviation > 0 ? lead / deviation : lead < 0 ? -kDecided : kDecided;", "return lead / deviation;"),
        ("deviations[query]};", "deviations[i]};"),
        ("erfc(-(double(list[r]) + z)", "erfc((double(list[r]) + z)"),
    ],
    "sm90": [
        ("fmaf(k, acc, shift)", "fmaf(k, acc, -shift)"),
        ("| uint32_t(g < 0) << 1 | 1", "| 1"),
        ("uint32_t(weight < 0) << 1 | 1;", "1;"),
        ("log2(magnitude) - lse2", "log2(magnitude) + lse2"),
        ("separate_term(k * acc, b)", "separate_term(k * acc, a)"),
        ("(to_bits(weight) & 2) << 30", "(to_bits(weight) & 1) << 31"),
        ("return is_separate(weight) ? weight : from_bits(bits);", "return from_bits(bits);"),
        ("from_bits(to_bits(float(factor)) & ~1u)", "from_bits(to_bits(float(factor)) | 1u)"),
        ("kCeiling - log2(terms)", "kCeiling + 50"),
        ("terms * 0x1p-102 &&", "0 &&"),
        ("t * stride + i]", "t * count + i]"),
        ("first + d < p.depth;", "true;"),
        ("o = kAcross / 2", "o = kAcross / 4"),
        ("if (column0 + column < p.columns && ", "if ("),
        ("lse[row] != lse[row])\n      lse", "lse[row] == lse[row])\n      lse"),
        ("if (other_base == kNothing<float>) return;", ""),
        ("other_sum * exp2_of(other_base - high)", "other_sum"),
        ("w.column_weight[column + c]", "w.column_weight[column]"),
        ("if (*w.separate != 0) return;", "if (*w.separate == 0) return;"),
        ("(row + label_offset) * p.depth", "row * p.depth"),
        ("* pitch + row + label_offset;", "* pitch + row;"),
        ("(term * rows + row) * pitch", "row * pitch"),
        ("left -= double(to_wide(*to));", ""),
        ("double(x[d]) * double(y[d])", "double(x[d] * y[d])"),
        ("sigmoid_of_other(acc, -scale, -bias)", "sigmoid_of_other(acc, -scale, bias)"),
        ("return {terms.loss, -terms.gradient};", "return terms;"),
        ("s > 0 ? reciprocal : e * reciprocal", "s > 0 ? e * reciprocal : reciprocal"),
        ("log1p_ratio(e), s > 0 ? s : 0.f", "log1p_ratio(e), 0.f"),
        ("0.07822594791650772f", "0.07822694791650772f"),
        ("magnitude < 1e-30f ?", "false ?"),
        ("return scale < 0 ? kFar : -kFar;", "return -kFar;"),
        ("-1.44269504f * fabsf(s)", "-1.44269504f * s"),
        ("separate = block_max<kWarps>(separate, scratch);", ""),
        ("first += loads * threads", "first += (loads + 1) * threads"),
        ("column0 + column != row0 + row + label", "column0 + column != row0 + row"),
        ("} else if (i < padded) {", "} else if (i < count) {"),
        ("left = grad_label[row];", "left = grad_label[0];"),
        ("i % packs * count;", "i % packs;"),
        ("double(larger(rows, columns))", "double(rows)"),
        ("* column * 1.001f", "* column"),
        ("&& sum < 0x1p127", ""),
        ("exponent <= kWeightRange", "true"),
        ("log2(terms) + kFloor))", "kFloor))"),
        ("shift, double(terms)) ? 0 : 1;", "shift, 1.) ? 0 : 1;"),
        ("(a + w.column_weight[column + c])", "(a + w.column_weight[c])"),
        ("exponent < least ? least :", ""),
    ],
    "sm90_masked": [
        ("control[2] + control[1] >= -125", "true"),
        ("control[2] + control[1] >= -125", "false"),
        ("if (sum == 0 && !flushed)", "if (sum == 0)"),
        ("|| sum >= terms * 0x1p-102)", "|| true)"),
        ("&& sum < 0x1p127;", ";"),
        ("sum != sum && control[1] == control[1]", "sum != sum"),
        ("floor(228 - log2(terms))", "floor(248 - log2(terms))"),
        ("if (!condition || *condition != 0)", "if (condition)"),
        ("if (i < count && lse[i] == pending()) {", "if (i < count) {"),
        ("left = found == pending() ? 1 : 0;", ""),
        ("left = block_max<kWarps>(left, scratch);", ""),
        ("next[1] = control[1] + raise_of", "next[1] = control[1] - raise_of"),
        ("*condition = found;", "*condition = 1;"),
        ("(positive && positive[row0 + r] == pending())", "false"),
        ("|| column0 + column == row0 + row + label) return;", ") return;"),
        ("if (id[i] == to_bits(mark[0]))", "if (id[0] == to_bits(mark[0]))"),
        ("product > limit[i] || product > mark[1]", "product > limit[i]"),
        ("product > limit[i] || product > mark[1]", "product > mark[1]"),
        ("lse && lse[row] == pending())", "lse)"),
        ("positive && soft ? fmaf(-a, s, s) : 0.f", "0.f"),
        ("positive && soft ? fmaf(-a, s, s) : 0.f", "(positive && soft) * fmaf(-a, s, s)"),
        ("positive ? -weight : weight", "weight"),
        ("positive && !soft ? a", "positive ? a"),
    ],
}


def fails(program, **environment):
    """Whether a kernel's program finds a fault, until it says so."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([program], text=True, env={**os.environ, **environment}, **streams) as running:
        if any(line.startswith("FAILED") for line in running.stdout):
            running.kill()
    return running.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_planted_mistake_is_caught(built, tmp_path, capability):
    """A test of the test: an index, a sign or a barrier changed in a copy of the kernels."""
    source = SOURCES.parent.parent / "csrc"
    compiler = ["c++", "-std=c++17", "-O0", "-w", "-ffp-contract=off"]  # most of the time goes to the compiler
    standard = {
        line for path in SOURCES.glob("*.*") for line in path.read_text().split("\n") if line.startswith("#include <")
    }
    (tmp_path / "standard.h").write_text("\n".join(sorted(standard)) + "\n")
    subprocess.run(
        [*compiler, "-x", "c++-header", tmp_path / "standard.h", "-o", tmp_path / "standard.h.gch"], check=True
    )
    compiler += ["-include", tmp_path / "standard.h"]
    texts = {
        path.relative_to(source): path.read_text()
        for path in (source / FOLDERS.get(capability, capability)).glob("*.cuh")
    }

    def unnoticed(number):
        right, wrong = PLANTED[capability][number]
        changed = tmp_path / str(number)
        (changed / FOLDERS.get(capability, capability)).mkdir(parents=True)
        for path, text in texts.items():
            if right in text:
                (changed / path).write_text(text.replace(right, wrong))
        assert list(changed.rglob("*.cuh")), f"nothing to plant it in: {right!r}"
        program = changed / "program"
        include = ["-I", changed, "-I", SOURCES, "-I", source]
        subprocess.run([*compiler, *include, SOURCES / f"{capability}.cpp", "-o", program], check=True)
        if fails(program, GAPKERN_SIMT_ERRORS="1") or fails(program):
            return None
        return f"{right!r} changed to {wrong!r} went unnoticed"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert [line for line in pool.map(unnoticed, range(len(PLANTED[capability]))) if line] == []
