"""open_clip's loss classes, with its arguments, its order and its results, on gapkern's losses.

Across ranks (`world_size` > 1) each rank forms its rows of the logits once. With W ranks:

| local_loss | gather_with_grad | value | gradient of the features |
| --- | --- | --- | --- |
| False | False | of the whole batch | that of the whole batch |
| False | True | of the whole batch | W times that of the whole batch |
| True | either | of this rank's pairs | W times that of the whole batch |

DistributedDataParallel averages over ranks, so that factor W trains as one process with the whole batch would. The
factors are open_clip's own. Where open_clip leaves part of the gradient out (local_loss without gather_with_grad), here
it is whole. The gradient of logit_scale is that of the whole batch, on every rank.

Subclasses may override open_clip's methods: `get_logits`, `get_ground_truth`, `dist_loss`, SigLipLoss's `_loss`. Where
one is overridden, or labels were put into the cache, the loss is formed from the N x M logits with them.
"""

from gapkern.losses.open_clip.clip import ClipLoss, CoCaLoss
from gapkern.losses.open_clip.distill import DistillClipLoss
from gapkern.losses.open_clip.siglip import SigLipLoss

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss"]
