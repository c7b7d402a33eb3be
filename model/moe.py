"""DeepSeekMoE as V4 uses it (report 2.1; specification 9).

R tokens (flattened), D model width, E experts, K experts a token, I expert width.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from consilience.model import exact
from consilience.model.config import ModelConfig
from consilience.model.forward_trace import Trace
from consilience.model.kernels import experts as by_pieces
from consilience.model.kernels import gpu_moe
from consilience.model.kernels.decode_moe import decode_moe, is_available
from consilience.model.linear import StoredLinear, project
from consilience.model.pieces import Work, in_pieces, piece_of
from consilience.model.quantization import OFF, fake_mxfp4, is_passing
from consilience.model.recompute import named
from consilience.model.routing import Routing
from consilience.model.row_sums import add_rows_, take_rows

if TYPE_CHECKING:
    from consilience.model.context_parallel import Piece
    from consilience.model.expert_exchange import Shard

FEW = 2048  # up to so many scores a sort costs no more than a check for ties


def top_experts(selection: Tensor, topk: int) -> Tensor:
    """Experts [R, K] int64 with the largest selection scores [R, E], falling; of equals the lowest first.

    `torch.topk` gives the same where no two scores are equal, but promises no order among equals.
    """
    if selection.device.type != "cpu" or selection.numel() <= FEW:
        return selection.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    largest, experts = selection.topk(min(topk + 1, selection.shape[1]), dim=-1)
    is_tied = largest[:, 1:] == largest[:, :-1]
    experts = experts[:, :topk]
    if is_tied.any():
        rows = is_tied.any(1).nonzero()[:, 0]
        experts[rows] = selection[rows].sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    return experts


class Gate(nn.Module):
    """Router: scores s = sqrt(softplus(W h)) in fp32.

    Learned layers take the top K of s + bias (bias moves by rule, not by gradient, and only
    selects); of equals the lowest index. Hash layers look the experts up by token id. Both weight by
    s, normalised over the chosen ones, times the scaling factor.
    """

    tid2eid: Tensor

    def __init__(self, config: ModelConfig, *, is_hash: bool, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.topk = config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        self.is_hash = is_hash
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, dtype=dtype))
        if is_hash:
            self.register_buffer(
                "tid2eid", torch.zeros(config.vocab_size, self.topk, dtype=torch.int64), persistent=True
            )
        else:
            self.bias = nn.Parameter(
                torch.zeros(config.n_routed_experts, dtype=torch.float32), requires_grad=False
            )

    def forward(
        self, hidden: Tensor, token_ids: Tensor, fixed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [R, D], token_ids [R] -> weights [R, K] fp32, experts [R, K] int64, scores [R, E].

        fixed [R, K] int64: experts that a learned router takes instead of its own choice, -1 where the
        token chooses. Their weights are made from the scores of now.
        """
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logits = named("router", exact.linear, hidden.to(wide), self.weight.to(wide))
        scores = exact.by_tiles(_affinity, logits)
        if self.is_hash:
            experts = self.tid2eid[token_ids]
        else:
            experts = top_experts(scores.detach() + self.bias, self.topk)
            if fixed is not None:
                experts = torch.where(fixed >= 0, fixed, experts)
        chosen = scores.gather(1, experts)
        weights = exact.by_tiles(_shares, chosen) * self.scaling
        return weights, experts, scores


def _affinity(logits: Tensor) -> Tensor:
    # Below a logit of -87 softplus leaves fp32; the floor keeps the root's slope finite there.
    return functional.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()


