"""Command-line overrides, checked against the schema before Hydra composes anything.

Hydra needs `+` for a key that a YAML file does not list; here the schema says what exists, so
`task.domains.mine.kind=file` needs no sign. `GROUP=OPTION` picks a file of conf/GROUP, everything
else sets a value.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from consilience.conf.errors import ConfigError
from consilience.conf.fields import fields_of, nearest
from consilience.conf.schema import Config

CONF = Path(__file__).resolve().parent


def group_options(config_dirs: Sequence[Path]) -> dict[str, list[str]]:
    """Group -> the options its folders offer, sorted. Groups come from the schema alone."""
    groups = {}
    for group in fields_of(Config):
        files = (f for root in config_dirs for f in (root / group).glob("*.yaml"))
        groups[group] = sorted({f.stem for f in files})
    return groups


def normalise(override: str, options: Mapping[str, Sequence[str]]) -> str:
    """One override as Hydra takes it. ConfigError if its key or option does not exist."""
    if override.startswith("~"):
        check_key(override[1:].partition("=")[0])
        return override
    key, equals, value = override.lstrip("+").partition("=")
    if not equals:
        raise ConfigError(f"'{override}' is no override; write KEY=VALUE, for example grpo.steps=10")
    if key in options:
        return _choose(key, value.strip(), options[key])
    if "." not in key:
        raise ConfigError(f"unknown group '{key}'; {nearest(key, options)}")
    check_key(key)
    if "^" in value and "'" not in value:  # 2^20: outside quotes Hydra's grammar has no such sign
        value = f"'{value}'"
    return f"++{key}={value}"


def own_setting(verb: str, override: str) -> str:
    """`plan context=1M` as `plan plan.context=1M`: a verb's own group may be left out.

    ConfigError if the key is neither a setting of that group nor a group.
    """
    groups = fields_of(Config)
    key, equals, _ = override.partition("=")
    if verb not in groups or not equals or key in groups or not key.isidentifier():
        return override
    own = fields_of(groups[verb][1])
    if key not in own:
        raise ConfigError(f"unknown setting '{key}' of {verb}; {nearest(key, [*own, *groups])}")
    return f"{verb}.{override}"


def _choose(group: str, option: str, options: Sequence[str]) -> str:
    if option in options:
        return f"{group}={option}"
    if group == "specialist":  # any domain is a specialist; the loader checks that it exists
        return f"++specialist.domain={option}"
    raise ConfigError(f"group '{group}' has no option '{option}'; {nearest(option, options)}")


def check_key(key: str) -> None:
    """ConfigError unless the dotted key exists in the schema (names inside mappings are free)."""
    hint: Any = Config
    path: list[str] = []
    for part in key.split("."):
        hint = _inner(hint)
        if dataclasses.is_dataclass(hint):
            fields = fields_of(hint)  # type: ignore[arg-type]
            if part not in fields:
                rest = key.split(".")[len(path) + 1 :]
                raise ConfigError(f"unknown setting '{key}'; {_suggest(path, part, rest, fields)}")
            hint = fields[part][1]
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        elif hint is not Any:
            raise ConfigError(f"unknown setting '{key}': '{'.'.join(path)}' is a value and has no parts")
        path.append(part)


def _inner(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(a for a in get_args(hint) if a is not type(None))
    return hint


def _suggest(path: Sequence[str], part: str, rest: Sequence[str], fields: Mapping[str, Any]) -> str:
    """The nearest key beside the wrong one, with its whole path; else another group that has it."""
    text = nearest(part, fields)
    if text.startswith("did you mean"):
        full = ".".join([*path, text.split("'")[1], *rest])
        return f"did you mean '{full}'?"
    elsewhere = [g for g, (_, cls) in fields_of(Config).items() if part in fields_of(cls)]
    return f"did you mean '{elsewhere[0]}.{part}'?" if elsewhere else text
