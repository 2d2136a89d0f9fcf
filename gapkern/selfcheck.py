"""Every operator against its reference on small random inputs, in a second: `gapkern doctor`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gapkern.losses import contrastive_loss
from gapkern.ops import contrastive
from gapkern.reference import classes as classes_reference
from gapkern.reference import contrastive as contrastive_reference
from gapkern.reference import losses as losses_reference
from gapkern.reference import meanshift as meanshift_reference
from gapkern.reference import perturb as perturb_reference
from gapkern.reference import robustness as robustness_reference
from gapkern.testing import compare


@dataclass(frozen=True)
class Check:
    """One operator's verdict."""

    name: str
    passed: bool
    detail: str


def _near(actual: Tensor, expected: Tensor, tolerance: float) -> tuple[bool, str]:
    found = compare(actual, expected)
    return found.relative_l2 <= tolerance and not found.mismatched, f"relative error {found.relative_l2:.1e}"


def _pairs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, 37, 29, generator=generator, dtype=torch.float64) / 3).unbind()
    return x.to(dtype), y.to(dtype)


def _contrastive() -> tuple[bool, str]:
    x, y = (t.requires_grad_() for t in _pairs())
    loss = contrastive_loss(x, y, 10.0)
    ours = torch.autograd.grad(loss, (x, y))
    expected = contrastive_reference.contrastive_loss(x.double(), y.double(), 10.0)
    theirs = torch.autograd.grad(expected, (x, y))
    return _near(
        torch.cat([loss.reshape(1), *(g.flatten() for g in ours)]),
        torch.cat([expected.reshape(1), *(g.flatten() for g in theirs)]),
        1e-5,
    )


def _contrastive_bfloat16() -> tuple[bool, str]:
    x, y = _pairs(torch.bfloat16)
    return _near(
        contrastive_loss(x, y, 10.0), contrastive_reference.contrastive_loss(x.double(), y.double(), 10.0), 1e-2
    )


def _sigmoid() -> tuple[bool, str]:
    x, y = _pairs()
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0)
    return _near(
        contrastive.sigmoid_sum(x, y, scale, bias),
        contrastive_reference.sigmoid_sum(x.double(), y.double(), scale, bias),
        1e-5,
    )


def _prefixes() -> tuple[bool, str]:
    x, y = (t.requires_grad_() for t in _pairs())
    scale, dims = torch.tensor(10.0), (1, x.shape[1] // 2, x.shape[1])
    factors = torch.linspace(0.5, 1.5, 3 * len(x), dtype=torch.float64).reshape(3, -1)
    found = []
    for function, leaves in (
        (contrastive.prefix_lse, (x, y)),
        (contrastive_reference.prefix_lse, (x.double(), y.double())),
    ):
        sums = function(*leaves, scale, factors, factors, dims)
        gradients = torch.autograd.grad(sums[0].sum() + sums[1].sum() - sums[2].sum(), leaves)
        found.append(torch.cat([t.detach().double().flatten() for t in (*sums, *gradients)]))
    ours, theirs = found
    return _near(ours, theirs, 1e-5)


def _masked() -> tuple[bool, str]:
    x, y = (t.requires_grad_() for t in _pairs())
    ids = torch.arange(len(x)) // 3
    scale = torch.tensor(10.0)
    found = []
    for function, leaves in (
        (contrastive.masked_lse, (x, y)),
        (classes_reference.masked_lse, (x.double(), y.double())),
    ):
        classes = function(*leaves, scale, row_ids=ids, col_ids=ids, equal="positive", row_limit=torch.ones(len(x)))
        gradients = torch.autograd.grad(torch.cat(classes).sum(), leaves)
        found.append(torch.cat([*(c.detach().double() for c in classes), *(g.flatten().double() for g in gradients)]))
    ours, theirs = found
    return _near(ours, theirs, 1e-5)


def _against_itself() -> tuple[bool, str]:
    x = _pairs()[0].requires_grad_()
    ids, limit, scale = torch.arange(len(x)) // 3, torch.full((len(x),), 0.9), torch.tensor(10.0)
    options = {"row_ids": ids, "col_ids": ids, "row_limit": limit, "equal": "positive", "label": "left_out"}
    leaf = x.detach().double().requires_grad_()
    found = []
    for given, classes in (
        (x, contrastive.self_lse(x, scale, ids=ids, equal="positive", limit=limit)),
        (leaf, classes_reference.masked_lse(leaf, leaf, scale, **options)[:4:2]),  # type: ignore[arg-type]
    ):
        (gradient,) = torch.autograd.grad(torch.cat(classes).sum(), given)
        found.append(torch.cat([*(c.detach().double() for c in classes), gradient.flatten().double()]))
    ours, theirs = found
    return _near(ours, theirs, 1e-5)


def _class_sums() -> tuple[bool, str]:
    x, y = (t.requires_grad_() for t in _pairs())
    ids, found = torch.arange(len(x)) // 3, []
    for rows, columns in (
        contrastive.class_sums(x, y, ids, ids, similarity="sqeuclidean"),
        classes_reference.class_sums(x.double(), y.double(), ids, ids, similarity="sqeuclidean"),
    ):
        gradients = torch.autograd.grad(rows.sin().sum() + columns.cos().sum(), (x, y))
        found.append(torch.cat([t.detach().double().flatten() for t in (rows, columns, *gradients)]))
    ours, theirs = found
    return _near(ours, theirs, 1e-5)


def _masked_sigmoid() -> tuple[bool, str]:
    x, y = _pairs()
    ids, half = torch.arange(len(x)) // 3, torch.full((len(x),), 0.5, dtype=torch.float64)
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0)
    ours = contrastive.masked_sigmoid_sum(x, y, scale, bias, ids, ids, half, half) / len(x)
    return _near(ours, losses_reference.sigmoid_loss(x.double(), y.double(), scale, bias, ids=ids), 1e-5)


