"""One thread's messages kept off the root logger for a while."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_stand_in: logging.Handler | None = None


class _NotFrom(logging.Filter):
    def __init__(self, thread: int) -> None:
        super().__init__()
        self.thread = thread

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self.thread or record.levelno > logging.ERROR


@contextmanager
def quiet() -> Iterator[None]:
    """Drops what this thread logs with `logging.error` and below; other threads, loggers and settings go on as before.

    Where the root logger has no handler, `logging.error` would install one for good: for so long the handler that
    Python falls back on stands in.

    Example:
        >>> with quiet():
        ...     logging.error("nobody sees this")
        >>> logging.root.manager.disable
        0
    """
    others = _NotFrom(threading.get_ident())
    logging.root.addFilter(others)
    _enter()
    try:
        yield
    finally:
        _leave()
        logging.root.removeFilter(others)


def _enter() -> None:
    global _inside, _stand_in
    with _lock:
        _inside += 1
        if not logging.root.handlers and logging.lastResort is not None:
            _stand_in = logging.lastResort
            logging.root.addHandler(_stand_in)


def _leave() -> None:
    global _inside, _stand_in
    with _lock:
        _inside -= 1
        if not _inside and _stand_in is not None:
            logging.root.removeHandler(_stand_in)
            _stand_in = None
