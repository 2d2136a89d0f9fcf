import math

import numpy as np
import pytest
import torch

from gapkern.testing import assert_near, assert_three_way, compare
from tests.conftest import real_embeddings


def test_the_worst_element_is_named():
    expected = torch.arange(12.0).reshape(3, 4)
    actual = expected.clone()
    actual[2, 1] += 3
    comparison = compare(actual, expected)
    assert comparison.worst_index == (2, 1)
    assert (comparison.worst_actual, comparison.worst_expected) == (12, 9)
    assert comparison.max_abs == 3
    assert comparison.relative_l2 == pytest.approx(3 / expected.norm().item())
    assert "at (2, 1)" in str(comparison)


def test_bias_tells_a_systematic_error_from_noise():
    expected = np.ones(1000)
    noise = np.where(np.arange(1000) % 2, 0.1, -0.1)
    assert compare(expected + noise, expected).bias == pytest.approx(0, abs=1e-12)
    assert compare(expected + 0.1, expected).bias == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("actual", "expected", "relative_l2", "cosine"),
    [([0.0, 0.0], [0.0, 0.0], 0.0, 1.0), ([1.0, 0.0], [0.0, 0.0], 1.0, 0.0), ([], [], 0.0, 1.0)],
)
def test_zeros_and_empty_inputs_have_defined_answers(actual, expected, relative_l2, cosine):
    comparison = compare(actual, expected)
    assert comparison.relative_l2 == relative_l2
    assert comparison.cosine == cosine


def test_equal_nans_and_infinities_pass_and_others_do_not():
    odd = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert_near(odd, odd, 0.0)
    for index, wrong in ((0, math.nan), (1, 1.0), (2, -math.inf)):
        actual = odd.clone()
        actual[index] = wrong
        with pytest.raises(AssertionError, match=rf"at \({index},\).*1 NaN or infinite"):
            assert_near(actual, odd, 1e9)


def test_shapes_must_match():
    with pytest.raises(ValueError, match=r"actual: expected shape \(3,\) as in expected, got \(2,\)"):
        compare(np.zeros(2), np.zeros(3))


def test_three_way_allows_pytorchs_own_error_and_no_more():
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    rounded = truth.bfloat16()
    own = compare(rounded, truth).relative_l2
    assert own > 1e-4
    assert_three_way(rounded, rounded, truth, margin=0.0)
    with pytest.raises(AssertionError, match=r"gradient: error above PyTorch's own[\s\S]*ours:[\s\S]*PyTorch:"):
        assert_three_way(truth * (1 + 3 * own), rounded, truth, margin=own, name="gradient")


def test_three_way_gives_no_credit_where_pytorch_overflows():
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    broken = torch.tensor([1.0, math.inf])
    assert_three_way(truth, broken, truth, margin=1e-6)
    with pytest.raises(AssertionError):
        assert_three_way(broken, broken, truth, margin=1.0)


def test_real_embeddings_are_pairs(real_data):
    assert real_data is real_embeddings
    pairs = real_embeddings("clip")
    assert pairs.shape == (2, 500, 512)
    assert pairs.dtype == np.float32


def test_absent_embeddings_skip_with_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("GAPKERN_TEST_DATA", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=str(tmp_path)):
        real_embeddings("clip")
