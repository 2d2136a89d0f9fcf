"""The noise's integer stream, its law, quantisation, replacement and chains."""

import numpy as np
import pytest
import torch

from gapkern import Gaussian, Quantize, Replace, Uniform
from gapkern.perturb import Chain, perturb
from gapkern.reference import meanshift as meanshift_reference
from gapkern.reference import perturb as reference
from gapkern.testing import assert_near, assert_three_way

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Known answers published with the generator (Random123): counter, key, result.
KNOWN = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_reference_gives_philoxs_known_answers(counter, key, expected):
    assert reference.philox(torch.tensor(counter), key).tolist() == expected


@pytest.mark.parametrize(("counter", "key", "expected"), [KNOWN[0], KNOWN[2]])
def test_the_operator_gives_philoxs_known_answers(counter, key, expected):
    # Column block 0 only reaches counters whose first word is 0; the others come through the reference.
    column, low, high, trial = counter
    seed = key[1] << 32 | key[0]
    seed = seed - 2**64 if seed >= 2**63 else seed
    if column:
        assert torch.equal(
            torch.ops.gapkern.perturb_bits(torch.empty(1, 4), seed, trial, high << 32 | low),
            reference.bits(1, 4, seed, trial, high << 32 | low),
        )
        return
    words = torch.ops.gapkern.perturb_bits(torch.empty(1, 4), seed, trial, high << 32 | low)
    assert (words.long() & 0xFFFFFFFF)[0].tolist() == expected


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 257), (20, 1030), (0, 5), (4, 0)])
@pytest.mark.parametrize(("seed", "trial", "first_row"), [(0, 0, 0), (2**62 + 12345, 2**32 - 1, 2**40 + 3)])
def test_bits_are_the_references(poisoned, shape, seed, trial, first_row):
    ours = torch.ops.gapkern.perturb_bits(torch.empty(shape), seed, trial, first_row)
    assert ours.dtype == torch.int32
    assert torch.equal(ours, reference.bits(*shape, seed, trial, first_row))


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_the_references(poisoned, law, dtype):
    x = torch.randn(61, 133).to(dtype)
    ours = torch.ops.gapkern.perturb_noise(x, law, 0.7, 11, 2, 5)
    z = reference.noise(61, 133, law, 11, 2, 5)
    assert ours.dtype == dtype
    assert_three_way(ours, x + (0.7 * z).to(dtype), x.double() + 0.7 * z, 1e-6)


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_noise_has_its_law(law):
    stats = pytest.importorskip("scipy.stats")
    z = torch.ops.gapkern.perturb_noise(torch.zeros(2000, 500), law, 1.0, 3, 0, 0).flatten().double().numpy()
    expected = stats.norm if law == "gaussian" else stats.uniform(-(3**0.5), 2 * 3**0.5)
    assert stats.kstest(z, expected.cdf).pvalue > 1e-3
    neighbours = np.corrcoef(z[:-1], z[1:])[0, 1]
    assert abs(neighbours) < 5 / len(z) ** 0.5
    assert abs(z.mean()) < 5 / len(z) ** 0.5
    assert z.var() == pytest.approx(1, abs=5 * (2 / len(z)) ** 0.5)


def test_trials_seeds_and_rows_differ():
    x = torch.zeros(4, 64)
    draws = [
        perturb(x, Gaussian(1.0), seed=s, trial=t, first_row=r)
        for s, t, r in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 4))
    ]
    for i, a in enumerate(draws):
        assert len(torch.unique(a, dim=0)) == 4
        for b in draws[:i]:
            assert (a == b).double().mean() < 0.01


@pytest.mark.parametrize("perturbation", [Gaussian(2.0), Uniform(2.0), Gaussian(1.0) | Uniform(2.0)])
def test_chunks_threads_and_width_do_not_matter(perturbation):
    x = torch.randn(50, 70)
    whole = perturb(x, perturbation, seed=9, trial=4)
    parts = [perturb(x[i : i + 7], perturbation, seed=9, trial=4, first_row=i) for i in range(0, 50, 7)]
    assert torch.equal(whole, torch.cat(parts))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(whole, perturb(x, perturbation, seed=9, trial=4))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, perturb(x.T.contiguous().T, perturbation, seed=9, trial=4))


