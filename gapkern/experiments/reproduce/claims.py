"""What a reproduction hands over: claims that were put to the test, figures with the numbers drawn, tables.

A target (a figure, a theorem, the baselines) is a function `(Context) -> Result`, named in `TARGETS` of this package.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gapkern.experiments.reproduce.embeddings import Embeddings

KEPT = 0.99  # share of neighbours that counts as all but the same


@dataclass(frozen=True)
class Claim:
    """One row of the report's table.

    Args:
        claim: what the paper says, as a sentence a reader of its abstract understands.
        run: what was run here to test it: data, sizes, settings.
        number: what came out, by name; the first entry is what the table sorts by.
        holds: True, False, or None where this run cannot tell.
        reason: why it does not hold or cannot be told; must be given then.

    Raises:
        ValueError: `holds` is not True and no reason is given, or there is no number and `holds` is not None.

    Example:
        >>> Claim("Neighbours stay", "10 prompts", {"agreement": 0.5}, False)
        Traceback (most recent call last):
        ...
        ValueError: reason: expected why 'Neighbours stay' does not hold, got nothing
    """

    claim: str
    run: str
    number: Mapping[str, float]
    holds: bool | None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.holds is not None:
            object.__setattr__(self, "holds", bool(self.holds))
        if self.holds is not True and not self.reason:
            raise ValueError(f"reason: expected why {self.claim!r} does not hold, got nothing")
        if not self.number and self.holds is not None:
            raise ValueError(f"number: expected what {self.claim!r} is judged by, got nothing")


def judge(claim: str, run: str, number: dict[str, float], holds: bool, otherwise: str) -> Claim:
    """A claim that holds or not; `otherwise` is the reason where it does not."""
    return Claim(claim, run, number, holds, "" if holds else otherwise)


@dataclass(frozen=True)
class Figure:
    """One drawing, written as NAME.png and NAME.pdf, and the numbers in it as NAME.csv.

    Args:
        name: begins with the target's name: "fig8", "fig8_digits", "thm3.1".
        caption: what is seen, in one or two sentences.
        draw: draw(tall=False) gives a matplotlib Figure; tall=True one for narrow screens, panels one below the other.
        rows: the numbers drawn, one dictionary per point, all with the same keys.
    """

    name: str
    caption: str
    draw: Callable[..., Any] = field(repr=False)
    rows: Sequence[Mapping[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Table:
    """Numbers for the report below the figures.

    Args:
        heading: what they are.
        columns: key of a row to the heading of its column, the first one naming the row.
        rows: dictionaries; None and NaN are shown as a dash.
    """

    heading: str
    columns: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Result:
    """What one target found.

    Args:
        claims: at least one.
        figures: may be empty.
        tables: may be empty.
        numbers: anything else worth keeping, for the JSON; plain values, tensors or arrays. Same seed, same numbers: no
            times in here.
        text: a paragraph or two for the report, above the figures; `backquotes` mark code, a blank line parts them.
    """

    claims: Sequence[Claim]
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


class Context:
    """What a target is given.

    Args:
        seed: of every draw; the same seed gives the same numbers.
        quick: sizes for a first look: all targets together in two minutes on two cores.
        load: called once, when `embeddings` is first asked for.
        progress: called with how much is done, and of how much.

    Example:
        >>> Context(seed=3, quick=True).embeddings
        []
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        quick: bool = False,
        load: "Callable[[], list[Embeddings]]" = list,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.seed, self.quick, self.progress, self._load = seed, quick, progress, load

    @cached_property
    def embeddings(self) -> "list[Embeddings]":
        """The embeddings to work on: a synthetic set and the digits, or what the user gave."""
        return self._load()
