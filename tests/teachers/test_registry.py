"""Owners, and one clear error for each way a registry can be wrong."""

import pytest

from consilience.conf.errors import CheckpointError, ConfigError
from consilience.teachers.registry import TeacherRecord, TeacherRegistry


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_every_domain_finds_its_owner(folder):
    math = TeacherRecord("euler", folder, ("math", "logic"), 2.0)
    code = TeacherRecord("knuth", folder, ("code",))
    registry = TeacherRegistry([math, code])
    assert registry.owners("logic") == (math,) and registry.names("code") == "knuth"
    assert registry.get("euler") is math and list(registry) == [math, code] and len(registry) == 2


def test_an_unknown_name_or_domain_is_answered_with_the_nearest(folder):
    registry = TeacherRegistry([TeacherRecord("euler", folder, ("math",))])
    with pytest.raises(ConfigError, match="unknown teacher 'eular'; did you mean 'euler'"):
        registry.get("eular")
    with pytest.raises(ConfigError, match="no teacher owns domain 'maths'; did you mean 'math'"):
        registry.owners("maths")
    with pytest.raises(ConfigError, match="valid: math"):
        registry.owners("agent")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "registry is empty"),
        ([("a", ("x",), 1), ("a", ("y",), 1)], "teacher 'a' is registered twice"),
        ([("a", ("x", "y"), 1), ("b", ("y",), 1)], "domain 'y' has two teachers, 'a' and 'b'"),
        ([("a", ("x", "x"), 1)], "domain 'x' has two teachers"),
        ([("a", (), 1)], "owns no domain"),
        ([("a+b", ("x",), 1)], "a name has no '\\+'"),
        ([("a", ("x",), 0)], "weight 0; it must be finite and above 0"),
        ([("a", ("x",), float("nan"))], "weight nan"),
    ],
)
def test_records_that_contradict_each_other_are_refused(folder, rows, message):
    with pytest.raises(ConfigError, match=message):
        TeacherRegistry([TeacherRecord(name, folder, domains, weight) for name, domains, weight in rows])


def test_a_domain_may_be_shared_by_request(folder):
    rows = [("math", ("x", "y")), ("style", ("y",))]
    records = [TeacherRecord(name, folder, domains) for name, domains in rows]
    registry = TeacherRegistry(records, is_shared=True)
    assert registry.names("x") == "math" and registry.names("y") == "math+style"
    with pytest.raises(ConfigError, match=r"unless teachers\.shared=true"):
        TeacherRegistry(records)
    with pytest.raises(ConfigError, match="domain 'x' has two teachers, 'a' and 'a'"):
        TeacherRegistry([TeacherRecord("a", folder, ("x", "x"))], is_shared=True)


def test_a_missing_checkpoint_is_named_with_the_key_that_sets_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint folder .*teachers\.registry\.a\.checkpoint"):
        TeacherRegistry([TeacherRecord("a", tmp_path / "nowhere", ("x",))])
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        TeacherRegistry([TeacherRecord("a", tmp_path, ("x",))])
