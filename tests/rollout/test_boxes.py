"""Boxes found again: one that can answer for what it did is asked, and nothing is run a second time."""

from consilience.rollout.boxes import FakeBoxes
from consilience.rollout.encoding import render_assistant, text_of
from consilience.rollout.engine import Completed, SamplingParams
from consilience.rollout.episode import Episode
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.parsing import ToolCall
from consilience.rollout.recovery import box_for

TOKENIZER = byte_tokenizer()


class LastingBoxes(FakeBoxes):
    """Its boxes live on and note what they are told to resume after."""

    def __init__(self):
        super().__init__()
        self.told = []

    def find(self, box_id):
        box = self.lease()
        box.id = box_id
        box.resume = self.told.append  # pyright: ignore[reportAttributeAccessIssue]
        return box


def episode_with(calls, num_answered, num_begun):
    """An episode in its tool calls: so many answered, so many begun by its former worker."""
    job = RolloutJob(
        "j", "j", "agent", "chat", ({"role": "user", "content": "go"},), reward="x", tools=("shell", "read"),
        files={"a": "1", "b": "2"}, sampling=SamplingParams(max_tokens=500), max_tokens=500, max_turns=3,
    )  # fmt: skip
    episode = Episode(job, tuple(TOKENIZER.encode("go")), TOKENIZER)
    request = episode.next_request()
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    ids = tuple(TOKENIZER.encode(text_of(render_assistant(message, False))))
    numbers = (0.0,) * len(ids)
    episode.on_completed(Completed(request.uid, ids, numbers, (0,) * len(ids), "stop"))
    episode.used_box("box-1", "none")
    episode.num_begun = num_begun
    for _ in range(num_answered):
        episode.on_tool_result("done")
    return episode


def shell(command):
    return ToolCall("shell", {"command": command})


def test_a_begun_command_is_asked_for_by_its_number():
    """Two files written, one call answered, so the begun one is the fourth verb: three are done."""
    boxes = LastingBoxes()
    box = box_for(boxes, episode_with([shell("a"), shell("b")], 1, 2), 2000)
    assert box.id == "box-1" and boxes.told == [3]


def test_a_call_that_ran_nothing_is_no_verb_of_the_box():
    boxes = LastingBoxes()
    calls = [ToolCall("shell", {"wrong": "x"}), shell("a"), shell("b")]
    box_for(boxes, episode_with(calls, 2, 3), 2000)
    assert boxes.told == [3]


def test_between_two_calls_there_is_nothing_to_ask_for():
    boxes = LastingBoxes()
    box_for(boxes, episode_with([shell("a"), shell("b")], 1, 1), 2000)
    assert boxes.told == []
