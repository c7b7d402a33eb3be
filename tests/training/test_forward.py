"""Hidden states at loss positions are those of each sample run alone, with its values beside them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from consilience.model.config import TINY
from consilience.model.context_parallel import context_parallel
from consilience.model.forward_trace import Trace
from consilience.model.initialize import initialize
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.model.ranks import ALONE, Ranks
from consilience.model.transformer import Transformer
from consilience.training.anticipatory_routing import look_up_choices, routings
from consilience.training.forward import hidden_at_loss, mtp_loss, own_piece, sample_order
from consilience.training.packing import pack, split_micro_batches
from tests.rank_processes import on_ranks

pytestmark = pytest.mark.row("rows cut over ranks: losses", "library")

torch.set_num_threads(1)

CONFIG = replace(
    TINY,
    hidden_size=32,
    vocab_size=50,
    n_routed_experts=4,
    num_hidden_layers=4,
    compress_ratios=(0, 4, 16, 4),
)
MODEL = initialize(Transformer(CONFIG), 0).requires_grad_(False)
LENGTHS = (21, 40, 3, 9, 33, 1)


@pytest.fixture(scope="module")
def samples():
    """token_ids, loss_mask (first third is prompt; sample 3 has no loss at all) and log-probs."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 50, n) for n in LENGTHS]
    masks = [(np.arange(n) >= n // 3).astype(np.float32) * (i + 1) for i, n in enumerate(LENGTHS)]
    masks[3][:] = 0
    return ids, masks, [rng.normal(size=n).astype(np.float32) for n in LENGTHS]


def test_every_loss_position_has_the_hidden_state_target_weight_and_values_of_its_sample(samples):
    ids, masks, logprobs = samples
    packed = pack(ids, masks, {"logprobs": logprobs}, quantum=8, max_row_tokens=48)
    found = hidden_at_loss(MODEL, packed)
    expected = []
    for s in [s for row in range(len(packed.token_ids)) for s in by_start(packed, row)]:
        alone = MODEL.hidden(torch.from_numpy(ids[s])[None])[0]
        for t in range(1, len(ids[s])):
            if masks[s][t] > 0:
                expected.append((s, ids[s][t], masks[s][t], logprobs[s][t], alone[t - 1]))
    assert found.sample_index.tolist() == [e[0] for e in expected]
    assert found.target_ids.tolist() == [e[1] for e in expected]
    assert found.weight.tolist() == [e[2] for e in expected] and found.weight.dtype == torch.float32
    torch.testing.assert_close(found.arrays["logprobs"], torch.tensor([e[3] for e in expected]))
    # fp32, other matrix shapes: rounding only.
    torch.testing.assert_close(found.hidden, torch.stack([e[4] for e in expected]), rtol=0, atol=1e-5)
    assert len(expected) == packed.num_loss_tokens


def by_start(packed, row):
    """Samples of a row from left to right."""
    return sorted(np.flatnonzero(packed.rows == row).tolist(), key=lambda s: packed.starts[s])


def test_micro_batches_give_the_same_positions_as_the_whole(samples):
    ids, masks, logprobs = samples
    packed = pack(ids, masks, {"logprobs": logprobs}, quantum=8, max_row_tokens=48)
    assert len(packed.token_ids) > 2
    whole = hidden_at_loss(MODEL, packed)
    parts = [hidden_at_loss(MODEL, m) for m in split_micro_batches(packed, packed.token_ids.shape[1])]
    assert len(parts) == len(packed.token_ids)
    for name in ("target_ids", "weight", "sample_index"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    torch.testing.assert_close(torch.cat([p.hidden for p in parts]), whole.hidden, rtol=0, atol=1e-5)


def test_sample_order_lists_each_sample_once_as_it_appears_and_none_without_a_loss(samples):
    ids, masks, _ = samples
    packed = pack(ids, masks, quantum=8, max_row_tokens=120)
    order = sample_order(hidden_at_loss(MODEL, packed))
    expected = [s for row in range(len(packed.token_ids)) for s in by_start(packed, row)]
    assert order == [
        s for s in expected if s not in (3, 5)
    ]  # 3 has no loss, 5 one token that nothing predicts


def test_gradients_reach_the_parameters_through_the_chosen_positions(samples):
    ids, masks, _ = samples
    model = initialize(Transformer(CONFIG), 0)
    found = hidden_at_loss(model, pack(ids, masks, quantum=8, max_row_tokens=48))
    (found.hidden.sum(1) * found.weight).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("wq_a.weight"))


def test_a_trace_is_filled_by_the_tokens_that_are_no_padding(samples):
    ids, masks, _ = samples
    trace = Trace()
    hidden_at_loss(MODEL, pack(ids, masks, quantum=8, max_row_tokens=48), trace)
    assert int(trace.expert_load[0].sum()) == sum(LENGTHS) * CONFIG.num_experts_per_tok
    assert trace.csa_visible == 2 * sum((t + 1) // 4 for n in LENGTHS for t in range(n))


def test_rows_without_any_loss_give_no_position():
    packed = pack([np.array([1, 2, 3])], [np.zeros(3)], quantum=4, max_row_tokens=4)
    found = hidden_at_loss(MODEL, packed)
    assert found.hidden.shape == (0, 32) and found.target_ids.numel() == 0 and sample_order(found) == []


# ---- prediction blocks ----

TWO_BLOCKS = replace(CONFIG, num_nextn_predict_layers=2, mtp_compress_ratios=(0, 4))
AHEAD = initialize(Transformer(TWO_BLOCKS), 0)


def test_targets_of_the_blocks_worked_by_hand():
    """Token 7 is predicted from 5 and 6 by the trunk, from 5 (with 6) by block 1; 8 from 5 by block 2."""
    ids, weights = [[5, 6, 7, 8], [9, 10], [11]], [[0, 0, 1, 0.5], [0, 1], [1]]
    packed = pack(ids, weights, quantum=8, max_row_tokens=8)
    assert packed.token_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 0]]
    with torch.no_grad():
        found = hidden_at_loss(AHEAD, packed, wants_mtp=True)
        streams, layout = AHEAD.streams(torch.tensor([ids[0]]))
        first, second = AHEAD.mtp_hidden(streams, torch.tensor([[6, 7, 8, 0]]), layout)
        by_hand = torch.tensor(0.0)
        for block, expected in zip(found.ahead, ([(0, 7, 1.0), (1, 8, 0.5)], [(0, 8, 0.5)]), strict=True):
            own = first if block is found.ahead[0] else second
            assert block.target_ids.tolist() == [target for _, target, _ in expected]
            assert block.weight.tolist() == [weight for _, _, weight in expected]
            for hidden, (t, target, weight) in zip(block.hidden, expected):
                torch.testing.assert_close(hidden, own[0, t], rtol=0, atol=1e-5)  # fp32, other shapes
                by_hand -= weight * torch.log_softmax(AHEAD.head(own[0, t]), -1)[target]
        loss = mtp_loss(found, AHEAD.head.weight)
    assert float(loss) == pytest.approx(float(by_hand) / 2, rel=1e-5)  # the mean over two blocks


def test_the_blocks_loss_of_packed_rows_is_that_of_the_samples_alone(samples):
    ids, masks, _ = samples
    packed = pack(ids, masks, quantum=8, max_row_tokens=48)
    model = initialize(Transformer(TWO_BLOCKS), 0).double()
    found = hidden_at_loss(model, packed, wants_mtp=True)
    alone = [pack([i], [m], quantum=1, max_row_tokens=48) for i, m in zip(ids, masks)]
    singles = [hidden_at_loss(model, one, wants_mtp=True) for one in alone]
    head = model.head.weight
    expected = sum(mtp_loss(one, head).item() for one in singles)
    assert mtp_loss(found, head).item() == pytest.approx(expected, rel=1e-12)
    counts = [sum(len(one.ahead[depth].weight) for one in singles) for depth in (0, 1)]
    assert [len(block.weight) for block in found.ahead] == counts
    # Samples 0, 1, 2 and 4 have a loss on all but their first third; token 1 is out of block 1's reach, …
    lasts = [[n - max(n // 3, depth + 2) for n in (21, 40, 3, 33)] for depth in (0, 1)]
    assert counts == [sum(row) for row in lasts]
    gradients = [torch.autograd.grad(mtp_loss(found, head), p)[0] for p in (model.embed.weight, head)]
    total = sum((mtp_loss(one, head) for one in singles), torch.zeros((), dtype=torch.float64))
    for ours, theirs in zip(gradients, torch.autograd.grad(total, (model.embed.weight, head))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_a_detached_loss_leaves_every_gradient_of_the_trunk_as_it_was_to_the_bit(samples):
    ids, masks, _ = samples
    packed = pack(ids, masks, quantum=8, max_row_tokens=48)
    runs = {}
    for weight in (0.0, 5.0):
        AHEAD.zero_grad()
        at = hidden_at_loss(AHEAD, packed, wants_mtp=True, is_detached=True)
        (at.hidden.sum() + weight * mtp_loss(at, AHEAD.head.weight.detach())).backward()
        runs[weight] = {n: p.grad.clone() for n, p in AHEAD.named_parameters() if p.grad is not None}
    assert all(torch.equal(g, runs[5.0][n]) for n, g in runs[0.0].items() if not n.startswith("mtp."))
    changed = {n for n, g in runs[5.0].items() if n.startswith("mtp.") and g.any()}
    assert {"mtp.0.e_proj.weight", "mtp.1.h_proj.weight", "mtp.1.hc_head.fn"} <= changed
    AHEAD.zero_grad()


def test_without_blocks_or_unasked_nothing_is_found_and_nothing_computed(samples):
    ids, masks, _ = samples
    packed = pack(ids, masks, quantum=8, max_row_tokens=48)
    assert hidden_at_loss(MODEL, packed, wants_mtp=True).ahead == ()
    traces = [Trace(), Trace()]
    for trace, wants_mtp in zip(traces, (False, True)):
        with torch.no_grad():
            hidden_at_loss(AHEAD, packed, trace, wants_mtp=wants_mtp)
    assert [sorted(trace.expert_load) for trace in traces] == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_a_rank_has_its_tokens_of_rows_and_the_numbers_of_the_whole(samples):
    ids, masks, logprobs = samples
    packed = pack(ids, masks, {"logprobs": logprobs}, quantum=8, max_row_tokens=48)
    parts = []
    for rank in range(2):
        with context_parallel(Ranks(rank, 2), (0, 11, packed.token_ids.shape[1])):
            parts.append(own_piece(packed))
    for name in ("token_ids", "segment_ids", "position_ids", "target_ids", "loss_mask", "sample_index"):
        whole = getattr(packed, name)
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts], axis=1), whole), name
    assert parts[0].token_ids.shape[1] == parts[0].arrays["logprobs"].shape[1] == 11
    assert sum(part.num_loss_tokens for part in parts) == packed.num_loss_tokens
    assert np.array_equal(own_piece(packed).token_ids, packed.token_ids) and parts[0].rows is packed.rows


def losses(ranks, ids, masks, borders):
    """A step's losses on the routing of other weights, at this rank's positions, with gradients."""
    model = initialize(Transformer(AHEAD.config), 5).double()
    packed = pack(ids, masks, {"index": [np.arange(len(x)) for x in ids]}, quantum=64, max_row_tokens=128)
    with context_parallel(ranks, borders):
        other = initialize(Transformer(AHEAD.config), 6).double()
        (routing,) = routings(look_up_choices(other, [packed]), [packed])
        trace = Trace(wants_losses=True)
        at = hidden_at_loss(model, packed, trace, routing, wants_mtp=True)
        logprob = linear_logprob(at.hidden, model.head.weight, at.target_ids).logprob
        terms = [-(logprob * at.weight).sum(), mtp_loss(at, model.head.weight), trace.summed_indexer_loss()]
        loss = torch.stack([*terms, torch.stack(trace.balance_loss).sum()])
        loss.sum().backward()
    places = [(s, int(t), w) for s, t, w in zip(at.sample_index, at.arrays["index"], at.weight)]
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), sorted(places), [len(block.weight) for block in at.ahead], grads


@pytest.mark.slow
@pytest.mark.parametrize("borders", [(0, 40, 128), (0, 1, 128), (0, 123, 128)])
def test_losses_of_rows_that_are_cut_add_up_to_those_of_one_rank(borders, samples, tmp_path):
    """The last cut leaves a rank padding alone, the second but one a token."""
    ids, masks, _ = samples
    loss, places, counts, grads = losses(ALONE, ids, masks, None)
    found = on_ranks(2, losses, ids, masks, borders, folder=tmp_path)
    # fp64: sums in another order.
    torch.testing.assert_close(sum(rank[0] for rank in found), loss, rtol=1e-10, atol=0)
    assert sorted(place for rank in found for place in rank[1]) == places
    assert (borders[1] == 123) == (not found[1][1])
    assert [sum(n) for n in zip(*(rank[2] for rank in found))] == counts
    for name, grad in grads.items():
        parts = [rank[3][name] for rank in found if rank[3][name] is not None]
        assert (grad is None) == (not parts), name
        if grad is not None:
            assert (sum(parts) - grad).norm() <= 1e-10 * grad.norm(), name
