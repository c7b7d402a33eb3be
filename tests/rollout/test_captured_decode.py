"""Decoding in buckets, as a GPU captures it, with the twins on the CPU: the same turns as row by row."""

import pytest
import torch
from small_policy import CONFIG, policy, prompt

from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.model.exact import exact_mode
from consilience.model.state import DecodeState
from consilience.rollout import captured_decode
from consilience.rollout.captured_decode import Decoder
from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine

torch.set_num_threads(1)

MODEL = policy()


@pytest.fixture
def captures(monkeypatch):
    """Buckets of 16, 32, … tokens, as on a GPU; a capture is the step itself. The captures' decoders."""
    made = []

    def capture(decoder, work):
        made.append(decoder)
        return work

    monkeypatch.setattr(captured_decode, "runs_without_host", lambda model: True)
    monkeypatch.setattr(captured_decode, "SHORTEST", 16)
    monkeypatch.setattr(captured_decode, "GROWTH", 2)
    monkeypatch.setattr(Decoder, "_capture", capture)
    return made


def decoder(starts, max_rows=8, captures=True, model=MODEL):
    """A decoder whose first rows stand behind prompts of `starts` tokens; all other rows are empty."""
    state = DecodeState.allocate(CONFIG, max_rows, 96, num_blocks=8 * 8, dtype=model.head.weight.dtype)
    made = Decoder(model, state, max_rows, 96, captures)
    with torch.no_grad():
        for row, length in enumerate(starts):
            state.reserve(row, 96)
            model.hidden(torch.tensor([prompt(length, row)]), state=state.view(row, row + 1))
    made.tokens[: len(starts)] = torch.arange(len(starts))
    return made


def test_buckets_are_powers_of_two_and_never_beyond_the_engine_s_size():
    made = decoder([], max_rows=6)
    assert [made._rows_of(n) for n in (1, 2, 3, 4, 5, 6)] == [1, 2, 4, 4, 6, 6]
    made.max_length = 100_000
    lengths = (1, 2048, 2049, 8192, 8193, 100_000)
    assert [made._length_of(n) for n in lengths] == [2048, 2048, 8192, 8192, 32768, 100_000]


def test_a_bucket_draws_what_its_rows_draw_without_one(captures):
    starts, heats = [3, 20, 9], [0.0, 1.0, 0.7]
    plain, bucketed = decoder(starts, captures=False), decoder(starts)
    for step in range(12):
        numbers = torch.rand(3, generator=torch.Generator().manual_seed(step)).tolist()
        expected = plain.step(heats, numbers, 21 + step)
        found = bucketed.step(heats, numbers, 21 + step)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-6)  # fp32 of size one
    assert len(captures) == 1
    assert bucketed._state.position.tolist() == [15, 32, 21, 0, 0, 0, 0, 0]


def test_rows_beside_a_running_one_change_none_of_its_bits(captures):
    """In a bucket of four, row 0 runs beside three idle rows, then beside two other streams and an idle one.

    In exact mode: a CPU's products of few rows have another order of summation for other numbers of rows.
    """
    model = policy().float()
    with exact_mode():
        alone, crowded = decoder([14], model=model), decoder([14, 33, 2], model=model)
        alone._rows_of = lambda num_rows: 4
        for step in range(10):
            mine = alone.step([1.0], [0.37], 34 + step)
            ours = crowded.step([1.0, 0.0, 2.0], [0.37, 0.5, 0.9], 34 + step)
            assert mine[0][0] == ours[0][0] and mine[1][0] == ours[1][0]
    for own, other in zip(alone._state.layers, crowded._state.layers):
        for ring, ring_beside in zip(own.rings(), other.rings()):
            assert torch.equal(ring[0], ring_beside[0])


def test_idle_rows_stay_empty_and_write_no_block(captures):
    made = decoder([5, 7, 11], max_rows=4)
    pages = [p for layer in made._state.layers for p in layer.pages()]
    nobody = [p[0].clone() for p in pages]
    for step in range(14):
        made.step([1.0] * 3, [0.5] * 3, 12 + step)
    assert made._state.position[3] == 0 and not made._state.tables[3].any()
    assert all(torch.equal(p[0], before) for p, before in zip(pages, nobody))


def turn(uid, ids, tokens, **more):
    return Request(uid, ids, SamplingParams(1.0, tokens, (7,), sum(map(ord, uid))), **more)


def play(**options):
    """Streams that join, leave, wait for tools and go on; everything that was sampled, by name."""
    engine = NativeEngine(MODEL, max_rows=5, max_length=96, **options)
    engine.submit([turn(f"g{i}", prompt(40), 9 + 3 * i, group="g") for i in range(3)])
    engine.submit([turn("held", prompt(11, 1), 6, hold=True), turn("long", prompt(5, 2), 40)])
    engine.submit([turn(f"late{i}", prompt(3 + i, i), 12) for i in range(3)])
    done = {}
    for _ in range(200):
        for completed in engine.step():
            done[completed.uid] = completed
            if completed.uid == "held":
                engine.submit([turn("goes on", prompt(9, 3), 20, parent="held")])
        if not engine.state().num_running + engine.state().num_waiting:
            return done
    raise AssertionError("the engine does not finish")


def test_an_engine_in_buckets_plays_the_same_turns(captures):
    expected, found = play(captures=False), play()
    assert not any(decoder.captures is False for decoder in captures)
    assert found.keys() == expected.keys() and len(found) == 9
    for uid, turn in expected.items():
        assert found[uid].token_ids == turn.token_ids and found[uid].finish == turn.finish, uid
        assert found[uid].logprobs == pytest.approx(turn.logprobs, abs=1e-6)
    # At most: rows of 1, 2, 4 and 5, lengths of 16, 32, 64 and 96.
    assert 4 <= len(captures) <= 16


def test_new_weights_are_captured_anew(captures):
    engine = NativeEngine(policy(), max_rows=2, max_length=48)
    engine.submit([turn("a", prompt(5), 9)])
    for _ in range(3):
        engine.step()
    weights = {name: 0.5 * t if t.is_floating_point() else t for name, t in to_official(policy()).items()}
    engine.publish(weights, weights_digest(weights), 1)
    before = len(captures)
    engine.step()
    assert len(captures) == before + 1


def test_a_host_without_such_a_gpu_captures_nothing(monkeypatch):
    monkeypatch.setattr(Decoder, "_capture", lambda *_: pytest.fail("captured"))
    decoder([4]).step([1.0], [0.5], 5)
