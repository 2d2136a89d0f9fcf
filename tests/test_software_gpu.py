"""gapkern's CUDA kernels executed from their PTX (tests/software_gpu); on a GPU where there is one.

`python -m tests.software_gpu` does the same at length: more problems, seeds and random programs.
"""

import pytest
import torch

from tests.software_gpu import (
    end_to_end,
    forms,
    hopper_problems,
    matrix_programs,
    mistakes,
    planting,
    problems,
    programs,
    reductions,
)
from tests.software_gpu.device import DeviceError
from tests.software_gpu.fixture import on_gpu
from tests.software_gpu.scalars import SCALARS
from tests.software_gpu.torch_device import TorchDevice


def named(problem):
    function, arguments, options = problem
    values = [str(v).removeprefix("torch.") for v in (*arguments, *options.values())]
    marks = [pytest.mark.sm90] if function in problems.HOPPERS else []
    return pytest.param(*problem, marks=marks, id="-".join([function.__name__, *values]))


@pytest.mark.parametrize(("function", "arguments", "options"), list(map(named, problems.KERNELS)))
def test_kernels_against_float64(cuda_device, poisoned, function, arguments, options):
    if function is problems.wide_divisions and not hasattr(cuda_device, "mistake"):
        pytest.skip("changes PTX")
    function(cuda_device, *arguments, **options)


def test_the_problems_reach_every_kernel(software_gpu):
    every = set(software_gpu.report()[0])
    for function, arguments, options in problems.KERNELS:  # none, where they have just run
        if every <= set(software_gpu.launches()):
            break
        function(software_gpu, *arguments, **options)
    assert every <= set(software_gpu.launches())


@pytest.mark.parametrize(("function", "arguments", "options"), list(map(named, end_to_end.IN_BLOCKS)))
def test_losses_in_blocks_of_rows(cuda_device, function, arguments, options):
    function(cuda_device, *arguments, **options)


@pytest.mark.parametrize("seed", [0, 3, *on_gpu(*range(4, 60))])
def test_random_losses_against_float64(cuda_device, seed):
    end_to_end.losses(cuda_device, seed)


HOST_PROBLEMS = {function: problem for problem in problems.KERNELS for function in problem[:1]}
del HOST_PROBLEMS[problems.wide_divisions]


@pytest.mark.parametrize("problem", HOST_PROBLEMS.values(), ids=lambda p: p[0].__name__)
def test_a_device_of_pytorchs_has_the_same_interface(problem):
    """What a GPU will be asked is asked of the CPU, with tensors that are copied as they will be."""
    function, arguments, options = problem
    function(TorchDevice("cpu"), *arguments, **options)


def test_tensors_travel_to_a_device_of_pytorchs_as_they_lie():
    x = torch.randn(7, 9)[1:, 2:].T
    (y,) = TorchDevice("cpu").there((x,))
    assert (y.stride(), y.storage_offset()) == (x.stride(), x.storage_offset())
    assert torch.equal(x, y)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("problem", [planting.sums, planting.kept, planting.column_sum, planting.chunk])
def test_orders_and_moments_change_no_bit(software_gpu, problem):
    for order in (1, 2):
        software_gpu.seed(order)
        problem(software_gpu)
    software_gpu.seed(0)
    x, y = hopper_problems.pair(200, 300, 136, torch.bfloat16)
    control, found = torch.tensor([5.0, -3.0]), []
    for order in (0, 3):
        software_gpu.seed(order)
        found.append(software_gpu.call("contrastive_sm90_sums", x, y, control, x.new_empty(0), 60))
    software_gpu.seed(0)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mistake", mistakes.MISTAKES, ids=[m.name for m in mistakes.MISTAKES])
def test_a_planted_mistake_is_reported(software_gpu, mistake):
    said = planting.noticed(software_gpu, mistake)
    assert said, "it went unnoticed"
    assert not said.startswith("MISTAKEN"), said


@pytest.mark.parametrize("problem", sorted({m.problem for m in mistakes.MISTAKES}, key=lambda p: p.__name__))
def test_without_a_mistake_nothing_is_reported(software_gpu, problem):
    software_gpu.lib.software_gpu_clear_fault()
    problem(software_gpu)
    assert software_gpu.fault() is None


def test_every_kernel_is_understood_and_every_form_has_a_test(software_gpu, software_machine):
    kernels, of_kernels, errors = software_gpu.report()
    assert not errors
    assert len(kernels) > 50
    needed = {form for of_kernel in of_kernels.values() for form in of_kernel}
    in_programs = {form for program in programs.PROGRAMS for form in program(software_machine)}
    for form in sorted(filter(programs.is_memory, needed)):
        in_programs |= programs.memory(software_machine, form)
    assert needed <= set(SCALARS) | in_programs


@pytest.mark.parametrize("program", [*matrix_programs.PROGRAMS, *reductions.PROGRAMS], ids=lambda p: p.__name__)
@pytest.mark.parametrize("order", [0, 1])
def test_what_kernels_may_come_to_need(software_machine, program, order):
    software_machine.seed(order, order)
    assert program(software_machine)
    software_machine.seed(0)


def reported(device, run) -> str:
    device.lib.software_gpu_clear_fault()
    try:
        run(device)
    except DeviceError as error:
        return error.fault.kind
    return ""


@pytest.mark.parametrize(
    ("changes", "kind"), [f[1:] for f in matrix_programs.FAULTS], ids=[f[0] for f in matrix_programs.FAULTS]
)
def test_registers_of_products_in_flight(software_machine, changes, kind):
    for order in range(3):
        software_machine.seed(order)
        assert reported(software_machine, lambda d: matrix_programs.run_with_registers(d, **changes)) == kind
    software_machine.seed(0)


@pytest.mark.parametrize(("run", "kind"), [f[1:] for f in reductions.FAULTS], ids=[f[0] for f in reductions.FAULTS])
def test_races_of_additions(software_machine, run, kind):
    for order in range(3):
        software_machine.seed(order)
        assert reported(software_machine, run) == kind
    software_machine.seed(0)


@pytest.mark.parametrize("scalar", SCALARS.values(), ids=SCALARS)
def test_scalar_instructions_are_the_isas(software_machine, scalar):
    forms.check_scalar(software_machine, scalar)


def test_random_programs_are_numpys(software_machine):
    assert sum(forms.check_random(software_machine, seed) for seed in range(500)) > 100_000


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("add.f33 %x, %x, %x;", "unknown instruction", "add.f33"),
        ("fma.rm.f32 %x, %x, %x, %x;", "unknown instruction", "fma.rm.f32"),
        ("add.f32 %x, %x;", "unknown form", "expected 3 operands, got 2"),
        ("add.f64 %x, %x, %x;", "unknown form", "width d"),
        ("mov.u32 %x, %clock;", "unknown instruction", "%clock"),
        ("bra NOWHERE;", "parse", "no label NOWHERE"),
        ("atom.global.inc.u32 %x, [%a0], 1;", "unknown instruction", "atom.global.inc.u32"),
    ],
)
def test_what_is_not_known_names_itself(software_machine, body, kind, message):
    text = forms.program(f".reg .b32 %x;\nmov.u32 %x, 0;\n{body}", 1)
    with pytest.raises(DeviceError) as caught:
        software_machine.run(text, "k", [torch.zeros(1)])
    assert caught.value.fault.kind == kind
    assert message in caught.value.fault.what
