"""V4's two optimisers on what one rank holds under ZeRO: pieces of flattened parameters.

DeepSpeed lays the parameters of a group end to end and gives each rank a part of that, in fp32, with the
gradient's part beside it. AdamW works element by element, so a part is as good as the whole. Muon needs whole
matrices: momentum and Nesterov's gradient are elementwise too and stay in parts; only the few matrices that a
border between ranks cuts through are put together from their pieces before they are orthogonalised.

R ranks, S segments (pieces of parameters) in a part, K matrices of one shape.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from consilience.model.kernels.newton_schulz import newton_schulz
from consilience.model.ranks import Ranks
from consilience.training.muon import MuonParameter
from consilience.training.optimizers import ParameterGroups
from consilience.training.torch_engine import OptimizerSettings

ADAMW_STATES, MUON_STATES = ("exp_avg", "exp_avg_sq"), ("momentum",)


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` elements of a parameter from its element `first` on, at `start` of a rank's part."""

    name: str
    start: int
    first: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """These elements in a rank's part [n], a view."""
        return flat[self.start : self.start + self.length]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix [rows, columns] of a Muon parameter, from the parameter's element `first` on."""

    name: str
    first: int
    rows: int
    columns: int

    def overlap(self, segment: Segment) -> tuple[int, int]:
        """First and last (excluded) element of the parameter that lie both here and in the segment."""
        last = min(self.first + self.rows * self.columns, segment.first + segment.length)
        return max(self.first, segment.first), last


@dataclass
class Group:
    """Parameters that share optimiser, weight decay, clipping norm and type.

    is_ahead   of the prediction blocks (mtp.*), which are clipped by a norm of their own
    matrices   of a Muon group
    segments   this rank's part, known once DeepSpeed has divided the parameters
    cut        matrices of which no rank's part holds the whole
    states     "momentum", or "exp_avg" and "exp_avg_sq": [n] like the part
    num_steps  name -> updates that AdamW has made
    """

    parameters: dict[str, nn.Parameter]
    is_muon: bool
    decay: float
    is_ahead: bool
    matrices: list[Matrix]
    segments: list[Segment] = field(default_factory=list)
    cut: list[Matrix] = field(default_factory=list)
    states: dict[str, Tensor] = field(default_factory=dict)
    num_steps: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(init=False)  # of the whole parameters, which ZeRO-3 empties

    def __post_init__(self) -> None:
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    def divide(self, segments: list[Segment], flat: Tensor, ranks: Ranks) -> None:
        """Take this rank's segments, with states of zeros like its part `flat` [n]."""
        self.segments = segments
        everywhere = [segment for own in ranks.gather(segments) for segment in own]
        by_name = defaultdict(list)
        for segment in everywhere:
            by_name[segment.name].append(segment)
        self.cut = [m for m in self.matrices if not any(_holds(s, m) for s in by_name[m.name])]
        names = MUON_STATES if self.is_muon else ADAMW_STATES
        self.states = {name: torch.zeros_like(flat, requires_grad=False) for name in names}
        if not self.is_muon:
            self.num_steps = {name: torch.zeros((), dtype=torch.float32) for name in self.parameters}

    def whole(self, flat: Tensor, ranks: Ranks) -> Iterable[tuple[str, Tensor]]:
        """Each parameter's values, put together from what the ranks hold in their parts `flat` [n].

        All ranks call it and get all; one parameter at a time is in memory twice.
        """
        held = {segment.name: segment for segment in self.segments}
        for name, shape in self.shapes.items():
            whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=ranks.device)
            if name in held:
                segment = held[name]
                whole[segment.first : segment.first + segment.length] = segment.of(flat)
            ranks.sum_([whole])  # pieces do not overlap: each element is one number and zeros
            yield name, whole.view(shape)

    def take(self, flat: Tensor, values: Mapping[str, Tensor]) -> None:
        """Copy this rank's elements of whole parameters into its part `flat` [n]."""
        for segment in self.segments:
            whole = values[segment.name].reshape(-1)
            segment.of(flat).copy_(whole[segment.first : segment.first + segment.length])


