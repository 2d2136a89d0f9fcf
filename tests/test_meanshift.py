"""The mean shift's operators against float64 and their own contract."""

import pytest
import torch

from gapkern import MeanShift
from gapkern.ops import meanshift
from gapkern.reference import meanshift as reference
from gapkern.testing import assert_near, assert_three_way

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (511, 33), (513, 64), (2000, 130), (0, 4)]


def data(shape, dtype, offset=10.0):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum(poisoned, shape, dtype):
    x = data(shape, dtype)
    ours = torch.ops.gapkern.meanshift_sum(x)
    assert ours.dtype == torch.float64
    assert_near(ours, reference.column_sum(x), 1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram(poisoned, shape, dtype):
    x = data(shape, dtype)
    mean = torch.full((shape[1],), 10.0, dtype=torch.float64)
    assert_near(torch.ops.gapkern.meanshift_gram(x, mean), reference.gram(x, mean), 1e-13)


def test_gram_of_many_chunks_of_rows(poisoned, monkeypatch):
    monkeypatch.setattr(meanshift, "_CHUNK", 3 * 11)
    x = data((20, 11), torch.float32)
    mean = torch.full((11,), 10.0, dtype=torch.float64)
    assert_near(torch.ops.gapkern.meanshift_gram(x, mean), reference.gram(x, mean), 1e-13)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply(poisoned, shape, dtype, normalize):
    x = data(shape, dtype, offset=0.0)
    shift = torch.linspace(-1, 1, shape[1], dtype=torch.float64)
    ours = torch.ops.gapkern.meanshift_apply(x, shift, normalize)
    plain = x + shift.to(dtype)
    plain = torch.nn.functional.normalize(plain, dim=1) if normalize else plain
    truth = x.double() + shift
    truth = torch.nn.functional.normalize(truth, dim=1) if normalize else truth
    assert ours.dtype == dtype
    assert_three_way(ours, plain, truth, 1e-15)
    # Formed in float64 and rounded once: half a unit in the last place, or one where the quotient's rounding adds.
    assert torch.equal(ours, reference.apply(x, shift, normalize)) or dtype == torch.float64


def test_every_half_precision_number_survives_a_shift_of_zero():
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).reshape(64, 1024)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        y = torch.ops.gapkern.meanshift_apply(x, torch.zeros(1024), False)
        assert ((x == y) | (x.isnan() & y.isnan())).all()


def test_rows_of_zeros_normalise_to_zeros():
    x = torch.zeros(3, 5)
    assert torch.equal(torch.ops.gapkern.meanshift_apply(x, torch.zeros(5), True), x)


def test_strides_and_threads_do_not_matter():
    x = torch.randn(900, 60)
    shift = torch.randn(60)
    expected = torch.ops.gapkern.meanshift_apply(x, shift, True), torch.ops.gapkern.meanshift_sum(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for other in (x, x.T.contiguous().T, torch.stack([x, x], 1)[:, 0]):
            assert torch.equal(torch.ops.gapkern.meanshift_apply(other, shift, True), expected[0])
            assert torch.equal(torch.ops.gapkern.meanshift_sum(other), expected[1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: torch.ops.gapkern.meanshift_apply(a, b, normalize), (x, shift))
    assert torch.autograd.gradcheck(torch.ops.gapkern.meanshift_sum, (x,))
    assert torch.autograd.gradcheck(torch.ops.gapkern.meanshift_gram, (x, shift))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, shift = torch.randn(5, 7).to(dtype).requires_grad_(), torch.randn(7, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.gapkern.meanshift_sum, (x,))
    torch.library.opcheck(torch.ops.gapkern.meanshift_gram, (x, shift))
    torch.library.opcheck(torch.ops.gapkern.meanshift_apply, (x, shift, False))
    torch.library.opcheck(torch.ops.gapkern.meanshift_apply, (x, shift, True))


def test_bad_shapes_are_refused():
    with pytest.raises(RuntimeError, match="shift: expected D = 4 elements, got 3"):
        torch.ops.gapkern.meanshift_apply(torch.zeros(2, 4), torch.zeros(3), False)
    with pytest.raises(RuntimeError, match=r"x: expected shape \(N, D\)"):
        torch.ops.gapkern.meanshift_sum(torch.zeros(4))
    with pytest.raises(RuntimeError, match="x: expected float32, float64"):
        torch.ops.gapkern.meanshift_sum(torch.zeros(4, 2).int())


@pytest.mark.parametrize("normalize", [False, True])
def test_the_mean_shift_on_cuda_is_that_of_the_cpu(cuda_device, normalize):
    gallery, queries = data((70, 33), torch.float32), data((41, 33), torch.float32, offset=-2.0)

    def run(gallery, queries):
        shift = MeanShift(normalize=normalize, n_components=5).fit(gallery, queries)
        return shift.transform(gallery), shift.transform_queries(queries)

    for ours, theirs in zip(cuda_device.on(run, gallery, queries), run(gallery, queries), strict=True):
        assert_near(ours, theirs, 1e-6)


@pytest.mark.gpu
def test_cuda_sums_more_rows_than_one_pass_takes():
    x = torch.ones(3_000_000, 4, dtype=torch.float16, device="cuda")
    assert torch.ops.gapkern.meanshift_sum(x).tolist() == [3_000_000.0] * 4


@pytest.mark.gpu
def test_cuda_on_a_stream_of_its_own():
    x, shift = data((513, 64), torch.float32).cuda(), torch.linspace(-1, 1, 64, dtype=torch.float64).cuda()
    expected = torch.ops.gapkern.meanshift_sum(x), torch.ops.gapkern.meanshift_apply(x, shift, True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # inputs of another stream's launch would be read too early
        late = x * 1
        found = torch.ops.gapkern.meanshift_sum(late), torch.ops.gapkern.meanshift_apply(late, shift, True)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
