"""What is left in a box, as a patch: read back by the strict reader it gives the workspace again."""

import pytest

from consilience.rewards.patches import apply_patch
from consilience.rewards.workspace import workspace_patch
from consilience.rollout.boxes import FakeBoxes
from consilience.sandboxes.blocking import open_blocking
from consilience.sandboxes.protocol import Isolation, SandboxSpec

SPEC = SandboxSpec(driver="insecure_subprocess", min_isolation=Isolation.NONE, allow_insecure=True)
FILES = {"pkg/a.py": "x = 1\ny = 2\n", "pkg/b.py": "z = 3", "notes.txt": "a\x0cb\n"}


def box_with(**files):
    box = FakeBoxes(1).lease()
    for path, text in FILES.items():
        box.write(path, text.encode())
    box.files.update({name.replace("__", "/").replace("_py", ".py"): data for name, data in files.items()})
    return box


def changed(box):
    return apply_patch(workspace_patch(box, FILES), FILES, allowed=("*",))


def test_nothing_changed_is_an_empty_patch():
    assert workspace_patch(box_with(), FILES) == ""


def test_changed_removed_and_new_files_come_back():
    box = box_with(pkg__a_py=b"x = 1\ny = 5\n", pkg__c_py=b"new = 1")
    del box.files["pkg/b.py"]
    assert changed(box).files == {"pkg/a.py": "x = 1\ny = 5\n", "pkg/b.py": None, "pkg/c.py": "new = 1"}


def test_an_end_of_line_is_a_change_like_any_other():
    assert changed(box_with(pkg__b_py=b"z = 3\n")).files == {"pkg/b.py": "z = 3\n"}
    assert changed(box_with(pkg__a_py=b"x = 1\ny = 2")).files == {"pkg/a.py": "x = 1\ny = 2"}


def test_what_running_leaves_and_what_is_no_text_is_left_out():
    box = box_with()
    more = {
        "pkg/__pycache__/a.pyc": b"\0",
        ".cache/x": b"x",
        "core": b"\xff\xfe",
        "d\n.py": b"x",
        "e.py": b"a\r\n",
    }
    box.files.update(more)
    assert workspace_patch(box, FILES) == ""


def test_a_file_that_is_no_text_any_more_counts_as_removed():
    assert changed(box_with(pkg__a_py=b"\xff")).files == {"pkg/a.py": None}


def test_tests_and_start_up_files_are_in_the_patch_and_dropped_by_its_reader():
    box = box_with()
    box.files |= {"conftest.py": b"x\n", "sitecustomize.py": b"x\n", "tests/test_a.py": b"x\n"}
    applied = changed(box)
    assert applied.files == {} and set(applied.dropped) == {
        "conftest.py",
        "sitecustomize.py",
        "tests/test_a.py",
    }


@pytest.fixture(scope="module")
def real():
    box = open_blocking(SPEC)
    yield box
    box.destroy()


def test_a_real_box_links_odd_names_and_running_programs_included(real):
    for path, text in FILES.items():
        real.write(path, text.encode())
    script = "rm pkg/b.py; ln -s /etc/passwd pkg/b.py; ln -s / root; echo 'x = 7' > pkg/a.py; echo y > '-rf'"
    real.exec(["sh", "-c", script + "; mkfifo p; nohup sleep 60 & exit 0"])
    assert changed(real).files == {"pkg/a.py": "x = 7\n", "pkg/b.py": None, "-rf": "y\n"}
    real.reset()
