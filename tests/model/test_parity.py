"""Our model against transformers' deepseek_v4 in fp32: every intermediate, logits, gradients.

Agreement is to 1e-5 of a tensor's largest magnitude (gradients: 1e-4 of their norm), the bound set for
this model: fp32 rounds by 6e-8, and sums of up to 300 terms in different orders, norms, softmaxes and four
layers of mHC multiply that by up to about 100. Where a top-k choice hangs on less than that, two correct
programs may choose differently: `Bounds` leaves out what such a choice can reach. So it is with the gradient
where an expert's clamp begins (of the forward it is a corner only): rows with such a clamp are not used.
"""

from dataclasses import astuple, dataclass, replace

import pytest
import torch
from intermediates import BORDERS, is_per_entry, run_ours, run_theirs
from torch import Tensor, nn
from transformers_oracle import hf_gradients, hf_twin, take_lowest_of_equals

from consilience.model.config import CSA_RATIO, TINY
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer

torch.set_num_threads(1)

TOLERANCE = 1e-5
LENGTH = 301  # past 2·128, past 4·index_topk of every config below, and no multiple of anything

CONFIGS = {
    "the demo's tiny": TINY,
    "wide heads, pro's start": replace(
        TINY,
        vocab_size=97,
        hidden_size=72,
        num_hidden_layers=4,
        num_attention_heads=6,
        head_dim=64,
        qk_rope_head_dim=32,
        q_lora_rank=44,
        o_groups=3,
        o_lora_rank=28,
        sliding_window=24,
        compress_ratios=(128, 4, 0, 4),
        index_n_heads=16,
        index_head_dim=48,
        index_topk=16,
        n_routed_experts=10,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        num_hash_layers=2,
        routed_scaling_factor=2.5,
        rope_theta=100.0,
        compress_rope_theta=900.0,
        rope_original_length=256,
    ),
    "flash's start, six streams": replace(
        TINY,
        vocab_size=61,
        hidden_size=40,
        num_hidden_layers=5,
        num_attention_heads=8,
        head_dim=80,
        qk_rope_head_dim=16,
        q_lora_rank=36,
        o_groups=4,
        o_lora_rank=20,
        sliding_window=9,
        compress_ratios=(0, 0, 4, 128, 4),
        index_n_heads=24,
        index_head_dim=52,
        index_topk=7,
        n_routed_experts=12,
        num_experts_per_tok=4,
        moe_intermediate_size=28,
        num_hash_layers=3,
        hc_mult=6,
        hc_sinkhorn_iters=7,
        routed_scaling_factor=1.0,
        swiglu_limit=2.5,  # clamps one value in 80; at 0.5 every row has some thirty that hang on rounding
        rope_theta=30.0,
        compress_rope_theta=300.0,
        rope_original_length=128,
        rope_factor=4.0,
    ),
}


# Every token a forward of its own is slow on both sides: from the first token on for one config.
CASES = [(c, b) for c in CONFIGS for b in BORDERS if b != "token by token" or c == "the demo's tiny"]


