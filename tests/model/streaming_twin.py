"""The model once more, in fp64, token by token: specification sections 2-9 without masks or batches.

Streaming state, official tensor names, plain Python lists. Shares nothing with model/ but the table of
RoPE frequencies. Everything is differentiable, so gradients have a twin too.

T tokens of one sequence, D model width, N streams, M finished entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import softplus

from consilience.model.checkpoint import to_official
from consilience.model.rope import inverse_frequencies


@dataclass
class Record:
    """What the indexers of one forward did, by layer; indices [t][...] over queries.

    scores    [M at t] index scores of every entry visible to the query
    chosen    indices of the entries it attends to, best first, ties by the lowest index
    target    [M at t] main attention's mass on each visible entry, summed over heads (5.3); None for a
              query without an entry
    """

    scores: dict[int, list[Tensor]] = field(default_factory=dict)
    chosen: dict[int, list[list[int]]] = field(default_factory=dict)
    target: dict[int, list[Tensor | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """How values change by being stored: KV entries, index queries and keys, index scores."""

    kv: Callable[[Tensor], Tensor] = lambda x: x
    index: Callable[[Tensor], Tensor] = lambda x: x
    scores: Callable[[Tensor], Tensor] = lambda x: x


PLAIN = Stored()


def normed(x, weight=None, eps=1e-6):
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def turned(x, position, frequencies, sign=1):
    """Interleaved pairs of the last channels, one complex number each. x [..., C] of one token."""
    width = 2 * len(frequencies)
    angle = torch.tensor(float(position)) * frequencies  # fp32 product
    unit = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)
    unit = unit if sign > 0 else unit.conj()
    tail = x[..., -width:]
    z = torch.complex(tail[..., 0::2], tail[..., 1::2]) * unit
    return torch.cat((x[..., :-width], torch.stack((z.real, z.imag), -1).flatten(-2)), -1)


class StreamingCompressor:
    """Section 8's update rule: slots, -inf where nothing was, pool when (pos + 1) mod m is 0."""

    def __init__(self, w, prefix, ratio, frequencies, stored=PLAIN.kv):
        self.stored = stored
        self.w, self.prefix, self.m, self.frequencies = w, prefix, ratio, frequencies
        self.width = w[f"{prefix}.norm.weight"].shape[0]
        num_slots = 2 * ratio if ratio == 4 else ratio
        series = w[f"{prefix}.wkv.weight"].shape[0]
        self.u = [torch.zeros(series, dtype=torch.float64)] * num_slots
        self.z = [torch.full((series,), float("-inf"), dtype=torch.float64)] * num_slots
        self.entries = []

    def feed(self, h, pos):
        slot = pos % self.m + (4 if self.m == 4 else 0)
        self.u[slot] = self.w[f"{self.prefix}.wkv.weight"] @ h
        self.z[slot] = self.w[f"{self.prefix}.wgate.weight"] @ h + self.w[f"{self.prefix}.ape"][pos % self.m]
        if (pos + 1) % self.m:
            return
        u, z = torch.stack(self.u), torch.stack(self.z)
        if self.m == 4:
            c = self.width
            u = torch.cat((u[:4, :c], u[4:, c:]))
            z = torch.cat((z[:4, :c], z[4:, c:]))
        pooled = (torch.softmax(z, 0) * u).sum(0)
        entry = normed(pooled, self.w[f"{self.prefix}.norm.weight"])
        self.entries.append(self.stored(turned(entry, pos + 1 - self.m, self.frequencies)))
        if self.m == 4:
            self.u[:4], self.z[:4] = self.u[4:], self.z[4:]