def _meanshift() -> tuple[bool, str]:
    x, _ = _pairs()
    total = torch.ops.gapkern.meanshift_sum(x)
    shift = torch.linspace(-1, 1, x.shape[1], dtype=torch.float64)
    ours = [
        total,
        torch.ops.gapkern.meanshift_gram(x, total / len(x)),
        torch.ops.gapkern.meanshift_apply(x, shift, True),
    ]
    theirs = [
        meanshift_reference.column_sum(x),
        meanshift_reference.gram(x, x.double().mean(0)),
        meanshift_reference.apply(x, shift, True),
    ]
    flat = [torch.cat([t.double().flatten() for t in side]) for side in (ours, theirs)]
    return _near(flat[0], flat[1], 1e-7)


def _bits() -> tuple[bool, str]:
    x = torch.empty(5, 11)
    same = torch.equal(torch.ops.gapkern.perturb_bits(x, 42, 3, 7), perturb_reference.bits(5, 11, 42, 3, 7))
    return same, "bit-equal" if same else "other bits than Philox4x32-10"


def _noise() -> tuple[bool, str]:
    x = torch.zeros(64, 33)
    ours = [torch.ops.gapkern.perturb_noise(x, law, 1.0, 42, 3, 0) for law in ("gaussian", "uniform")]
    theirs = [perturb_reference.noise(64, 33, law, 42, 3) for law in ("gaussian", "uniform")]
    return _near(torch.cat(ours), torch.cat(theirs), 1e-6)


def _noisy_gallery() -> tuple[bool, str]:
    x, _ = _pairs()
    shift = torch.linspace(-1, 1, x.shape[1], dtype=torch.float64)
    z = perturb_reference.noise(len(x), x.shape[1], "gaussian", 42, 3)
    call = torch.ops.gapkern.perturb_noisy_gallery
    ours = [call(x, shift, "gaussian", 0.1, 42, 3, 0, True, when).double() for when in ("after", "before")]
    theirs = [
        meanshift_reference.apply(x.double(), shift, True) + 0.1 * z,
        meanshift_reference.apply(x.double() + 0.1 * z, shift, True),
    ]
    return _near(torch.cat(ours), torch.cat(theirs), 1e-6)


