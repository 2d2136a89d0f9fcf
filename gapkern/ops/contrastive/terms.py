"""Float32 embeddings as sums of bfloat16 terms: products of float32's accuracy on tensor cores.

x = h + m + l, of 8 bits each. Of the nine products of two such sums six count; the others are about 2^-30 of the norms'
product. They stand side by side in rows 6 D long, so that a kernel of bfloat16 products adds them up as it is.

Tensor cores round towards zero at every step of 16 products (Fasi, Higham, Mikaitis and Pranesh 2021; Ootomo and Yokota
2022), always to the same side: over 48 steps several times the error of a float32 product. Here no step of <h, h'>
rounds. h is a multiple of a grid, 2^-11 of the row's norm within a factor of 1.5, so that partial sums are multiples of
one number and at most 2^23 times it. They fit into 24 bits, and so do the sums of what is smaller, which come first.
"""

import torch
from torch import Tensor

from gapkern.ops.products import add_matmul

TERMS = 3
PRODUCTS = ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))  # terms of either side, in the order of their sums
# Columns of a product of the library before its sum is rounded to nearest, by the sum of the terms' numbers: where all
# products have one sign 512 lose 2^-20 of theirs, as float32's own do over some thousands.
_STEPS = (2**9, 2**13, 2**31)
_BLOCK = 6 * 2**20  # elements of a sum of products, which stay in L2 meanwhile


def split(x: Tensor) -> list[Tensor]:
    """TERMS bfloat16 matrices whose sum is x, float32 (N, D), but for 2^-29 of the rows' norms."""
    # Adding and subtracting 1.5 2^12 times the norm leaves multiples of a unit in the last place of that.
    far = 6144 * torch.linalg.vector_norm(x, dim=1, keepdim=True)
    terms = [((x + far) - far).bfloat16()]
    rest = x - terms[0]
    while len(terms) < TERMS:
        terms.append(rest.bfloat16())
        rest = rest - terms[-1]
    return terms


def rows(x: Tensor, side: int) -> Tensor:
    """(N, 6 D) bfloat16 of float32 (N, D): what the left side, 0, or the right, 1, has in each of the products."""
    terms = split(x)
    return torch.cat([terms[product[side]] for product in PRODUCTS], 1)


def of_rows(x: Tensor, side: int) -> list[Tensor]:
    """The terms, as views of what `rows` gave."""
    places = [product[side] for product in PRODUCTS]
    return [x.chunk(len(PRODUCTS), 1)[places.index(term)] for term in range(TERMS)]


def add_products(out: Tensor, left: list[Tensor], right: list[Tensor]) -> None:
    """out (R, D) float32 += the product of sums of terms, each of left (R, K) and of right (K, D)."""
    count = max(1, _BLOCK // out.shape[1])
    for first in range(0, len(out), count):
        some = slice(first, first + count)
        for i, j in PRODUCTS:
            step = _STEPS[i + j]
            for a, b in zip(left[i][some].split(step, 1), right[j].split(step), strict=True):
                add_matmul(out[some], a, b)
