"""What happens inside a forward, of our model and of transformers' twin, under common names.

Both sides are watched at module borders, by hooks; nothing inside a module's forward is assumed. The only
method that is watched is `HyperConnection.receive`, which is a border without a module.

B rows, T tokens, M compressed entries, N streams, E experts, K experts a token.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from consilience.model.config import CSA_RATIO, SLIDING
from consilience.model.forward_trace import Trace
from consilience.model.norm import RMSNorm, rms
from consilience.model.rope import inverse_frequencies, rotate, rotations
from consilience.model.state import DecodeState

Found = dict[str, Tensor]

# Of one layer: ours, theirs, whose outputs are one row a token.
TOKEN_BORDERS = [
    ("attn_norm", "input_layernorm"),
    ("attn.wq_a", "self_attn.q_a_proj"),
    ("attn.q_norm", "self_attn.q_a_norm"),
    ("attn.wq_b", "self_attn.q_b_proj"),
    ("attn.wkv", "self_attn.kv_proj"),
    ("attn.kv_norm", "self_attn.kv_norm"),
    ("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    ("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
    ("attn", "self_attn"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn.experts", "mlp.experts"),
    ("ffn.shared_experts", "mlp.shared_experts"),
    ("ffn", "mlp"),
]
# The same with one row an entry, of those that this forward finished.
ENTRY_BORDERS = [
    ("attn.compressor.norm", "self_attn.compressor.kv_norm"),
    ("attn.indexer.compressor.norm", "self_attn.compressor.indexer.kv_norm"),
]


class Watch:
    """Collects named tensors of one forward; `take` hands them over as [rows, -1, ...]."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self._undo: list[Callable[[], object]] = []

    def output(self, module: nn.Module | None, name: str, pick=lambda output: output) -> None:
        """Keep `pick(output)` of every call of `module` as `name`; a norm that turns too is turned back."""
        if module is not None:

            def keep(_, given, output):
                found = pick(output).detach()
                is_turned = isinstance(module, RMSNorm) and len(given) > 1 and given[1] is not None
                self.found[name] = rotate(found, given[1], is_inverse=True) if is_turned else found

            self._undo.append(module.register_forward_hook(keep).remove)

    def inputs(self, module: nn.Module | None, keep: Callable[[tuple], None]) -> None:
        """Call `keep` with the positional arguments of every call of `module`."""
        if module is not None:
            self._undo.append(module.register_forward_pre_hook(lambda _, args: keep(args)).remove)

    def method(self, owner: nn.Module, name: str, keep: Callable[[tuple], None]) -> None:
        """Call `keep` with the results of every call of `owner.name`."""
        inner = getattr(owner, name)

        def watched(*args, **kwargs):
            results = inner(*args, **kwargs)
            keep(results)
            return results

        setattr(owner, name, watched)
        self._undo.append(lambda: delattr(owner, name))

    def close(self) -> None:
        for undo in self._undo:
            undo()


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        root = getattr(root, part, None)  # type: ignore[assignment]
        if root is None:
            return None
    return root