def twin_index_scores(c, w, prefix, h, latent, t, frequencies, entries, stored=PLAIN):
    """Section 5.2's I_{t,i} over the finished entries: [M]. h and latent are detached (5.3)."""
    h, latent = h.detach(), latent.detach()
    query = (w[f"{prefix}.wq_b.weight"] @ latent).view(c.index_n_heads, c.index_head_dim)
    match = torch.relu(stored.index(turned(query, t, frequencies)) @ torch.stack(entries).T)
    weight = (w[f"{prefix}.weights_proj.weight"] @ h) * c.index_n_heads**-0.5
    return stored.scores(weight @ match * c.index_head_dim**-0.5)


def best(scores, k):
    """Indices of the k highest scores, best first; of equal ones the lowest index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def twin_attention(c, w, layer, hidden, record=None, stored=PLAIN):
    """hidden [T, D] -> [T, D], one token after the other."""
    p, ratio = f"layers.{layer}.attn", c.compress_ratios[layer]
    f = inverse_frequencies(c, is_compressed=ratio > 0)
    main = StreamingCompressor(w, f"{p}.compressor", ratio, f, stored.kv) if ratio else None
    index = StreamingCompressor(w, f"{p}.indexer.compressor", 4, f, stored.index) if ratio == 4 else None
    if record is not None and index is not None:
        record.scores[layer], record.chosen[layer], record.target[layer] = [], [], []
    window, outputs = [], []
    for t, h in enumerate(hidden):
        latent = normed(w[f"{p}.wq_a.weight"] @ h, w[f"{p}.q_norm.weight"])
        q = normed((w[f"{p}.wq_b.weight"] @ latent).view(c.num_attention_heads, c.head_dim))
        q = turned(q, t, f)
        kv = stored.kv(turned(normed(w[f"{p}.wkv.weight"] @ h, w[f"{p}.kv_norm.weight"]), t, f))
        window = [*window, kv][-c.sliding_window :]
        chosen, scores = [], torch.zeros(0)
        if main is not None:
            main.feed(h, t)
            chosen = list(range(len(main.entries)))
            if index is not None:
                index.feed(h.detach(), t)
                if chosen:
                    scores = twin_index_scores(c, w, f"{p}.indexer", h, latent, t, f, index.entries, stored)
                    chosen = best(scores.tolist(), c.index_topk)
        k = torch.stack(window + [main.entries[i] for i in chosen])
        exps = torch.exp(q @ k.T * c.head_dim**-0.5)
        shares = exps / (exps.sum(1) + torch.exp(w[f"{p}.attn_sink"]))[:, None]
        if record is not None and index is not None:
            record.scores[layer].append(scores)
            record.chosen[layer].append(chosen)
            record.target[layer].append(shares[:, len(window) :].sum(0).detach() if chosen else None)
        o = turned(shares @ k, t, f, sign=-1)
        groups = o.reshape(c.o_groups, -1)
        wo_a = w[f"{p}.wo_a.weight"].view(c.o_groups, c.o_lora_rank, -1)
        low = torch.cat([a @ g for a, g in zip(wo_a, groups)])
        outputs.append(w[f"{p}.wo_b.weight"] @ low)
    return torch.stack(outputs)


def twin_index_loss(record, layer):
    """Section 5.3: mean over queries with an entry of KL(p_t ‖ softmax(I_t over S_t))."""
    terms = []
    for scores, chosen, target in zip(record.scores[layer], record.chosen[layer], record.target[layer]):
        if target is not None:
            p = target / target.sum()
            terms.append((p * (p.log() - torch.log_softmax(scores[chosen], 0))).sum())
    return torch.stack(terms).mean()


def twin_expert(w, prefix, x, limit):
    gate, up = w[f"{prefix}.w1.weight"] @ x, w[f"{prefix}.w3.weight"] @ x
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return w[f"{prefix}.w2.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def twin_moe(c, w, layer, hidden, tokens):
    p, outputs = f"layers.{layer}.ffn", []
    for h, token in zip(hidden, tokens):
        s = softplus(w[f"{p}.gate.weight"] @ h).sqrt()
        if layer < c.num_hash_layers:
            chosen = w[f"{p}.gate.tid2eid"][token]
        else:
            chosen = (s + w[f"{p}.gate.bias"]).argsort(descending=True)[: c.num_experts_per_tok]
        weight = s[chosen] / s[chosen].sum() * c.routed_scaling_factor
        out = twin_expert(w, f"{p}.shared_experts", h, c.swiglu_limit)
        for e, share in zip(chosen.tolist(), weight):
            out = out + share * twin_expert(w, f"{p}.experts.{e}", h, c.swiglu_limit)
        outputs.append(out)
    return torch.stack(outputs)


def twin_connection(c, w, prefix, streams, layer):
    """X [T, N, D] -> X' by section 3, `layer` maps [T, D] to [T, D]."""
    n = c.hc_mult
    flat = streams.flatten(1)
    m = (flat @ w[f"{prefix}_fn"].T) / (flat.square().mean(1, keepdim=True) + c.rms_norm_eps).sqrt()
    scale, base = w[f"{prefix}_scale"], w[f"{prefix}_base"]
    pre = torch.sigmoid(scale[0] * m[:, :n] + base[:n]) + c.hc_eps
    post = 2 * torch.sigmoid(scale[1] * m[:, n : 2 * n] + base[n : 2 * n])
    comb = torch.softmax((scale[2] * m[:, 2 * n :] + base[2 * n :]).view(-1, n, n), -1) + c.hc_eps
    comb = comb / (comb.sum(1, keepdim=True) + c.hc_eps)
    for _ in range(c.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + c.hc_eps)
        comb = comb / (comb.sum(1, keepdim=True) + c.hc_eps)
    out = layer(torch.einsum("tn,tnd->td", pre, streams))
    return post[:, :, None] * out[:, None] + torch.einsum("tjk,tjd->tkd", comb, streams)


