"""Per-token fields in files: the record stays light, the numbers stay what they were."""

import math
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest

from consilience.conf.errors import EngineError, RunError
from consilience.rollout.boxes import FakeBoxes
from consilience.rollout.columns import Column, ColumnFile
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.kept_sets import KeptSets
from consilience.rollout.lease import fence, take_lease
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord, UserTurn
from consilience.rollout.store import RolloutStore
from consilience.rollout.token_routing import TokenRouting
from consilience.rollout.worker import RolloutWorker
from consilience.training.packing import pack_episodes


def record(uid="a", n=5):
    logprobs = tuple(math.nan if i == 1 else -0.5 * i for i in range(n))
    mask = tuple(int(i != 1) for i in range(n))
    return RolloutRecord(
        uid, "g", "math", "think", None, (3, 9), tuple(range(n)), logprobs, mask, (7,) * n,
        FinishReason.STOP, Outcome(OutcomeKind.GRADED), 1.0, metadata={"index": 4},
        earlier=(UserTurn((1, 2, 3), (8, 1), (-0.25, -1.0), (1, 1), (6, 6)),),
    )  # fmt: skip


def test_routing_and_kept_sets_lie_on_disk_too_and_are_read_where_they_are_needed(tmp_path):
    chosen = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(4, 2, 3)
    routing = TokenRouting.of((1, 2), np.concatenate([chosen, chosen[:3]]))
    kept = KeptSets.of([np.array([4, 9]), None, np.array([1]), np.array([2, 3, 7]), None])
    turn = replace(record().earlier[0], routing=TokenRouting.of((1, 2), np.concatenate([chosen, chosen[:1]])))
    whole = replace(record(), routing=routing, kept=kept, earlier=(turn,))
    light = ColumnFile(tmp_path / "0.tokens", 3).put(whole)
    assert isinstance(light.routing.data, Column) and isinstance(light.kept.ids, Column)
    again = RolloutRecord.from_json(light.to_json(), tmp_path)
    for found in (light, again, pickle.loads(pickle.dumps(light))):
        assert found.routing == routing and np.array_equal(found.routing.experts(), routing.experts())
        assert found.routing.num_tokens == 7 and found.earlier[0].routing == turn.routing
        assert found.kept == kept and found.kept.token_ids().tolist() == [4, 9, 1, 2, 3, 7]
        assert found.kept.num_ids().tolist() == [2, 0, 1, 3, 0]
    # What is sent and stored has no size of its own per token: a thousand times the tokens, 16 digits more.
    long = replace(
        whole,
        earlier=(),
        kept=None,
        prompt_ids=(1,) * 3000,
        routing=TokenRouting.of((1, 2), np.tile(chosen, (752, 1, 1))[:3005]),
    )
    sizes = [
        len(ColumnFile(tmp_path / "1.tokens", n).put(r).to_json())
        for n, r in enumerate((replace(whole, earlier=(), kept=None), long))
    ]
    assert sizes[1] - sizes[0] < 64
    next(tmp_path.glob("0.tokens/*")).write_bytes(b"")
    with pytest.raises(RunError, match="cannot map"):
        again.routing.experts()


def test_a_record_reads_the_same_through_its_references(tmp_path):
    whole = record()
    light = ColumnFile(tmp_path / "0.tokens", 3).put(whole)
    assert isinstance(light.token_ids, Column) and isinstance(light.earlier[0].logprobs, Column)
    assert light.token_ids == whole.token_ids and whole.logprobs == light.logprobs
    assert list(light.loss_mask) == list(whole.loss_mask) and light.prompt_ids[-1] == 9
    assert light.token_ids[1:3] == (1, 2) and len(light.token_ids) == 5
    assert math.isnan(light.logprobs[1]) and light.weight_version != (7,) * 4
    assert (light.num_sampled, light.num_tokens) == (whole.num_sampled, whole.num_tokens) == (6, 12)
    assert [s.num_sampled for s in light.samples()] == [2, 4]
    assert (
        np.asarray(light.token_ids).dtype == np.int32 and np.asarray(light.loss_mask, np.float32).sum() == 4
    )


