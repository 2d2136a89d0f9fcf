"""The contrastive losses' operators: log-sum-exps of logits that are never formed, and the summed sigmoid loss.

`op` registers them; `dispatch` chooses between `chunked` and `sm90` on devices without kernels of their own; `masked`
and `masked_sigmoid` register those with classes of pairs (labels, positives, negatives, and those left out), of which
`masked_chunked` has the chunks and `masked_tangents` the forward-mode derivatives; `itself` has classes for a side with
itself; `prefixes` has all prefixes of the embeddings at once; `sums` adds t up over positives.
"""

from gapkern.ops.contrastive.itself import self_columns, self_lse
from gapkern.ops.contrastive.masked import Classes, masked_lse
from gapkern.ops.contrastive.masked_sigmoid import masked_sigmoid_sum
from gapkern.ops.contrastive.op import lse_pair, sigmoid_sum
from gapkern.ops.contrastive.prefixes import prefix_lse
from gapkern.ops.contrastive.sums import class_sums

__all__ = [
    "Classes",
    "class_sums",
    "lse_pair",
    "masked_lse",
    "masked_sigmoid_sum",
    "prefix_lse",
    "self_columns",
    "self_lse",
    "sigmoid_sum",
]
