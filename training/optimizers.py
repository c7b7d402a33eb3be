"""Which optimiser owns which tensor (V4 specification, section 12.2), and the step over all of them.

    Muon     every weight matrix: attention, compressor, indexer, router, experts, MTP projections,
             and the `fn` of the hyper-connections
    AdamW    embedding and head, RMSNorm weights, hyper-connection base and scale, sinks, `ape`
    rule     `ffn.gate.bias`: moved by load, never by gradient
    frozen   `ffn.gate.tid2eid`

Dense models go the same way: matrices to Muon, embedding, head, norms and biases to AdamW.

Weight decay of AdamW falls on embedding and head only: norms, sinks, gates and position biases have
no scale to shrink (our reading; the report names one weight decay and no exemptions).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from consilience.conf.errors import CheckpointError, EngineError
from consilience.model.expert_exchange import Shard
from consilience.model.ranks import ALONE, Ranks
from consilience.training.expert_gradients import sum_gradients, whole_norms
from consilience.training.logical_matrices import COMPRESSOR, LAYER, row_blocks
from consilience.training.muon import Muon, MuonParameter, work_dtype
from consilience.training.sharded_adamw import MOMENTS, ShardedAdamW
from consilience.training.sharded_muon import ShardedMuon
from consilience.training.shards import Shards, norms_of


class Owner(StrEnum):
    """Who moves a parameter."""

    MUON = "muon"
    ADAMW = "adamw"
    ADAMW_DECAYED = "adamw_decayed"
    RULE = "rule"
    FROZEN = "frozen"


OWNERS: tuple[tuple[str, Owner], ...] = (
    (r"(embed|head)\.weight", Owner.ADAMW_DECAYED),
    (r"norm\.weight", Owner.ADAMW),
    (rf"{LAYER}(attn_norm|ffn_norm|enorm|hnorm|norm|attn\.q_norm|attn\.kv_norm)\.weight", Owner.ADAMW),
    (rf"{COMPRESSOR}norm\.weight", Owner.ADAMW),
    (rf"{COMPRESSOR}ape", Owner.ADAMW),
    (rf"{COMPRESSOR}(wkv|wgate)\.weight", Owner.MUON),
    (rf"{LAYER}attn\.attn_sink", Owner.ADAMW),
    (rf"{LAYER}attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b|indexer\.weights_proj)\.weight", Owner.MUON),
    (rf"({LAYER})?hc_(attn|ffn|head)[._]fn", Owner.MUON),
    (rf"({LAYER})?hc_(attn|ffn|head)[._](base|scale)", Owner.ADAMW),
    (rf"{LAYER}ffn\.gate\.weight", Owner.MUON),
    (rf"{LAYER}ffn\.gate\.bias", Owner.RULE),
    (rf"{LAYER}ffn\.gate\.tid2eid", Owner.FROZEN),
    (rf"{LAYER}ffn\.experts\.w[123]", Owner.MUON),
    (rf"{LAYER}ffn\.experts\.\d+\.w[123]\.weight", Owner.MUON),
    (rf"{LAYER}ffn\.shared_experts\.w[123]\.weight", Owner.MUON),
    (r"mtp\.\d+\.(e_proj|h_proj)\.weight", Owner.MUON),
    (r"(model\.embed_tokens|lm_head)\.weight", Owner.ADAMW_DECAYED),  # from here on: dense models
    (r"model\.(layers\.\d+\.(\w+\.)?)?\w*norm\.weight", Owner.ADAMW),
    (r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight", Owner.MUON),
    (r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.bias", Owner.ADAMW),
)
_PATTERNS = tuple((re.compile(pattern), owner) for pattern, owner in OWNERS)


@dataclass(frozen=True, slots=True)
class ParameterGroups:
    """Every parameter under exactly one owner."""

    muon: tuple[MuonParameter, ...]
    adamw_decayed: dict[str, nn.Parameter]
    adamw: dict[str, nn.Parameter]
    rule: dict[str, Tensor]
    frozen: dict[str, Tensor]


def owner_of(name: str) -> Owner:
    """The owner of an official tensor name.

    Routed experts may be stacked or one by one, hyper-connections flat (`hc_attn_fn`, as released)
    or modules (`hc_attn.fn`, as in model/).
    """
    found = {owner for pattern, owner in _PATTERNS if pattern.fullmatch(name)}
    if len(found) != 1:
        raise EngineError(
            f"parameter {name} has no optimiser: it is not an official tensor name of the V4 architecture; "
            "name it in training/optimizers.py (OWNERS), once"
        )
    return found.pop()


def parameter_groups(
    model: nn.Module, *, o_groups: int | None = None, use_muon: bool = True
) -> ParameterGroups:
    """Split a model's trainable parameters; the logical matrices follow from names and shapes.

    o_groups  output groups of `wo_a`; None reads it off the shapes of `wq_b` and `wo_a`.
    use_muon  False gives Muon's matrices to AdamW, with weight decay.
    A parameter with requires_grad False is frozen, whatever its name. EngineError: an unknown name.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    muon: list[MuonParameter] = []
    by_owner: dict[Owner, dict[str, nn.Parameter]] = {owner: {} for owner in Owner}
    for name, parameter in model.named_parameters():
        owner = owner_of(name)
        if owner is not Owner.RULE and not parameter.requires_grad:
            owner = Owner.FROZEN
        if owner is Owner.MUON and not use_muon:
            owner = Owner.ADAMW_DECAYED
        if owner is Owner.MUON:
            muon.append(MuonParameter(name, parameter, row_blocks(name, shapes, o_groups)))
        by_owner[owner][name] = parameter
    rule: dict[str, Tensor] = dict(by_owner[Owner.RULE])
    rule |= {n: b for n, b in model.named_buffers() if n.endswith(".ffn.gate.bias")}
    return ParameterGroups(
        muon=tuple(muon),
        adamw_decayed=by_owner[Owner.ADAMW_DECAYED],
        adamw=by_owner[Owner.ADAMW],
        rule=rule,
        frozen=dict(by_owner[Owner.FROZEN]),
    )


