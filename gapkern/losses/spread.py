"""Rows that lie on one process or are spread over ranks: brought together, or visited around a ring."""

from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import distributed, ring
from gapkern.ops import contrastive

EXCHANGES = ("auto", "gather", "ring")
# "auto" gathers while everyone's rows and their gradients, of the widest of the tensors, fit into this.
GATHERED_BYTES = 2**31
# A loss has several blocks of logits: each is kept for the backward pass where it fits in here, or not at all.
BLOCK_BYTES = 64 * 2**20


def by_ring(exchange: str, place: distributed.Shard | None, *tensors: Tensor | None) -> bool:
    """Whether rows travel; every rank finds the same, since their tensors have one shape.

    Raises:
        ValueError: an unknown exchange.
    """
    _check.choice("exchange", exchange, EXCHANGES)
    if place is None or place.world == 1 or exchange == "gather":
        return False
    if exchange == "ring":
        return True
    if torch.compiler.is_compiling():
        return False
    return 2 * place.world * max(t.numel() * t.itemsize for t in tensors if t is not None) > GATHERED_BYTES


def block_bytes(x: Tensor, columns: int | torch.SymInt) -> int:
    """Bytes of work space for a block of logits, x's rows x columns: enough for all of it, or none."""
    if not torch.is_grad_enabled():
        return 0
    needed = x.shape[0] * columns * (8 if x.dtype == torch.float64 else 4)
    return BLOCK_BYTES if needed <= BLOCK_BYTES else 0