def test_references_survive_json_pickle_and_a_moved_folder(tmp_path):
    run = tmp_path / "rollouts"
    store = RolloutStore(run)
    file = ColumnFile(store.columns_folder("000000"), 0)
    records = [file.put(record(f"r{i}", n)) for i, n in enumerate((1, 500, 70_000))]
    assert len(records[2].to_json()) < 3000 > len(pickle.dumps(records[2]))
    store.append("000000", records)
    partial = store.partial("000001")
    partial.add(records)
    partial.close()
    shutil.move(run, tmp_path / "moved")
    moved = RolloutStore(tmp_path / "moved")
    for found in (list(moved.read("000000")), list(moved.partial("000001").records.values())):
        assert [r.token_ids == record("x", n).token_ids for r, n in zip(found, (1, 500, 70_000))] == [
            True
        ] * 3
        assert found[1].earlier[0].prompt_ids == (1, 2, 3)
    assert pickle.loads(pickle.dumps(found[1])).logprobs == record("x", 500).logprobs


def test_packing_is_the_same_from_tuples_and_from_files(tmp_path):
    records = [record(f"r{i}", n) for i, n in enumerate((5, 9, 30, 3))]
    file = ColumnFile(tmp_path / "0.tokens", 0)
    packs = []
    for given in (records, [file.put(r) for r in records]):
        columns = ([getattr(r, f) for r in given] for f in ("prompt_ids", "token_ids", "loss_mask"))
        packs.append(pack_episodes(*columns, 32, {"old_logprob": [r.logprobs for r in given]}))
    for name, value in packs[0].to_torch().items():
        assert value.equal(packs[1].to_torch()[name]), name


def test_a_damaged_or_missing_file_is_named_and_never_trained_on(tmp_path):
    light = ColumnFile(tmp_path / "0.tokens", 0).put(record(n=200))
    path = light.token_ids.root / light.token_ids.name
    data = bytearray(path.read_bytes())
    data[light.token_ids.offset + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match="damaged between bytes 8 and 808"):
        light.token_ids.array()
    assert len(light.logprobs.array()) == 200
    path.write_bytes(data[:100])
    with pytest.raises(RunError, match="cannot map"):
        list(light.logprobs)
    path.unlink()
    with pytest.raises(RunError, match="cannot map"):
        light.token_ids[0]


def test_a_disk_that_takes_nothing_is_an_error_that_says_so(tmp_path):
    (tmp_path / "0.tokens").write_text("a file where the folder should be")
    with pytest.raises(EngineError, match="free space there and resume"):
        ColumnFile(tmp_path / "0.tokens", 0).put(record())


@pytest.mark.parametrize("inline_tokens", [0, 40, 10_000])
def test_workers_put_long_records_into_files_and_go_on_after_a_death(tmp_path, inline_tokens):
    tokenizer = byte_tokenizer()
    reply = lambda request, context: [*tokenizer.encode_plain("x" * request.sampling.seed), tokenizer.eos_id]

    def worker(die_after=None):
        engine = FakeRolloutEngine(reply, die_after=die_after)
        options = {"flush_s": 0.001, "inline_tokens": inline_tokens}
        return RolloutWorker(engine, tokenizer, FakeBoxes(), FakeGrader(), **options)

    message = ({"role": "user", "content": "go"},)
    jobs = [
        RolloutJob(f"j{n}", "g", "d", "chat", message, reward="x", sampling=SamplingParams(seed=n))
        for n in (5, 30, 90)
    ]
    whole = worker().run(jobs)
    found = {}
    for die_after in (60, None):
        fence(tmp_path / "log")
        lease = take_lease(tmp_path / "log", "w", columns_folder=tmp_path / "0.tokens")
        try:
            for batch in worker(die_after).stream([j for j in jobs if j.uid not in found], lease):
                found |= {r.uid: r for r in batch}
        except EngineError as error:
            assert "died" in str(error)
    for r in whole:
        light = found[r.uid]
        assert isinstance(light.token_ids, Column) == (r.num_tokens > inline_tokens)
        assert light.token_ids == r.token_ids and light.logprobs == r.logprobs
        assert replace(light, token_ids=(), logprobs=(), loss_mask=(), weight_version=()).reward == r.reward
