"""Tool calls on a real vLLM: a small model learns one episode by heart, then lives it.

The episode comes from a scripted engine: read a file, answer with what was in it. Sampling is greedy, so the
tokens have to be those of the script, across the tool's answer and across a death behind it.
"""

import contextlib

import numpy as np
import pytest
import torch
from tiny_qwen import build_engine, write_checkpoint

from consilience.conf.errors import EngineError
from consilience.model.digest import weights_digest
from consilience.rollout.boxes import FakeBoxes
from consilience.rollout.encoding import render_assistant, text_of
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import fence, take_lease
from consilience.rollout.parsing import ToolCall
from consilience.rollout.records import FinishReason
from consilience.rollout.worker import RolloutWorker

TOKENIZER = byte_tokenizer()
MOST_TOKENS = 300
SAMPLING = SamplingParams(max_tokens=MOST_TOKENS, temperature=0.0)
JOB = RolloutJob(
    "a/0",
    "a",
    "agent",
    "chat",
    ({"role": "user", "content": "a"},),
    reward="x",
    tools=("read",),
    max_turns=3,
    max_tokens=MOST_TOKENS,
    files={"start": "blue"},
    sampling=SAMPLING,
)
MAX_LENGTH = 1536  # the tools' schemas make a long prompt: 1,036 tokens
STEPS = 150  # of learning at most; 50 were enough, 10 s of an idle core
pytestmark = pytest.mark.timeout(600)


def script(request, context):
    calls = [ToolCall("read", {"path": "start"})] if request.parent is None else []
    message = {"role": "assistant", "content": "" if calls else "It says blue.", "tool_calls": calls}
    return TOKENIZER.encode(text_of(render_assistant(message, False)))


def work(engine, lease=None):
    boxes = FakeBoxes(2)
    worker = RolloutWorker(engine, TOKENIZER, boxes, FakeGrader(), flush_s=0.0, max_context=MAX_LENGTH)
    with contextlib.closing(worker):
        return next(record for batch in worker.stream([JOB], lease) for record in batch), boxes


def learn(folder, record):
    """Weights of the checkpoint's model that have learnt what the record samples by heart."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([[*record.prompt_ids, *record.token_ids]])
    mask = torch.tensor([0] * len(record.prompt_ids) + list(record.loss_mask))[1:] > 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(STEPS):
        logits = model(ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits[mask], ids[0, 1:][mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 2e-3:
            break
    assert float(loss.detach()) < 0.05, "the model did not learn the episode"
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """(the scripted record, an engine that has learnt it)"""
    folder = tmp_path_factory.mktemp("qwen")
    write_checkpoint(folder, most_tokens=MAX_LENGTH)
    record, _ = work(FakeRolloutEngine(script))
    weights = learn(folder, record)
    engine = build_engine(folder, max_length=MAX_LENGTH)
    engine.publish(weights, weights_digest(weights), 1)
    yield record, engine
    engine.close()


def test_a_turn_ends_at_its_tool_call_and_goes_on_behind_the_answer(lived):
    scripted, engine = lived
    assert scripted.finish is FinishReason.STOP and scripted.metadata["turns"] == 2
    found, boxes = work(engine)
    assert found.token_ids == scripted.token_ids and found.loss_mask == scripted.loss_mask
    assert (found.finish, found.metadata["turns"]) == (FinishReason.STOP, 2)
    assert boxes.num_leased == boxes.num_released == 1
    assert 0 < sum(found.loss_mask) < len(found.token_ids)  # the answer of the tool is not sampled
    sampled = np.array(found.loss_mask) > 0
    assert np.isfinite(np.array(found.logprobs)[sampled]).all()
    assert np.isnan(np.array(found.logprobs, float)[~sampled]).all()
    assert engine.state().num_held == 0


def test_a_death_behind_a_tool_call_goes_on_from_the_log_with_the_call_and_its_answer(lived, tmp_path):
    scripted, engine = lived
    first_turn = scripted.loss_mask.index(0)
    death = Mortal(engine, first_turn + 5)
    with pytest.raises(EngineError, match="it died"):
        work(death, take_lease(tmp_path, "first"))
    engine.clear()
    engine.release(["a/0#0", "a/0#1"])
    fence(tmp_path)
    found, _ = work(engine, take_lease(tmp_path, "second"))
    assert found.token_ids == scripted.token_ids and found.loss_mask == scripted.loss_mask
    assert found.metadata["resumed_at"] >= first_turn


class Mortal:
    """The engine until it has taken so many steps, then an error at each."""

    def __init__(self, engine, steps):
        self.engine, self.left = engine, steps

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def step(self):
        self.left -= 1
        if self.left < 0:
            raise EngineError("it died")
        return self.engine.step()