class Spread:
    """(n, D) rows of every rank, N = W n in all.

    Args:
        mine: this rank's.
        place: the rank; None where there is one process.
        terms: see `distributed.gather`.
        travels: whether rows are visited; they are gathered else, at first use and once.
    """

    def __init__(self, mine: Tensor, place: distributed.Shard | None, terms: str = "", travels: bool = False):
        self.mine, self.place, self.terms, self.travels = mine, place, terms, travels
        self._everyone: Tensor | None = None

    def __len__(self) -> int:
        return self.mine.shape[0] * (1 if self.place is None else self.place.world)

    @property
    def first(self) -> int:
        """Where this rank's rows begin."""
        return 0 if self.place is None else self.place.rank * self.mine.shape[0]

    def everyone(self) -> Tensor:
        """(N, D), with gradients."""
        if self._everyone is None:
            place = self.place
            self._everyone = self.mine if place is None else distributed.gather(self.mine, place, self.terms)
        return self._everyone

    def _block(self, value: Tensor | None, owner: int) -> Tensor | None:
        """An owner's part of a value for each of the N rows."""
        n = self.mine.shape[0]
        return None if value is None else value[owner * n : (owner + 1) * n]

    def masked_lse(
        self,
        x: Tensor,
        scale: Tensor,
        *,
        col_ids: Tensor | None = None,
        col_limit: Tensor | None = None,
        guide_y: Tensor | None = None,
        label: str = "counted",
        work_bytes: int | None = None,
        **options: Any,
    ) -> contrastive.Classes:
        """`contrastive.masked_lse` of x (n, D) against the N rows.

        Args:
            x, scale, options: this rank's.
            col_ids, col_limit: of all N rows.
            guide_y: of this rank's rows.
            label: row i of x belongs to row i of this rank's.
            work_bytes: as there, where rows are on this process; None: `block_bytes`.

        Returns:
            Columns: the sums over this rank's x, (N,).
        """
        if not self.travels:
            if guide_y is not None and self.place is not None:
                guide_y = distributed.stack(guide_y, self.place).flatten(0, 1)
            options |= {"col_ids": col_ids, "col_limit": col_limit, "guide_y": guide_y, "label": label}
            everyone = self.everyone()
            if work_bytes is None:
                work_bytes = block_bytes(x, everyone.shape[0])
            options |= {"label_offset": self.first, "work_bytes": work_bytes}
            return contrastive.masked_lse(x, everyone, scale, **options)
        assert self.place is not None
        rank = self.place.rank

        def block(owner: int, visitors: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            found = contrastive.masked_lse(
                x,
                visitors[0],
                scale,
                col_ids=self._block(col_ids, owner),
                col_limit=self._block(col_limit, owner),
                guide_y=None if guide_y is None else visitors[1],
                label=label if owner == rank else "none",
                **options,
            )
            return tuple(found)

        visitors = [self.mine] if guide_y is None else [self.mine, guide_y.detach()]
        job = ring.Visit(self.place, block, ("lse", "columns", "lse", "columns", "own"))
        return contrastive.Classes(*ring.visit(job, visitors, (x, scale)))

    def against_itself(
        self,
        scale: Tensor,
        *,
        ids: Tensor | None = None,
        equal: str = "left_out",
        limit: Tensor | None = None,
        similarity: str = "dot",
    ) -> tuple[Tensor, Tensor]:
        """Log-sum-exps of this rank's rows against all others: over negatives, and over positives.

        Args:
            ids: of all N rows.
            limit: of this rank's.
            scale, equal, similarity: as for `contrastive.masked_lse`.
        """
        if self.place is None:
            columns = contrastive.self_columns(self.mine.shape[0])
            return contrastive.self_lse(
                self.mine,
                scale,
                ids=ids,
                equal=equal,
                limit=limit,
                similarity=similarity,
                work_bytes=block_bytes(self.mine, columns),
            )
        options: dict[str, Any] = {"row_limit": limit, "similarity": similarity, "label": "left_out"}
        if ids is not None:
            own = ids[self.first : self.first + self.mine.shape[0]]
            options |= {"row_ids": own, "col_ids": ids, "equal": equal}
        found = self.masked_lse(self.mine, scale, **options)
        return found.row_negative, found.row_positive

    def class_sums(self, x: Tensor, row_ids: Tensor, col_ids: Tensor, similarity: str = "dot") -> tuple[Tensor, Tensor]:
        """`contrastive.class_sums` of x (n, D) against the N rows, whose ids are `col_ids`, without the labels.

        Row i of x has row i of this rank's as its label. The columns' sums are over this rank's x, (N,).
        """
        if not self.travels:
            options: dict[str, Any] = {"similarity": similarity, "label_offset": self.first}
            return contrastive.class_sums(x, self.everyone(), row_ids, col_ids, **options)
        assert self.place is not None
        rank, n = self.place.rank, len(self.mine)

        def block(owner: int, visitors: Any, x: Tensor) -> tuple[Tensor, ...]:
            ids = col_ids[owner * n : (owner + 1) * n]
            return contrastive.class_sums(x, visitors[0], row_ids, ids, similarity=similarity, labelled=owner == rank)

        rows, columns = ring.visit(ring.Visit(self.place, block, ("sum", "columns")), [self.mine], (x,))
        return rows, columns

    def total(self) -> Tensor:
        """(D,) the sum of all rows, in float32 at least."""
        work = torch.float64 if self.mine.dtype == torch.float64 else torch.float32
        if not self.travels:
            return self.everyone().sum(0, dtype=work)
        assert self.place is not None
        return distributed.sum_columns(self.mine.sum(0, dtype=work), self.place)

    def map(self, function: Any) -> "Spread":
        """The rows that `function` makes of each rank's."""
        return Spread(function(self.mine), self.place, self.terms, self.travels)


def dense(*ids: Tensor) -> tuple[Tensor, ...]:
    """The same partition in small numbers, below the number of all ids: exact in float32 up to 2^24 of them.

    Example:
        >>> dense(torch.tensor([7, -3]), torch.tensor([7, 7, 10**12]))
        (tensor([1, 0]), tensor([1, 1, 4]))
    """
    ordered = torch.cat(ids).sort().values
    return tuple(torch.searchsorted(ordered, part) for part in ids)


def class_counts(ids: Tensor, of: Tensor, classes: int | torch.SymInt) -> Tensor:
    """For each of `of`: how many of `ids` are equal, in float64; all are numbers of `classes`.

    Example:
        >>> class_counts(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 2]), 3).tolist()
        [1.0, 2.0, 0.0]
    """
    counts = torch.zeros(classes, dtype=torch.float64, device=ids.device)
    return counts.index_add(0, ids, counts.new_ones(len(ids)))[of]
