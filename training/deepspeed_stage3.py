"""ZeRO-3: the trunk's blocks divided over the ranks too, each whole only while it computes.

Our losses call parts of the model (`streams`, `mtp_hidden`, `norm`) and read `head.weight` beside any forward
of the whole, where DeepSpeed's hooks are. So a block of the trunk is one leaf, gathered and reduced as one;
embedding, head, norms and prediction blocks stay whole on every rank between steps ("persistent": gathered
once a step), with masters, states and gradients divided as everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from consilience.model.ranks import Ranks
from consilience.training.deepspeed_optimizer import Group, Segment


def mark_blocks(model: nn.Module) -> None:
    """Before DeepSpeed sees the model: a block of the trunk is gathered and reduced as one."""
    from deepspeed.utils import set_z3_leaf_module

    for block in _blocks(model):
        set_z3_leaf_module(block, True)


class DividedModel:
    """What `OrderedGradients` is to stages 1 and 2, and access to weights that no rank holds whole."""

    def __init__(
        self,
        zero: Any,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        ranks: Ranks,
        *,
        offload: bool,
    ) -> None:
        self._zero, self._model, self._ranks, self._is_offloaded = zero, model, ranks, offload
        inner = {id(p) for block in _blocks(model) for p in block.parameters()}
        outer = [p for p in model.parameters() if id(p) not in inner]
        self._outer = [p for p in outer if p.requires_grad]
        for parameter in outer:
            parameter.ds_persist = True  # type: ignore[attr-defined]
        known = {id(p) for p in zero.persistent_parameters}
        zero.persistent_parameters.extend(p for p in outer if id(p) not in known)
        outer[0].all_gather(outer)  # type: ignore[attr-defined]
        self._waiting = {id(p) for p in self._outer}
        self._reduce, self._end = (
            zero.reduce_ready_partitions_and_remove_grads,
            zero.independent_gradient_partition_epilogue,
        )
        zero.reduce_ready_partitions_and_remove_grads = self._arrive
        zero.independent_gradient_partition_epilogue = self._finish_backward
        self.reached: set[str] = set()
        self._is_final = self._is_filler = False
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._note(name))
        self._last: Any = None
        _blocks(model)[-1].register_forward_hook(self._keep)

    def begin(self) -> None:
        """Before the forward of each micro-batch, which DeepSpeed would learn from a forward of the whole."""
        self._zero.clear_backward_seen_flag()
        self._zero.parameter_offload.get_param_coordinator().reset_step()

    def end_forward(self) -> None:
        """After the forward of each micro-batch, on all ranks: what is to stay whole is whole again."""
        _bring_back(self._outer)

    def backward(self, engine: Any, loss: Tensor, *, is_filler: bool = False) -> None:
        """Add the gradients of one loss. All ranks call it together, after a forward each."""
        self._is_filler = is_filler
        made, self._last = self._last, None
        tied = [x for x in (made if isinstance(made, tuple) else (made,)) if isinstance(x, Tensor)]
        # Every block's backward must run on every rank, whatever its loss depends on.
        for x in tied:
            loss = loss + 0.0 * x.sum().to(loss.dtype)
        engine.backward(loss, scale_wrt_gas=False)

    def finish(self) -> None:
        """End the accumulation: what `parts` returns is whole from here on."""
        if self._is_final:
            return
        zero = self._zero
        zero.finalize_gradient_accumulation_boundary()
        if not self._is_offloaded:
            for i, pieces in zero.averaged_gradients.items():
                zero.averaged_gradients[i] = [torch.cat([piece.reshape(-1) for piece in pieces])]
        for part in self.parts(is_final=True):
            part.mul_(self._ranks.size)  # ZeRO-3 knows means only
        self._is_final = True

    def parts(self, *, is_final: bool = False) -> list[Tensor]:
        """Each group's gradient on this rank, fp32 [n] like its part, in place; none before `finish`."""
        zero = self._zero
        if not (is_final or self._is_final):
            return []
        if self._is_offloaded:
            return [part.grad for part in zero.fp32_partitioned_groups_flat]
        return [zero.averaged_gradients[i][0] for i in sorted(zero.averaged_gradients)]

    def clear(self) -> None:
        """Forget everything since the last step."""
        zero = self._zero
        zero.zero_grad()
        zero.averaged_gradients = {}
        zero.grad_partitions_flat_buffer.zero_()  # parts that the next step does not reach would stay
        zero.micro_step_id = 0
        zero._epilogue_ran_this_backward = False
        zero._backward_active_depth = 0
        zero.clear_backward_seen_flag()
        zero.set_gradient_accumulation_boundary(False)
        if self._is_offloaded:
            for part in zero.fp32_partitioned_groups_flat:
                part.grad.zero_()
        self.reached, self._is_final = set(), False

    @contextmanager
    def whole(self, *, is_changed: bool = False, names: set[str] | None = None) -> Iterator[None]:
        """Weights whole on every rank within; is_changed: the first rank's are divided again, masters follow.

        names  only these; None: all
        """
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        chosen = [p for name, p in self._model.named_parameters() if names is None or name in names]
        inner = [p for p in chosen if not p.ds_persist]  # type: ignore[attr-defined]
        outer = [p for p in chosen if p.ds_persist]  # type: ignore[attr-defined]
        _bring_back(outer)
        with GatheredParameters(inner, modifier_rank=0 if is_changed else None):
            yield
        if not is_changed:
            return
        if outer:
            outer[0].partition(outer, has_been_updated=True)  # type: ignore[attr-defined]
            outer[0].all_gather(outer)  # type: ignore[attr-defined]
        for group, flat in zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat):
            flat.data.copy_(torch.cat([p.ds_tensor.data.reshape(-1) for p in group]))

    def _note(self, name: str) -> None:
        if not self._is_filler:
            self.reached.add(name)

    def _keep(self, _module: nn.Module, _given: Any, made: Any) -> None:
        self._last = made if torch.is_grad_enabled() else None

    def _arrive(self, parameter: nn.Parameter) -> None:
        """A block's gradients go on; the others wait, as their order may differ between ranks."""
        if id(parameter) not in self._waiting:
            self._reduce(parameter)

    def _finish_backward(self) -> None:
        for parameter in self._outer:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._reduce(parameter)
        self._end()


def divide_parameters(zero: Any, groups: Sequence[Group], ranks: Ranks) -> None:
    """Tell each group which elements of which parameters are this rank's under ZeRO-3."""
    for group, own, flat in zip(groups, zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        names = {id(parameter): name for name, parameter in group.parameters.items()}
        segments, start = [], 0
        for parameter in own:
            size = parameter.partition_numel()
            first = size * ranks.rank
            length = min(size, parameter.ds_numel - first)
            if length > 0:
                segments.append(Segment(names[id(parameter)], start, first, length))
            start += size
        group.divide(segments, flat, ranks)


def _bring_back(outer: list[nn.Parameter]) -> None:
    """A forward without gradients may have given those of prediction blocks away, on all ranks alike."""
    if away := [p for p in outer if p.ds_status.name == "NOT_AVAILABLE"]:  # type: ignore[attr-defined]
        away[0].all_gather(away)  # type: ignore[attr-defined]


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.layers)  # type: ignore[arg-type]