@torch.no_grad()
def update_gate_bias(bias: Tensor, load: Tensor, speed: float = 1e-3) -> None:
    """bias[e] up by `speed` where expert e is under the mean load, down where over; in place.

    bias [E] float, load [E] tokens routed to each expert in the step (V3's auxiliary-free balancing).
    """
    if bias.shape != load.shape:
        raise EngineError(f"gate bias {list(bias.shape)} and expert load {list(load.shape)} differ in shape")
    load = load.to(device=bias.device, dtype=torch.float64)
    bias.add_(torch.sign(load.mean() - load).to(bias.dtype), alpha=speed)


def gate_bias_names(model: nn.Module) -> dict[int, str]:
    """Layer -> name of its router bias, layers as `MoE.layer` counts them: MTP's follow the trunk's."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    trunk = [int(found[1]) for name in names if (found := re.match(r"layers\.(\d+)\.", name))]
    first = {"layers": 0, "mtp": max(trunk, default=-1) + 1}
    biases = (re.fullmatch(r"(layers|mtp)\.(\d+)\.ffn\.gate\.bias", name) for name in names)
    return {first[found[1]] + int(found[2]): found[0] for found in biases if found}


def loads_by_bias(
    names: Mapping[int, str],
    biases: Mapping[str, Tensor],
    expert_load: Mapping[int, Tensor] | None,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Name of a router bias -> [E] fp64 tokens of all ranks; hash layers have none.

    names  layer -> router bias (`gate_bias_names`);  expert_load  layer -> [E] tokens of this rank
    """
    own = {names[layer]: load for layer, load in (expert_load or {}).items() if layer in names}
    total: dict[str, Tensor] = {}
    for name in sorted(set().union(*ranks.gather(set(own)))):
        nothing = torch.zeros_like(biases[name], dtype=torch.float64)
        total[name] = own[name].double() if name in own else nothing
    ranks.sum_(total.values())
    return total


