"""A teacher is admitted or refused from its folder alone, with both values in the message."""

import json
import shutil
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

from consilience.conf.errors import AdmissionError, CheckpointError
from consilience.teachers.admission import (
    SELF_KL_BOUND,
    admit,
    check_loaded,
    check_self_kl,
    read_speech,
    read_templates,
    self_kl,
)
from consilience.teachers.fake_teacher import FakeTeacher

SPECIAL = [{"id": 0, "content": "<bos>", "special": True}, {"id": 1, "content": "<eos>", "special": True}]


def write_checkpoint(
    folder, *, vocab=12, rows=None, width=4, merges=("a b",), special=SPECIAL, eos=1, **tokenizer
):
    folder.mkdir(exist_ok=True)
    card = {"digest": "d", "special_tokens": {t["content"]: t["id"] for t in special}}
    files = {
        "config.json": {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": eos},
        "tokenizer.json": {"added_tokens": special, "model": {"merges": list(merges)}, **tokenizer},
        "consilience.json": card,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    save_file({"head.weight": torch.zeros(rows or vocab, width)}, folder / "model.safetensors")
    return folder


def test_a_teacher_of_another_width_with_the_same_speech_is_admitted(tmp_path):
    student = write_checkpoint(tmp_path / "s")
    teacher = write_checkpoint(tmp_path / "t", width=9, padding={"length": 5}, truncation=None)
    admit(student, teacher)
    assert read_speech(student).special_tokens == {"<bos>": 0, "<eos>": 1}


@pytest.mark.parametrize(
    ("change", "both_values"),
    [
        ({"vocab": 13}, ["vocab_size: student 12, teacher 13", "head_rows: student 12, teacher 13"]),
        ({"merges": ("b a",)}, ["tokenizer: student ", ", teacher "]),
        (
            {"special": [SPECIAL[0], SPECIAL[1] | {"content": "<end>"}]},
            ["special_tokens: student {<eos>=1}, teacher {<end>=1}"],
        ),
        ({"special": [SPECIAL[0], SPECIAL[1] | {"id": 7}]}, ["student {<eos>=1}, teacher {<eos>=7}"]),
        ({"eos": 2}, ["eos: student 1, teacher 2"]),
        ({"rows": 11}, ["teacher 'x': head.weight has 11 rows for a vocabulary of 12"]),
    ],
)
def test_a_teacher_that_speaks_differently_is_refused_with_both_values(tmp_path, change, both_values):
    student = write_checkpoint(tmp_path / "s")
    teacher = write_checkpoint(tmp_path / "t", **change)
    with pytest.raises(AdmissionError) as error:
        admit(student, teacher, "x")
    assert all(part in str(error.value) for part in both_values)
    assert "same tokenizer.json" in str(error.value)


def change(folder, name, **values):
    """Set values of a JSON file of a checkpoint."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def refusal(student, teacher):
    with pytest.raises(AdmissionError) as error:
        admit(student, teacher, "x")
    return str(error.value)


def test_a_teacher_that_was_prompted_otherwise_is_refused_with_both_templates(tmp_path):
    student, teacher = write_checkpoint(tmp_path / "s"), write_checkpoint(tmp_path / "t")
    change(student, "consilience.json", family="official")
    admit(student, teacher)  # the teacher's folder does not say
    change(teacher, "consilience.json", family="preview")
    assert "family: student official, teacher preview" in refusal(student, teacher)
    change(teacher, "consilience.json", family="official")
    admit(student, teacher)
    (student / "chat_template.jinja").write_text("{{ a }}")
    change(teacher, "tokenizer_config.json", chat_template="{{ a }}")
    admit(student, teacher)
    change(teacher, "tokenizer_config.json", chat_template="{{ b }}")
    ours, theirs = read_templates(student), read_templates(teacher)
    assert f"chat_template: student {ours['chat_template']}, teacher {theirs['chat_template']}" in refusal(
        student, teacher
    )


def test_a_released_folders_encoder_tells_its_family(tmp_path):
    student, teacher = write_checkpoint(tmp_path / "s"), write_checkpoint(tmp_path / "t")
    change(student, "consilience.json", family="official")
    (teacher / "consilience.json").unlink()
    (teacher / "encoding").mkdir()
    (teacher / "encoding" / "encoding_dsv4.py").write_text('REASONING_EFFORT_MAX = "think"\n')
    assert "family: student official, teacher preview" in refusal(student, teacher)


@pytest.mark.parametrize(
    ("key", "value", "neutral"),
    [("logit_scale", 0.0625, 1.0), ("logits_scaling", 8, 1), ("final_logit_softcapping", 30.0, None)],
)
def test_logits_that_are_more_than_state_times_head_are_refused_on_either_side(tmp_path, key, value, neutral):
    student, teacher = write_checkpoint(tmp_path / "s"), write_checkpoint(tmp_path / "t")
    change(teacher, "config.json", **{key: neutral})
    admit(student, teacher)
    change(teacher, "config.json", **{key: value})
    said = refusal(student, teacher)
    assert (
        f"teacher 'x': {key} is {value}" in said
        and f"scales: student {{}}, teacher {{{key}={value}}}" in said
    )
    change(student, "config.json", **{key: value})
    assert f"student: {key} is {value}" in refusal(student, teacher)  # both alike are not rebuilt either


def test_special_tokens_declared_by_the_card_alone_count_too(tmp_path):
    student, teacher = write_checkpoint(tmp_path / "s"), write_checkpoint(tmp_path / "t")
    card = json.loads((teacher / "consilience.json").read_text()) | {"special_tokens": {"<bos>": 5}}
    (teacher / "consilience.json").write_text(json.dumps(card))
    with pytest.raises(AdmissionError, match="declared_tokens"):
        admit(student, teacher)


NAMES = ["config.json", "tokenizer.json", "consilience.json"]


@pytest.mark.parametrize(("name", "content"), [*product(NAMES, ("{", "[1]")), *product(NAMES[:2], (None,))])
def test_a_file_that_is_missing_or_broken_is_a_checkpoint_error_that_names_it(tmp_path, name, content):
    student, teacher = write_checkpoint(tmp_path / "s"), write_checkpoint(tmp_path / "t")
    (teacher / name).unlink()
    if content is not None:
        (teacher / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        admit(student, teacher)


@pytest.mark.parametrize("added", [3, ["<bos>"], [{"content": "<bos>"}]])
def test_added_tokens_that_are_none_and_a_template_that_is_no_text_are_checkpoint_errors(tmp_path, added):
    student, teacher = write_checkpoint(tmp_path / "s"), write_checkpoint(tmp_path / "t")
    (teacher / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        admit(student, teacher)
    change(teacher, "tokenizer.json", added_tokens=added)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: added_tokens"):
        admit(student, teacher)


def test_a_folder_without_a_card_was_released_and_declares_what_its_tokenizer_adds(tmp_path):
    student, teacher = write_checkpoint(tmp_path / "s"), write_checkpoint(tmp_path / "t")
    (teacher / "consilience.json").unlink()
    admit(student, teacher)
    assert read_speech(teacher) == read_speech(student)
    card = json.loads((student / "consilience.json").read_text()) | {"special_tokens": {"<bos>": 5}}
    (student / "consilience.json").write_text(json.dumps(card))
    with pytest.raises(AdmissionError, match="declared_tokens"):
        admit(student, teacher)


def test_a_folder_without_weights_is_a_checkpoint_error(tmp_path):
    student = write_checkpoint(tmp_path / "s")
    teacher = tmp_path / "t"
    shutil.copytree(student, teacher, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(CheckpointError, match=r"index\.json is missing"):
        admit(student, teacher)


def test_a_vocabulary_size_that_is_no_number_is_a_checkpoint_error(tmp_path):
    student = write_checkpoint(tmp_path / "s")
    (student / "config.json").write_text('{"vocab_size": "many"}')
    with pytest.raises(CheckpointError, match="vocab_size 'many'"):
        read_speech(student)


def test_a_model_has_no_kl_to_itself_and_another_model_has():
    ids = [[3, 1, 4, 1, 5], [9, 2, 6]]
    same = self_kl(FakeTeacher("a", seed=1), FakeTeacher("b", seed=1), ids)
    assert abs(check_self_kl(same)) <= 1e-6
    other = self_kl(FakeTeacher("a", seed=1), FakeTeacher("b", seed=2), ids)
    with pytest.raises(AdmissionError, match=r"at most 1e-06 is allowed"):
        check_self_kl(other)
    with pytest.raises(AdmissionError, match="nan"):
        check_self_kl(float("nan"))


def test_a_loaded_teacher_has_no_kl_to_itself():
    assert check_loaded(FakeTeacher("math")) <= SELF_KL_BOUND
    assert check_loaded(FakeTeacher("math", dtype=torch.bfloat16)) <= SELF_KL_BOUND


class Damaged(FakeTeacher):
    """Its head, or its states, changed."""

    def __init__(self, change_head=lambda h: h, change_state=lambda h: h):
        super().__init__("math")
        self._head, self.change_state = change_head(self._head), change_state

    def score(self, token_ids, positions):
        return [self.change_state(state) for state in super().score(token_ids, positions)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"change_head": lambda h: h * float("nan")}, "teacher 'math': its KL to itself is nan nats"),
        ({"change_head": lambda h: h * 1e30, "change_state": lambda h: h * 1e30}, "to itself is nan nats"),
        ({"change_state": lambda h: h.where(h < 1, float("inf"))}, "to itself is nan nats"),
        ({"change_state": lambda h: h[:, :5]}, "states of width 5 and a head of 8"),
    ],
)
def test_a_loaded_teacher_that_is_damaged_is_refused_with_the_number(change, message):
    with pytest.raises(AdmissionError, match=message):
        check_loaded(Damaged(**change))
