"""Derivative rules for operators: reverse mode, forward mode, and `torch.func`'s transforms.

`torch.library.register_autograd` knows reverse mode alone: a dual tensor would lose its tangent without a word, and
`torch.func.grad` would fail. `register` gives an operator a rule for each, at the same place of the dispatcher.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_library = torch.library.Library("gapkern", "IMPL")

TWICE = "gapkern: the contrastive losses can be differentiated once; double backward (create_graph=True) is refused"


def register(
    name: str,
    backward: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    jvp: Callable[..., Any] | None = None,
    arguments: Callable[..., tuple] | None = None,
) -> None:
    """Registers the derivatives of `torch.ops.gapkern.<name>`.

    Args:
        name: of the operator.
        backward: (ctx, *gradients of the results, None for some) -> a gradient or None for each argument.
        save: (ctx, arguments, results): saves what `backward` needs.
        jvp: (arguments, tangents) -> a tangent or None for each result, in operations that can be differentiated.
            Arguments without a tangent have None. Without a rule forward mode is refused.
        arguments: (arguments) -> the arguments to call the operator with where derivatives are wanted.

    vmap calls the operator once an example, with the results of a loop.
    """
    operator = getattr(torch.ops.gapkern, name).default
    below = torch._C._after_autograd_keyset
    schema = operator._schema.arguments

    def call(keyset, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & below, *inputs)

    # autograd.Function would start again at the innermost transform; this is the rule of the one that is at work.
    class Rule(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, keyset, *inputs):
            # Off for this level, but for the transforms around it.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                results = call(keyset, *inputs)
            ctx.set_materialize_grads(False)
            if forward_ad._current_level >= 0:
                ctx.inputs = inputs
            if save is not None:
                save(ctx, inputs, results)
            return results

        @staticmethod
        def backward(ctx, *gradients):
            if all(g is None for g in gradients):
                return (None,) * len(ctx.needs_input_grad)
            return None, *backward(_Context(ctx), *gradients)

        @staticmethod
        def jvp(ctx, _, *tangents):
            if jvp is None:
                raise RuntimeError(f"gapkern: {name} has no forward-mode derivative; use reverse mode (backward())")
            return jvp(ctx.inputs, tangents)

    def apply(*inputs):
        with enable_single_level_autograd_function():
            return Rule.apply(*inputs)  # type: ignore[attr-defined]

    def autograd(keyset, *inputs):
        inputs += tuple(a.default_value for a in schema[len(inputs) :])
        reverse = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in inputs)
        if not reverse and forward_ad._current_level < 0:
            return call(keyset, *inputs)
        return apply(keyset, *(arguments(*inputs) if reverse and arguments is not None else inputs))

    def each_example(info, in_dims, *inputs):
        examples = [
            operator(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(examples[0], Tensor):
            return torch.stack(examples), 0
        results = tuple(torch.stack(same) for same in zip(*examples, strict=True))
        return results, (0,) * len(results)

    _library.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"gapkern::{name}", each_example, lib=_library)


class _Context:
    """A rule's context, whose `needs_input_grad` counts the operator's arguments."""

    def __init__(self, ctx):
        self._ctx = ctx
        self.needs_input_grad = ctx.needs_input_grad[1:]

    def __getattr__(self, name):
        return getattr(self._ctx, name)


class _Once(torch.autograd.Function):
    """The first `count` tensors; who differentiates them, by whatever they were formed from, is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count, *tensors):
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(TWICE)

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(TWICE)


def once(gradients: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`gradients`, formed from `sources`, whose own derivatives are refused."""
    return _Once.apply(len(gradients), *gradients, *sources)


def refuse_twice(ctx, *_):
    """The backward rule of operators that form gradients."""
    raise RuntimeError(TWICE)


def refuse_jvp_twice(inputs, tangents):
    """The forward-mode rule of operators that form gradients."""
    raise RuntimeError(TWICE)


_STEP = "gapkern: a step of the contrastive losses is not differentiable; contrastive_lse and sigmoid_loss are"


def refuse_step(ctx, *_):
    """The backward rule of the steps inside an operator."""
    raise RuntimeError(_STEP)


def refuse_jvp_step(inputs, tangents):
    """Their forward-mode rule."""
    raise RuntimeError(_STEP)
