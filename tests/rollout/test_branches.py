"""Quick instructions of a job: their answers are those of the same branch alone, whoever dies in between."""

from dataclasses import replace

import pytest
import torch
from small_policy import CONFIG
from test_recovery import survive

from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.branches import BRANCHES, _branch_of
from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.protocol import TASK_TOKENS
from consilience.rollout.worker import RolloutWorker

torch.set_num_threads(1)

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_id
ALL = ("title", "query", "domain", "authority", "action")


def job(uid, branches=ALL, group=None, effort="chat", **fields):
    messages = ({"role": "user", "content": f"Ask {group or uid}."},)
    sampling = SamplingParams(max_tokens=40, seed=sum(map(ord, uid)))
    fields = {"max_tokens": 40, "branch_tokens": 12, **fields}
    return RolloutJob(
        uid, group or uid, "d", effort, messages, sampling=sampling, branches=branches, **fields
    )


def task_of(context):
    """The name of the task token that ends the prompt, None where the user is answered."""
    names = {TOKENIZER.special_ids[text]: name for name, text in TASK_TOKENS.items()}
    return next((names[i] for i in reversed(context) if i in names), None)


def reply(request, context):
    task = task_of(context)
    return [*TOKENIZER.encode("an answer" if task is None else f"{task}!"), EOS]


def fake_worker(die_after=None):
    engine = FakeRolloutEngine(reply, max_running=5, die_after=die_after)
    return RolloutWorker(engine, TOKENIZER, None, FakeGrader(), flush_s=0.001)


def plain(record):
    metadata = {k: v for k, v in record.metadata.items() if k != "resumed_at"}
    return replace(record, metadata=metadata).to_json()


def run(worker, jobs):
    try:
        return worker.run(jobs)
    finally:
        worker.close()


def test_each_answer_is_in_the_metadata_and_none_in_the_stream():
    (record,) = run(fake_worker(), [job("a")])
    assert {name: answer["text"] for name, answer in record.metadata[BRANCHES].items()} == {
        name: f"{name}!<｜end▁of▁sentence｜>" for name in sorted(ALL)
    }
    (without,) = run(fake_worker(), [job("a", ())])
    assert BRANCHES not in without.metadata
    assert (record.prompt_ids, record.token_ids, record.loss_mask) == (
        without.prompt_ids,
        without.token_ids,
        without.loss_mask,
    )


def test_an_answer_that_never_ends_has_no_title_and_the_others_wait_for_nobody():
    (record,) = run(fake_worker(), [job("a", max_tokens=3)])
    answers = record.metadata[BRANCHES]
    assert answers["title"] is None and answers["query"]["text"].startswith("query!")


@pytest.mark.parametrize("deaths", [(2,), (6,), (11,), (13,), (3, 4, 5, 2), (16, 1)])
def test_branches_go_on_from_the_log_like_everything_else(deaths, tmp_path):
    jobs = [job(f"j{n}", effort=("chat", "think")[n % 2]) for n in range(3)]
    undisturbed = run(fake_worker(), jobs)
    records = survive(tmp_path, jobs, fake_worker, deaths)
    assert [plain(r) for r in records] == [plain(r) for r in undisturbed]


MODEL = initialize(Transformer(replace(CONFIG, vocab_size=TOKENIZER.vocab_size)), 0)
with torch.no_grad():
    MODEL.head.weight[EOS] *= 6.0  # so that some answers end, and have a title


def native(max_rows=8):
    engine = NativeEngine(MODEL, max_rows=max_rows, max_length=256, exact=True)
    return RolloutWorker(engine, TOKENIZER, max_context=256, flush_s=0.0)


def cold(asked):
    """What each (prompt, seed) samples as a request of its own, by name."""
    e, done = NativeEngine(MODEL, max_rows=16, max_length=256, exact=True), {}
    for name, (ids, seed) in asked.items():
        e.submit([Request(name, ids, SamplingParams(max_tokens=12, stop_ids=(EOS,), seed=seed))])
    while len(done) < len(asked):
        done |= {completed.uid: list(completed.token_ids) for completed in e.step()}
    return done


@pytest.mark.parametrize("max_rows", [8, 1])
def test_a_branch_samples_what_it_would_alone_and_its_parent_what_it_would_without(max_rows):
    jobs = [job(f"g{n}", group="g") for n in range(3)]
    plain_jobs = [replace(j, branches=()) for j in jobs]
    alone = run(native(), plain_jobs)
    worker = native(max_rows)
    records = run(worker, jobs)
    asked, said = {}, {}
    for record, without, each in zip(records, alone, jobs):
        assert (record.token_ids, record.logprobs) == (without.token_ids, without.logprobs)
        for name, answer in record.metadata[BRANCHES].items():
            if answer is None:
                assert name == "title" and record.finish.value != "stop"
                continue
            ids = record.prompt_ids
            if name == "title":
                ids = (*ids, *record.token_ids)
            elif name != "action":  # behind the user's text: without the hand-over of two tokens
                ids = ids[:-2]
            uid = f"{each.uid} {name}"
            asked[uid] = (*ids, TOKENIZER.special_ids[TASK_TOKENS[name]]), seed_of(each, name)
            said[uid] = answer["token_ids"]
    assert said == cold(asked) and any("title" in uid for uid in said)


def seed_of(each, name):
    return _branch_of(each, name).sampling.seed


def test_a_title_is_a_fork_of_the_answers_state_and_needs_two_tokens_of_prefill():
    with_title, without = native(), native()
    jobs = [job(f"g{n}", ("title",), group="g") for n in range(3)]
    records = run(with_title, jobs)
    run(without, [replace(j, branches=()) for j in jobs])
    titles = [r.metadata[BRANCHES]["title"] for r in records]
    num = sum(title is not None for title in titles)
    assert num
    # The answer's last token, which its state had not consumed, and the title's own.
    found, expected = with_title.engine.state().prefill_tokens, without.engine.state().prefill_tokens
    assert found == expected + 2 * num
    assert with_title.engine.state().num_held == 0


def test_seeds_are_a_branchs_own():
    seeds = {seed_of(job(uid), name) for uid in ("a", "b") for name in ALL}
    assert len(seeds) == 10
    assert seed_of(job("a", ("query",)), "query") == seed_of(job("a"), "query")


def test_branches_that_are_none_are_refused_and_those_that_are_travel():
    with pytest.raises(ValueError, match="allowed are action, authority, domain, query, title"):
        job("a", ("titel",))
    with pytest.raises(ValueError, match="of 0 tokens"):
        job("a", branch_tokens=0)
    assert RolloutJob.from_dict(job("a").to_dict()) == job("a")
