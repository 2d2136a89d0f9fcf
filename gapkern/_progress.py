"""What long work says on stderr: bars on a terminal and in a notebook, elsewhere a line every half minute."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TextIO

EVERY = 30.0  # seconds between two lines


class Step(Protocol):
    """Told of each stage what is done, of how much, and what else there is to say: a loss."""

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> None: ...


class _Lines:
    """Prints where a stage is once `EVERY` seconds have passed without a line.

    The time left is what the rest of the stage takes at the stage's rate so far; a stage that is entered with some of
    it done, as where work is resumed, counts from there.
    """

    def __init__(
        self, names: Mapping[str, str], units: Mapping[str, str], say: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self._names, self._units, self._say, self._clock = names, units, say, clock
        self._last = clock()
        self._stage: str | None = None
        self._began, self._first = self._last, 0

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> None:
        now = self._clock()
        if stage != self._stage:
            self._stage, self._began, self._first = stage, now, done
        if now - self._last < EVERY:
            return
        self._last = now
        parts = [" ".join(filter(None, [f"{done}/{total}", self._units.get(stage, "")]))]
        parts += [note] if note else []
        if self._first < done < total:
            parts.append(f"{left((now - self._began) / (done - self._first) * (total - done))} left")
        self._say(f"{self._names.get(stage, stage)}: {', '.join(parts)}")


def left(seconds: float) -> str:
    """A time to come, as roughly as it is known.

    Example:
        >>> left(12.3), left(99), left(3 * 3600 + 300)
        ('20 s', '2 min', '3 h 5 min')
    """
    if seconds <= 50:
        return f"{max(10, -int(-seconds // 10) * 10)} s"
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def shown(
    names: Mapping[str, str],
    units: Mapping[str, str] | None = None,
    *,
    wanted: bool = True,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Step]:
    """Gives a function (stage, done, total[, note]) that draws bars, or prints lines where nothing can be drawn.

    Args:
        names: what each stage is called.
        units: what is counted in a stage.
        wanted: else nothing is shown.
        stream: where to (default: stderr).
        clock: seconds from any start.

    Example:
        >>> clock = iter([0, 0, 31, 40]).__next__
        >>> with shown({"train": "training"}, {"train": "steps"}, stream=sys.stdout, clock=clock) as step:
        ...     step("train", 0, 90), step("train", 30, 90, "loss 3.4"), step("train", 40, 90)
        training: 30/90 steps, loss 3.4, 1 min left
        (None, None, None)
    """
    to = sys.stderr if stream is None else stream
    if not wanted:
        yield lambda *_: None
        return
    if not (to.isatty() or "ipykernel" in sys.modules):
        yield _Lines(names, units or {}, lambda line: _print(line, to), clock)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    columns = (*columns, TextColumn("{task.fields[note]}"))  # type: ignore[assignment]
    with Progress(*columns, console=Console(file=to)) as bars:
        tasks: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int, note: str = "", /) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(names.get(stage, stage), total=total, note="")
            bars.update(tasks[stage], completed=done, note=note)

        yield draw


def _print(line: str, stream: TextIO) -> None:
    with contextlib.suppress(OSError):  # a closed pipe does not stop the work
        print(line, file=stream, flush=True)
