"""What a program may have set around a call, and all of it that a call may not change."""

import contextlib
import locale
import logging
import threading
import warnings

import numpy as np
import torch


def surroundings():
    """All that a call may not change."""

    def precision():
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:
            return "mixed"

    return (
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_num_threads(),
        in_a_new_thread(),
        torch.random.get_rng_state().numpy().tobytes(),
        repr(np.random.get_state()),  # noqa: NPY002
        np.geterr(),
        locale.setlocale(locale.LC_ALL),
        logging.root.manager.disable,
        list(warnings.filters),
        torch.overrides._len_torch_function_stack(),
    )


def in_a_new_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@contextlib.contextmanager
def changed(setter, value, back):
    try:
        setter(value)
        yield
    finally:
        setter(back)


@contextlib.contextmanager
def precision(where, value):
    before = where.fp32_precision
    where.fp32_precision = value
    try:
        yield
    finally:
        where.fp32_precision = before


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def matmul_precision(value):
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def a_locale():
    """One with a decimal comma where the machine has it."""
    for name in ("de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "C"):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, name)
            return


@contextlib.contextmanager
def other_locale():
    before = locale.setlocale(locale.LC_ALL)
    try:
        a_locale()
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def dtype(value):
    return lambda: changed(torch.set_default_dtype, value, torch.float32)


STATES = {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "float64 by default": dtype(torch.float64),
    "float16 by default": dtype(torch.float16),
    "bfloat16 by default": dtype(torch.bfloat16),
    "meta by default": lambda: changed(torch.set_default_device, "meta", None),
    "within a meta device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
    "medium products": lambda: matmul_precision("medium"),
    "bfloat16 products of oneDNN": lambda: precision(torch.backends.mkldnn.matmul, "bf16"),
    "low precision throughout": lambda: precision(torch.backends, "bf16"),
    "strict NumPy": lambda: np.errstate(all="raise"),
    "another locale": other_locale,
}
