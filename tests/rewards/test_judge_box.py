"""The held judge box: clean at every start, replaced after trouble, described truthfully."""

import pytest

from consilience.conf.errors import SandboxLost
from consilience.rewards.judge_box import JudgeBox, spec_from_dict, spec_to_dict
from consilience.sandboxes.blocking import BlockingSandbox
from consilience.sandboxes.fake import FakeSandbox, result
from consilience.sandboxes.protocol import ExecStatus, Isolation, Limits, SandboxSpec


def boxes(script):
    """A JudgeBox over fakes, and the list of the fakes it opened."""
    opened = []

    def start():
        opened.append(FakeSandbox(script))
        return BlockingSandbox(opened[-1])

    return JudgeBox(start), opened


def test_a_used_workspace_is_emptied_before_the_next_call_and_an_unused_one_left_alone():
    box, opened = boxes(lambda argv, stdin, files: b"ok")
    box.begin()
    assert opened[0].num_resets == 0
    box.write("left.txt", b"from the last candidate")
    box.begin()
    assert opened[0].num_resets == 1
    with pytest.raises(FileNotFoundError):
        box.read("left.txt")
    box.run_python("1")
    box.begin()
    assert opened[0].num_resets == 2


@pytest.mark.parametrize("status", [s for s in ExecStatus if s not in (ExecStatus.OK, ExecStatus.NONZERO)])
def test_every_abnormal_outcome_soils_the_box_until_it_is_renewed(status):
    box, opened = boxes(lambda argv, stdin, files: result(status=status, exit_code=None))
    assert not box.is_soiled
    box.exec(["true"])
    assert box.is_soiled
    box.renew()
    assert len(opened) == 2
    assert box.id == opened[1].id
    assert not box.is_soiled


def test_ordinary_outcomes_and_a_lost_box():
    box, opened = boxes(lambda argv, stdin, files: result(exit_code=1))
    assert box.exec(["false"]).exit_code == 1
    assert not box.is_soiled
    opened[0].lose()
    with pytest.raises(SandboxLost):
        box.run_python("1")
    box.renew(is_lost=True)
    assert box.run_python("1").exit_code == 1
    assert box.label == "none"


def test_a_specification_travels_as_json():
    spec = SandboxSpec("bwrap", Isolation.BWRAP_ROOT, Limits(processes=7, wall_s=1.5), "image", True)
    assert spec_from_dict(spec_to_dict(spec)) == spec
