"""What `descend` returns: one row for each recorded step, and the embeddings at the end and at chosen steps."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gapkern import _check, files
from gapkern._compare import same_fields

__all__ = ["COLUMNS", "Snapshot", "Trajectory"]

COLUMNS = (
    "step",
    "loss",
    "gradient_norm",
    "logit_scale",
    "gap_norm",
    "variance_along_images",
    "variance_across_images",
    "variance_along_texts",
    "variance_across_texts",
    "residual_images",
    "residual_texts",
    "sum_distance_correlation",
    "relative_alignment",
    "orthogonality",
)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Embeddings and softmax sums at one step: images, texts (N, D); sums_images, sums_texts (N,)."""

    images: Tensor
    texts: Tensor
    sums_images: Tensor
    sums_texts: Tensor

    __eq__ = same_fields


@dataclass(eq=False)
class Trajectory:
    """A descent, as it was recorded.

    Attributes:
        rows: dictionaries with the keys of `COLUMNS`; see `gapkern.dynamics.measure`. gradient_norm is that of images
            and texts together (on the sphere: of its tangential part).
        images, texts: (N, D) after the last step.
        logit_scale: after the last step.
        snapshots: by step.
        settings: the descent's arguments.
    """

    rows: list[dict[str, Any]]
    images: Tensor = field(repr=False)
    texts: Tensor = field(repr=False)
    logit_scale: float
    snapshots: dict[int, Snapshot] = field(repr=False)
    settings: dict[str, Any]

    __eq__ = same_fields

    def series(self, value: str) -> tuple[list[int], list[float]]:
        """The recorded steps and the values there."""
        _check.choice("value", value, COLUMNS[1:])
        return [row["step"] for row in self.rows], [row[value] for row in self.rows]

    def frozen(self, residual: float = 1e-6, change: float = 1e-6) -> int | None:
        """The first recorded step from which on the gap stands still as Theorem 3.2 has it; None if it never does.

        Args:
            residual: both modalities' |S_i - 1| stay below this,
            change: and the gap's relative change over 1000 steps below this.

        Example:
            >>> from gapkern.dynamics import descend, tight_clusters
            >>> path = descend(*tight_clusters(6, 8, 0.01, gap=2.0), 2.0, lr=0.3, steps=800)
            >>> 0 < path.frozen() < 800, path.frozen(residual=1e-12) is None
            (True, True)
        """
        first: int | None = None
        for before, after in zip(self.rows[:-1], self.rows[1:], strict=True):
            moved = abs(after["gap_norm"] - before["gap_norm"]) / before["gap_norm"] if before["gap_norm"] else 0.0
            still = moved * 1000 / (after["step"] - before["step"]) < change
            level = max(row[f"residual_{side}"] for row in (before, after) for side in ("images", "texts"))
            if not (still and level < residual):
                first = None
            elif first is None:
                first = before["step"]
        return first

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with the columns of `COLUMNS`."""
        pandas = _check.extra("pandas", "pandas", "tables")
        return pandas.DataFrame(self.rows, columns=list(COLUMNS))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Settings and rows as JSON; written to `path` too where one is given."""
        value = {"settings": self.settings, "rows": self.rows}
        if path is not None:
            files.write_json(path, value)
        return json.dumps(files.plain(value), indent=2)

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Writes the rows as a table."""
        return files.write(path, lambda temporary: self.to_dataframe().to_csv(temporary, index=False))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A figure: loss and gradient, gap, variance along and across it, and softmax sums. Written to `path` too."""
        from gapkern import figures

        figure = figures.trajectory(self)
        if path is not None:
            files.write(path, lambda temporary: figure.savefig(temporary, dpi=150))
        return figure
