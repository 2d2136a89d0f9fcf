"""What `python -m tests.software_gpu` shares out among its processes."""

import traceback

import torch

SEEDS = 5
# Seeds of orders come in pairs with one seed of rounding: results are the same bits within a pair.
PAIRS = [((0, 0), (1, 0)), ((2, 1), (3, 1)), ((4, 2), (5, 2))]
RANDOM_PROGRAMS, LOSSES = 10_000, 20


def _kernel_problem(index: int) -> str:
    from . import problems
    from .device import with_library

    device = with_library()
    function, arguments, options = problems.KERNELS[index]
    for pair in PAIRS:
        found = []
        for order, rounding in pair:
            device.seed(order, rounding)
            found.append(function(device, *arguments, **options))
        for a, b in zip(*found, strict=True):
            equal = a.numpy().tobytes() == b.numpy().tobytes() if a.dtype != torch.bfloat16 else torch.equal(a, b)
            assert equal, f"orders {pair} differ"
    device.seed(0)
    return ""


def _in_blocks(index: int) -> str:
    from . import end_to_end
    from .device import with_library

    function, arguments, options = end_to_end.IN_BLOCKS[index]
    device = with_library()
    device.seed(index % (SEEDS + 1), index)
    function(device, *arguments, **options)
    device.seed(0)
    return ""


def _losses(seed: int) -> str:
    from . import end_to_end
    from .device import with_library

    device = with_library()
    device.seed(seed % (SEEDS + 1), seed)
    end_to_end.losses(device, seed)
    device.seed(0)
    return ""


def _mistake(index: int) -> str:
    from .device import with_library
    from .mistakes import MISTAKES
    from .planting import noticed

    said = noticed(with_library(), MISTAKES[index])
    assert said, "nobody noticed"
    assert not said.startswith("MISTAKEN"), said
    return said


def _random(first: int) -> str:
    from .device import machine
    from .forms import check_random

    for seed in range(first, first + 500):
        check_random(machine(), seed)
    return ""


def _form(form: str) -> str:
    from .device import machine
    from .forms import check_scalar
    from .programs import is_memory, memory
    from .scalars import SCALARS

    if form in SCALARS:
        check_scalar(machine(), SCALARS[form])
    elif is_memory(form):
        memory(machine(), form)
    else:
        assert form in _in_programs(), "no program has it"
    return ""


def _further(index: int) -> str:
    """Programs of what no kernel of the library has, under each seed."""
    from . import matrix_programs, reductions
    from .device import machine

    for order in range(SEEDS):
        machine().seed(order, order)
        [*matrix_programs.PROGRAMS, *reductions.PROGRAMS][index](machine())
    machine().seed(0)
    return ""


def _in_programs() -> set[str]:
    from .device import machine
    from .programs import PROGRAMS

    if not hasattr(_in_programs, "forms"):
        _in_programs.forms = {form for program in PROGRAMS for form in program(machine())}
    return _in_programs.forms


def run(job):
    """(job, error, what was said, kernels that ran)."""
    function, argument = job
    torch.set_num_threads(1)
    from .device import with_library

    try:
        said, error = globals()[f"_{function}"](argument), ""
    except Exception:
        said, error = "", traceback.format_exc().strip()
    ran = {name for name, launches in with_library().launches().items() if launches}
    return job, error, said, ran
