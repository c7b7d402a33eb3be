import json

import pytest

from consilience.conf.errors import RunError
from consilience.rollout.frame_file import read_frames
from consilience.rollout.ledger import PromptLedger


def opened(folder):
    return PromptLedger(folder / "ledger.log")


def test_each_sample_is_trained_on_once_and_a_resume_undoes_what_the_weights_forgot(tmp_path):
    ledger = opened(tmp_path)
    for step in range(3):
        uids = [f"{step}/a", f"{step}/b"]
        ledger.issued(step, uids)
        ledger.stored(uids)
        ledger.trained(step, uids)
    ledger.check()
    ledger.close()
    again = opened(tmp_path)  # after a crash, from the checkpoint before step 1
    again.resumed(1)
    assert again.missing() == ["1/a", "1/b", "2/a", "2/b"]
    with pytest.raises(RunError, match="4 of 6 samples were issued and not trained on, 1/a the first"):
        again.check()
    for step in (1, 2):
        again.trained(step, [f"{step}/a", f"{step}/b"])
    opened(tmp_path).check()


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda ledger: ledger.issued(1, ["a"]), "issued in step 0 and again in step 1"),
        (lambda ledger: ledger.stored(["x"]), "never issued"),
        (lambda ledger: ledger.trained(0, ["b"]), "not stored"),
        (lambda ledger: ledger.trained(1, ["a"]), "not its own"),
        (lambda ledger: ledger.trained(0, ["a", "a"]), "a sample twice"),
        (lambda ledger: ledger.dropped(0, ["b"], "x"), "dropped b, which is not stored"),
        (lambda ledger: [ledger.dropped(0, ["a"], "x"), ledger.trained(0, ["a"])], "which was dropped"),
        (
            lambda ledger: [ledger.trained(0, ["a"]), ledger.trained(0, ["a"])],
            "trained on in step 0 and again",
        ),
    ],
)
def test_what_would_lose_or_double_a_sample_is_refused_before_it_is_written(tmp_path, act, message):
    ledger = opened(tmp_path)
    ledger.issued(0, ["a", "b"])
    ledger.stored(["a"])
    with pytest.raises(RunError, match=message):
        act(ledger)
    again = opened(tmp_path)
    assert again.missing() in (["b"], ["a", "b"])
    again.stored(["b"])
    again.trained(0, again.missing())
    again.check()


def test_dropped_samples_are_not_missing_and_stay_dropped_after_a_resume(tmp_path):
    ledger = opened(tmp_path)
    ledger.issued(0, ["a", "b", "c"])
    ledger.stored(["a", "b", "c"])
    ledger.dropped(0, ["a", "b"], "a: lost: box 7 is gone")
    ledger.dropped(0, ["b", "a"], "again")
    ledger.trained(0, ["c"])
    ledger.check()
    ledger.close()
    again = opened(tmp_path)
    again.resumed(0)
    assert again.missing() == ["c"]
    events = [json.loads(payload) for payload in read_frames(again.path).payloads]
    dropped = [event for event in events if event["event"] == "dropped"]
    assert dropped == [
        {"event": "dropped", "step": 0, "uids": ["a", "b"], "reason": "a: lost: box 7 is gone"}
    ]


def test_events_that_say_nothing_new_are_not_written(tmp_path):
    ledger = opened(tmp_path)
    ledger.issued(0, ["a"])
    ledger.stored(["a"])
    size = (tmp_path / "ledger.log").stat().st_size
    ledger.issued(0, ["a"])
    ledger.stored(["a"])
    ledger.resumed(0)
    assert (tmp_path / "ledger.log").stat().st_size == size


def test_a_ledger_torn_at_any_byte_is_one_from_before(tmp_path):
    ledger = opened(tmp_path)
    states = []
    for step in range(3):
        for event in ("issued", "stored", "trained"):
            args = ([f"{step}"],) if event == "stored" else (step, [f"{step}"])
            getattr(ledger, event)(*args)
            states.append((ledger.missing(), len(ledger._stored)))
    whole = (tmp_path / "ledger.log").read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "ledger.log").write_bytes(whole[:cut])
        torn = opened(tmp_path)
        assert (torn.missing(), len(torn._stored)) in [([], 0), *states]
        torn.close()


def test_dropped_samples_are_accounted_for_and_never_trained_on(tmp_path):
    ledger = opened(tmp_path)
    ledger.issued(0, ["a", "b", "c"])
    ledger.stored(["a", "b", "c"])
    ledger.trained(0, ["a"])
    with pytest.raises(RunError, match="dropped a, trained on in step 0"):
        ledger.dropped(0, ["a"], "why")
    with pytest.raises(RunError, match="dropped b, which is not stored or not its own"):
        ledger.dropped(1, ["b"], "why")
    ledger.dropped(0, ["b", "c"], "why")
    ledger.dropped(0, ["b"], "why")
    again = opened(tmp_path)
    again.check()
    with pytest.raises(RunError, match="step 0 trained on b, which was dropped"):
        again.trained(0, ["b"])
    again.resumed(0)
    assert again.missing() == ["a"]  # the weights forgot a; b and c stay given up