@pytest.mark.parametrize("scale", ["total", "per_coordinate"])
def test_the_two_scales_of_variance(scale):
    noise = perturb(torch.zeros(4000, 64), Gaussian(0.32, scale), seed=1)
    energy = noise.double().square().sum(1).mean().item()
    assert energy == pytest.approx(0.32 if scale == "total" else 0.32 * 64, rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bins", [2, 3, 32, 256])
@pytest.mark.parametrize("shared", [True, False])
def test_quantisation_is_the_references(poisoned, dtype, bins, shared):
    x = torch.randn(37, 19).to(dtype)
    x[:, 3] = 0.5  # a coordinate without extent stays
    low, high = (x.min()[None], x.max()[None]) if shared else (x.amin(0), x.amax(0))
    ours = torch.ops.gapkern.perturb_quantize(x, low, high, bins)
    assert_near(ours, reference.quantize(x, low, high, bins), 1e-7 if dtype != torch.bfloat16 else 1e-3)
    if not shared:
        assert torch.equal(ours[:, 3], x[:, 3])


@pytest.mark.parametrize("range", ["per_dimension", "global"])
def test_quantised_values_are_few_and_near(range):
    x = torch.randn(500, 6) * torch.tensor([1.0, 2, 3, 4, 5, 100])
    y = perturb(x, Quantize(16, range), seed=0)
    extent = x.amax(0) - x.amin(0) if range == "per_dimension" else (x.max() - x.min()).expand(6)
    assert ((y - x).abs() <= extent / 32 * 1.0001).all()
    assert all(len(torch.unique(column)) <= 16 for column in y.T)


def test_quantising_keeps_nan_and_clips_infinity():
    x = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [0.3]])
    y = torch.ops.gapkern.perturb_quantize(x, torch.tensor([0.0]), torch.tensor([1.0]), 4)
    assert y[0].isnan().all()
    assert y[1:].flatten().tolist() == [0.875, 0.125, 0.375]


def test_replace_and_chains():
    x, other = torch.zeros(3, 4), torch.ones(3, 4)
    assert torch.equal(perturb(x, Replace(other), seed=0), other)
    chain = Replace(other) | Gaussian(1.0) | Quantize(8)
    assert isinstance(chain, Chain)
    assert chain.random
    noisy = perturb(other, Gaussian(1.0), seed=0)
    assert not torch.equal(perturb(x, chain, seed=0), noisy)
    assert len(torch.unique(perturb(x, chain, seed=0)[:, 0])) <= 8
    assert not (Quantize(4) | Quantize(2)).random
    two = perturb(x, Gaussian(1.0) | Gaussian(1.0), seed=0)
    assert not torch.allclose(two, 2 * perturb(x, Gaussian(1.0), seed=0)), "stages must not share their noise"


def test_arrays_come_back_as_arrays():
    x = np.zeros((3, 4), dtype=np.float16)
    y = perturb(x, Gaussian(1.0), seed=0)
    assert isinstance(y, np.ndarray)
    assert y.dtype == np.float16