def _shares(chosen: Tensor) -> Tensor:
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20)


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows sorted by expert times each expert's own matrix.

    rows [N, in], weight [E, out, in], counts [E] rows of each expert -> [N, out]. One grouped GEMM
    where torch has one for the type (fp32 and bf16 on CPU, bf16 on Hopper), else one GEMM an expert.
    """
    is_aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    has_grouped = rows.dtype == torch.bfloat16 or (rows.dtype == torch.float32 and rows.device.type == "cpu")
    if is_aligned and has_grouped and rows.shape[0] and not exact.is_on():
        ends = counts.cumsum(0).to(torch.int32)
        return functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    pieces = rows.split(counts.tolist())
    return torch.cat([exact.linear(piece, weight[e]) for e, piece in enumerate(pieces)])


class _Gated(torch.autograd.Function):
    """silu(min(gate, limit)) · clamp(up, ±limit), zero gradient strictly beyond a limit."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        gate, up = _wide(gate), _wide(up)
        return functional.silu(gate.clamp(max=limit)).mul_(up.clamp(-limit, limit))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        saved, limit = ctx.saved_tensors, ctx.limit
        dtype = saved[0].dtype
        gate, up = (_wide(x) for x in saved)
        clamped = gate.clamp(max=limit)
        sigmoid = torch.sigmoid(clamped)
        silu = clamped * sigmoid
        d_up = (grad * silu).masked_fill_(up.abs() > limit, 0)
        # silu' = sigmoid + silu (1 - sigmoid)
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        d_gate = slope.mul_(grad).mul_(up.clamp(-limit, limit)).masked_fill_(gate > limit, 0)
        return d_gate.to(dtype), d_up.to(dtype), None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gated(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) · clamp(up, ±limit), fp32 or wider: the gate is clamped from above only."""
    return exact.by_tiles(lambda g, u: _Gated.apply(g, u, limit), gate, up)  # type: ignore[return-value]


def routed(
    hidden: Tensor, weights: Tensor, experts: Tensor, masters: tuple[Tensor, Tensor, Tensor], limit: float
) -> tuple[Tensor, Tensor]:
    """Σ_k weight_k · expert_k(hidden): [R, D] fp32 or wider, and tokens per expert [E].

    hidden [R, D], weights, experts [R, K]; masters w1, w2, w3 as `Experts` stacks them. Pairs are sorted by
    expert, tokens in order within each, so results do not depend on timing.
    """
    if by_pieces.is_available(hidden, weights, masters[0]):
        own = by_pieces.Expert(*masters)
        counts = torch.bincount(experts.flatten(), minlength=len(own.w1))
        return by_pieces.routed_experts(hidden, weights, experts, limit, own), counts
    num_tokens, topk = experts.shape
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    w1, w2, w3 = masters
    counts = torch.bincount(flat, minlength=w1.shape[0])
    rows = take_rows(hidden, order // topk)
    gate = named("expert_activations", grouped_linear, rows, w1, counts)
    up = named("expert_activations", grouped_linear, rows, w3, counts)
    active = gated(gate, up, limit)
    active = active * weights.flatten().index_select(0, order)[:, None].to(active.dtype)
    down = grouped_linear(active.to(hidden.dtype), w2, counts)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    mine = down.index_select(0, inverse).view(num_tokens, topk, w2.shape[1])
    wide = active.dtype
    return exact.by_tiles(lambda x: x.sum(1, dtype=wide), mine), counts


class Experts(nn.Module):
    """Routed experts, stacked: w1 (gate), w3 (up) [E, I, D]; w2 (down) [E, D, I].

    shard  where each rank holds some of them only: which, and how tokens get there (expert_parallel.py)
    """

    quantization = OFF
    shard: Shard | None = None

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None) -> None:
        super().__init__()
        e, i, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.limit = config.swiglu_limit
        self.w1 = nn.Parameter(torch.empty(e, i, d, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(e, d, i, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(e, i, d, dtype=dtype))
        self._rounded: tuple[tuple[Tensor, ...], tuple, tuple[Tensor, ...]] | None = None

    def forward(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """`routed` by all: hidden [R, D], weights, experts [R, K] -> [R, D], tokens per expert [E]."""
        return routed(hidden, weights, experts, self.weights(), self.limit)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """w1, w2, w3 as they compute: in FP4 where that is switched on.

        Rounded once while no gradient is wanted, and again after any change of the masters that autograd's
        version counters show. A forward with gradients forgets what was kept: optimizers that write past
        those counters (`.data`, flat buffers) come after one. Of weights marked as passing nothing is kept.
        """
        masters = (self.w1, self.w2, self.w3)
        if not self.quantization.experts or torch.is_grad_enabled() or is_passing(self.w1):
            self._rounded = None
            return tuple(fake_mxfp4(w) for w in masters) if self.quantization.experts else masters  # type: ignore[return-value]
        versions = tuple((w.data_ptr(), w._version) for w in masters)
        kept = self._rounded
        # The masters themselves are held: a new parameter may get the address of one that is gone.
        if kept is None or kept[1] != versions or any(a is not b for a, b in zip(kept[0], masters)):
            kept = self._rounded = (masters, versions, tuple(fake_mxfp4(w).contiguous() for w in masters))
        return kept[2]  # type: ignore[return-value]


class SharedExperts(nn.Module):
    """The expert every token passes through: same form, same clamp, no gate."""

    quantization = OFF

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None) -> None:
        super().__init__()
        d, i = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.limit = config.swiglu_limit
        self.w1 = StoredLinear(d, i, dtype)
        self.w2 = StoredLinear(i, d, dtype)
        self.w3 = StoredLinear(d, i, dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R, D]."""
        if not self.quantization.linears and by_pieces.is_available(hidden, self.w1.weight):
            own = by_pieces.Expert(self.w1.weight, self.w2.weight, self.w3.weight)
            return by_pieces.one_expert(hidden, self.limit, own)
        gate, up = named("expert_activations", project, hidden, self.w1, self.w3)
        return self.w2(gated(gate, up, self.limit).to(hidden.dtype))


