"""A user's file as a domain by configuration alone, and what each broken file says."""

import json

import pytest

from consilience.conf.errors import ConfigError, TaskError
from consilience.tasks.registry import load_domain
from consilience.tasks.splits import SPLITS


def write(folder, rows, name="data.jsonl"):
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(file)


def everything(domain, num):
    """Every problem of a small file, whatever its split."""
    found = [problem for split in SPLITS for problem in _all_of(domain, split)]
    assert len(found) == num
    return found


def _all_of(domain, split):
    found = []
    while True:
        try:
            found += domain.problems(split, 1, start=len(found))
        except TaskError:
            return found


def test_user_turns_are_what_the_user_says_after_each_answer(tmp_path):
    rows = [{"prompt": f"p{i}", "user_turns": [f"then {i}", "thanks"], "answer": "x"} for i in range(40)]
    domain = load_domain({"name": "m", "kind": "file", "path": write(tmp_path, rows)})
    found = everything(domain, 40)
    assert {p.user_turns for p in found} == {(f"then {i}", "thanks") for i in range(40)}


def test_columns_become_prompt_and_answer(tmp_path):
    path = write(tmp_path, [{"question": f"{i} + 1 =", "solution": i + 1} for i in range(40)])
    settings = {
        "name": "mine",
        "kind": "file",
        "path": path,
        "parameters": {"columns": {"prompt": "question", "answer": "solution"}},
    }
    domain = load_domain(settings)
    problems = everything(domain, 40)
    assert len(problems) == 40
    assert {p.messages[0]["content"]: p.metadata["answer"] for p in problems} == {
        f"{i} + 1 =": i + 1 for i in range(40)
    }
    assert {p.domain for p in problems} == {"mine"}
    assert domain.reward == "consilience.rewards.exact_match:score"


def test_messages_metadata_files_tools_and_demos_of_any_shape_are_kept_exactly(tmp_path):
    rows = [
        {
            "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": f"q{i}"}],
            "difficulty": i if i % 2 else "easy",
            "source": {"a": [i]} if i % 3 else None,
            "files": {f"f{i}": "text"},
            "demo": [{"role": "assistant", "content": f"a{i}"}],
        }
        for i in range(12)
    ]
    parameters = {"columns": {"metadata": ["difficulty", "source"]}, "tools": ["read"], "system": "Be brief."}
    domain = load_domain(
        {"kind": "file", "path": write(tmp_path, rows), "parameters": parameters, "max_turns": 3}
    )
    problems = {p.messages[1]["content"]: p for p in everything(domain, 12)}
    assert len(problems) == 12
    for i in range(12):
        problem = problems[f"q{i}"]
        assert problem.messages[0]["content"] == "Be brief.\n\nS"
        assert problem.metadata == {"difficulty": rows[i]["difficulty"], "source": rows[i]["source"]}
        assert problem.files == {f"f{i}": "text"}
        assert problem.demo == ({"role": "assistant", "content": f"a{i}"},)
    assert (domain.tools, domain.max_turns) == (("read",), 3)


@pytest.mark.parametrize("kind", ["mathematics", "agent", "code"])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_domain_written_to_a_file_reads_back_as_the_same_problems(tmp_path, kind, suffix):
    original = load_domain(kind)
    file = str(tmp_path / f"data.{suffix}")
    dataset = original.as_dataset("train", 15)
    dataset.to_parquet(file) if suffix == "parquet" else dataset.to_json(file)
    copies = {
        p.messages[-1]["content"]: p for p in everything(load_domain({"kind": "file", "path": file}), 15)
    }
    for problem in original.problems("train", 15):
        copy = copies[problem.messages[-1]["content"]]
        for name in ("messages", "metadata", "files", "demo"):
            assert json.dumps(getattr(copy, name)) == json.dumps(getattr(problem, name))


def test_splits_follow_the_content_not_the_order_of_rows(tmp_path):
    rows = [{"prompt": f"question {i}", "answer": "x"} for i in range(60)]
    one = load_domain({"kind": "file", "path": write(tmp_path, rows, "one.jsonl")})
    other = load_domain({"kind": "file", "path": write(tmp_path, [*rows[::-1], *rows[:5]], "other.jsonl")})
    for split in SPLITS:
        (first,) = one.problems(split, 1)
        assert first.id in {p.id for p in _all_of(other, split)}
    assert {p.id for p in everything(one, 60)} == {p.id for p in everything(other, 60)}
    assert other.num_duplicates == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        (b'{"prompt": "a"}\n\xff\xfe\n', "line 2 is not JSON"),
        (b"[1, 2]\n", "line 1 is a list"),
        (b"\n\n", "has no rows"),
        (b"", "has no rows"),
        (b'{"question": "a"}\n', "neither a 'prompt' nor a 'messages' column.*question"),
        (b'{"prompt": ""}\n', "row 1: the prompt is ''"),
        (b'{"prompt": "a"}\n{"answer": "b"}\n', "row 2: the prompt is None"),
        (b'{"messages": "hello"}\n', "row 1, column 'messages' is not JSON"),
        (
            b'{"messages": [{"role": "usr", "content": "a"}]}\n',
            "message 1 has role 'usr'; did you mean 'user'",
        ),
        (b'{"prompt": "a", "files": [1]}\n', "row 1, column 'files' is a list"),
    ],
)
def test_each_broken_file_is_one_error_that_says_where(tmp_path, content, words):
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(TaskError, match=words):
        load_domain({"kind": "file", "path": str(file)}).problems("train", 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs a path"),
        ({"path": "/nowhere/data.jsonl"}, "no data file '/nowhere/data.jsonl'"),
        (
            {"parameters": {"columns": {"prompt": "promt"}}},
            "no column 'promt' .wanted as prompt.; did you mean 'prompt'",
        ),
        ({"parameters": {"columns": {"promt": "prompt"}}}, "unknown role 'promt'; did you mean 'prompt'"),
        ({"parameters": {"columns": {"metadata": ["answer", "levle"]}}}, "no column 'levle'"),
        ({"parameters": {"colums": {}}}, "did you mean 'file.parameters.columns'|did you mean 'columns'"),
    ],
)
def test_each_mistake_in_the_settings_is_named(tmp_path, settings, words):
    path = write(tmp_path, [{"prompt": "a", "answer": "b", "level": 1}])
    given = {"kind": "file", **settings} if settings == {} else {"kind": "file", "path": path, **settings}
    with pytest.raises(TaskError, match=words):
        load_domain(given)


def test_an_unknown_tool_is_refused_before_anything_is_sampled(tmp_path):
    path = write(tmp_path, [{"prompt": "a"}])
    with pytest.raises(ConfigError, match="unknown tool browse"):
        load_domain({"kind": "file", "path": path, "parameters": {"tools": ["browse"]}})


def test_too_few_rows_say_how_many_there_are_and_what_to_do(tmp_path):
    path = write(tmp_path, [{"prompt": str(i)} for i in range(30)])
    with pytest.raises(TaskError, match=r"split 'test' has \d distinct problems, 512 are needed.*add rows"):
        load_domain({"kind": "file", "path": path}).problems("test", 512)


def test_a_damaged_parquet_file_and_other_formats_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is not it")
    (tmp_path / "a.csv").write_text("prompt\na\n")
    with pytest.raises(TaskError, match="no readable parquet file"):
        load_domain({"kind": "file", "path": str(tmp_path / "a.parquet")})
    with pytest.raises(TaskError, match=r"ends in '.csv'; .jsonl and .parquet"):
        load_domain({"kind": "file", "path": str(tmp_path / "a.csv")})
