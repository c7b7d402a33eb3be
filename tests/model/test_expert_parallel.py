"""A model with its experts over ranks: it trains, decodes, is filled and put together as the whole one."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from consilience.conf.errors import ConfigError
from consilience.model.checkpoint import to_official
from consilience.model.config import TINY
from consilience.model.expert_exchange import Shard
from consilience.model.expert_parallel import (
    each_expert,
    load_own,
    official_tensors,
    shard_experts,
    sharded_names,
)
from consilience.model.forward_trace import Trace
from consilience.model.initialize import initialize
from consilience.model.ranks import ALONE, Ranks
from consilience.model.recompute import recompute_policy, set_recompute
from consilience.model.released_checkpoint import open_checkpoint
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer
from consilience.training.optimizers import gate_bias_names, update_gate_bias
from tests.rank_processes import on_ranks
from tests.ranks_table import keep

pytestmark = pytest.mark.row("experts over ranks: a model", "library")

torch.set_num_threads(1)

CONFIG = replace(TINY, vocab_size=53, num_nextn_predict_layers=1, mtp_compress_ratios=(0,), swiglu_limit=0.5)
POLICIES = ("none", "cheap", "block", "experts")
TOKENS = torch.randint(53, (4, 37), generator=torch.Generator().manual_seed(3))
# Packed samples and padding; the last rank has nothing else.
SEGMENTS = torch.tensor([[0] * 20 + [1] * 17, [0] * 30 + [-1] * 7, [0] * 5 + [1] * 5 + [-1] * 27, [-1] * 37])


def build():
    return initialize(Transformer(CONFIG), 0)


def losses(model, rows):
    """The loss of some rows in sum form, and the trace."""
    tokens, segments, trace = TOKENS[rows], SEGMENTS[rows], Trace(wants_losses=True)
    streams, layout = model.streams(tokens, segments, trace=trace)
    ahead = model.mtp_hidden(streams, tokens.roll(-1, 1), layout)[0]
    hidden = model.norm(model.hc_head(streams)).view(*tokens.shape, -1)
    is_read = (segments >= 0)[..., None]
    return ((hidden**2 + 0.3 * ahead**2) * is_read).sum() + 2 * sum(trace.balance_loss), trace


def bias_after(model, load):
    """Router biases by name after the rule's step."""
    for layer, name in gate_bias_names(model).items():
        update_gate_bias(model.get_parameter(name), load[layer])
    return {name: model.get_parameter(name).detach() for name in gate_bias_names(model).values()}


def train_on_each(ranks, expert_ranks, policies):
    """Loss, load, biases and whole gradients, each rank with a row of its own; the same on all ranks."""
    within, across = ranks.split(expert_ranks)
    found = {}
    for policy in policies:
        model = build()
        set_recompute(model, recompute_policy(policy))
        shard_experts(model, within, waves=2)
        loss, trace = losses(model, [ranks.rank])
        loss.backward()
        sharded, grads = sharded_names(model), {}
        load = dict(trace.expert_load)
        ranks.sum_([total := loss.detach()[None], *load.values()])
        for name, p in model.named_parameters():
            if p.grad is not None and name in sharded:
                across.sum_([p.grad])
                grads[name] = torch.stack(list(each_expert(p.grad, sharded[name])))
            elif p.grad is not None:
                ranks.sum_([p.grad])
                grads[name] = p.grad
        found[policy] = {"loss": total, "load": load, "grads": grads, "bias": bias_after(model, load)}
    return found


@pytest.mark.parametrize(
    ("size", "expert_ranks", "policies"),
    [
        pytest.param(2, 2, POLICIES, marks=pytest.mark.slow),
        pytest.param(4, 2, ("none",), marks=pytest.mark.slow),
    ],
)
def test_a_model_trains_as_in_one_process_under_every_policy(size, expert_ranks, policies, tmp_path):
    found = on_ranks(size, train_on_each, expert_ranks, policies, folder=tmp_path)
    model = build()
    loss, trace = losses(model, list(range(size)))
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bias = bias_after(model, trace.expert_load)
    for rank, results in enumerate(found):
        for result in results.values():
            torch.testing.assert_close(result["loss"][0], loss.detach(), rtol=1e-5, atol=0)
            assert (
                result["load"].keys() == trace.expert_load.keys() and result["grads"].keys() == grads.keys()
            )
            assert all(torch.equal(load, trace.expert_load[layer]) for layer, load in result["load"].items())
            assert all(torch.equal(value, bias[name]) for name, value in result["bias"].items())
            for name, expected in grads.items():
                error = (result["grads"][name] - expected).norm()
                assert error <= 1e-5 * expected.norm(), (name, rank, float(error))
                keep(error / expected.norm().clamp(min=1e-30))
            # What is saved and what is made again does not change a bit.
            first = next(iter(results.values()))
            assert all(torch.equal(grad, first["grads"][name]) for name, grad in result["grads"].items())


