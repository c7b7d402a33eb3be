"""What is looked up when, what is kept, what it costs; the choices of a step over its micro-batches."""

import json

import pytest
import torch

from consilience.training.anticipatory_routing import AnticipatoryRouting, AnticipatorySettings, routings
from consilience.training.packing import pack, split_micro_batches
from consilience.training.stage_clock import StageClock

torch.set_num_threads(1)


class Time:
    now = 0.0

    def __call__(self):
        return self.now


class LookUp:
    """Choices that name their step; a look-up takes two seconds."""

    def __init__(self, time=None):
        self.asked, self.time = [], time or Time()

    def __call__(self, step):
        self.asked.append(step)
        self.time.now += 2
        return {1: torch.tensor([[step, -1]], dtype=torch.int16)}


def always(delay, **options):
    return AnticipatoryRouting(AnticipatorySettings(mode="always", delay=delay), 6, **options)


@pytest.mark.parametrize(
    ("delay", "asked"),
    [
        (0, [[0], [1], [2], [3], [4], [5]]),
        (2, [[0, 1, 2], [3], [4], [5], [], []]),  # all at once, then one a step, none beyond the end
        (9, [[0, 1, 2, 3, 4, 5], [], [], [], [], []]),
    ],
)
def test_each_step_is_looked_up_once_and_so_many_steps_before_it_comes(delay, asked):
    look_up, routing = LookUp(), always(delay)
    for step in range(6):
        before = len(look_up.asked)
        assert routing.choices(step, look_up, StageClock())[1].tolist() == [[step, -1]]
        assert look_up.asked[before:] == asked[step]
    assert routing.tensors() == {}


def test_what_is_kept_goes_through_a_checkpoint():
    whole, look_up = always(2), LookUp()
    whole.choices(0, look_up, StageClock())
    cursor, tensors = json.loads(json.dumps(whole.cursor())), whole.tensors()
    assert sorted(tensors) == ["1.1", "2.1"] and tensors["1.1"].dtype == torch.int16
    again, asked = always(2, cursor=cursor, tensors=tensors), LookUp()
    assert again.choices(1, asked, StageClock())[1].tolist() == [[1, -1]] and asked.asked == [3]


def test_the_cost_is_booked_step_by_step_and_in_a_phase_of_its_own():
    time = Time()
    clock, look_up, routing = StageClock(now=time), LookUp(time), always(1)
    shares = []
    for step in range(6):
        routing.choices(step, look_up, clock)
        shares.append(routing.account(train_s=6.0))
    assert shares[0] == {"anticipatory": 1.0, "anticipatory_s": 4.0, "anticipatory_share": 0.4}
    assert shares[1] == {"anticipatory": 1.0, "anticipatory_s": 2.0, "anticipatory_share": 0.25}
    assert shares[5] == {"anticipatory": 1.0, "anticipatory_s": 0.0, "anticipatory_share": 0.0}
    report = routing.report()["anticipatory"]
    assert report == {"rollbacks": [], "steps": 6, "extra_s": 12.0, "train_s": 36.0, "overhead": 1 / 3}
    assert clock.report()["phases"]["look_ahead"] == 12.0


def test_off_asks_nothing_keeps_nothing_says_nothing():
    routing, look_up, clock = AnticipatoryRouting(AnticipatorySettings(), 6), LookUp(), StageClock()
    assert routing.choices(0, look_up, clock) is None and look_up.asked == []
    assert routing.account(1.0) == routing.cursor() == routing.tensors() == routing.report() == {}
    assert not any(routing.must_go_back(loss) for loss in [1.0] * 100 + [1e9])
    assert "look_ahead" not in clock.report()["phases"] and routing.points_every == 0


def test_choices_follow_the_rows_into_any_cut():
    packed = pack([[5] * n for n in (9, 20, 31, 17, 8, 30)], quantum=32, max_row_tokens=32)
    num_rows, num_tokens = packed.token_ids.shape
    choices = {3: torch.arange(num_rows * num_tokens * 2, dtype=torch.int16).view(-1, 2)}
    for budget in (32, 64, 10_000):
        micro_batches = split_micro_batches(packed, budget)
        found = routings(choices, micro_batches)
        assert [r.experts[3].shape[0] for r in found] == [m.token_ids.size for m in micro_batches]
        assert torch.equal(torch.cat([r.experts[3] for r in found]), choices[3])
        assert all(r.is_fixed for r in found)
    assert routings(None, micro_batches) == [None] * len(micro_batches)
