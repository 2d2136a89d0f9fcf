"""Work in a thread whose PyTorch operators do not split up."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

_starting = threading.Lock()


@contextmanager
def one_thread() -> Iterator[Callable[..., Any]]:
    """Gives `run(function, *args, **kwargs)`, which calls the function in a worker that computes with one thread.

    Many small operators go ten times faster so on a busy machine, where a team's threads wait for each other. The
    caller's number of threads, other threads' and that of threads yet to start stay as they are.

    Example:
        >>> before = torch.get_num_threads()
        >>> with one_thread() as run:
        ...     run(torch.get_num_threads), torch.get_num_threads() == before
        (1, True)
    """
    with ThreadPoolExecutor(1, "gapkern", _split_no_more) as worker:
        yield lambda function, *args, **kwargs: worker.submit(function, *args, **kwargs).result()


def _split_no_more() -> None:
    """Sets this thread's number; `torch.set_num_threads` also sets that of threads yet to start, which is put back."""
    with _starting:
        inherited = torch.get_num_threads()
        torch.set_num_threads(1)
        putter = threading.Thread(target=torch.set_num_threads, args=(inherited,))
        putter.start()
        putter.join()
