"""The held judge box: clean at every start, replaced after trouble, described truthfully."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from consilience.conf.errors import SandboxLost
from consilience.rewards.judge_box import JudgeBox, spec_from_dict, spec_to_dict
from consilience.sandboxes.blocking import BlockingSandbox
from consilience.sandboxes.fake import FakeSandbox, result
from consilience.sandboxes.protocol import ExecStatus, Isolation, Limits, SandboxSpec


def boxes(script, gradings_per_box=1000):
    """A JudgeBox over fakes, and the list of the fakes it opened."""
    opened = []

    def start():
        opened.append(FakeSandbox(script))
        return BlockingSandbox(opened[-1])

    return JudgeBox(start, gradings_per_box=gradings_per_box), opened


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


def test_each_grading_has_a_box_of_its_own_unless_told_otherwise():
    box, opened = boxes(lambda argv, stdin, files: b"ok", gradings_per_box=1)
    ids = []
    for _ in range(3):
        box.begin()
        box.run_python("1")
        ids.append(box.id)
    assert len(set(ids)) == 3 and [fake._lost is None for fake in opened] == [False, False, True]
    box.begin()
    box.begin()  # nothing ran in between: the box is as good as new
    assert len(opened) == 4
    shared, few = boxes(lambda argv, stdin, files: b"ok", gradings_per_box=2)
    for _ in range(4):
        shared.begin()
        shared.write("left", b"1")
    assert len(few) == 2 and [fake.num_resets for fake in few] == [1, 1]
    with pytest.raises(ValueError, match="at least 1"):
        boxes(lambda argv, stdin, files: b"", gradings_per_box=0)


def test_a_box_with_one_user_serves_one_grading_however_many_are_allowed():
    box, opened = boxes(lambda argv, stdin, files: b"ok")
    for number in range(1, 4):
        box.begin()
        box.run_python("1")
        opened[-1].is_reusable = False
        assert len(opened) == number and box.id == opened[-1].id


SNOOPS = """
import os, pwd, signal
print(os.getuid(), pwd.getpwuid(os.getuid()).pw_name)
print(sorted(os.listdir('/workspace') + os.listdir('/tmp') + os.listdir('/dev/shm')))
alive = [name for name in os.listdir('/proc') if name.isdigit() and int(name) not in (1, os.getpid())]
print(alive)
for place in ('/workspace', '/tmp', '/dev/shm'):
    os.makedirs(place + '/closed/deep')
    open(place + '/closed/deep/left', 'w').write('the expected answer')
    os.chmod(place + '/closed', 0)
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.close(1), os.close(2)
    signal.pause()
"""


@pytest.mark.timeout(120)
def test_gradings_that_share_a_box_share_neither_user_nor_files_nor_processes():
    spec = SandboxSpec(driver="bwrap", limits=Limits(workspace_bytes=1 << 20))
    box = JudgeBox.open(spec, gradings_per_box=3)
    try:
        seen = []
        for _ in range(4):
            box.begin()
            done = box.run_python(SNOOPS)
            who, left, alive = done.stdout.decode().splitlines()
            assert done.is_ok and left == alive == "[]" and who.endswith(" model"), done
            seen.append((box.id, who))
        assert len(set(seen)) == 4
        num_boxes = 2 if box.label == "bwrap_root" else 4  # with one user only, no box is shared
        assert len({box_id for box_id, _ in seen}) == num_boxes
    finally:
        box.close()


def _held(namespaces: list[str]) -> list[int]:
    """Descriptors of the named namespaces ("net:[4026532489]"), taken from a process that lives in them.

    While they are open the kernel gives their numbers to no other: afterwards it may, as with any inode.
    """
    missing, descriptors = set(namespaces), []
    for process in Path("/proc").glob("[0-9]*"):
        for name in sorted(missing):
            with suppress(OSError):  # the process ended, or is another's
                descriptor = os.open(process / "ns" / name.split(":")[0], os.O_RDONLY)
                if os.readlink(f"/proc/self/fd/{descriptor}") == name:
                    missing.discard(name)
                    descriptors.append(descriptor)
                else:
                    os.close(descriptor)
    assert not missing
    return descriptors


@pytest.mark.timeout(120)
def test_gradings_in_real_boxes_share_neither_box_nor_uid_nor_namespaces_nor_files():
    """What one leaves in every place that outlives a command is not there for the next."""
    program = (
        "import os, glob\n"
        "spaces = ('pid', 'mnt', 'net', 'ipc', 'uts')\n"
        "print(os.getuid(), *(os.readlink('/proc/self/ns/' + name) for name in spaces))\n"
        "print(glob.glob('/workspace/*') + glob.glob('/tmp/*') + glob.glob('/dev/shm/*'))\n"
        "for place in ('/workspace', '/tmp', '/dev/shm'): open(place + '/left', 'w').write('x')\n"
    )
    box = JudgeBox.open(SandboxSpec(driver="bwrap", limits=Limits(workspace_bytes=1 << 20)))
    box_ids, uids, namespaces, held = set(), set(), [], []
    try:
        for _ in range(3):
            box.begin()
            done = box.run_python(program)
            who, left = done.stdout.decode().splitlines()
            assert done.is_ok and left == "[]"
            uid, *spaces = who.split()
            held += _held(spaces)
            box_ids.add(box.id)
            uids.add(uid)
            namespaces += spaces
        assert len(box_ids) == 3 and len(set(namespaces)) == len(namespaces) == 15
        if box.label == "bwrap_root":
            assert len(uids) == 3
    finally:
        box.close()
        for descriptor in held:
            os.close(descriptor)
