"""A native engine, requests for it, and the full forward that its tokens are held against."""

import torch
from small_policy import policy

from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine

MODEL = policy()


def engine(model=MODEL, max_rows=8, max_length=160, **options):
    return NativeEngine(model, max_rows=max_rows, max_length=max_length, **options)


def request(
    uid, ids, *, parent=None, group=None, hold=False, temperature=1.0, max_tokens=12, stop_ids=(), seed=None
):
    seed = sum(map(ord, uid)) if seed is None else seed
    return Request(uid, ids, SamplingParams(temperature, max_tokens, stop_ids, seed), parent, group, hold)


def drain(e):
    done = {}
    for _ in range(2000):
        if e.state().num_running + e.state().num_waiting == 0:
            return done
        for completed in e.step():
            assert completed.uid not in done
            done[completed.uid] = completed
    raise AssertionError("the engine does not finish")


def run(e, *requests):
    e.submit(requests)
    return drain(e)


@torch.no_grad()
def logprobs_of(model, before, sampled, temperature=1.0):
    """Log-probs of `sampled` after `before` by one full forward."""
    logits = model(torch.tensor([[*before, *sampled]]))[0, len(before) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(sampled)[:, None])[:, 0]


@torch.no_grad()
def greedy(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tuple(ids[-count:])


def check(model, before, completed, temperature=1.0, bound=2e-6):
    """`bound`: the sampler rounds logits of size about 10 to fp32, 5e-7 each, and normalises them there."""
    expected = logprobs_of(model, before, completed.token_ids, temperature)
    found = torch.tensor(completed.logprobs)
    assert len(completed.logprobs) == len(completed.token_ids) == len(completed.weight_version)
    assert (found - expected).abs().max() < bound