class MoE(nn.Module):
    """Routed experts plus the shared expert; the first `num_hash_layers` layers route by token id."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layer = layer
        self.gate = Gate(config, is_hash=layer < config.num_hash_layers, dtype=dtype)
        self.experts = Experts(config, dtype)
        self.shared_experts = SharedExperts(config, dtype)

    def forward(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        sample: Tensor | None = None,
        trace: Trace | None = None,
        routing: Routing | None = None,
        piece: Piece | None = None,
    ) -> Tensor:
        """hidden [R, D], token_ids [R] -> [R, D].

        sample [R]  sample that each token belongs to, -1 for padding; read with a `trace` only
        routing     takes the learned router's choices down, or prescribes them
        piece       of samples, where other ranks have more of them
        """
        if self.gate.is_hash:
            routing = None
        is_plain = trace is None and not self.shared_experts.quantization.linears
        is_plain = is_plain and (routing is None or routing.into is not None)
        if is_plain and self.experts.shard is None and is_available(hidden, self.gate.weight):
            return decode_moe(self, hidden, token_ids, routing)
        shape = (hidden.shape[0], self.gate.topk)
        fixed = None if routing is None else routing.prescribed(self.layer, shape, hidden.device, piece)
        route = partial(gpu_moe.route, self.gate) if self._is_on_gpu(hidden) else self.gate
        weights, experts, scores = route(hidden, token_ids, fixed)
        if routing is not None and fixed is None:
            routing.take_down(self.layer, experts, piece)
        elif routing is not None and fixed is not None and routing.compares:
            fresh = top_experts(scores.detach() + self.gate.bias, self.gate.topk)
            routing.compare(self.layer, fresh, fixed)
        num_tokens, topk = experts.shape
        most = piece_of(num_tokens, topk * hidden.shape[1] * hidden.element_size())
        most = most if self.experts.shard is None else num_tokens  # ranks have other numbers of tokens
        parameters = (*self.experts.parameters(), *self.shared_experts.parameters())
        work = Work(self._experts, 0, most, "expert_activations", parameters)
        (output,) = in_pieces(work, (hidden, weights, experts))
        if trace is not None:
            assert sample is not None
            load = torch.bincount(experts[sample >= 0].flatten(), minlength=scores.shape[1])
            trace.add_load(self.layer, load, is_hash=self.gate.is_hash)
            if trace.wants_losses and not self.gate.is_hash:
                trace.add_balance_loss(balance_loss(scores, experts, sample, piece))
        return output

    def _experts(self, _: int, hidden: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor]:
        """Routed and shared experts of hidden [R, D] by weights, experts [R, K] -> [R, D]."""
        own, shared = self.experts, self.shared_experts
        if not self._is_on_gpu(hidden) and own.shard is None:
            return ((own(hidden, weights, experts)[0] + shared(hidden)).to(hidden.dtype),)
        given = (hidden, weights, experts, own.weights(), own.limit)
        if not self._is_on_gpu(hidden):
            return ((own.shard.run(*given) + shared(hidden)).to(hidden.dtype),)  # type: ignore[union-attr]
        base = gpu_moe.shared_expert(shared, hidden)
        return (gpu_moe.routed_experts(*given, base) if own.shard is None else own.shard.run(*given, base),)

    def _is_on_gpu(self, hidden: Tensor) -> bool:
        return gpu_moe.is_available(hidden, self.experts.w1, self.gate.topk)


def balance_loss(scores: Tensor, experts: Tensor, sample: Tensor, piece: Piece | None = None) -> Tensor:
    """Sequence-wise balance loss Σ_e f_e P_e of each sample, summed over samples (V3 report, eq. 17-20).

    scores [R, E], experts [R, K], sample [R] the sample of each token, -1 for padding -> scalar.
    f_e = E / (K T) · count_e over the sample's T tokens, P_e = mean over them of s_e / Σ_j s_j. A sum,
    so that the caller divides by the samples of a step however its rows are cut. Of a `piece` of the samples
    it is what these tokens give to the P_e, times f_e over all ranks: a sum over ranks, too.
    """
    num_experts, topk = scores.shape[1], experts.shape[1]
    token = (sample >= 0).nonzero()[:, 0]
    owner = sample[token]
    num_samples = int(owner.max()) + 1 if owner.numel() else 0
    num_samples = num_samples if piece is None else piece.num_samples
    length = torch.bincount(owner, minlength=num_samples)
    hits = torch.bincount(
        (owner[:, None] * num_experts + experts[token]).flatten(), minlength=num_samples * num_experts
    ).view(num_samples, num_experts)
    if piece is not None:
        piece.ranks.sum_((length, hits))
    length = length.clamp(min=1)[:, None]
    frequency = (hits * num_experts).to(scores.dtype) / (topk * length)
    share = (scores / scores.sum(-1, keepdim=True))[token]
    mean_share = add_rows_(share.new_zeros(num_samples, num_experts), owner, share) / length
    return (frequency * mean_share).sum()
