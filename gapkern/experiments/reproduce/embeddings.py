"""What the figures are drawn from: synthetic clusters, the digits, files, or a model on a folder of images."""

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from gapkern.gap import MeanShift


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Queries, a gallery, and what is known of them.

    Args:
        name: for titles.
        queries: (Q, D), images.
        gallery: (G, D), texts: class prompts or captions.
        labels: (Q,) the right gallery row of each query, or None.
        about: one sentence for the report: what this is.
        rewordings: name to (G, D): the gallery in other words; the first entry is `gallery` itself where there are any.
        classes: what each gallery row is called; empty where rows are captions.
        components: what `MeanShift` is to keep: "exact" for a few prompts, "auto" for a large gallery.
    """

    name: str
    queries: Tensor = field(repr=False)
    gallery: Tensor = field(repr=False)
    labels: Tensor | None = field(repr=False)
    about: str
    rewordings: dict[str, Tensor] = field(default_factory=dict, repr=False)
    classes: tuple[str, ...] = ()
    components: int | float | str = "exact"

    @cached_property
    def shift(self) -> MeanShift:
        """Fitted on the gallery and the queries, alpha = 1."""
        return MeanShift(components=self.components).fit(self.gallery, self.queries)

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return "".join(c if c.isalnum() else "_" for c in self.name.lower()).strip("_")
