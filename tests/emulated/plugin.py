"""For pytest (-p tests.emulated.plugin): operators on CPU tensors run on the processor that GAPKERN_EMULATED names.

Autograd, checks and references stay here.
"""

import os
from pathlib import Path
from typing import Any

import torch

import gapkern  # noqa: F401  its operators are there
from tests import emulated

_library = torch.library.Library("gapkern", "IMPL")
_calls = 0


def _kernel(processor: emulated.Processor, schema: Any) -> Any:
    """What the dispatcher calls in place of the operator's kernel."""
    floats = [str(argument.type) == "float" for argument in schema.arguments]
    name, outputs = schema.name.removeprefix("gapkern::"), len(schema.returns)

    def call(*arguments: Any) -> Any:
        global _calls
        _calls += 1
        whole = [float(value) if f else value for value, f in zip(arguments, floats, strict=True)]
        results = processor(name, *whole, outputs=outputs)
        return results[0] if outputs == 1 else tuple(results)

    return call


def pytest_configure(config: Any) -> None:
    folder, isa = os.environ["GAPKERN_EMULATED"].rsplit(":", 1)
    processor = emulated.Processor(Path(folder), emulated.PROCESSORS[isa])
    assert processor.isa == isa, f"{isa} was asked for, the library chose {processor.isa}"
    config.add_cleanup(processor.close)
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("gapkern::") and torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CPU"):
            _library.impl(schema.name.removeprefix("gapkern::"), _kernel(processor, schema), "CPU")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    isa = os.environ["GAPKERN_EMULATED"].rsplit(":", 1)[1]
    terminalreporter.write_line(f"emulated: {_calls} operators ran on {isa}")
