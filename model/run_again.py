"""A function that keeps nothing but its arguments for the backward, and is run again there.

What torch.utils.checkpoint does, less its options: no random state, no nesting, no partial saving. That one
imports the compiler on its first call, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def run_again(work: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
    """work(*arguments), differentiable in those arguments that are tensors and ask for a gradient.

    `work` returns a tuple of tensors of its own making, and must give the same values on every run. Tensors
    inside of other arguments get no gradient.
    """
    return _RunAgain.apply(work, *arguments)  # type: ignore[no-any-return]


class _RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
        is_tensor = [isinstance(argument, Tensor) for argument in arguments]
        ctx.work = work
        ctx.rest = [None if is_one else argument for argument, is_one in zip(arguments, is_tensor)]
        ctx.is_tensor = is_tensor
        ctx.save_for_backward(*(argument for argument, is_one in zip(arguments, is_tensor) if is_one))
        made = work(*arguments)
        ctx.mark_non_differentiable(*(tensor for tensor in made if not tensor.is_floating_point()))
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved) if is_one else rest for rest, is_one in zip(ctx.rest, ctx.is_tensor)]
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
        for i in wanted:
            arguments[i] = arguments[i].detach().requires_grad_()
        with torch.enable_grad():
            made = ctx.work(*arguments)
        pairs = [(tensor, gradient) for tensor, gradient in zip(made, gradients) if tensor.requires_grad]
        found: list[Tensor | None] = [None] * len(arguments)
        if pairs and wanted:
            outputs, upstream = zip(*pairs)
            inputs = [arguments[i] for i in wanted]
            grads = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
            for i, gradient in zip(wanted, grads):
                found[i] = gradient
        return None, *found