def twin_weights(model):
    """The model's tensors under official names, in fp64, as leaves that collect gradients."""
    return {
        name: tensor.double().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in to_official(model).items()
    }


def twin_block(c, w, layer, x, tokens, record=None, stored=PLAIN):
    """Streams [T, N, D] -> [T, N, D] through `layers.{layer}`."""
    p = f"layers.{layer}"
    attend = lambda y: twin_attention(c, w, layer, normed(y, w[f"{p}.attn_norm.weight"]), record, stored)
    x = twin_connection(c, w, f"{p}.hc_attn", x, attend)
    feed = lambda y: twin_moe(c, w, layer, normed(y, w[f"{p}.ffn_norm.weight"]), tokens)
    return twin_connection(c, w, f"{p}.hc_ffn", x, feed)


def twin_collapse(c, w, x, prefix=""):
    """Streams [T, N, D] -> [T, D]: head collapse and norm, the trunk's or those of `prefix`."""
    flat = x.flatten(1)
    m = (flat @ w[f"{prefix}hc_head_fn"].T) / (flat.square().mean(1, keepdim=True) + c.rms_norm_eps).sqrt()
    a = torch.sigmoid(w[f"{prefix}hc_head_scale"] * m + w[f"{prefix}hc_head_base"]) + c.hc_eps
    return normed(torch.einsum("tn,tnd->td", a, x), w[f"{prefix}norm.weight"])


def twin_streams(model, tokens, w, record=None, stored=PLAIN):
    """Residual streams [T, N, D] after the trunk's last layer."""
    c = model.config
    x = w["embed.weight"][tokens][:, None].expand(-1, c.hc_mult, -1)
    for layer in range(c.num_hidden_layers):
        x = twin_block(c, w, layer, x, tokens, record, stored)
    return x


def twin_logits(model, tokens, w=None, record=None, stored=PLAIN):
    """Logits [T, V] fp64 of one sequence; `w` as `twin_weights` makes it."""
    w = twin_weights(model) if w is None else w
    streams = twin_streams(model, tokens, w, record, stored)
    return twin_collapse(model.config, w, streams) @ w["head.weight"].T
