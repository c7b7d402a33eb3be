"""Top-k, top-p and min-p: five tokens by hand, the same sets as transformers, draws from these alone."""

import numpy as np
import pytest
import torch
from small_policy import policy, prompt

from consilience.conf.errors import EngineError
from consilience.rollout import captured_decode
from consilience.rollout.captured_decode import Decoder
from consilience.rollout.engine import Prefix, Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.truncation import NO_CUT, bits_of, ids_of, kept_tokens, sample_kept

torch.set_num_threads(1)

FIVE = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]], dtype=torch.float64).log()
MODEL = policy()


def kept(logprobs, *cut):
    return kept_tokens(logprobs, torch.tensor([cut], dtype=torch.float64).expand(len(logprobs), 3))


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (NO_CUT, [0, 1, 2, 3, 4]),
        ((2, 1.0, 0.0), [1, 3]),
        ((0, 0.6, 0.0), [1, 3]),  # 0.4 + 0.25 is the first sum above 0.6
        ((0, 0.66, 0.0), [1, 3, 4]),
        ((0, 1.0, 0.3), [1, 3, 4]),  # at least 0.12
        ((2, 0.6, 0.0), [1]),  # of the two, 0.4 / 0.65 is above 0.6
        ((3, 0.9, 0.6), [1, 3]),
        ((0, 1e-9, 1.0), [1]),
        ((0, 0.0, 0.0), [1]),  # an idle row's zeros
    ],
)
def test_which_of_five_tokens_are_kept(cut, expected):
    assert kept(FIVE, *cut)[0].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("cut", [(7, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (20, 0.8, 0.05)])
def test_the_sets_are_those_of_transformers(cut):
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k, p, least = cut
    expected = logits.clone()
    for is_on, warper in ((k, TopKLogitsWarper), (p < 1, TopPLogitsWarper), (least, MinPLogitsWarper)):
        if is_on:
            value = {TopKLogitsWarper: k, TopPLogitsWarper: p, MinPLogitsWarper: least}[warper]
            expected = warper(value)(None, expected)
    found = kept(logits.log_softmax(-1), *cut)
    assert torch.equal(found, expected.isfinite()) and not found.all()


def test_bits_and_ids_are_each_other_s_inverse():
    is_kept = torch.rand(9, 61, generator=torch.Generator().manual_seed(0)) < 0.3
    for row, bits in zip(is_kept, bits_of(is_kept).numpy()):
        assert bits.shape == (8,) and ids_of(bits).tolist() == row.nonzero()[:, 0].tolist()
    assert bits_of(torch.tensor([[True, False, False, True]])).tolist() == [[0b1001]]


def test_draws_follow_the_renormalised_distribution_and_nothing_else():
    """20,000 draws, so that a share of 0.6 has a standard deviation of 0.0035; five of these are allowed."""
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    cut = torch.tensor([[0, 0.6, 0.0]], dtype=torch.float64).expand(count, 3)
    tokens, logprobs, bits = sample_kept(FIVE.expand(count, 5).float(), torch.ones(count), uniform, cut)
    assert torch.bincount(tokens, minlength=5)[[0, 2, 4]].sum() == 0
    assert float((tokens == 1).double().mean()) == pytest.approx(0.4 / 0.65, abs=1e-4)
    assert sorted(set(logprobs.exp().tolist())) == pytest.approx([0.25 / 0.65, 0.4 / 0.65], abs=1e-6)
    assert ids_of(bits[0].numpy()).tolist() == [1, 3]


# ---- the engine -------------------------------------------------------------------------------------


def run(requests, **options):
    engine = NativeEngine(MODEL, max_rows=6, max_length=80, **options)
    engine.submit(requests)
    done = {}
    while engine.state().num_running + engine.state().num_waiting:
        done |= {c.uid: c for c in engine.step()}
    return done


def requests():
    """One greedy, one whole and three cut ones, so that a step has all kinds in one batch."""
    cuts = {"k": {"top_k": 5}, "p": {"top_p": 0.7}, "m": {"min_p": 0.1, "top_p": 0.9}, "whole": {}}
    found = [
        Request(name, prompt(4 + 3 * n, n), SamplingParams(0.9, 14, (), n, **cut))
        for n, (name, cut) in enumerate(cuts.items())
    ]
    return [*found, Request("greedy", prompt(9, 7), SamplingParams(0.0, 14, (), 9, top_k=3))]


@torch.no_grad()
def check(request, done):
    """Sets and log-probs against one full forward in fp64, on which rounding changes no set."""
    ids = (*request.prompt_ids, *done.token_ids)
    logits = MODEL(torch.tensor([ids]))[0, len(request.prompt_ids) - 1 : -1] / 0.9
    s = request.sampling
    expected = kept(logits.log_softmax(-1), s.top_k, s.top_p, s.min_p)
    sizes = done.kept.num_ids()
    sets = np.split(done.kept.token_ids(), np.cumsum(sizes)[:-1])
    for is_kept, ids_kept in zip(expected, sets):
        assert ids_kept.tolist() == is_kept.nonzero()[:, 0].tolist()
    logprobs = logits.masked_fill(~expected, -torch.inf).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
    assert (torch.tensor(done.logprobs) - chosen).abs().max() < 2e-6  # fp32 of logits of size 10
    assert len(set(sizes.tolist())) > 1 or s.top_k


@pytest.mark.parametrize("is_bucketed", [False, True])
def test_kept_sets_and_log_probs_are_those_of_the_full_forward(monkeypatch, is_bucketed):
    if is_bucketed:
        monkeypatch.setattr(captured_decode, "runs_without_host", lambda model: True)
        monkeypatch.setattr(Decoder, "_capture", lambda decoder, work: work)
    given = requests()
    done = run(given)
    for request in given[:3]:
        check(request, done[request.uid])
    assert done["whole"].kept is None and done["greedy"].kept is None
    alone = run([r for r in given if not r.sampling.is_cut])
    for uid in ("whole", "greedy"):
        assert alone[uid].token_ids == done[uid].token_ids
        assert alone[uid].logprobs == pytest.approx(done[uid].logprobs, abs=2e-6)


def test_a_prefix_of_a_dead_engine_has_no_sets_and_the_rest_goes_on_with_its_own():
    request = requests()[1]
    whole = run([request])["p"]
    prefix = Prefix(whole.token_ids[:4], whole.logprobs[:4], whole.weight_version[:4])
    again = run([Request("p", request.prompt_ids, request.sampling, prefix=prefix)])["p"]
    assert again.token_ids == whole.token_ids
    assert again.kept.num_ids()[:4].tolist() == [0] * 4
    assert again.kept.num_ids()[4:].tolist() == whole.kept.num_ids()[4:].tolist()


@pytest.mark.parametrize(
    "cut", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2}]
)
def test_cuts_that_are_none_are_refused(cut):
    engine = NativeEngine(MODEL, max_rows=2, max_length=40)
    with pytest.raises(EngineError, match=r"top_k is 0 \(all\) or more, top_p above 0"):
        engine.submit([Request("r", prompt(3), SamplingParams(**cut))])
