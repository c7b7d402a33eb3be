"""Blocks of the native engine's decode state: taken, shared, given back; and tokens that never notice."""

import random

import numpy as np
import torch
from small_policy import policy, prompt

from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine

torch.set_num_threads(1)

MODEL = policy()


def engine(max_rows=8, max_length=160, **options):
    return NativeEngine(MODEL, max_rows=max_rows, max_length=max_length, **options)


def request(uid, ids, *, parent=None, group=None, hold=False, temperature=1.0, max_tokens=12):
    return Request(
        uid, ids, SamplingParams(temperature, max_tokens, (), sum(map(ord, uid))), parent, group, hold
    )


def drain(e):
    while e.state().num_running + e.state().num_waiting:
        e.step()


def run(e, *requests):
    e.submit(requests)
    drain(e)


def blocks_in_use(e):
    """Blocks of the decode state (12 tokens each) that somebody holds; each is owned by a row."""
    state = e._state
    owned = {block for row in state.owned for block in row}
    num_blocks = len(state.pool.holders) - 1
    assert len(owned) == num_blocks - len(state.pool.free) and not owned & set(state.pool.free)
    return len(owned)


def test_blocks_are_taken_for_all_a_request_may_become_and_given_back_when_it_ends():
    e = engine(max_rows=4)
    e.submit([request("a", prompt(20), max_tokens=8), request("b", prompt(5), max_tokens=7, hold=True)])
    assert blocks_in_use(e) == 0
    e.step()
    assert blocks_in_use(e) == 3 + 1  # 28 and 12 tokens
    drain(e)
    assert blocks_in_use(e) == 1
    e.submit([request("c", prompt(4, 1), parent="b", max_tokens=20, hold=True)])
    e.step()
    assert blocks_in_use(e) == 3  # 12 tokens of before, 4 and 20 more
    drain(e)
    e.release(["c"])
    assert blocks_in_use(e) == 0


def test_a_group_holds_its_prompt_s_complete_blocks_once():
    e = engine()
    e.submit([request(f"m{i}", prompt(50), group="g", max_tokens=9) for i in range(5)])
    e.step()
    assert blocks_in_use(e) == 4 + 5 * 1  # 48 tokens are shared; 50 … 59 lie in a block of each member's own
    drain(e)
    assert blocks_in_use(e) == 0


def test_the_shared_prefix_alone_stays_behind():
    e = engine(max_rows=3)
    run(e, *(request(f"r{i}", (*prompt(40), i), max_tokens=4) for i in range(3)))
    assert blocks_in_use(e) == 4
    run(e, *(request(f"s{i}", (*prompt(34, 1), i), max_tokens=4) for i in range(3)))
    assert blocks_in_use(e) == 3  # another prefix took its place


@torch.no_grad()
def one_by_one(before, completed, sampling):
    """The turn's tokens by full forwards: each drawn by inverse CDF from what came before it."""
    logits = MODEL(torch.tensor([[*before, *completed.token_ids]]))[0, len(before) - 1 : -1]
    if sampling.temperature == 0:
        return tuple(logits.argmax(-1).tolist())
    cumulative = (logits.float() / sampling.temperature).log_softmax(-1).double().exp().cumsum(-1)
    uniforms = np.random.Generator(np.random.Philox(key=sampling.seed)).random(len(logits))
    target = torch.from_numpy(uniforms)[:, None] * cumulative[:, -1:]
    return tuple(torch.searchsorted(cumulative, target, right=True)[:, 0].tolist())


def test_a_random_coming_and_going_never_overflows_and_changes_no_token():
    rng = random.Random(2)
    e = engine(max_rows=4, max_length=70, prefill_tokens=150)
    streams, requests, held, count = {}, {}, [], 0

    def fresh():
        """One to three requests: a group, prompts with a shared beginning, or unrelated ones."""
        kind, size = rng.choice(["group", "prefix", "alone"]), rng.randint(1, 3)
        shared = prompt(rng.choice([12, 35, 40]), rng.randint(0, 2))
        for i in range(size):
            ids = {"group": shared, "prefix": (*shared, i), "alone": prompt(rng.randint(1, 30), 9 + i)}[kind]
            yield ids, None, f"g{count}" if kind == "group" else None

    while count < 24 or requests or held:
        new = list(fresh()) if count < 24 and rng.random() < 0.5 else []
        if held and rng.random() < 0.7:
            parent = held.pop(rng.randrange(len(held)))
            if rng.random() < 0.3 or len(streams[parent]) > 55:
                e.release([parent])
            else:
                new.append((prompt(rng.randint(1, 9), count), parent, None))
        batch = []
        for ids, parent, group in new:
            temperature, most = rng.choice([0.0, 1.0]), rng.randint(1, 12)
            uid, hold, count = f"r{count}", rng.random() < 0.5, count + 1
            streams[uid] = (streams[parent] if parent else ()) + ids
            batch.append(
                request(
                    uid, ids, parent=parent, group=group, hold=hold, temperature=temperature, max_tokens=most
                )
            )
            requests[uid] = batch[-1]
        e.submit(batch)
        for _ in range(rng.randint(1, 9)):
            for completed in e.step():
                r = requests.pop(completed.uid)
                before = streams[completed.uid]
                assert completed.token_ids == one_by_one(before, completed, r.sampling), completed.uid
                streams[completed.uid] += completed.token_ids
                if r.hold:
                    held.append(completed.uid)
            assert blocks_in_use(e) <= (4 + 1) * 6
    # What is left is the prefix that prompts shared last.
    assert blocks_in_use(e) == -(-len(e._prefill.shared) // 12) and e.state().num_held == 0