def test_noise_passes_gradients_and_quantisation_stops_them():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: torch.ops.gapkern.perturb_noise(t, "gaussian", 1.0, 0, 0, 0), (x,))
    perturb(x, Quantize(4), seed=0).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def composed(x, shift, noise, normalize, when):
    """The shift and the noise one after the other."""
    add, move = torch.ops.gapkern.perturb_noise, torch.ops.gapkern.meanshift_apply
    if when == "before":
        return move(add(x, *noise), shift, normalize)
    return add(move(x, shift, normalize), *noise)


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shift_and_noise_together_are_one_after_the_other(poisoned, dtype, normalize, when):
    x, shift = torch.randn(61, 133).to(dtype), torch.linspace(-1, 1, 133, dtype=torch.float64)
    noise = ("gaussian", 0.1, 11, 2, 5)
    ours = torch.ops.gapkern.perturb_noisy_gallery(x, shift, *noise, normalize, when)
    assert ours.dtype == dtype
    assert torch.equal(ours, composed(x, shift, noise, normalize, when))
    z, truth = 0.1 * reference.noise(61, 133, "gaussian", 11, 2, 5), x.double()
    truth = truth + z if when == "before" else truth
    truth = meanshift_reference.apply(truth, shift, normalize)
    truth = truth + z if when == "after" else truth
    assert_near(ours, truth, 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6)
    rows = torch.ops.gapkern.perturb_noisy_gallery(x[7:], shift, "gaussian", 0.1, 11, 2, 12, normalize, when)
    assert torch.equal(rows, ours[7:])


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("normalize", [False, True])
def test_shift_and_noise_together_pass_gradients(normalize, when):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(6, dtype=torch.float64, requires_grad=True)
    call = torch.ops.gapkern.perturb_noisy_gallery
    assert torch.autograd.gradcheck(lambda a, b: call(a, b, "uniform", 0.5, 1, 2, 3, normalize, when), (x, shift))
    torch.library.opcheck(call, (x, shift, "uniform", 0.5, 1, 2, 3, normalize, when))
    with pytest.raises(RuntimeError, match="when: expected 'after' or 'before', got 'during'"):
        call(x.detach(), shift.detach(), "uniform", 0.5, 1, 2, 3, normalize, "during")


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x = torch.randn(5, 7).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.gapkern.perturb_bits, (x.detach(), 1, 2, 3))
    torch.library.opcheck(torch.ops.gapkern.perturb_noise, (x, "gaussian", 0.1, 1, 2, 3))
    low, high = x.detach().float().amin(0), x.detach().float().amax(0)
    torch.library.opcheck(torch.ops.gapkern.perturb_quantize, (x, low, high, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_on_cuda_gives_the_cpus_bits(cuda_device, dtype):
    x = torch.randn(30, 41, generator=torch.Generator().manual_seed(0)).to(dtype)
    for noise in (Gaussian(0.3), Uniform(0.3, "per_coordinate"), Quantize(16), Quantize(16) | Gaussian(0.1)):
        found = cuda_device.on(lambda x, noise=noise: perturb(x, noise, 5, 2, first_row=7), x)
        assert torch.equal(found, perturb(x, noise, 5, 2, first_row=7)), noise


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Gaussian(-0.1), ValueError, "variance: expected a finite number >= 0, got -0.1"),
        (lambda: Gaussian("0.1"), TypeError, "variance: expected a number, got str"),
        (lambda: Gaussian(float("nan")), ValueError, "variance: expected a finite number >= 0, got nan"),
        (lambda: Uniform(0.1, "row"), ValueError, "scale: expected one of 'total', 'per_coordinate', got 'row'"),
        (lambda: Quantize(1), ValueError, r"bins: expected an integer >= 2 and <= 16777216, got 1"),
        (lambda: Quantize(2.0), TypeError, "bins: expected an integer, got float"),
        (lambda: Quantize(4, "row"), ValueError, "range: expected one of 'per_dimension', 'global', got 'row'"),
        (lambda: Replace([1.0]), TypeError, "gallery: expected a torch.Tensor or numpy.ndarray, got list"),
        (lambda: Quantize(4) | Replace(torch.ones(1, 1)), ValueError, "stages: expected Replace only as the first"),
        (lambda: perturb(torch.zeros(2, 2), "gaussian", 0), TypeError, "perturbation: expected Gaussian, Uniform"),
        (lambda: perturb(torch.zeros(2), Gaussian(1.0), 0), ValueError, r"x: expected shape \(N, D\), got \(2,\)"),
        (lambda: perturb(torch.zeros(2, 2).int(), Gaussian(1.0), 0), TypeError, "x: expected float32, float16"),
        (lambda: perturb(torch.zeros(2, 2), Gaussian(1.0), -1), ValueError, "seed: expected an integer >= 0"),
        (lambda: perturb(torch.zeros(2, 2), Gaussian(1.0), 0, 2**32), ValueError, "trial: expected an integer >= 0"),
        (lambda: perturb(torch.zeros(2, 2), Gaussian(1.0), 0, first_row=-1), ValueError, "first_row: expected"),
        (lambda: perturb(torch.zeros(2, 2), Replace(torch.ones(3, 2)), 0), ValueError, r"expected shape \(2, 2\)"),
        (lambda: Gaussian(1.0) | 3, TypeError, "unsupported operand"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