def _sorted_by_expert(weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    order = experts.argsort(-1)
    return weights.gather(-1, order), experts.gather(-1, order)


@contextmanager
def watched_ours(model):
    """Within: every forward of `model` fills the yielded Watch, rows and tokens still flattened."""
    watch = Watch()
    put = watch.found.__setitem__
    for i, block in enumerate(model.layers):
        for ours, _ in TOKEN_BORDERS + ENTRY_BORDERS:
            watch.output(_submodule(block, ours), f"{i}.{ours}", _first)
        watch.output(block.attn.compressor, f"{i}.entries")
        if block.attn.indexer is not None:
            watch.output(block.attn.indexer.compressor, f"{i}.index keys")
        for name in ("hc_attn", "hc_ffn"):

            def keep(results, stem=f"{i}.{name}"):
                for part, value in zip(("layer input", "post", "comb"), results[1:]):
                    put(f"{stem} {part}", value.detach())

            watch.method(getattr(block, name), "receive", keep)

        def routed(_, __, output, i=i):
            weights, experts = _sorted_by_expert(output[0].detach(), output[1])
            put(f"{i}.router weights", weights)
            put(f"{i}.router experts", experts)
            put(f"{i}.router scores", output[2].detach())

        watch._undo.append(block.ffn.gate.register_forward_hook(routed).remove)
        watch.output(block, f"{i}.streams")
    watch.inputs(model.layers[0], lambda args: put("embedding streams", args[0].detach()))
    watch.output(model.hc_head, "head collapse")
    watch.output(model.norm, "final norm")
    try:
        yield watch
    finally:
        watch.close()


@contextmanager
def watched_theirs(twin):
    """The same of transformers' model."""
    watch = Watch()
    put = watch.found.__setitem__
    for i, layer in enumerate(twin.model.layers):
        for ours, theirs in TOKEN_BORDERS + ENTRY_BORDERS:
            watch.output(_submodule(layer, theirs), f"{i}.{ours}", _first)
        compressor = layer.self_attn.compressor
        watch.output(layer.self_attn.q_b_norm, f"{i}.query heads", lambda x: x.transpose(1, 2))
        watch.output(compressor, f"{i}.entries", lambda output: output[0][:, 0])
        indexer = getattr(compressor, "indexer", None)
        if indexer is not None:
            watch.output(indexer.scorer, f"{i}.index scores")
            watch.output(indexer, f"{i}.index picks")

            def scored(args, i=i):
                put(f"{i}.index queries", args[0].detach())
                put(f"{i}.index keys", args[1].detach())

            watch.inputs(indexer.scorer, scored)
        for ours, theirs in (("hc_attn", "attn_hc"), ("hc_ffn", "ffn_hc")):

            def keep(_, __, output, stem=f"{i}.{ours}"):
                for part, value in zip(("post", "comb", "layer input"), output):
                    put(f"{stem} {part}", value.detach())

            watch._undo.append(getattr(layer, theirs).register_forward_hook(keep).remove)

        def routed(gate, _, output, i=i):
            weights, experts = _sorted_by_expert(output[1].detach(), output[2])
            put(f"{i}.router weights", weights)
            put(f"{i}.router experts", experts)
            put(f"{i}.router scores", gate.score_fn(output[0]).detach())

        watch._undo.append(layer.mlp.gate.register_forward_hook(routed).remove)
        watch.output(layer, f"{i}.streams")
    first = twin.model.layers[0]
    put_streams = lambda _, args, kwargs: put("embedding streams", args[0].detach())
    watch._undo.append(first.register_forward_pre_hook(put_streams, with_kwargs=True).remove)
    watch.output(twin.model.hc_head, "head collapse")
    watch.output(twin.model.norm, "final norm")
    try:
        yield watch
    finally:
        watch.close()


def is_per_entry(name: str) -> bool:
    """Whether the second axis is compressed entries, not tokens."""
    return name.endswith(("compressor.norm", "entries", "index keys"))


def _by_row(name: str, value: Tensor, num_rows: int) -> Tensor:
    """[R, ...] or [B, T, ...] -> [B, T, ...]."""
    num_tail = 2 if name.endswith(("streams", "comb", "query heads", "index queries")) else 1
    return value if value.ndim == 2 + num_tail else value.unflatten(0, (num_rows, -1))


def _fill_gaps(config, found: Found, num_rows: int, num_tokens: int) -> None:
    """NaN where our indexer did not run: a forward of at most k entries needs no scores."""
    widths = {"wq_b": config.index_n_heads * config.index_head_dim, "weights_proj": config.index_n_heads}
    for i, ratio in enumerate(config.compress_ratios):
        for leaf, width in widths.items() if ratio == CSA_RATIO else ():
            empty = torch.full((num_rows, num_tokens, width), float("nan"))
            found.setdefault(f"{i}.attn.indexer.{leaf}", empty)


def _recompose(config, found: Found) -> None:
    """What lies between our borders, from what passes them: normed heads, index queries, keys, scores.

    Whether attention uses them so is seen in its output. Entries and keys are kept where they were watched.
    """
    length = found["logits"].shape[1]
    frequencies = inverse_frequencies(config, is_compressed=True)
    for i, ratio in enumerate(config.compress_ratios):
        heads = found[f"{i}.attn.wq_b"].unflatten(-1, (config.num_attention_heads, -1))
        found[f"{i}.query heads"] = rms(heads, config.rms_norm_eps)
        if ratio == SLIDING:
            continue
        pooled = found[f"{i}.attn.compressor.norm"]
        start = torch.arange(pooled.shape[1]) * ratio
        found.setdefault(f"{i}.entries", rotate(pooled, rotations(start, frequencies)))
        if f"{i}.attn.indexer.compressor.norm" not in found:  # not CSA, or it attends to all
            continue
        query = found[f"{i}.attn.indexer.wq_b"].unflatten(-1, (config.index_n_heads, -1))
        query = rotate(query, rotations(torch.arange(length), frequencies)[:, None])
        keys = found[f"{i}.attn.indexer.compressor.norm"]
        keys = rotate(keys, rotations(start, frequencies))
        match = torch.einsum("bthc,bmc->bthm", query, keys).relu()
        weights = found[f"{i}.attn.indexer.weights_proj"]
        scale = (config.index_n_heads * config.index_head_dim) ** -0.5
        found[f"{i}.index queries"] = query
        found.setdefault(f"{i}.index keys", keys)
        found[f"{i}.index scores"] = torch.einsum("bthm,bth->btm", match, weights) * scale


@torch.no_grad()
def run_ours(model, tokens: Tensor, borders: list[int] | None = None) -> Found:
    """All intermediates and logits of our model: tokens [B, T] at once, or in chunks with a state.

    borders = ends of the chunks, the last one T; None = one forward without a state. Compressed entries
    after RoPE are watched in the latter only: in what form a state hands them over is its own affair.
    """
    num_rows, length = tokens.shape
    state = None if borders is None else DecodeState.allocate(model.config, num_rows, length)
    pieces: dict[str, list[Tensor]] = defaultdict(list)
    start = 0
    with watched_ours(model) as watch:
        for end in borders or [length]:
            watch.found.clear()
            # A trace keeps steps on the path whose parts can be watched.
            pieces["logits"].append(model(tokens[:, start:end], state=state, trace=Trace()))
            _fill_gaps(model.config, watch.found, num_rows, end - start)
            for name, value in watch.found.items():
                if name.endswith(("entries", "index keys")) and state is not None:
                    continue
                value = _by_row(name, value, num_rows)
                pieces[name].append(value if is_per_entry(name) else value[:, : end - start])
            start = end
    found = {name: torch.cat(values, dim=1) for name, values in pieces.items()}
    _recompose(model.config, found)
    return found


@torch.no_grad()
def run_theirs(twin, tokens: Tensor, borders: list[int] | None = None) -> Found:
    """The same of transformers' model, with its DynamicCache."""
    from transformers import DynamicCache

    num_rows, length = tokens.shape
    cache = None if borders is None else DynamicCache(config=twin.config)
    pieces: dict[str, list[Tensor]] = defaultdict(list)
    start = 0
    with watched_theirs(twin) as watch:
        for end in borders or [length]:
            watch.found.clear()
            output = twin(tokens[:, start:end], past_key_values=cache, use_cache=cache is not None)
            pieces["logits"].append(output.logits)
            for name, value in watch.found.items():
                if name.endswith("index keys") or (name.endswith("entries") and cache is not None):
                    pieces[name] = [value]  # all entries so far
                    continue
                value = _by_row(name, value, num_rows)
                if name.endswith(("index scores", "index picks")):  # one column an entry so far
                    value = nn.functional.pad(value, (0, length // CSA_RATIO - value.shape[-1]), value=-1)
                pieces[name].append(value)
            start = end
    return {name: torch.cat(values, dim=1) for name, values in pieces.items()}


def nasty_borders(config, length):
    """Ends of chunks on and around every size that matters: 4, 8, the window, 128, 256."""
    marks = {1, 2, 3, 4, 5, 7, 8, 9, 12}
    for size in (config.sliding_window, 128, 256):
        marks |= {size - 1, size, size + 1}
    return [*sorted(m for m in marks if m < length), length]


def random_borders(length, num_chunks, seed):
    return [*sorted(random.Random(seed).sample(range(1, length), num_chunks - 1)), length]


BORDERS = {
    "at once": lambda c, n: None,
    "one chunk": lambda c, n: [n],
    "chunks at every border": nasty_borders,
    "random chunks": lambda c, n: random_borders(n, 11, seed=c.hidden_size),
    "prompt, then token by token": lambda c, n: list(range(210, n + 1)),
    "token by token": lambda c, n: list(range(1, n + 1)),
}
