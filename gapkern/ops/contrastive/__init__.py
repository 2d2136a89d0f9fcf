"""The contrastive losses' operators: log-sum-exps of logits that are never formed, and the summed sigmoid loss.

`op` registers them; `dispatch` chooses between `chunked` and `sm90` on devices without kernels of their own.
"""

from gapkern.ops.contrastive.op import lse_pair, sigmoid_sum

__all__ = ["lse_pair", "sigmoid_sum"]