def visible(num_tokens, num_entries):
    """bool [T, M]: entry i of 4 tokens is finished at token t."""
    return torch.arange(num_entries) < ((torch.arange(num_tokens) + 1) // CSA_RATIO)[:, None]


def ambiguous(scores, is_visible, k, margin=1):
    """Queries whose k-th best visible score lies nearer than the tolerance to one that is not chosen.

    Exact ties are not among them, they go to the lowest index. scores [B, T, M], is_visible [T, M] or
    [B, T, M] -> bool [B, T].
    """
    if scores.shape[-1] <= k:
        return torch.zeros(scores.shape[:2], dtype=torch.bool)
    ranked = scores.masked_fill(~is_visible, float("-inf")).sort(-1, descending=True).values
    last, best_left = ranked[..., k - 1 : k], ranked[..., k : k + 1]
    is_finite = scores.isfinite()
    near = (scores - last).abs() < margin * TOLERANCE * scores[is_finite].abs().max()
    tied_or_one = torch.where(last == best_left, scores != last, scores < last)
    return (near & tied_or_one & is_visible).any(-1) & is_visible.sum(-1).gt(k)


class Bounds:
    """Row b is compared up to token first[b]; a choice that hangs on rounding lowers it from its layer on."""

    def __init__(self, num_rows, length):
        self.first = torch.full((num_rows,), length)
        self.num_ambiguous = 0

    def add(self, is_ambiguous):
        """is_ambiguous bool [B, T]; those at or past the bound may follow from an earlier one."""
        steps = torch.arange(is_ambiguous.shape[1])
        fresh = is_ambiguous & (steps < self.first[:, None])
        self.num_ambiguous += int(fresh.sum())
        self.first = torch.where(fresh, steps, self.first[:, None]).amin(1)

    def keep(self, num, ratio=1):
        """bool [B, num]: the tokens, or entries of `ratio` tokens each, that precede the bound."""
        return (torch.arange(num) + 1) * ratio <= self.first[:, None]


BEFORE_PICKS = [
    *("hc_attn layer input", "hc_attn post", "hc_attn comb", "attn_norm"),
    *("attn.wq_a", "attn.q_norm", "attn.wq_b", "query heads", "attn.wkv", "attn.kv_norm"),
    *("attn.compressor.norm", "entries", "attn.indexer.compressor.norm", "index keys"),
    *("attn.indexer.wq_b", "index queries", "attn.indexer.weights_proj"),
]
BEFORE_ROUTING = ["attn", "hc_ffn layer input", "hc_ffn post", "hc_ffn comb", "ffn_norm", "router scores"]
AFTER_ROUTING = ["router experts", "router weights", "ffn.experts", "ffn.shared_experts", "ffn", "streams"]


def close(name, ours, theirs):
    assert ours.shape == theirs.shape, name
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max()
    assert error <= TOLERANCE, f"{name}: {error:.1e}"


class Comparison:
    """Intermediates in the order of the forward, each where no ambiguous choice has reached it yet."""

    def __init__(self, model, ours, theirs):
        self.model, self.config, self.ours, self.theirs = model, model.config, ours, theirs
        self.bounds = Bounds(*theirs["logits"].shape[:2])
        self.compared = set()

    def check(self, name, ratio=1):
        if name not in self.theirs:
            assert name not in self.ours, name
            return
        self.compared.add(name)
        keep = self.bounds.keep(self.theirs[name].shape[1], ratio if is_per_entry(name) else 1)
        ours, theirs = self.ours[name][keep], self.theirs[name][keep]
        is_there = ~ours.flatten(1).isnan().any(1)
        assert is_there.all() or "index" in name
        close(name, ours[is_there], theirs[is_there])

    def check_index_scores(self, layer):
        """Also lowers the bounds where a pick is ambiguous by either side's scores."""
        name, topk = f"{layer}.index scores", self.config.index_topk
        ours, theirs = self.ours[name], self.theirs[name]
        self.compared |= {name, f"{layer}.index picks"}
        num_tokens, num_entries = theirs.shape[1:]
        is_visible = visible(num_tokens, num_entries)
        has_run = ~ours.isnan().any(-1)
        assert has_run[:, CSA_RATIO * (topk + 1) - 1 :].all()  # from there on something is left out
        shared = is_visible & (has_run & self.bounds.keep(num_tokens))[..., None]
        close(name, ours[shared], theirs[shared])
        for scores in (ours.nan_to_num(), theirs):
            self.bounds.add(ambiguous(scores, is_visible & has_run[..., None], topk))

    def check_routing(self, layer):
        if layer >= self.config.num_hash_layers:
            bias = self.model.layers[layer].ffn.gate.bias.detach()
            for side in (self.ours, self.theirs):
                scores = side[f"{layer}.router scores"] + bias
                every = torch.ones_like(scores, dtype=torch.bool)
                self.bounds.add(ambiguous(scores, every, self.config.num_experts_per_tok))

    def run(self):
        self.check("embedding streams")
        for layer, ratio in enumerate(self.config.compress_ratios):
            for name in BEFORE_PICKS:
                self.check(f"{layer}.{name}", ratio)
            if ratio == CSA_RATIO:
                self.check_index_scores(layer)
            for name in BEFORE_ROUTING:
                self.check(f"{layer}.{name}")
            self.check_routing(layer)
            for name in AFTER_ROUTING:
                self.check(f"{layer}.{name}")
        for name in ("head collapse", "final norm", "logits"):
            self.check(name)
        assert self.compared == set(self.theirs)
        return self.bounds


MARGIN = 1.2  # what is watched in one run may round otherwise in the run that is compared


def near_limit(gate, up, limit, margin=1):
    """Values [B, ...] of each row [B] nearer than the tolerance to where their clamp begins."""
    near = [(x - limit).abs() < margin * TOLERANCE * x.abs().max() for x in (gate, up.abs())]
    return sum(n.flatten(1).sum(1) for n in near)


def ambiguous_clamps(model, found):
    """Clamps of chosen and shared experts that may hang on rounding, by row [B]; all; those that act."""
    count, num_clamps, num_active, limit = 0, 0, 0, model.config.swiglu_limit
    for layer, block in enumerate(model.layers):
        x, ffn = found[f"{layer}.ffn_norm"], block.ffn
        rows = torch.arange(len(x))[:, None, None], torch.arange(x.shape[1])[:, None]
        chosen = (*rows, found[f"{layer}.router experts"])
        w1, w3 = ffn.experts.w1.detach(), ffn.experts.w3.detach()
        routed = [torch.einsum("btd,eid->btei", x, w)[chosen] for w in (w1, w3)]
        shared = [x @ w.weight.detach().T for w in (ffn.shared_experts.w1, ffn.shared_experts.w3)]
        for gate, up in (routed, shared):
            count = count + near_limit(gate, up, limit, MARGIN)
            num_clamps += 2 * gate.numel()
            num_active += int((gate > limit).sum() + (up.abs() > limit).sum())
    return count, num_clamps, num_active


def ambiguous_choices(model, found):
    """How many choices of each row [B], in all layers together, are ambiguous or nearly so."""
    config, count = model.config, 0
    num_tokens = found["logits"].shape[1]
    for layer, ratio in enumerate(config.compress_ratios):
        if ratio == CSA_RATIO:
            scores = found[f"{layer}.index scores"]
            count = count + ambiguous(scores, visible(*scores.shape[1:]), config.index_topk, MARGIN).sum(1)
        if layer >= config.num_hash_layers:
            scores = found[f"{layer}.router scores"] + model.layers[layer].ffn.gate.bias.detach()
            every = torch.ones(num_tokens, config.n_routed_experts, dtype=torch.bool)
            count = count + ambiguous(scores, every, config.num_experts_per_tok, MARGIN).sum(1)
    return count


@dataclass(frozen=True)
class Case:
    """A model, its twin, and two rows of tokens in which no choice and no clamp hangs on rounding."""

    model: Transformer
    twin: nn.Module
    tokens: Tensor


@pytest.fixture(scope="module")
def case():
    """case(name, rough_model) -> Case, made once.

    Candidates are random rows; the twin's scores say which have an ambiguous choice, its expert inputs which
    have a clamp that begins there. Such are few of all, or the comparison would say little: that is asserted.
    """
    made = {}

    def build(name, rough_model):
        if name not in made:
            model = rough_model(CONFIGS[name], seed=24)
            twin = hf_twin(model)
            take_lowest_of_equals(twin)
            g = torch.Generator().manual_seed(1)
            clear, totals = [], torch.zeros(5, dtype=torch.long)
            while len(clear) < 2:
                rows = torch.randint(model.config.vocab_size, (6, LENGTH), generator=g)
                found = run_theirs(twin, rows)
                choices = ambiguous_choices(model, found)
                clamps, *numbers = ambiguous_clamps(model, found)
                clear += rows[(choices == 0) & (clamps == 0)]
                totals += torch.tensor([int(choices.sum()), rows.numel(), int(clamps.sum()), *numbers])
                # A value is as near with a probability of 2.4e-5 · the largest value · its density there.
                assert totals[0] <= 0.01 * totals[1] and totals[2] <= 2e-5 * totals[3]
            if model.config.swiglu_limit < TINY.swiglu_limit:
                assert totals[4] > 0.01 * totals[3]
            made[name] = Case(model, twin, torch.stack(clear[:2]))
            left = "{} choices in {} tokens and {} clamps in {}, {} active".format(*totals.tolist())
            print(f"{name}: left out {left}")  # shown by pytest -s
        return made[name]

    return build


@pytest.mark.parametrize(("name", "chunks"), CASES)
def test_every_intermediate_equals_transformers(name, chunks, case, rough_model):
    model, twin, tokens = astuple(case(name, rough_model))
    borders = BORDERS[chunks](model.config, LENGTH)
    ours, theirs = run_ours(model, tokens, borders), run_theirs(twin, tokens, borders)
    bounds = Comparison(model, ours, theirs).run()
    assert bounds.num_ambiguous == 0 and bounds.first.tolist() == [LENGTH] * 2
    if borders is not None:  # nothing watched: steps go through the compiled kernels
        state = DecodeState.allocate(model.config, *tokens.shape)
        edges = zip([0, *borders], borders)
        with torch.no_grad():
            logits = torch.cat([model(tokens[:, a:b], state=state) for a, b in edges], dim=1)
        close("logits", logits, theirs["logits"])


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_transformers_and_no_indexer_has_any(name, case, rough_model):
    model, twin, tokens = astuple(case(name, rough_model))
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(*tokens.shape, model.config.vocab_size, generator=g)
    for side in (model, twin):
        side.zero_grad()
    (model(tokens) * weight).sum().backward()
    (twin(tokens, use_cache=False).logits * weight).sum().backward()
    without = set()
    for name, theirs in hf_gradients(model, twin).items():
        ours = model.get_parameter(name).grad
        if theirs is None:
            assert ours is None, name
            without.add(name)
        else:
            assert theirs.any() and (ours - theirs).norm() <= 1e-4 * theirs.norm(), name
    names = dict(model.named_parameters())
    assert without == {n for n in names if ".indexer." in n or n.endswith(".gate.bias")}
    assert len([n for n in without if ".indexer." in n]) == 6 * model.config.compress_ratios.count(CSA_RATIO)


def entries_and_output(model, tokens, layer):
    """A layer's compressed entries [B, M, C] and attention output [B, T, D], in one graph."""
    kept = {}
    attention = model.layers[layer].attn
    hooks = [
        module.register_forward_hook(lambda module, _, output: kept.__setitem__(module, output))
        for module in (attention.compressor, attention)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return kept[attention.compressor], kept[attention]


@pytest.mark.parametrize("name", CONFIGS)
def test_queries_attend_to_the_entries_that_transformers_picks(name, case, rough_model):
    """Read off at the borders: attention's output has a gradient by the entries it used and by no others."""
    model, twin, tokens = astuple(case(name, rough_model))
    found = run_theirs(twin, tokens)
    for layer in [i for i, ratio in enumerate(model.config.compress_ratios) if ratio == CSA_RATIO]:
        picks = found[f"{layer}.index picks"]
        entries, output = entries_and_output(model, tokens, layer)
        for t in [*range(0, 40, 3), *range(40, LENGTH, 7), LENGTH - 1]:
            probe = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(t))
            (slope,) = torch.autograd.grad((output[:, t] @ probe).sum(), entries, retain_graph=True)
            for row in range(2):
                theirs = set(picks[row, t].tolist()) - {-1}
                assert set(slope[row].any(-1).nonzero()[:, 0].tolist()) == theirs, (layer, t)


def test_clamps_that_hang_on_rounding_by_hand():
    gate = torch.tensor([[2.0, -2.0, 4.0], [2 + 3e-5, 2 - 3e-5, 1.0], [-2.0, 2 + 5e-5, 2 - 5e-5]])
    up = torch.tensor([[1.0, -1.0, 0.0], [2.0, -2 - 9e-6, 0.0], [2 + 2e-5, -2 + 2e-5, 1.9]])
    # The largest gate is 4, the largest up 2: nearer than 4e-5 and 2e-5; a gate of -2 is not clamped.
    assert near_limit(gate, up, 2.0).tolist() == [1, 2 + 2, 0]
    assert near_limit(gate, up, 2.0, 1.3).tolist() == [1, 2 + 2, 2 + 2]


def test_ambiguous_choices_by_hand():
    none = float("-inf")
    scores = torch.tensor(
        [
            [4.0, 3.0, 2.0, 1.0],  # k = 2: clear
            [4.0, 3.0, 3.0 - 1e-6, 1.0],  # the third might be the second
            [3.0, 3.0 - 1e-6, 2.0, 1.0],  # both are chosen
            [4.0, 2.0, 2.0, 1.0],  # an exact tie goes to the lower index
            [4.0, 2.0, 2.0, 2.0 - 1e-6],  # a tie that rounding might break
            [4.0, 3.0, 3.0, none],  # what is not visible is no rival
            [4.0, 3.0, none, none],  # no more than k
        ]
    )
    found = ambiguous(scores[None], scores[None] > none, 2)
    assert found[0].tolist() == [False, True, False, False, True, False, False]
    bounds = Bounds(2, 7)
    bounds.add(torch.stack((found[0], found[0] & (torch.arange(7) == 4))))
    assert bounds.first.tolist() == [1, 4] and bounds.num_ambiguous == 3
    bounds.add(torch.tensor([[False] * 3 + [True] * 4] * 2))  # past row 0's bound, not past row 1's
    assert bounds.first.tolist() == [1, 3] and bounds.num_ambiguous == 4
    assert bounds.keep(7).sum(1).tolist() == [1, 3] and bounds.keep(3, 2).sum(1).tolist() == [0, 1]