class ZeroV4Optimizer(torch.optim.Optimizer):
    """The optimiser that DeepSpeed calls, group by group, with a part and its gradient each time.

    lr, touched   of the step that is being made: learning rate, names that have a gradient on any rank
    """

    def __init__(self, groups: Sequence[Group], settings: OptimizerSettings, ranks: Ranks) -> None:
        self.groups, self.settings, self.ranks = list(groups), settings, ranks
        self.lr, self.touched = settings.lr, frozenset[str]()
        rows = [{"params": list(g.parameters.values()), "place": i} for i, g in enumerate(self.groups)]
        super().__init__(rows, {"lr": settings.lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parts of the groups that `param_groups` holds at the moment."""
        for row in self.param_groups:
            for flat in row["params"]:
                group = self.groups[row["place"]]
                (self._muon if group.is_muon else self._adamw)(group, flat, flat.grad)

    def _adamw(self, group: Group, flat: Tensor, grad: Tensor) -> None:
        s, moved = self.settings, [x for x in group.segments if x.name in self.touched]
        for name in group.parameters:
            if name in self.touched:
                group.num_steps[name] += 1
        if not moved:
            return
        averages, squares = ([x.of(group.states[name]) for x in moved] for name in ADAMW_STATES)
        adamw(
            [segment.of(flat) for segment in moved],
            [segment.of(grad) for segment in moved],
            averages,
            squares,
            [],
            [group.num_steps[x.name].to(flat.device, copy=True) - 1 for x in moved],  # the call adds the 1
            fused=True,
            amsgrad=False,
            beta1=s.beta1,
            beta2=s.beta2,
            lr=self.lr,
            weight_decay=group.decay,
            eps=s.eps,
            maximize=False,
        )

    def _muon(self, group: Group, flat: Tensor, grad: Tensor) -> None:
        s, moved = self.settings, {x.name: x for x in group.segments if x.name in self.touched}
        momentum = group.states["momentum"]
        for segment in moved.values():
            own, g = segment.of(momentum), segment.of(grad)
            own.mul_(s.momentum).add_(g)
            g.add_(own, alpha=s.momentum)
        whole = self._joined([m for m in group.cut if m.name in self.touched], moved, grad)
        for matrix in group.matrices:
            segment = moved.get(matrix.name)
            if segment is not None and _holds(segment, matrix):
                at = segment.start + matrix.first - segment.first
                whole[matrix] = grad[at : at + matrix.rows * matrix.columns].view(matrix.rows, matrix.columns)
        decay = 1.0 - self.lr * group.decay
        for matrix, update in self._orthogonal(whole):
            segment = moved[matrix.name]
            first, last = matrix.overlap(segment)
            at = segment.start + first - segment.first
            own = update.reshape(-1)[first - matrix.first : last - matrix.first]
            flat[at : at + last - first].mul_(decay).add_(own, alpha=-self.lr)

    def _joined(self, cut: Sequence[Matrix], moved: dict[str, Segment], grad: Tensor) -> dict[Matrix, Tensor]:
        """Matrices of which several ranks hold pieces, whole: those that this rank holds a piece of."""
        whole = {}
        for matrix in cut:
            flat = torch.zeros(matrix.rows * matrix.columns, dtype=grad.dtype, device=self.ranks.device)
            segment = moved.get(matrix.name)
            if segment is not None:
                first, last = matrix.overlap(segment)
                if first < last:
                    at = segment.start + first - segment.first
                    flat[first - matrix.first : last - matrix.first] = grad[at : at + last - first]
            whole[matrix] = flat
        self.ranks.sum_(whole.values())  # pieces do not overlap: each element is one number and zeros
        return {
            matrix: flat.to(grad.device).view(matrix.rows, matrix.columns)
            for matrix, flat in whole.items()
            if matrix.name in moved and _touches(matrix, moved[matrix.name])
        }

    def _orthogonal(self, whole: dict[Matrix, Tensor]) -> Iterable[tuple[Matrix, Tensor]]:
        """Each matrix with its update [rows, columns]; all of one shape go through in one batch [K, n, m]."""
        by_shape: dict[tuple[int, int], list[Matrix]] = defaultdict(list)
        for matrix in whole:
            by_shape[min(matrix.rows, matrix.columns), max(matrix.rows, matrix.columns)].append(matrix)
        for (_, width), matrices in by_shape.items():
            wide = [whole[m] if m.rows <= m.columns else whole[m].mT for m in matrices]
            updates = newton_schulz(torch.stack(wide)).mul_(self.settings.update_rms * width**0.5)
            for matrix, update in zip(matrices, updates):
                yield matrix, update if matrix.rows <= matrix.columns else update.mT


def optimizer_groups(owners: ParameterGroups, weight_decay: float, *, is_fp32_first: bool) -> list[Group]:
    """Groups of one owner, one clipping norm and one type each.

    DeepSpeed takes the first group's type for that of all its gradient buffers. is_fp32_first puts a group
    of fp32 parameters there, if there is one, otherwise one of the narrowest type comes first.
    """
    blocks = {owned.name: owned for owned in owners.muon}
    rows = [
        ({owned.name: owned.parameter for owned in owners.muon}, True, weight_decay),
        (owners.adamw_decayed, False, weight_decay),
        (owners.adamw, False, 0.0),
    ]
    found = []
    for parameters, is_muon, decay in rows:
        parts: dict[tuple[bool, torch.dtype], dict[str, Any]] = defaultdict(dict)
        for name, parameter in parameters.items():
            parts[name.startswith("mtp."), parameter.dtype][name] = parameter
        for (is_ahead, _), own in parts.items():
            matrices = [m for name in own if is_muon for m in matrices_of(blocks[name])]
            found.append(Group(own, is_muon, decay, is_ahead, matrices))
    return sorted(found, key=lambda group: (group.dtype == torch.float32) != is_fp32_first)


def matrices_of(owned: MuonParameter) -> list[Matrix]:
    """The independent matrices of one parameter, each of which lies in one run of its elements."""
    *stack, _, columns = owned.parameter.shape
    found, first = [], 0
    for _ in range(math.prod(stack)):
        for rows in owned.row_blocks:
            found.append(Matrix(owned.name, first, rows, columns))
            first += rows * columns
    return found


def _holds(segment: Segment, matrix: Matrix) -> bool:
    return matrix.overlap(segment) == (matrix.first, matrix.first + matrix.rows * matrix.columns)


def _touches(matrix: Matrix, segment: Segment) -> bool:
    first, last = matrix.overlap(segment)
    return first < last