class V4Optimizer:
    """Muon and AdamW over one model, and the bias rule. One learning rate for both (12.2).

    ranks              who holds the same weights; all of them make the same calls
    is_sharded         momentum and moments are divided among the ranks; state goes in and out whole
    has_bf16_exchange  sharded only: experts' gradients travel as bf16, rounded by chance
    split              weights of which this rank has some experts (`sharded_names`): only those who have the
                       same add their gradients, and divide their state
    """

    def __init__(
        self,
        groups: ParameterGroups,
        *,
        lr: float,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
        momentum: float = 0.95,
        update_rms: float = 0.18,
        bias_speed: float = 1e-3,
        ranks: Ranks = ALONE,
        is_sharded: bool = False,
        has_bf16_exchange: bool = False,
        split: Mapping[str, Shard] = MappingProxyType({}),
    ) -> None:
        self.groups = groups
        self.lr = lr
        self.bias_speed = bias_speed
        self.ranks, self.split = ranks, split
        self._adamw_names = [*groups.adamw_decayed, *groups.adamw]
        self.shards: Shards | None = None
        self.muon: Muon | ShardedMuon
        rates: Any = {"momentum": momentum, "weight_decay": weight_decay, "update_rms": update_rms}
        if is_sharded:
            copies = next((shard.copies for shard in split.values()), None)
            self.muon = ShardedMuon(groups.muon, ranks, has_bf16_exchange, copies=copies, **rates)
            how: Any = {"weight_decay": weight_decay, "betas": betas, "eps": eps}
            adamw = ShardedAdamW(groups.adamw_decayed, groups.adamw, ranks=ranks, copies=copies, **how)
            self.shards = Shards(self.muon, adamw, ranks)
            return
        self.muon = Muon(groups.muon, **rates)
        decayed, plain = list(groups.adamw_decayed.values()), list(groups.adamw.values())
        param_groups = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in ((decayed, weight_decay), (plain, 0.0))
            if parameters
        ]
        self.adamw = (
            torch.optim.AdamW(param_groups, lr=lr, betas=betas, eps=eps, fused=True) if param_groups else None
        )

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Everything a gradient moves, by name."""
        by_muon = {owned.name: owned.parameter for owned in self.groups.muon}
        return {**by_muon, **self.groups.adamw_decayed, **self.groups.adamw}

    def step(self, lr_scale: float = 1.0, expert_loads: Mapping[str, Tensor] | None = None) -> float:
        """One update from the gradients in place; returns the learning rate used. With one of 0 from the
        start nothing moves, router biases neither.

        expert_loads  name of a gate bias -> [E] tokens each expert received in this step
        """
        lr = self.lr * lr_scale
        if expert_loads and self.lr:
            self._move_biases(expert_loads)
        self.muon.step(lr)
        if self.shards is not None:
            self.shards.adamw.step(lr)
        elif self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        return lr

    def sum_gradients(self, step: int) -> None:
        """Sum gradients over the ranks; a parameter that has one on some ranks only has the sum of those.

        step  number of the update, the same on every rank (what chance roundings are keyed with)
        Where state is sharded each sum goes to its owner alone, and no gradient stays on a parameter.
        """
        parameters = self.parameters
        own = [name for name, parameter in parameters.items() if parameter.grad is not None]
        anywhere = set().union(*self.ranks.gather(own))
        for name in anywhere:
            if parameters[name].grad is None:
                parameters[name].grad = torch.zeros_like(parameters[name])
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        if self.shards is None:
            sum_gradients(gradients, self.ranks, self.split)
            return
        self.shards.sum_gradients(gradients, step)
        for parameter in parameters.values():
            parameter.grad = None

    def gradient_norms(self) -> dict[str, float]:
        """name -> norm of the parameter's gradient, the same on every rank; after `sum_gradients`."""
        if self.shards is not None:
            return self.shards.gradient_norms()
        return whole_norms(norms_of(self.gradients()), self.split)

    def scale_gradients(self, factors: Mapping[str, float]) -> None:
        """Gradients times the factors of their parameters, in place; after `sum_gradients`."""
        if self.shards is not None:
            self.shards.scale_gradients(factors)
        elif factors:
            grads = self.gradients()
            scaled = [grads[name] for name in factors]
            torch._foreach_mul_(scaled, list(factors.values()))  # pyright: ignore[reportPrivateImportUsage]

    def gradients(self) -> dict[str, Tensor]:
        """name -> gradient, those there are, of experts this rank's; after `sum_gradients`. From shards they
        are gathered, whole, by all ranks together: to be looked at, not to be changed."""
        if self.shards is not None:
            return self.shards.whole_gradients()
        return {n: p.grad for n, p in self.parameters.items() if p.grad is not None}

    def clear_gradients(self) -> None:
        """Forget all gradients, summed or not."""
        for parameter in self.parameters.values():
            parameter.grad = None
        if self.shards is not None:
            self.shards.clear_gradients()

    def _move_biases(self, expert_loads: Mapping[str, Tensor]) -> None:
        unknown = sorted(set(expert_loads) - set(self.groups.rule))
        if unknown:
            raise EngineError(
                f"expert loads for {unknown[0]}, the model's gate biases are {sorted(self.groups.rule)}"
            )
        for name, load in expert_loads.items():
            update_gate_bias(self.groups.rule[name], load, self.bias_speed)

    def each_state_tensor(self) -> Iterator[tuple[str, Tensor]]:
        """What `state_tensors` gives, one at a time. Where state is sharded every rank iterates, and each
        gets the whole tensors, of experts this rank's."""
        for name, value in self.muon.each_state_tensor():
            yield f"muon.momentum.{name}", value
        if self.shards is not None:
            yield from ((f"adamw.{name}", value) for name, value in self.shards.adamw.each_state_tensor())
            return
        for name in self._adamw_names:
            for key, value in self._adamw_state(name).items():
                yield f"adamw.{key}.{name}", value

    def state_tensors(self) -> dict[str, Tensor]:
        """muon.momentum.<name>, adamw.{exp_avg, exp_avg_sq, step}.<name>; zeros before a first step."""
        return dict(self.each_state_tensor())

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state_tensors`. CheckpointError on a missing, unexpected or wrongly shaped tensor."""
        expected = self.state_types()
        for name in sorted(set(expected) ^ set(tensors)):
            problem = "is missing" if name in expected else "is not a state of this model's optimiser"
            raise CheckpointError(
                f"optimiser state: {name} {problem}; resume with the model and optimiser that wrote it"
            )
        for name, (_, shape) in expected.items():
            if tensors[name].shape != shape:
                raise CheckpointError(
                    f"optimiser state: {name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
                )
        parts = [
            {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
            for prefix in ("muon.momentum.", "adamw.")
        ]
        self.muon.load_state_tensors(parts[0])
        if self.shards is not None:
            self.shards.adamw.load_state_tensors(parts[1])
            return
        for name in self._adamw_names:
            parameter = self.parameters[name]
            state = {k: tensors[f"adamw.{k}.{name}"] for k in ("exp_avg", "exp_avg_sq", "step")}
            if self.adamw is not None:
                self.adamw.state[parameter] = {
                    key: value.to(
                        device=parameter.device, dtype=torch.float32 if key == "step" else parameter.dtype
                    ).clone(memory_format=torch.preserve_format)
                    for key, value in state.items()
                }

    def state_types(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Type and shape of what `each_state_tensor` gives, in its order."""
        parameters = self.parameters
        names = [owned.name for owned in self.groups.muon]
        found = {f"muon.momentum.{n}": (work_dtype(parameters[n]), parameters[n].shape) for n in names}
        for name in self._adamw_names:
            own = parameters[name]
            found |= {f"adamw.{moment}.{name}": (own.dtype, own.shape) for moment in MOMENTS}
            found[f"adamw.step.{name}"] = torch.float32, torch.Size()
        return found

    def _adamw_state(self, name: str) -> dict[str, Tensor]:
        parameter = self.parameters[name]
        state = self.adamw.state.get(parameter) if self.adamw is not None else None
        if not state:
            zeros = torch.zeros_like(parameter, requires_grad=False)
            return {
                "exp_avg": zeros,
                "exp_avg_sq": zeros.clone(),
                "step": torch.zeros((), dtype=torch.float32),
            }
        return {key: state[key] for key in ("exp_avg", "exp_avg_sq", "step")}
