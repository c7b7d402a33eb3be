"""Conversations of several user messages: one stream where nothing is dropped, else one a user turn."""

import pytest

from consilience.rollout import protocol as p
from consilience.rollout.dsml import ToolCall
from consilience.rollout.encoding import encode_messages, render_assistant, text_of
from consilience.rollout.engine import Completed, SamplingParams
from consilience.rollout.episode import Episode, State
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader, Graded
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.prompts import prompt_ids
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.rollout.tokenizer import Tokenizer
from consilience.rollout.tools import declare_tools
from consilience.rollout.worker import RolloutWorker

BYTES = byte_tokenizer()
GRADED = Graded(1.0, {}, Outcome(OutcomeKind.GRADED))
HELLO = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "one"})


def job(effort, said=("two", "three"), **fields):
    sampling = SamplingParams(max_tokens=900, seed=5)
    return RolloutJob(
        "c/0", "c", "talk", effort, HELLO, user_turns=said, reward="x",
        **{"max_tokens": 900, "sampling": sampling, **fields},
    )  # fmt: skip


def episode(effort, said=("two", "three"), tokenizer=BYTES, max_context=None, **fields):
    made = job(effort, said, **fields)
    ids = prompt_ids(tokenizer, made.messages, effort, made.tools)
    return Episode(made, ids, tokenizer, max_context=max_context)


def complete(e, ids, version=1):
    request = e.next_request()
    logprobs = tuple(-0.01 * (i + 1) for i in range(len(ids)))
    e.on_completed(Completed(request.uid, tuple(ids), logprobs, (version,) * len(ids), "stop"))
    return request


def said(*answers, users=("one", "two", "three"), reasoning=()):
    """The conversation as messages, up to the user message that waits for an answer."""
    messages = [HELLO[0]]
    for i, user in enumerate(users[: len(answers) + 1]):
        messages.append({"role": "user", "content": user})
        if i < len(answers):
            thought = {"reasoning_content": reasoning[i]} if reasoning else {}
            messages.append({"role": "assistant", "content": answers[i], **thought})
    return messages


def test_dropped_reasoning_ends_a_stream_and_the_next_prompt_is_the_protocols():
    e = episode("think")
    for number, answer in enumerate(("A", "B", "C")):
        request = complete(e, BYTES.encode(f"thought {number}</think>{answer}{p.EOS}"), version=number)
        before = said(*"AB"[:number], reasoning=("dropped",) * number)
        assert BYTES.decode(request.prompt_ids) == encode_messages(before, "think")
        assert (request.parent, request.hold, request.group) == (None, False, None if number else "c")
    assert e.finish is FinishReason.STOP and e.held == []
    item, record = e.grade_item(), e.record(GRADED)
    assert item.answers == ("A", "B", "C") and item.text == "C" and item.thinking == "thought 2"
    assert BYTES.decode(item.token_ids).count(p.EOS) == 3
    assert item.prompt == encode_messages(said(), "think")
    first, second, third = record.samples()
    assert [s.uid for s in (first, second, third)] == ["c/0@0", "c/0@1", "c/0"]
    assert [set(s.weight_version) for s in (first, second, third)] == [{0}, {1}, {2}]
    assert BYTES.decode(second.token_ids) == f"thought 1</think>B{p.EOS}" and all(second.loss_mask)
    assert "thought" not in BYTES.decode(third.prompt_ids)
    assert record.num_sampled == sum(s.num_sampled for s in record.samples())
    assert all(s.reward == 1.0 and s.group == "c" and not s.earlier for s in record.samples())
    assert RolloutRecord.from_json(record.to_json()).to_json() == record.to_json()
    assert RolloutRecord.from_json(record.to_json()).earlier == record.earlier


def test_answers_stay_the_ids_that_were_sampled():
    """`abab` has a token of its own here; the policy spells it with others, and the history keeps them."""
    tokenizer = Tokenizer.train(["abab " * 200], 280)
    whole, spelled = tokenizer.encode_plain("abab"), tokenizer.encode_plain("a") + tokenizer.encode_plain("b")
    assert len(whole) < 4 and spelled * 2 != whole
    e = episode("think", tokenizer=tokenizer)
    end = tokenizer.special_ids[p.END_THINK]
    complete(e, [*tokenizer.encode_plain("hm"), end, *spelled, *spelled, tokenizer.eos_id])
    ids = e.next_request().prompt_ids
    assert tokenizer.decode(ids) == encode_messages(said("abab"), "think")
    answer = (end, *spelled, *spelled, tokenizer.eos_id)
    assert any(ids[i : i + len(answer)] == answer for i in range(len(ids)))


