"""How a mistake is planted, and the problems that must notice."""

from dataclasses import dataclass

import torch

from . import chunk_problems, hopper_problems, problems
from .device import Device, quiet

SUMS, KEPT, GRADIENTS = "4SumsINS_10bfloat16_tEv", "4SumsINS_10bfloat16_tES", "GradientsINS_10bfloat16_tELi1"
SIGMOIDS, TERMS = "SigmoidINS_10bfloat16_tELi1", "GradientsINS_10bfloat16_tELi3"
COLUMN_SUM, SHIFTED, NEAREST = "sum_rowsIfLi4E", "apply_rowsIfLi4ELb1E", "nearest_tilesIfLb1E"
LSE_TILES, BITS = "lse_tilesIfLb1E", "WriteBits"


def exponentials(x, y):
    return torch.exp2(5 * (x.double() @ y.double().T) - 3).fill_diagonal_(0)


def sums(device):
    x, y = hopper_problems.pair(300, 300, 320, torch.bfloat16)
    control = torch.tensor([5.0, -3.0])
    rows, columns = device.call("contrastive_sm90_sums", x, y, control, x.new_empty(0), 0)
    truth = exponentials(x, y)
    problems.assert_near(rows, truth.sum(1), 1e-5)
    problems.assert_near(columns, truth.sum(0), 1e-5)


def kept(device):
    x, y = hopper_problems.pair(300, 300, 136, torch.bfloat16)
    control, to = torch.tensor([5.0, -3.0]), torch.zeros(300, 304, dtype=torch.bfloat16)
    device.call("contrastive_sm90_sums", x, y, control, to, 0)
    problems.assert_near(to[:, :300], exponentials(x, y), 4e-3)


def gradient(device):
    hopper_problems.gradient_elements(device, 140, 300, 72, torch.bfloat16, False)


def separate(device):
    hopper_problems.gradient_elements(device, 140, 300, 72, torch.bfloat16, False, True)


def single_pair(device):
    hopper_problems.softmax_statistics(device, 1, 1, 8, torch.bfloat16)


def sigmoid(device):
    hopper_problems.sigmoid_elements(device, 140, 300, 72, torch.bfloat16)


def terms(device):
    hopper_problems.in_terms(device, "softmax", 140, 300, 40)


def exact(device):
    problems.exact(device, 900, 16, torch.float32)


def column_sum(device):
    problems.mean_shift(device, (513, 64), torch.float32)


def nearest(device):
    problems.nearest_rows(device, 70, 300, 32, torch.float32)


def chunk(device):
    chunk_problems.steps_between_products(device, 64, 132, torch.float32, False)


def statistics(device):
    hopper_problems.softmax_statistics(device, 131, 260, 72, torch.bfloat16)


def bits(device):
    x = torch.zeros(40, 257)
    assert torch.equal(device.call("perturb_bits", x, 7, 1, 3), problems.on_cpu("perturb_bits", x, 7, 1, 3))


@dataclass(frozen=True)
class Mistake:
    name: str
    kinds: tuple[str, ...]  # any of them; "wrong result" is the reference's word
    kernel: str
    changes: tuple
    problem: object
    seeds: tuple[int, ...] = (0, 1, 2)  # the first that shows it


GONE = ""


def of(name, kinds, kernel, *changes, problem=None, seeds=(0, 1, 2)):
    """A mistake, shown by a problem: that of Hopper's kernel unless another is named."""
    problem = problem or {KEPT: kept, SUMS: sums, GRADIENTS: gradient, SIGMOIDS: sigmoid, TERMS: terms}[kernel]
    planted = tuple((kernel, *c) for c in changes)
    return Mistake(name, (kinds,) if isinstance(kinds, str) else kinds, kernel, planted, problem, seeds)


def noticed(device: Device, mistake: Mistake) -> str:
    """What is said of it: "kind in kernel, line: what", or "wrong result"; "" where it goes unnoticed."""
    for seed in mistake.seeds:
        device.seed(seed)
        try:
            with quiet(), device.mistake(*mistake.changes):  # CUTLASS prints the tensor maps that are refused
                mistake.problem(device)
        except (RuntimeError, AssertionError) as error:
            fault = device.fault()
            if fault is None:
                kind = "wrong result"
                said = f"{kind}: {str(error).partition(chr(10))[0][:120]}"
            else:
                kind, said = fault.kind, f"{fault.kind} in {fault.kernel}, line {fault.line}: {fault.what}"
            if kind in mistake.kinds and (fault is None or mistake.kernel in fault.kernel):
                return said
            return f"MISTAKEN for {said}"
        finally:
            device.seed(0)
    return ""