def _quantize() -> tuple[bool, str]:
    x, _ = _pairs()
    low, high = x.amin(0), x.amax(0)
    return _near(
        torch.ops.gapkern.perturb_quantize(x, low, high, 32), perturb_reference.quantize(x, low, high, 32), 1e-6
    )


def _robustness(device: str = "cpu") -> tuple[bool, str]:
    def exact(squared: Tensor, targets: Tensor, variance: float, dims: int) -> Tensor:
        return (
            torch.ops.gapkern.robustness_exact(squared.to(device), targets.to(device), variance, dims).cpu().flatten()
        )

    # Equal distances: each of G rows wins with probability 1 / G, whatever the law.
    squared, targets = torch.full((2, 50), 1.3, dtype=torch.float64), torch.tensor([[0], [49]])
    p = [50 * exact(squared, targets, v, 64) for v in (1e-4, 1e-2, 1.0)]
    # Unequal ones: gapkern.reference.robustness.winning_probability, by SciPy's noncentral chi-square law.
    squared, targets = torch.tensor([[1.0, 1.05, 1.2]], dtype=torch.float64), torch.tensor([[0]])
    for dims, variance, known in ((4, 0.05, 0.40548518424003194), (512, 1e-3, 0.6830799143263553)):
        p.append(exact(squared, targets, variance, dims) / known)
    found = torch.cat(p)
    return _near(found, torch.ones_like(found), 1e-4)


def _nearest(device: str = "cpu") -> tuple[bool, str]:
    y, x = _pairs()
    x[11] = x[3]  # a tie
    found = torch.ops.gapkern.robustness_nearest(*(t.to(device) for t in (y, x, x.mean(0))))
    row, best, second, _ = (t.cpu() for t in found)
    values, rows = robustness_reference.nearest_two(y, x)
    found = compare(torch.stack([best, second], 1), values)
    passed = torch.equal(row, rows) and found.relative_l2 <= 1e-5
    return passed, f"relative error {found.relative_l2:.1e}"


_CHECKS: tuple[tuple[str, Callable[[], tuple[bool, str]]], ...] = (
    ("contrastive loss and gradients", _contrastive),
    ("contrastive loss, bfloat16", _contrastive_bfloat16),
    ("sigmoid loss", _sigmoid),
    ("log-sum-exps of prefixes and gradients", _prefixes),
    ("masked log-sum-exps and gradients", _masked),
    ("log-sum-exps of a side with itself", _against_itself),
    ("sums over pairs of equal ids", _class_sums),
    ("sigmoid loss with ids", _masked_sigmoid),
    ("mean, Gram matrix and shift", _meanshift),
    ("Philox bits", _bits),
    ("Gaussian and uniform noise", _noise),
    ("shift and noise together", _noisy_gallery),
    ("quantisation", _quantize),
    ("exact robustness", _robustness),
    ("nearest rows", _nearest),
)


def checks() -> Iterator[Check]:
    """Runs every check on the CPU, and those of noise and robustness on a CUDA device where one is visible.

    Example:
        >>> all(check.passed for check in checks())
        True
    """
    for name, function in _CHECKS:
        yield _run(name, function)
    if torch.cuda.is_available():
        yield _run("noise on CUDA", _noise_on_cuda)
        yield _run("exact robustness on CUDA", lambda: _robustness("cuda"))
        yield _run("nearest rows on CUDA", lambda: _nearest("cuda"))


def _noise_on_cuda() -> tuple[bool, str]:
    x = torch.zeros(64, 33)
    laws = ("gaussian", "uniform")
    cpu = [torch.ops.gapkern.perturb_noise(x, law, 1.0, 42, 3, 0) for law in laws]
    cuda = [torch.ops.gapkern.perturb_noise(x.cuda(), law, 1.0, 42, 3, 0).cpu() for law in laws]
    same = torch.equal(torch.cat(cpu), torch.cat(cuda))
    return same, "the CPU's bits" if same else "other bits than on the CPU"


def _run(name: str, function: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *function())
    except Exception as error:  # whatever is broken here is what the doctor is asked for
        said = str(error).partition("\n")[0]
        return Check(name, False, f"{type(error).__name__}: {said}")
