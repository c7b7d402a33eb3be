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

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from consilience.conf.errors import CheckpointError, EngineError
from consilience.model.ranks import Ranks
from consilience.training.muon import Muon, MuonParameter


class Owner(StrEnum):
    """Who moves a parameter."""

    MUON = "muon"
    ADAMW = "adamw"
    ADAMW_DECAYED = "adamw_decayed"
    RULE = "rule"
    FROZEN = "frozen"


_LAYER = r"(layers|mtp)\.\d+\."
_COMPRESSOR = rf"{_LAYER}attn\.(indexer\.)?compressor\."
OWNERS: tuple[tuple[str, Owner], ...] = (
    (r"(embed|head)\.weight", Owner.ADAMW_DECAYED),
    (r"norm\.weight", Owner.ADAMW),
    (rf"{_LAYER}(attn_norm|ffn_norm|enorm|hnorm|norm|attn\.q_norm|attn\.kv_norm)\.weight", Owner.ADAMW),
    (rf"{_COMPRESSOR}norm\.weight", Owner.ADAMW),
    (rf"{_COMPRESSOR}ape", Owner.ADAMW),
    (rf"{_COMPRESSOR}(wkv|wgate)\.weight", Owner.MUON),
    (rf"{_LAYER}attn\.attn_sink", Owner.ADAMW),
    (rf"{_LAYER}attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b|indexer\.weights_proj)\.weight", Owner.MUON),
    (rf"({_LAYER})?hc_(attn|ffn|head)[._]fn", Owner.MUON),
    (rf"({_LAYER})?hc_(attn|ffn|head)[._](base|scale)", Owner.ADAMW),
    (rf"{_LAYER}ffn\.gate\.weight", Owner.MUON),
    (rf"{_LAYER}ffn\.gate\.bias", Owner.RULE),
    (rf"{_LAYER}ffn\.gate\.tid2eid", Owner.FROZEN),
    (rf"{_LAYER}ffn\.experts\.w[123]", Owner.MUON),
    (rf"{_LAYER}ffn\.experts\.\d+\.w[123]\.weight", Owner.MUON),
    (rf"{_LAYER}ffn\.shared_experts\.w[123]\.weight", Owner.MUON),
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
            muon.append(MuonParameter(name, parameter, _row_blocks(name, shapes, o_groups)))
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


def _row_blocks(name: str, shapes: Mapping[str, tuple[int, ...]], o_groups: int | None) -> tuple[int, ...]:
    """Heights of the independent matrices stacked in the rows of one weight."""
    rows = shapes[name][-2]
    if name.endswith("attn.wo_a.weight"):
        groups = o_groups or _output_groups(name, shapes)
        return _equal(name, rows, groups)
    if re.fullmatch(rf"{_COMPRESSOR}(wkv|wgate)\.weight", name):
        entry_width = shapes.get(re.sub(r"(wkv|wgate)\.weight$", "norm.weight", name), (rows,))[0]
        return _equal(name, rows, max(1, rows // entry_width))  # 2 where windows overlap (CSA), else 1
    if re.search(r"hc_(attn|ffn)[._]fn$", name):
        streams = math.isqrt(rows + 1) - 1
        if streams * (streams + 2) != rows:
            raise EngineError(
                f"{name} has {rows} rows; N streams need N·(N + 2) of them (pre N, post N, comb N·N)"
            )
        return (streams, streams, streams * streams)
    return (rows,)


def _output_groups(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """wq_b makes all heads' channels, wo_a reads one group's: their ratio counts the groups."""
    queries = shapes.get(name.replace("wo_a", "wq_b"))
    if queries is None:
        raise EngineError(f"{name}: the number of output groups is unknown; pass o_groups")
    return max(1, queries[0] // shapes[name][1])


def _equal(name: str, rows: int, parts: int) -> tuple[int, ...]:
    if rows % parts:
        raise EngineError(f"{name} has {rows} rows, which do not fall into {parts} equal blocks")
    return (rows // parts,) * parts


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
    """Muon and AdamW over one model, and the bias rule. One learning rate for both (12.2)."""

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
    ) -> None:
        self.groups = groups
        self.lr = lr
        self.bias_speed = bias_speed
        self.muon = Muon(groups.muon, momentum=momentum, weight_decay=weight_decay, update_rms=update_rms)
        self._adamw_names = [*groups.adamw_decayed, *groups.adamw]
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
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        return lr

    def _move_biases(self, expert_loads: Mapping[str, Tensor]) -> None:
        unknown = sorted(set(expert_loads) - set(self.groups.rule))
        if unknown:
            raise EngineError(
                f"expert loads for {unknown[0]}, the model's gate biases are {sorted(self.groups.rule)}"
            )
        for name, load in expert_loads.items():
            update_gate_bias(self.groups.rule[name], load, self.bias_speed)

    def state_tensors(self) -> dict[str, Tensor]:
        """muon.momentum.<name>, adamw.{exp_avg, exp_avg_sq, step}.<name>; zeros before a first step."""
        tensors = {f"muon.momentum.{name}": value for name, value in self.muon.state_tensors().items()}
        for name in self._adamw_names:
            for key, value in self._adamw_state(name).items():
                tensors[f"adamw.{key}.{name}"] = value
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state_tensors`. CheckpointError on a missing, unexpected or wrongly shaped tensor."""
        expected = self.state_tensors()
        for name in sorted(set(expected) ^ set(tensors)):
            problem = "is missing" if name in expected else "is not a state of this model's optimiser"
            raise CheckpointError(
                f"optimiser state: {name} {problem}; resume with the model and optimiser that wrote it"
            )
        for name, value in expected.items():
            if tensors[name].shape != value.shape:
                raise CheckpointError(
                    f"optimiser state: {name} has shape {list(tensors[name].shape)}, "
                    f"expected {list(value.shape)}"
                )
        prefix = "muon.momentum."
        self.muon.load_state_tensors(
            {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
        )
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
