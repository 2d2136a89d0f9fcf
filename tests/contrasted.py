"""Embeddings, and what the contrastive operator or its reference makes of them."""

import torch


def pair(n, m, d, dtype=torch.float32, scale=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale
    y = torch.randn(m, d, generator=generator, dtype=torch.float64) * scale
    return x.to(dtype), y.to(dtype)


def value_and_gradients(function, x, y, scale, **options):
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    scale = scale.detach().clone().requires_grad_()
    row, col, positive = function(x, y, scale, **options)
    # Weights that differ by element, so that no error cancels.
    total = sum(
        (v.double() * torch.linspace(0.5, 1.5, len(v), dtype=torch.float64)).sum() * w
        for v, w in ((row, 1.0), (col, 0.7), (positive, -1.3))
    )
    return [row, col, positive, *torch.autograd.grad(total, (x, y, scale))]


NAMES = ("row_lse", "col_lse", "positive", "grad_images", "grad_texts", "grad_logit_scale")
