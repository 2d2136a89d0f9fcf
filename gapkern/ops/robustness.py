"""`torch.ops.gapkern.robustness_exact`: winning probabilities under Gaussian noise (csrc/robustness/robustness.h)."""

import torch


@torch.library.register_fake("gapkern::robustness_exact")
def _(distances, targets, variance, dims):
    return distances.new_empty(targets.shape, dtype=torch.float64)


def _refuse(ctx, grad):
    raise RuntimeError("gapkern: robustness_exact is not differentiable")


def _on_the_cpu(distances, targets, variance, dims):
    """For devices without a kernel of ours: the distances travel, their integrals are evaluated here."""
    result = torch.ops.gapkern.robustness_exact(distances.cpu(), targets.cpu(), variance, dims)
    return result.to(distances.device)


torch.library.register_autograd("gapkern::robustness_exact", _refuse)
_library = torch.library.Library("gapkern", "IMPL")
_library.impl("robustness_exact", _on_the_cpu, "CompositeExplicitAutograd")
