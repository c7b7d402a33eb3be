"""Task files: read strictly, split by content, and their own worked solutions are whole."""

import pytest

from consilience.conf.errors import TaskError
from consilience.tasks.registry import load_domain
from consilience.tasks.repository import FOLDER, edits_of, read_repository, task_names


def test_every_task_is_in_one_split_and_none_is_empty():
    domain = load_domain("repository")
    found = [
        len(domain.problems(split, num)) for split, num in (("train", 5), ("validation", 4), ("test", 3))
    ]
    assert sum(found) == len(task_names())


@pytest.mark.parametrize("name", task_names())
def test_the_hunks_of_each_right_patch_are_edits_that_fit_one_place(name):
    repository = read_repository(FOLDER / f"{name}.toml")
    for path, hunks in edits_of(repository.gold).items():
        text = repository.base[path]
        for old, new in hunks:
            assert text.count(old) == 1
            text = text.replace(old, new)
    assert 50 <= sum(text.count("\n") for text in repository.base.values()) <= 150


def test_a_folder_of_ones_own_and_a_choice_of_tasks(tmp_path):
    (tmp_path / "mine.toml").write_text((FOLDER / "spans.toml").read_text())
    given = {"kind": "repository", "parameters": {"folder": str(tmp_path)}}
    domain = load_domain({**given, "splits": {"train": 1.0, "validation": 0.0, "test": 0.0}})
    assert domain.problems("train", 1)[0].files == read_repository(FOLDER / "spans.toml").base
    with pytest.raises(TaskError, match="unknown task 'span'; did you mean 'spans'"):
        load_domain({"kind": "repository", "parameters": {"tasks": ["span"]}})
    with pytest.raises(TaskError, match="no task file"):
        load_domain({"kind": "repository", "parameters": {"folder": str(tmp_path / "none")}})


@pytest.mark.parametrize(
    "change, words",
    [("nonsense\n", "cannot be read"), ("extra = 1\n", "unknown key 'extra'"), ("", "issue must be a str")],
)
def test_a_task_file_that_is_wrong_says_how(tmp_path, change, words):
    text = (FOLDER / "spans.toml").read_text()
    (tmp_path / "a.toml").write_text(change + text if change else text.replace("issue =", "isue ="))
    with pytest.raises(TaskError, match=words):
        read_repository(tmp_path / "a.toml")
