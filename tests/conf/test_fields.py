"""One setting at a time: what is taken, what is refused, what the refusal says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from consilience.conf.errors import ConfigError
from consilience.conf.fields import bounds_text, fields_of, nearest, read_record, setting


@dataclass(frozen=True)
class Inner:
    size: int = setting(4, "a size", unit="bytes", low=1)


@dataclass(frozen=True)
class Sample:
    steps: int = setting(3, "steps", low=1, high=9)
    lr: float = setting(0.5, "rate", above=0)
    is_on: bool = setting(True, "switch")
    name: str | None = setting(None, "a name", choices=("left", "right"))
    ratios: tuple[int, ...] = setting((), "list", low=0)
    pair: tuple[float, float] = setting((0.1, 0.2), "two", low=0, high=1)
    inner: Inner = setting(Inner, "nested")
    words: tuple[str, ...] = setting((), "words", choices=("red", "green"))
    many: dict[str, Inner] = setting({}, "free names")
    from_: str = setting("", "a keyword")


def test_absent_keys_keep_their_defaults_and_given_ones_are_converted():
    sample = read_record(
        Sample, {"steps": 1e0, "lr": 2, "ratios": [0, 4], "many": {"a": {"size": 7}}, "from": 12}
    )
    assert sample == Sample(steps=1, lr=2.0, ratios=(0, 4), many={"a": Inner(7)}, from_="12")
    assert isinstance(sample.lr, float)
    assert isinstance(sample.steps, int)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"stepz": 1}, "'x.stepz'; did you mean 'steps'?"),
        ({"steps": 0}, "x.steps is 0, out of range (allowed: 1 to 9)"),
        ({"steps": 10}, "out of range"),
        ({"steps": 1.5}, "a whole number is needed"),
        ({"steps": True}, "a whole number is needed"),
        ({"steps": None}, "x.steps is null"),
        ({"lr": 0}, "out of range (allowed: above 0)"),
        ({"lr": float("nan")}, "finite"),
        ({"lr": "fast"}, "'fast', but a finite number"),
        ({"is_on": 1}, "true or false"),
        ({"name": "lefd"}, "did you mean 'left'?"),
        ({"ratios": 4}, "a list is needed"),
        ({"ratios": "4"}, "a list is needed"),
        ({"words": ["red", "grean"]}, "did you mean 'green'?"),
        ({"words": "blue"}, "x.words[0] is 'blue'"),
        ({"ratios": [4, -1]}, "x.ratios[1] is -1"),
        ({"pair": [0.1]}, "exactly 2"),
        ({"inner": 3}, "group of settings"),
        ({"inner": {"size": 0}}, "x.inner.size is 0, out of range (allowed: at least 1 bytes)"),
        ({"many": {"a": {"sise": 1}}}, "'x.many.a.sise'; did you mean 'size'?"),
        ({"many": [1]}, "names with their settings"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key_and_what_is_allowed(raw, said):
    with pytest.raises(ConfigError) as refused:
        read_record(Sample, raw, "x")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_one_word_is_a_list_of_one_word():
    assert read_record(Sample, {"words": "red"}) == read_record(Sample, {"words": ["red"]})
    assert read_record(Sample, {"words": ["red", "green"]}).words == ("red", "green")


def test_mutable_defaults_are_not_shared():
    assert Sample().many is not Sample().many


def test_a_keyword_field_is_written_without_its_underscore():
    assert "from" in fields_of(Sample)


def test_nothing_near_lists_everything():
    assert nearest("zzz", ["b", "a"]) == "valid: a, b"


def test_bounds_read_as_words():
    assert bounds_text({"low": 1, "high": 9}) == "1 to 9"
    assert bounds_text({"low": 1}) == "at least 1"
    assert bounds_text({"above": 0}) == "above 0"
    assert bounds_text({"above": 0, "high": 2}) == "above 0 to 2"
    assert bounds_text({"high": 2}) == "at most 2"
    assert bounds_text({"choices": ("a", "b")}) == "a | b"