def test_a_textual_end_of_thinking_is_encoded_anew():
    e = episode("think")
    complete(e, [*BYTES.encode_plain("hm</think>A"), BYTES.eos_id])
    assert BYTES.decode(e.next_request().prompt_ids) == encode_messages(said("A"), "think")


def test_in_chat_mode_nothing_is_dropped_and_the_conversation_is_one_stream():
    e = episode("chat")
    requests = [complete(e, BYTES.encode(f"{answer}{p.EOS}")) for answer in "ABC"]
    assert [r.parent for r in requests] == [None, "c/0#0", "c/0#1"]
    assert [r.hold for r in requests] == [True, True, False] and e.held == ["c/0#0", "c/0#1"]
    record = e.record(GRADED)
    assert record.samples() == [record]
    stream = BYTES.decode(record.prompt_ids + record.token_ids)
    assert stream == encode_messages([*said("A", "B"), {"role": "assistant", "content": "C"}], "chat")
    sampled = [t for t, m in zip(record.token_ids, record.loss_mask) if m]
    assert BYTES.decode(sampled) == f"A{p.EOS}B{p.EOS}C{p.EOS}"


def test_with_tools_reasoning_is_kept_across_user_messages_and_each_has_its_own_turns():
    e = episode("think", said=("two",), tools=("read",), max_turns=2)
    call = {"role": "assistant", "tool_calls": [ToolCall("read", {"path": "a"})], "reasoning_content": "look"}
    texts = []
    for user, answer in (("one", "A"), ("two", "B")):
        complete(e, BYTES.encode(text_of(render_assistant(call, True))))
        assert e.state is State.TOOLS
        e.on_tool_result("12")
        complete(e, BYTES.encode(f"so{p.END_THINK}{answer}{p.EOS}"))
        texts += [{"role": "user", "content": user}, call, {"role": "tool", "content": "12"}]
        texts += [{"role": "assistant", "content": answer, "reasoning_content": "so"}]
    assert e.finish is FinishReason.STOP
    record = e.record(GRADED)
    whole = encode_messages(declare_tools([HELLO[0], *texts], ("read",)), "think")
    assert record.samples() == [record] and BYTES.decode(record.prompt_ids + record.token_ids) == whole


@pytest.mark.parametrize("effort", ["chat", "think"])
def test_the_budget_is_the_conversations_and_its_end_is_typed(effort):
    e = episode(effort, max_tokens=9)
    answer = BYTES.encode(("x</think>" if effort == "think" else "xx") + f"A{p.EOS}")
    complete(e, answer)
    assert e.next_request().sampling.max_tokens == 9 - len(answer)
    e = episode(effort, max_tokens=len(answer))
    complete(e, answer)
    assert e.finish is FinishReason.LENGTH and len(e.record(GRADED).samples()) == 1
    e = episode(effort, said=("y" * 200,), max_context=220)
    complete(e, answer)
    assert e.finish is FinishReason.LENGTH and e.record(GRADED).token_ids == tuple(answer)


def test_a_worker_runs_conversations_and_a_malformed_answer_ends_one():
    def policy(request, context):
        asked = BYTES.decode(context).rsplit(p.USER, 1)[1]
        ends = f"re {asked[:3]}" + ("" if asked.startswith("bad") else p.END_THINK) + f"to {asked[:3]}{p.EOS}"
        return BYTES.encode(ends)

    graded = FakeGrader(lambda item: float(len(item.answers)))
    worker = RolloutWorker(FakeRolloutEngine(policy), BYTES, None, graded, flush_s=0.001)
    jobs = [job("think"), job("think", said=("bad", "three"))]
    jobs[1] = RolloutJob.from_dict({**jobs[1].to_dict(), "uid": "c/1"})
    good, bad = worker.run(jobs)
    worker.close()
    assert good.reward == 3.0 and good.metadata["answers"] == 3 and len(good.samples()) == 3
    assert bad.finish is FinishReason.MALFORMED and bad.reward == 1.0 and len(bad.samples()) == 2
