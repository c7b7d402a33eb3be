"""Muon as DeepSeek-V4 trains with it (V4 report, Algorithm 1 and section 2.4).

For every logically independent matrix W [n, m] with gradient G, momentum M, learning rate η:

    M ← μM + G
    O = HNS(G + μM) · sqrt(max(n, m)) · γ         (Nesterov; μ = 0.95, γ = 0.18)
    W ← W(1 − ηλ) − ηO                            (decoupled weight decay, λ = 0.1)

HNS, the hybrid Newton–Schulz iteration (`model/kernels/newton_schulz.py`), maps a matrix to (nearly) its
orthogonal factor UVᵀ. An orthogonal n×m matrix has entries of RMS 1/sqrt(max(n, m)), so the update has
RMS γ and shares AdamW's learning rate.

A tensor may hold several matrices: stacked experts [E, n, m], or row blocks of one weight (`wo_a` by
group, the two halves of an overlapping compressor, the pre/post/comb rows of a hyper-connection).
They are orthogonalised apart, but all matrices of one shape go through the iteration in one batched
product: at the demo's size the number of small operations is the cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.model.kernels.newton_schulz import newton_schulz


@dataclass(frozen=True, slots=True)
class MuonParameter:
    """One trainable tensor and how it falls into matrices.

    parameter   [n, m], or a stack [E, n, m] of matrices each on its own
    row_blocks  heights of the independent row blocks; they sum to n; (n,) when it is one matrix
    """

    name: str
    parameter: Tensor
    row_blocks: tuple[int, ...]


@dataclass(slots=True)
class _Bucket:
    """All matrices of one shape: momentum [K, n, m] with n ≤ m, and the slots each view of a tensor fills."""

    momentum: Tensor
    parts: list[tuple[int, int, slice]]  # (parameter, its view, slots)


class Muon:
    """The optimiser over a list of `MuonParameter`; a parameter without a gradient is left alone.

    Momentum is kept stacked by shape, so the elementwise work is a few operations a shape too.
    """

    def __init__(
        self,
        parameters: Sequence[MuonParameter],
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        update_rms: float = 0.18,
    ) -> None:
        for owned in parameters:
            shape = tuple(owned.parameter.shape)
            if len(shape) not in (2, 3) or sum(owned.row_blocks) != shape[-2] or min(owned.row_blocks) < 1:
                raise EngineError(
                    f"{owned.name}: Muon updates [n, m] or [E, n, m] tensors whose row blocks sum to n, "
                    f"found shape {list(shape)} with row blocks {list(owned.row_blocks)}"
                )
        self.parameters = list(parameters)
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.update_rms = update_rms
        self._buckets = _buckets(self.parameters)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients in place, learning rate `lr`."""
        gradients = [_views(owned.parameter.grad, owned.row_blocks) for owned in self.parameters]
        weights = [_views(owned.parameter, owned.row_blocks) for owned in self.parameters]
        decay = 1.0 - lr * self.weight_decay
        for bucket in self._buckets:
            parts = [part for part in bucket.parts if gradients[part[0]]]
            if not parts:
                continue
            g = torch.cat([gradients[i][view].to(bucket.momentum.dtype) for i, view, _ in parts])
            update = self._update(bucket, parts, g).mul_(-lr)
            done = 0
            for i, view, slots in parts:
                weight = weights[i][view]
                rows = slots.stop - slots.start
                part = update[done : done + rows].to(weight.dtype)
                torch.add(part, weight, alpha=decay, out=weight)  # one pass: W(1 − ηλ) − ηO
                done += rows

    def _update(self, bucket: _Bucket, parts: list[tuple[int, int, slice]], g: Tensor) -> Tensor:
        """Momentum of the parts from their gradients g [K', n, m]; their update O [K', n, m]."""
        is_whole = len(parts) == len(bucket.parts)
        m = bucket.momentum if is_whole else torch.cat([bucket.momentum[slots] for _, _, slots in parts])
        m.mul_(self.momentum).add_(g)
        if not is_whole:
            for (_, _, slots), rows in zip(parts, m.split([s.stop - s.start for _, _, s in parts])):
                bucket.momentum[slots] = rows
        return newton_schulz(g.add_(m, alpha=self.momentum)).mul_(self.update_rms * m.shape[2] ** 0.5)

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """name -> momentum in the shape of the parameter (a copy)."""
        tensors = [
            torch.empty(o.parameter.shape, dtype=work_dtype(o.parameter), device=o.parameter.device)
            for o in self.parameters
        ]
        for bucket in self._buckets:
            for i, view, slots in bucket.parts:
                _views(tensors[i], self.parameters[i].row_blocks)[view].copy_(bucket.momentum[slots])
        return {owned.name: tensor for owned, tensor in zip(self.parameters, tensors)}

    def held(self) -> list[Tensor]:
        """The state itself, not copies: what an offload moves."""
        return [bucket.momentum for bucket in self._buckets]

    def each_state_tensor(self) -> Iterator[tuple[str, Tensor]]:
        """(name, momentum in the shape of the parameter)."""
        yield from self.state_tensors().items()

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy momenta in; names and shapes were checked by the caller."""
        for bucket in self._buckets:
            for i, view, slots in bucket.parts:
                owned = self.parameters[i]
                bucket.momentum[slots] = _views(tensors[owned.name], owned.row_blocks)[view].to(
                    bucket.momentum
                )


def _buckets(parameters: Sequence[MuonParameter]) -> list[_Bucket]:
    """Group every matrix of every parameter by shape, type and device."""
    found: dict[tuple, list[tuple[int, int, slice]]] = defaultdict(list)
    counts: dict[tuple, int] = defaultdict(int)
    for i, owned in enumerate(parameters):
        for view, matrices in enumerate(_views(owned.parameter, owned.row_blocks)):
            key = (*matrices.shape[1:], work_dtype(owned.parameter), owned.parameter.device)
            found[key].append((i, view, slice(counts[key], counts[key] + len(matrices))))
            counts[key] += len(matrices)
    return [
        _Bucket(torch.zeros(counts[key], n, m, dtype=dtype, device=device), found[key])
        for key in found
        for n, m, dtype, device in [key]
    ]


def _views(tensor: Tensor | None, heights: tuple[int, ...]) -> list[Tensor]:
    """Views [K, n, m], n ≤ m, of the independent matrices in a tensor; equal row blocks share one view."""
    if tensor is None:
        return []
    tensor = tensor.detach()
    if tensor.ndim == 2 and len(set(heights)) == 1:
        views = [tensor.unflatten(0, (len(heights), heights[0]))]
    else:
        blocks = tensor.split(list(heights), dim=-2) if len(heights) > 1 else (tensor,)
        views = [block.unsqueeze(0) if tensor.ndim == 2 else block for block in blocks]
    return [view if view.shape[1] <= view.shape[2] else view.mT for view in views]


def work_dtype(parameter: Tensor) -> torch.dtype:
    """Type of momentum and iteration: fp32 (fp64 parameters keep fp64)."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
