"""Items reach the right reward process and come back in order, boxes reported truthfully."""

import json

import pytest

from consilience.conf.errors import RewardError, SandboxUnavailable
from consilience.rewards.grader import RewardGrader
from consilience.rollout.boxes import FakeBoxes
from consilience.rollout.grading import ExecutedCall, GradeItem
from consilience.rollout.records import OutcomeKind
from consilience.sandboxes.protocol import Isolation, SandboxSpec
from consilience.tasks.registry import load_domain

SPEC = SandboxSpec(driver="insecure_subprocess", min_isolation=Isolation.NONE, allow_insecure=True)


def grade_item(domain, problem, text, calls=()):
    return GradeItem(
        uid=problem.id,
        domain=domain.name,
        reward=domain.reward,
        prompt="",
        text=text,
        thinking="",
        token_ids=(5, 6),
        tool_calls=tuple(calls),
        finish="stop",
        metadata=problem.metadata,
        needs_sandbox=domain.needs_sandbox,
    )


def demo_item(domain, problem):
    results = [m["content"] for m in problem.demo if m["role"] == "tool"]
    made = [call["function"] for m in problem.demo for call in m.get("tool_calls", ())]
    calls = [ExecutedCall(f["name"], f["arguments"], r) for f, r in zip(made, results)]
    return grade_item(domain, problem, problem.demo[-1]["content"], calls)


def test_every_demo_of_every_domain_scores_one_and_another_answer_zero():
    domains = [load_domain(kind) for kind in ("mathematics", "code", "agent")]
    rows = [
        (d, p)
        for problems in zip(*(d.problems("train", 4) for d in domains))
        for d, p in zip(domains, problems)
    ]
    right = [demo_item(d, p) for d, p in rows]
    wrong = [grade_item(d, p, "999") for d, p in rows]
    with RewardGrader(sandbox=SPEC) as grader:
        verdicts = grader.grade([*right, *wrong])
        assert [v.reward for v in verdicts] == [1.0] * 12 + [0.0] * 12
        assert all(v.outcome.kind is OutcomeKind.GRADED and v.parts["correct"] == v.reward for v in verdicts)
        for item, verdict in zip([*right, *wrong], verdicts):
            assert len(verdict.sandbox_ids) == item.needs_sandbox
            assert item.needs_sandbox or verdict.isolation == "none"
        hostile = grade_item(domains[1], rows[1][1], "def f(x):\n while 1: pass")
        first, second = grader.grade([hostile, right[1]])
        assert (first.reward, first.outcome.kind, second.reward) == (0.0, OutcomeKind.GRADED, 1.0)
        assert first.sandbox_ids != second.sandbox_ids


def test_several_processes_share_a_batch_and_keep_its_order(tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "import os\ndef score(completion, *, prompt, metadata, sandbox):\n"
        " return {'reward': float(completion.text), 'pid': os.getpid()}"
    )
    items = [
        GradeItem(str(i), "d", f"{file}:score", "", str(i), "", (), (), "stop", {}) for i in range(20)
    ] + [GradeItem("none", "d", "", "", "", "", (), (), "stop", {})]
    with RewardGrader(num_processes=2) as grader:
        verdicts = grader.grade(items)
    assert [v.reward for v in verdicts] == [*map(float, range(20)), None]
    assert len({v.parts["pid"] for v in verdicts[:20]}) == 2
    assert "no reward function" in verdicts[-1].outcome.detail


def test_start_refuses_what_can_never_work(tmp_path):
    with RewardGrader() as grader, pytest.raises(RewardError, match="there is no file"):
        grader.start([("consilience.rewards.exact_match:score", False), (f"{tmp_path}/none.py:score", False)])
    strong = SandboxSpec(driver="insecure_subprocess", min_isolation=Isolation.VM)
    with RewardGrader(sandbox=strong) as grader, pytest.raises(SandboxUnavailable):
        grader.start([("consilience.rewards.code_scores:score", True)])


def test_metadata_crosses_unchanged(tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "import json\ndef score(completion, *, prompt, metadata, sandbox):\n"
        " return float(json.dumps(metadata, sort_keys=True) == prompt)"
    )
    metadata = {"a": [1, 2.5, None, True], "b": {"ü": "\ud800\n\u2028"}, "c": ""}
    prompt = json.dumps(metadata, sort_keys=True)
    item = GradeItem("1", "d", f"{file}:score", prompt, "", "", (), (), "stop", metadata)
    with RewardGrader() as grader:
        assert grader.grade([item])[0].reward == 1.0


def test_several_gradings_share_a_box_until_one_ends_badly_and_none_sees_what_another_left(tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "def score(completion, *, prompt, metadata, sandbox):\n"
        ' code = \'import glob, os; print(len(glob.glob("*"))); open("left", "w").close()\'\n'
        " found = sandbox.run_python(code).stdout\n"
        " if completion.text == 'hang': sandbox.run_python('while 1: pass', timeout_s=0.2)\n"
        " return float(found)"
    )
    texts = ["", "", "", "", "hang", "", ""]
    items = [
        GradeItem(str(i), "d", f"{file}:score", "", text, "", (), (), "stop", {}, needs_sandbox=True)
        for i, text in enumerate(texts)
    ]
    for spec in (SandboxSpec(driver="bwrap"), SPEC):
        with RewardGrader(sandbox=spec, gradings_per_box=3) as grader:
            verdicts = grader.grade(items)
        assert [v.reward for v in verdicts] == [0.0] * 7
        ids = [v.sandbox_ids[0] for v in verdicts]
        if verdicts[0].isolation == "bwrap_root":
            assert ids[0] == ids[1] == ids[2] and ids[3] == ids[4] and ids[5] == ids[6]
            assert len(set(ids)) == 3
        else:  # programs have one user there
            assert len(set(ids)) == 7


def test_an_episodes_own_box_is_asked_for_its_patch_only_where_the_judge_wants_a_box(tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "def score(completion, *, prompt, metadata, sandbox):\n"
        " return float(-1 if completion.patch is None else completion.patch.count('+x'))"
    )
    box = FakeBoxes(1).lease()
    box.write("a.py", b"x = 2\n")
    lost = FakeBoxes(1).lease()
    lost.is_lost = True

    def item(own, **more):
        more = {"files": {"a.py": "x = 1\n"}, "needs_sandbox": True, **more}
        return GradeItem("u", "d", f"{file}:score", "", "", "", (), (), "stop", {}, sandbox=own, **more)

    items = [item(box), item(None), item(box, needs_sandbox=False), item(box, files={}), item(lost)]
    with RewardGrader(sandbox=SPEC) as grader:
        verdicts = grader.grade(items)
    assert [v.reward for v in verdicts] == [1.0, -1.0, -1.0, -1.0, None]
    assert verdicts[-1].outcome.kind is OutcomeKind.INFRA
