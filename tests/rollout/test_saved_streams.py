"""Streams of a paused engine: another one goes on from the disk, or computes again what is not there."""

from dataclasses import replace

import pytest
import torch
from small_policy import CONFIG, prompt

from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.engine import Prefix, Request, SamplingParams, SavedStream
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.prefix_keys import PrefixKeys, build_digest
from consilience.rollout.prefix_reuse import PrefixCaching
from consilience.rollout.prefix_store import HEAD_BYTES

torch.set_num_threads(1)

MODEL = initialize(Transformer(CONFIG), 0)  # fp32, exact: only equal bits give equal tokens
OTHER = initialize(Transformer(CONFIG), 1)


def engine(model=MODEL, exact=True, **options):
    return NativeEngine(model, max_rows=8, max_length=160, exact=exact, **options)


def request(uid, ids, max_tokens=20, **fields):
    sampling = SamplingParams(1.0, max_tokens, (), sum(map(ord, uid)), **fields.pop("cut", {}))
    return Request(uid, ids, sampling, **fields)


def drain(e):
    done = {}
    while e.state().num_running + e.state().num_waiting:
        done |= {c.uid: c for c in e.step()}
    return done


def run(e, *requests):
    e.submit(requests)
    return drain(e)


def paused(folder, requests, steps, limit_s=60.0, **options):
    """The requests as they go on elsewhere, and how many states the engine saved."""
    e = engine(**options)
    e.submit(requests)
    for _ in range(steps):
        e.step()
    saved = e.save_streams(folder, [r.uid for r in requests], limit_s)
    begun = {r.uid: r for r in e.clear()[0]}
    return [replace(begun[r.uid], saved=SavedStream(folder, r.uid)) for r in requests], saved


def files(folder):
    return sorted(path for path in folder.glob("*/*") if path.is_file())


REQUESTS = [request(f"r{n}", prompt(n, n)) for n in (1, 2, 11, 12, 13, 25, 60)]
IN_ALL = [*REQUESTS[:3], *(request(f"g{n}", prompt(40), group="g") for n in range(3))]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 13])
def test_another_engine_goes_on_without_a_prefill_and_the_tokens_are_the_same(steps, exact, tmp_path):
    undisturbed = run(engine(exact=exact), *REQUESTS)
    begun, num_saved = paused(tmp_path / "s", REQUESTS, steps, exact=exact)
    assert num_saved == len(REQUESTS)
    after = engine(exact=exact)
    assert run(after, *begun) == undisturbed
    state = after.state()
    # A step that admits decodes too: steps + 1 tokens are sampled, all but the last of them consumed.
    assert state.prefill_tokens == 0
    assert state.saved_tokens == sum(len(r.prompt_ids) + steps for r in REQUESTS)
    assert not (tmp_path / "s").exists()  # nothing is left of what was used


def test_a_group_shares_the_blocks_of_its_prompt(tmp_path):
    begun, num_saved = paused(tmp_path, IN_ALL, 3)
    assert num_saved == 6
    # 40 + 3 tokens are three blocks of 12; the prompt's belong to all three samples.
    names = [path.name.rpartition(".")[2] for path in files(tmp_path)]
    assert names.count("stream") == 6 and names.count("block") == 3 + 1  # r11 has one of 12
    after = engine()
    assert run(after, *begun) == run(engine(), *IN_ALL)
    assert after.state().prefill_tokens == 0


@pytest.mark.parametrize("speed", ["whole", "none"])
def test_a_held_stream_is_continued_after_a_pause_by_its_whole_history(speed, tmp_path):
    turn, answer = request("t", prompt(40), hold=True), prompt(9, 9)
    e = engine()
    history = turn.prompt_ids + run(e, turn)["t"].token_ids + answer
    expected = run(e, replace(request("u", answer), parent="t"))["u"]
    before = engine()
    run(before, turn)
    assert before.save_streams(tmp_path / "s", ["t"], 60.0 if speed == "whole" else 0.0) == (speed == "whole")
    after = engine()
    found = run(after, request("u", history, saved=SavedStream(tmp_path / "s", "t")))["u"]
    assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
    # The turn's last token had not been consumed; the tool's answer was never there.
    assert after.state().prefill_tokens == (10 if speed == "whole" else len(history))


