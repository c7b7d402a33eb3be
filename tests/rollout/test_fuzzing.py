import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from consilience.conf.errors import ProtocolFault
from consilience.rollout.fuzz_cases import fuzz_tokenizer, make_case
from consilience.rollout.fuzzing import failure_of, main, shrink
from consilience.rollout.protocol_checks import Reference, check

TOKENIZER = fuzz_tokenizer()
KEPT = sorted((Path(__file__).parent / "kept_cases").glob("*.json"))


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_what_once_failed_holds(file):
    assert failure_of(json.loads(file.read_text())["case"], TOKENIZER) == ""


def test_a_case_is_known_by_seed_and_number_in_every_process():
    cases = [json.dumps(make_case(3, number, TOKENIZER)) for number in range(40)]
    assert len(set(cases)) == 40 and cases[0] != json.dumps(make_case(4, 0, TOKENIZER))
    code = (
        "import json; from consilience.rollout.fuzz_cases import fuzz_tokenizer, make_case;"
        "t = fuzz_tokenizer(); print(json.dumps([json.dumps(make_case(3, n, t)) for n in range(40)]))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == cases


def test_the_cases_reach_every_fault_and_much_that_is_accepted():
    outcomes = Counter(check(make_case(0, number, TOKENIZER), TOKENIZER) for number in range(1500))
    beyond = {
        ProtocolFault.EFFORT,
        ProtocolFault.UNICODE,
    }  # a case has a known effort; checks look into UNICODE
    assert set(outcomes) == {"accepted", *ProtocolFault} - beyond
    assert outcomes["accepted"] > 500


def test_a_failing_case_is_made_as_small_as_it_still_fails():
    case = {"kind": "parts", "parts": [["abXcd" * 50, True], ["e", False]], "more": {"k": [1, "y"]}}
    assert shrink(case, lambda smaller: "X" in json.dumps(smaller)) == {"parts": [["X"]]}


def test_a_short_run_finds_nothing_and_says_how_much_it_tried(tmp_path, capsys):
    assert main(["--seconds", "1", "--seed", "9", "--failures", str(tmp_path / "none")]) == 0
    assert "no promise broken" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_a_run_that_finds_something_fails_and_keeps_the_case(tmp_path, capsys):
    """A reference that encodes to nothing and reads nothing stands for a fault of ours."""
    file = tmp_path / "encoding_dsv4.py"
    file.write_text("encode_messages = lambda messages, mode, **options: ''\n")
    assert main(["--seconds", "60", "--reference", str(file), "--failures", str(tmp_path / "found")]) == 1
    (kept,) = (tmp_path / "found").glob("*.json")
    case = json.loads(kept.read_text())["case"]
    assert "AttributeError" in failure_of(case, TOKENIZER, Reference(file))
    assert str(kept) in capsys.readouterr().out
    assert main(["--reference", str(tmp_path / "missing.py")]) == 2
