"""open_clip's towers in training, without what no embedding depends on.

An embedding is read from one token: the images' first, a caption's end. So the last block needs that token's query,
output and MLP alone; a causal tower needs no token behind the longest caption's end; and of the table of tokens the
captions' own rows are trained, while AdamW shrinks the others by the same factor. All of it is the same function and
the same gradient, up to rounding (`tests/test_demo.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def fits(model: Any) -> bool:
    """Whether open_clip's model has the towers that are known here; of other versions all is computed."""
    towers = (getattr(model.visual, "transformer", None), getattr(model, "transformer", None))
    known = all(getattr(tower, "batch_first", False) and len(getattr(tower, "resblocks", ())) for tower in towers)
    pools = (getattr(model.visual, "pool_type", None), getattr(model, "text_pool_type", None))
    return known and pools == ("tok", "argmax") and isinstance(model.text_projection, torch.nn.Parameter)


def at(block: Any, x: Tensor, places: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a block makes (B, 1, D) of one token of each row of `x` (B, L, D), at `places` (B,)."""
    rows = torch.arange(len(x))
    seen = block.ln_1(x)
    if mask is not None:
        mask = mask[places][:, None].repeat_interleave(block.attn.num_heads, 0)
    found = block.attn(seen[rows, places][:, None], seen, seen, need_weights=False, attn_mask=mask)[0]
    chosen = x[rows, places][:, None] + block.ls_1(found)
    moved: Tensor = chosen + block.ls_2(block.mlp(block.ln_2(chosen)))
    return moved


@contextmanager
def first_token_alone(model: Any) -> Iterator[None]:
    """Within it, `encode_image` computes the last block for the token that is read."""
    block = model.visual.transformer.resblocks[-1]
    block.forward = lambda q_x, *_, **__: at(block, q_x, q_x.new_zeros(len(q_x), dtype=torch.long))
    try:
        yield
    finally:
        del block.forward


class Captions:
    """A fixed set of captions (N, L) whose embeddings are trained.

    Attributes:
        table: the rows of the table of tokens that they use, trained in its place: see `settle`.
    """

    def __init__(self, model: Any, tokens: Tensor):
        self._model = model
        ends = tokens.argmax(1)
        self._used, places = tokens[:, : int(ends.max()) + 1].unique(return_inverse=True)
        self._tokens, self._ends = places, ends
        self.table = torch.nn.Parameter(model.token_embedding.weight.detach()[self._used].clone())
        self._shrunk = 1.0

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those of the model, with `table` for the whole one."""
        whole = self._model.token_embedding.weight
        return [self.table, *(p for p in self._model.parameters() if p is not whole)]

    def encode(self) -> Tensor:
        """Normalised embeddings (N, D), as the model's `encode_text`."""
        model, length = self._model, self._tokens.shape[1]
        mask = model.attn_mask[:length, :length]
        x = torch.nn.functional.embedding(self._tokens, self.table) + model.positional_embedding[:length]
        *blocks, last = model.transformer.resblocks
        for block in blocks:
            x = block(x, attn_mask=mask)
        x = model.ln_final(at(last, x, self._ends, mask)[:, 0]) @ model.text_projection
        return torch.nn.functional.normalize(x, dim=-1)

    def shrink(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes what AdamW's next step does to rows without a gradient."""
        group = optimizer.param_groups[0]
        self._shrunk *= 1 - group["lr"] * group["weight_decay"]

    @torch.no_grad()
    def settle(self) -> None:
        """Puts what was trained into the model's table, and shrinks the other rows."""
        weight = self._model.token_embedding.weight
        weight *= self._shrunk
        weight[self._used] = self.table