@pytest.mark.parametrize(
    "damage", ["gone", "all gone", "torn", "empty", "flipped", "block", "weights", "build", "other tokens"]
)
def test_what_is_missing_or_damaged_or_of_something_else_is_computed_again(damage, tmp_path):
    folder, model = tmp_path / "s", OTHER if damage == "weights" else MODEL
    undisturbed = run(engine(), *REQUESTS)
    begun, _ = paused(folder, REQUESTS, 6, model=model)
    if damage == "weights":  # the tokens of the log are the same ones
        begun = [replace(r, prefix=cut(undisturbed[r.uid], 7)) for r in begun]
    for path in files(folder):
        data = path.read_bytes()
        if damage == "gone" or (damage == "block" and path.suffix == ".block"):
            path.unlink()
        elif damage in ("torn", "empty"):
            path.write_bytes(data[: len(data) // 2] if damage == "torn" else b"")
        elif damage == "flipped":
            path.write_bytes(data[:HEAD_BYTES] + bytes([data[HEAD_BYTES] ^ 1]) + data[HEAD_BYTES + 1 :])
    if damage == "all gone":
        begun = [replace(r, saved=SavedStream(tmp_path / "elsewhere", r.uid)) for r in begun]
    after = engine()
    if damage == "build":
        after._saved._keys = PrefixKeys(MODEL, True, build="of yesterday")
    if damage == "other tokens":  # a uid of this run, and a state of another
        others = [replace(r, prompt_ids=prompt(len(r.prompt_ids), 99)) for r in REQUESTS]
        folder = tmp_path / "other"
        paused(folder, others, 6)
        begun = [replace(r, saved=SavedStream(folder, r.uid)) for r in begun]
    assert run(after, *begun) == undisturbed
    consumed = {r.uid: len(r.prompt_ids) + 6 for r in REQUESTS}
    kept = [n for n in consumed.values() if n < 12] if damage == "block" else []  # they have no whole block
    assert after.state().saved_tokens == sum(kept)
    assert after.state().prefill_tokens == sum(consumed.values()) - sum(kept)
    assert damage == "all gone" or not list(folder.glob("*/*.stream"))


def cut(completed, count):
    return Prefix(completed.token_ids[:count], completed.logprobs[:count], completed.weight_version[:count])


def test_the_build_is_the_text_of_the_model_and_part_of_every_key(tmp_path):
    assert len(build_digest()) == 64
    ids = prompt(24)
    mine, same = PrefixKeys(MODEL, True), PrefixKeys(MODEL, True, build_digest())
    assert mine.of_blocks(ids) == same.of_blocks(ids) and len(set(mine.of_blocks(ids))) == 2
    assert not set(mine.of_blocks(ids)) & set(PrefixKeys(MODEL, True, "b").of_blocks(ids))


def test_a_pause_has_a_time_limit_and_the_longest_streams_come_first(tmp_path):
    begun, num_saved = paused(tmp_path / "none", REQUESTS, 2, limit_s=0.0)
    assert num_saved == 0 and not (tmp_path / "none").exists()
    assert run(engine(), *begun) == run(engine(), *REQUESTS)
    e, saved = engine(), []
    e.submit(REQUESTS)
    e.step()
    e._saved.save = lambda folder, row, stream: saved.append(stream.length) or True
    assert e.save_streams(tmp_path, [r.uid for r in REQUESTS], 60.0) == 7
    assert saved == sorted(saved, reverse=True)


def test_a_folder_that_takes_nothing_costs_a_prefill_and_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    begun, num_saved = paused(tmp_path / "file", REQUESTS, 2)
    assert num_saved == 0
    assert run(engine(), *begun) == run(engine(), *REQUESTS)


@pytest.mark.parametrize("is_held", [False, True])
def test_routing_and_kept_sets_of_what_was_sampled_before_the_pause_are_still_there(is_held, tmp_path):
    options = {"records_routing": True}
    turn = request("t", prompt(20), hold=True, cut={"top_k": 7})
    turns = [turn, replace(request("u", prompt(5, 3), cut={"top_k": 7}), parent="t")]
    e = engine(**options)
    first = run(e, turns[0])["t"]
    expected = run(e, turns[1])["u"]
    before = engine(**options)
    run(before, turns[0])
    history = turn.prompt_ids + first.token_ids + turns[1].prompt_ids
    whole = replace(turns[1], prompt_ids=history, parent=None)
    if is_held:
        before.save_streams(tmp_path, ["t"], 60.0)
        went_on = replace(whole, saved=SavedStream(tmp_path, "t"))
    else:
        before.submit([turns[1]])
        for _ in range(6):
            before.step()
        before.save_streams(tmp_path, ["u"], 60.0)
        (begun,), _ = before.clear()
        went_on = replace(whole, prefix=begun.prefix, saved=SavedStream(tmp_path, "u"))
    found = run(engine(**options), went_on)["u"]
    assert (found.token_ids, found.logprobs, found.kept) == (
        expected.token_ids,
        expected.logprobs,
        expected.kept,
    )
    num_fed = len(history) + len(expected.token_ids) - 1
    assert found.routing.num_tokens == num_fed
    again = run(engine(**options), whole)["u"]
    assert found.routing == again.routing


def test_a_stream_that_old_weights_had_a_part_in_is_not_saved(tmp_path):
    model = initialize(Transformer(CONFIG), 0)
    e = engine(model=model)
    e.submit([request("a", prompt(30), hold=True)])
    e.step()
    weights = {name: t.clone() for name, t in to_official(OTHER).items()}
    e.publish(weights, weights_digest(weights), 1)
    assert e.save_streams(tmp_path, ["a"], 60.0) == 0
    drain(e)
    assert e.save_streams(tmp_path, ["a"], 60.0) == 0  # held now, still mixed
    e.submit([request("b", prompt(30))])
    e.step()
    assert e.save_streams(tmp_path, ["a", "b"], 60.0) == 1


def test_a_drafting_engine_saves_nothing(tmp_path):
    model = initialize(Transformer(replace(CONFIG, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))), 0)
    begun, num_saved = paused(tmp_path, REQUESTS, 2, model=model, speculative=True)
    assert num_saved == 0 and files(tmp_path) == []
    assert run(engine(model, speculative=True), *begun) == run(engine(model, speculative=True), *REQUESTS)


@pytest.mark.parametrize("window", ["whole", "recomputed"])
def test_beside_a_prefix_store_the_saved_state_comes_first(window, tmp_path):
    prefixes = {"prefixes": PrefixCaching(tmp_path / "p", window)}
    begun, _ = paused(tmp_path / "s", REQUESTS, 4, **prefixes)
    after = engine(**prefixes)
    assert run(after, *begun) == run(engine(), *REQUESTS)
    assert (after.state().prefill_tokens, after.state().prefix_tokens) == (0, 0)