def live_on_each(ranks):
    """Hidden states of this rank's row, by steps of decoding and at once; the whole model's tensors."""
    model = build().eval()
    shard_experts(model, ranks)
    row = TOKENS[ranks.rank][None, :9]
    with torch.no_grad():
        at_once, state = model.hidden(row), DecodeState.allocate(CONFIG, 1, 9)
        steps = [model.hidden(row[:, t : t + 1], state=state) for t in range(9)]
    tensors = {name: tensor.clone() for name, tensor in official_tensors(model)}
    return at_once, torch.cat(steps, 1), tensors, list(to_official(model))


def test_a_split_model_decodes_and_is_put_together_as_the_whole_one(tmp_path):
    found, model = on_ranks(2, live_on_each, folder=tmp_path), build()
    whole = to_official(model)
    with torch.no_grad():
        hidden = model.hidden(TOKENS[:2, :9])
    own = []
    for rank, (at_once, steps, tensors, names) in enumerate(found):
        torch.testing.assert_close(at_once[0], hidden[rank], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(steps[0], hidden[rank], rtol=1e-5, atol=1e-5)
        assert list(tensors) == list(whole)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())
        own.append({name for name in names if ".ffn.experts." in name})
    assert not own[0] & own[1] and own[0] | own[1] == {name for name in whole if ".ffn.experts." in name}


def released_on_each(ranks, folder):
    """A model built on `meta` and filled with this rank's part of a released checkpoint."""
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        model = Transformer(checkpoint.config, torch.bfloat16)
    shard_experts(model, ranks)
    load_own(model, checkpoint)
    return {name: tensor.clone() for name, tensor in official_tensors(model)}


@pytest.mark.slow
def test_a_rank_reads_its_experts_of_a_released_checkpoint(tmp_path):
    from synthetic_release import write_official  # brings transformers, which the ranks do without

    checkpoint = open_checkpoint(folder := write_official(tmp_path / "released"))
    found = on_ranks(2, released_on_each, folder, folder=tmp_path)
    model = Transformer(checkpoint.config, torch.bfloat16)
    load_own(model, checkpoint)
    for name, expected in to_official(model).items():
        assert all(torch.equal(each[name], expected) for each in found), name


@dataclass(frozen=True)
class Counting(Ranks):
    """One rank that notes what it starts to exchange."""

    sizes: list[int] = field(default_factory=list)

    def start_exchange(self, found, given, found_rows, given_rows):
        self.sizes.append(sum(given_rows))
        return super().start_exchange(found, given, found_rows, given_rows)


@pytest.mark.parametrize(("policy", "runs"), [("none", 1), ("cheap", 1), ("block", 2), ("experts", 2)])
def test_what_a_policy_saves_is_not_exchanged_again_and_no_bit_changes(policy, runs):
    whole, model, ranks = build(), build(), Counting()
    losses(whole, [0, 1])[0].backward()
    for block in (*model.layers, *model.mtp):
        block.ffn.experts.shard = Shard(ranks, CONFIG.n_routed_experts, num_waves=3)
    set_recompute(model, recompute_policy(policy))
    loss, _ = losses(model, [0, 1])
    # Rows and weights go out, outputs come home: three exchanges a wave, and as many in the backward.
    assert len(ranks.sizes) == (num_exchanges := 4 * 3 * 3)
    loss.backward()
    assert len(ranks.sizes) == (runs + 1) * num_exchanges
    assert sum(ranks.sizes[:9]) == 3 * 2 * 37 * CONFIG.num_experts_per_tok
    for name, p in whole.named_parameters():
        grad = model.get_parameter(name).grad
        assert grad is None if p.grad is None else torch.equal(grad, p.grad), name


def test_one_rank_keeps_the_model_as_it_is():
    model = build()
    shard_experts(model, ALONE)
    assert not sharded_names(model) and len(model.layers[0].ffn.experts.w1) == CONFIG.n_routed_experts


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match=r"8 experts cannot be split over 9 ranks; take at most 8"):
        shard_experts(build(), Ranks(0, 9))
    with pytest.raises(ConfigError, match="waves of experts: found 0"):
        shard_experts(build(), Ranks(0, 2), waves=0)
    model = build()
    shard_experts(model, Ranks(1, 2), waves=99)
    shards = sharded_names(model)
    assert {shard.num_waves for shard in shards.values()} == {4}  # no more than there are experts on a rank
    assert set(shards) == {name for name, _ in model.named_parameters() if ".ffn.experts." in name}
    with pytest.raises(ConfigError, match="split over ranks already"):
        shard_experts(model, Ranks(1, 2))
