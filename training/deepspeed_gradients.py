"""DeepSpeed's reduction of gradients under ZeRO-1 and 2, made independent of what each rank's loss reaches.

DeepSpeed adds up gradients in the order in which autograd finishes them, without telling the ranks apart: if
one rank's rows are too short for compressed entries and another's are not, it adds up different tensors.
Here every rank hands them over in one order, zeros for those that its own loss does not reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from consilience.training.deepspeed_optimizer import Group, Segment


class OrderedGradients:
    """The gradients of one step, accumulated over backward passes and summed over the ranks.

    reached  names of parameters that a loss of this rank has reached since the last `clear`
    """

    def __init__(self, zero: Any, parameters: Mapping[str, nn.Parameter], *, is_offloaded: bool) -> None:
        self._zero, self._is_offloaded = zero, is_offloaded
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        group_of = {id(p): i for i, group in enumerate(zero.bit16_groups) for p in group}
        self._order = [
            (p, group_of[id(p)]) for p in reversed(list(parameters.values()))
        ]  # about as backward goes
        self._arrived: set[int] = set()
        self._next = 0
        self._is_final = self._is_filler = False
        self.reached: set[str] = set()
        self._reduce = zero.process_gradients
        zero.process_gradients = self._arrive

    def begin(self) -> None:
        """Before the forward of each micro-batch: nothing to do."""

    @contextmanager
    def whole(self, *, is_changed: bool = False, names: set[str] | None = None) -> Iterator[None]:
        """Weights are whole on every rank; masters take their values with `DeepSpeedEngine.load`."""
        yield

    def backward(self, engine: Any, loss: Tensor, *, is_filler: bool = False) -> None:
        """Add the gradients of one loss. All ranks call it together; it must reach one parameter at least.

        is_filler  it reaches that one only to be there, with zeros: nothing counts as reached
        """
        self._arrived, self._next, self._is_filler = set(), 0, is_filler
        self._zero.clear_backward_seen_flag()
        engine.backward(loss, scale_wrt_gas=False)

    def finish(self) -> None:
        """End the accumulation: what `parts` returns is whole from here on."""
        if self._is_final:
            return
        zero = self._zero
        if zero.partition_gradients:
            zero.finalize_gradient_accumulation_boundary()
        else:
            zero.set_gradient_accumulation_boundary(True)
            zero.setup_buckets()
            for parameter, _ in self._order:
                if zero.get_param_gradient_attribute(parameter) is None:
                    empty = torch.zeros_like(parameter, dtype=zero._gradient_reduction_buffer_dtype())
                    setattr(parameter, "grad_accum" if zero.use_grad_accum_attribute else "grad", empty)
            zero.reduce_gradients()
        if not self._is_offloaded:
            for i, pieces in zero.averaged_gradients.items():
                if getattr(pieces, "flat_partition", None) is None:
                    zero.averaged_gradients[i] = [torch.cat([piece.reshape(-1) for piece in pieces])]
        self._is_final = True

    def parts(self) -> list[Tensor]:
        """Each group's gradient on this rank, fp32 [n] like its part, in place; none before `finish`."""
        zero = self._zero
        if self._is_offloaded:
            return [part.grad for part in zero.single_partition_of_fp32_groups]
        groups = [zero.averaged_gradients[i] for i in sorted(zero.averaged_gradients)]
        return [getattr(group, "flat_partition", group[0]) for group in groups]

    def clear(self) -> None:
        """Forget everything since the last step, also what an error left half done."""
        zero = self._zero
        zero.zero_grad()
        zero.averaged_gradients.clear()
        zero.all_grad_tensors.clear()
        zero.extra_large_param_to_reduce.clear()
        for bucket in zero.ipg_buckets.values():
            bucket.clear()
        zero._release_ipg_buffers()
        zero.params_already_reduced = [False] * len(zero.params_already_reduced)
        zero.micro_step_id = -1
        zero._backward_active_depth = 0
        zero.clear_backward_seen_flag()
        zero.set_gradient_accumulation_boundary(False)
        if self._is_offloaded:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()
            for part in zero.single_partition_of_fp32_groups:
                part.grad.zero_()
        self.reached, self._is_final = set(), False

    def _arrive(self, parameter: nn.Parameter, _: int) -> None:
        """A gradient is done: hand over all that are next in order, with zeros for what will never come."""
        self._arrived.add(id(parameter))
        if not self._is_filler:
            self.reached.add(self._names[id(parameter)])
        while self._next < len(self._order):
            following, group = self._order[self._next]
            if id(following) not in self._arrived:
                if _will_arrive(following):
                    return
                if following.grad is None:  # ZeRO-1 keeps what earlier passes have found
                    following.grad = torch.zeros_like(following)
            self._reduce(following, group)
            self._next += 1


def divide_flat(zero: Any, groups: Sequence[Group], ranks: Any) -> None:
    """Tell each group which elements of which parameters are this rank's under ZeRO-1 and 2."""
    for i, group in enumerate(groups):
        size = int(zero.partition_size[i])
        low, first, segments = size * ranks.rank, 0, []
        for name, parameter in group.parameters.items():
            start, stop = max(first, low), min(first + parameter.numel(), low + size)
            if start < stop:
                segments.append(Segment(name, start - low, start - first, stop - start))
            first += parameter.numel()
        group.divide(segments, zero.single_partition_of_fp32_groups[i], ranks)


def _will_arrive(parameter: nn.Parameter) -> bool:
    """Whether the backward pass that runs now will still reach the parameter."""
    with torch.enable_grad():
        node = get_gradient_edge(parameter).node
    return torch._C._will_engine_execute_node(node)  # pyright: ignore[reportAttributeAccessIssue]
