"""Log-probabilities over recorded sets: one token by hand, the dense formula and its gradients in fp64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.grpo import kept_replay
from consilience.grpo.kept_replay import KeptReplay
from consilience.grpo.mini_batch import known_mask, pack_records
from consilience.rollout.kept_sets import KeptSets
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.training.packing import split_micro_batches

torch.set_num_threads(1)

VOCAB = 12


def record(uid, tokens, sets, mask=None):
    n = len(tokens)
    return RolloutRecord(
        uid, "g", "math", "chat", None, (3, 9), tuple(tokens), (-0.5,) * n, tuple(mask or (1,) * n), (0,) * n,
        FinishReason.STOP, Outcome(OutcomeKind.GRADED), 1.0, kept=KeptSets.of(sets),
    )  # fmt: skip


def drawn(count, seed):
    """Tokens and sets that hold them; every third token is an observation without a set."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCAB, size=count).tolist()
    sets = [np.union1d(rng.permutation(VOCAB)[: rng.integers(1, VOCAB)], [t]) for t in tokens]
    mask = [int(i % 3 != 2) for i in range(count)]
    return record(f"r{seed}", tokens, [s if m else None for s, m in zip(sets, mask)], mask)


def test_one_token_by_hand():
    """Logits 1, 2, 3 of which the first and the last are kept: 3 − log(e + e³)."""
    packed = pack_records([record("a", [2], [np.array([0, 2])])], [1.0], 32)
    head = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    replay = KeptReplay([record("a", [2], [np.array([0, 2])])])
    found = replay.logprob(torch.ones(1, 1, dtype=torch.float64), head, torch.tensor([2]), packed, 1.0)
    assert found.tolist() == pytest.approx([3 - np.log(np.e + np.e**3)])


@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_masked_softmax(monkeypatch, chunk, temperature):
    monkeypatch.setattr(kept_replay, "CHUNK_TOKENS", chunk)
    records = [drawn(n, seed) for seed, n in enumerate((7, 30, 4, 11))]
    packed = pack_records(records, [1.0] * 4, 32)
    replay = KeptReplay(records)
    g = torch.Generator().manual_seed(0)
    head = torch.randn(VOCAB, 5, generator=g, dtype=torch.float64).requires_grad_()
    twin = head.detach().clone().requires_grad_()
    num_found = 0
    for micro in split_micro_batches(packed, 32):
        where = micro.loss_mask.reshape(-1) > 0
        hidden = torch.randn(where.sum(), 5, generator=g, dtype=torch.float64).requires_grad_()
        wide = hidden.detach().clone().requires_grad_()
        targets = torch.from_numpy(micro.target_ids.reshape(-1)[where])
        found = replay.logprob(hidden, head, targets, micro, temperature)
        samples, places = micro.sample_index.reshape(-1)[where], micro.position_ids.reshape(-1)[where]
        expected = []
        for row, (s, t) in enumerate(zip(samples, places)):
            kept, at = records[s].kept, t + 1 - 2  # behind the prompt of two
            first = int(kept.num_ids()[:at].sum())
            ids = kept.token_ids()[first : first + kept.num_ids()[at]]
            z = wide[row] @ twin[ids].t() / temperature
            expected.append(z[list(ids).index(int(targets[row]))] - z.logsumexp(0))
        expected = torch.stack(expected)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        upstream = torch.randn(len(found), generator=g, dtype=torch.float64)
        (found * upstream).sum().backward()
        (expected * upstream).sum().backward()
        torch.testing.assert_close(hidden.grad, wide.grad, rtol=1e-11, atol=1e-12)
        num_found += len(found)
    torch.testing.assert_close(head.grad, twin.grad, rtol=1e-11, atol=1e-12)
    assert num_found == sum(sum(r.loss_mask) for r in records)


def test_a_micro_batch_without_targets_gives_nothing():
    one = record("a", [2, 5], [np.array([2]), np.array([5])])
    packed = pack_records([one], [1.0], 32, [[0, 0]])
    assert KeptReplay([one]).logprob(
        torch.ones(0, 1), torch.ones(9, 1), torch.ones(0), packed, 1.0
    ).shape == (0,)


def test_tokens_from_before_a_death_leave_the_loss_and_an_engine_without_sets_is_an_error():
    begun = record("a", [2, 5, 6], [None, np.array([5]), np.array([6, 7])])
    assert known_mask(begun) == [0, 1, 1]
    lost = replace(begun, kept=None, metadata={"resumed_at": 3})
    assert known_mask(lost) == [0, 0, 0]
    with pytest.raises(EngineError, match=r"a: no kept sets, but grpo\.replay_kept_sets asks for them"):
        known_mask(replace(begun, kept=None))
