"""V4's two optimisers over a model cut by FSDP2: every rank updates, and keeps the state of, its own part.

    stacks of experts    their matrices lie whole on the ranks: Muon, where they are
    other matrices       Muon by their owners (`OwnedMuon`)
    embedding, head      AdamW on the rank's rows
    all that is whole    the same update on every rank

R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from consilience.model.ranks import Ranks
from consilience.training.matrix_owners import OwnedMuon
from consilience.training.muon import MuonParameter
from consilience.training.optimizers import ParameterGroups, V4Optimizer
from consilience.training.sharded_tensors import Piece, Sharded, cut_pieces


class ShardedOptimizer:
    """The optimiser of one cut model.

    groups   of the model as it was before it was cut; their tensors give names, shapes and types only
    held     name -> the parameter as it is now, `DTensor` or whole
    values   `V4Optimizer`'s arguments
    """

    def __init__(
        self,
        groups: ParameterGroups,
        held: Mapping[str, nn.Parameter],
        ranks: Ranks,
        values: Mapping[str, Any],
    ) -> None:
        self.ranks, self.held = ranks, dict(held)
        self.local = {name: local_part(parameter) for name, parameter in held.items()}
        self.lr = values["lr"]
        owned = [o for o in groups.muon if isinstance(held[o.name], DTensor) and o.parameter.ndim == 2]
        names = {o.name for o in owned}
        muon = {k: values[k] for k in ("momentum", "weight_decay", "update_rms")}
        self.owned = OwnedMuon(owned, self.local, ranks, **muon)
        rest = [
            MuonParameter(o.name, self.local[o.name], o.row_blocks)
            for o in groups.muon
            if o.name not in names
        ]
        own = ParameterGroups(
            muon=tuple(o for o in rest if o.parameter.numel()),
            adamw_decayed=self._filled(groups.adamw_decayed),
            adamw=self._filled(groups.adamw),
            rule={name: self.local.get(name, bias) for name, bias in groups.rule.items()},
            frozen={},
        )
        self.kept = V4Optimizer(own, **values)
        self.muon_names = [o.name for o in groups.muon]
        self.adamw_names = [*groups.adamw_decayed, *groups.adamw]
        self.names = [*self.muon_names, *self.adamw_names]

    def _filled(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        return {name: self.local[name] for name in parameters if self.local[name].numel()}

    def take_gradients(self) -> dict[str, Tensor]:
        """This rank's part of every gradient there is, by name; `step` uses what they then are."""
        for name in self.names:
            grad = self.held[name].grad
            self.local[name].grad = grad.to_local() if isinstance(grad, DTensor) else grad
        return {name: p.grad for name in self.names if (p := self.local[name]).grad is not None}

    def is_cut(self, name: str) -> bool:
        """Whether a parameter is cut over the ranks."""
        return isinstance(self.held[name], DTensor)

    def step(self, lr_scale: float, expert_loads: Mapping[str, Tensor]) -> float:
        """One update from the gradients taken; the learning rate used."""
        lr = self.kept.step(lr_scale, expert_loads)
        self.owned.step(lr)
        return lr

    def clear(self) -> None:
        """Forget all gradients."""
        for name, parameter in self.held.items():
            parameter.grad = None
            self.local[name].grad = None

    def state_bytes(self) -> int:
        """Bytes of optimiser state on this rank, once every parameter has had a step."""
        own = {**self.kept.state_tensors(), **self.owned.muon.state_tensors()}
        return sum(tensor.nbytes for tensor in own.values())

    def state(self) -> dict[str, Sharded]:
        """The state's tensors as `V4Optimizer.state_tensors` names them, cut as they lie on the ranks."""
        own = self.kept.state_tensors()
        momenta = self.owned.muon.state_tensors()
        found: dict[str, Sharded] = {}
        for name in self.muon_names:
            key = f"muon.momentum.{name}"
            dtype = torch.float64 if self.held[name].dtype == torch.float64 else torch.float32
            if name in self.owned.owners:
                shape = self.owned.shapes[name]
                pieces = (Piece(self.owned.owners[name], 0, shape[0]),)
                found[key] = Sharded(dtype, shape, pieces, momenta.get(name))
            else:
                found[key] = self._like(name, dtype, own.get(key))
        for name in self.adamw_names:
            for part in ("exp_avg", "exp_avg_sq"):
                key = f"adamw.{part}.{name}"
                found[key] = self._like(name, self.held[name].dtype, own.get(key))
            step = own.get(f"adamw.step.{name}", torch.zeros((), dtype=torch.float32))
            found[f"adamw.step.{name}"] = Sharded(torch.float32, (), (Piece(0, 0, 1),), step)
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`: what each entry's pieces hold for this rank, by name."""
        prefix = "muon.momentum."
        own = self.kept.state_tensors()
        self.kept.load_state_tensors({name: tensors[name] for name in own})
        self.owned.muon.load_state_tensors(
            {o.name: tensors[prefix + o.name] for o in self.owned.muon.parameters}
        )

    def _like(self, name: str, dtype: torch.dtype, local: Tensor | None) -> Sharded:
        """A state tensor that lies as its parameter does."""
        parameter = self.held[name]
        shape = tuple(parameter.shape)
        size = self.ranks.size if self.is_cut(name) else 1
        return Sharded(dtype, shape, cut_pieces(shape, size), local)


def local_part(parameter: nn.Parameter) -> nn.Parameter:
    """The rank's rows as a parameter of their own, in the same memory; a whole one is itself."""
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
