"""One setting of the configuration: its default, what it means, its unit and its range.

`setting(...)` is what every field of conf/schema.py is made of; `read_record` turns plain data into
a frozen dataclass of such fields and refuses what does not fit, naming the nearest valid choice.
Standard library only: this file is imported before torch, ray or hydra.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from consilience.conf.errors import ConfigError

Record = TypeVar("Record")


def setting(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    speed_only: bool = False,
) -> Any:
    """A dataclass field. `low <= value <= high`; `above < value` excludes the border itself.

    Bounds hold for the numbers inside a tuple too, choices for the strings inside it. `speed_only`
    marks what changes how fast a result comes, never which: changing it redoes no finished stage.
    """
    meta = {"doc": doc, "unit": unit, "low": low, "above": above, "high": high, "choices": choices}
    meta["speed_only"] = speed_only
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=meta)
    if isinstance(default, type) and dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=default, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def key_of(field: dataclasses.Field[Any]) -> str:
    """The configuration key of a field: `from_` is written `from`."""
    return field.name.rstrip("_")


@functools.cache
def fields_of(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Configuration key -> (field, resolved type)."""
    hints = get_type_hints(cls)
    return {key_of(f): (f, hints[f.name]) for f in dataclasses.fields(cls)}


def nearest(word: str, valid: Iterable[str]) -> str:
    """What may stand instead of `word`: the nearest valid name, or all of them if none is near."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(names)}" if names else "there is none to choose from"


def read_record(cls: type[Record], raw: Mapping[str, Any], path: str = "") -> Record:
    """A `cls` from plain data; keys that are absent keep their defaults.

    ConfigError names the full key, what was found, what is allowed.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{path or 'config'} is {_shown(raw)}, but it is a group of settings; write {path}.KEY=VALUE"
        )
    fields = fields_of(cls)
    values = {}
    for key, value in raw.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise ConfigError(f"unknown setting '{where}'; {nearest(str(key), fields)}")
        field, hint = fields[key]
        values[field.name] = read_value(hint, value, where, field.metadata)
    return cls(**values)


def read_value(hint: Any, value: Any, path: str, meta: Mapping[str, Any]) -> Any:
    """`value` as the type `hint` asks for, inside the bounds of `meta`. ConfigError otherwise."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return read_value(next(a for a in args if a is not type(None)), value, path, meta)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return read_record(hint, value, path)  # type: ignore[arg-type]
    if origin is dict:
        return _read_mapping(args[1], value, path, meta)
    if origin is tuple:
        if isinstance(value, str) and args[0] is str:
            value = [value]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} is {_shown(value)}, but a list is needed; write {path}=[a,b]")
        items = tuple(read_value(args[0], v, f"{path}[{i}]", meta) for i, v in enumerate(value))
        if len(args) > 1 and args[1] is not Ellipsis and len(items) != len(args):
            raise ConfigError(f"{path} has {len(items)} entries, but exactly {len(args)} are needed")
        return items
    return _in_bounds(_read_scalar(hint, value, path, meta), path, meta)


def _read_mapping(item: Any, value: Any, path: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} is {_shown(value)}, but names with their settings are needed")
    return {str(k): read_value(item, v, f"{path}.{k}", meta) for k, v in value.items()}


def _read_scalar(hint: type, value: Any, path: str, meta: Mapping[str, Any]) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and is_number and math.isfinite(value) and value == int(value):
        return int(value)  # 1e3 is a whole number
    if hint is float and is_number and math.isfinite(value):
        return float(value)
    if hint is str and (isinstance(value, str) or is_number):
        return str(value)
    wanted = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}[hint]
    raise ConfigError(f"{path} is {_shown(value)}, but {wanted} is needed{_allowed(meta)}")


def _in_bounds(value: Any, path: str, meta: Mapping[str, Any]) -> Any:
    choices = meta.get("choices") or ()
    if choices and value not in choices:
        raise ConfigError(f"{path} is {_shown(value)}; {nearest(str(value), choices)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    low, above, high = meta.get("low"), meta.get("above"), meta.get("high")
    too_low = (low is not None and value < low) or (above is not None and value <= above)
    if too_low or (high is not None and value > high):
        raise ConfigError(f"{path} is {value}, out of range{_allowed(meta)}")
    return value


def bounds_text(meta: Mapping[str, Any]) -> str:
    """The range or choices of a field in words: "1 to 64", "above 0", "auto | docker"."""
    if meta.get("choices"):
        return " | ".join(meta["choices"])
    low, above, high = meta.get("low"), meta.get("above"), meta.get("high")
    start = f"{low:g}" if low is not None else f"above {above:g}" if above is not None else ""
    if high is not None:
        return f"{start} to {high:g}" if start else f"at most {high:g}"
    return f"at least {start}" if low is not None else start


def _allowed(meta: Mapping[str, Any]) -> str:
    text = " ".join(part for part in (bounds_text(meta), meta.get("unit", "")) if part)
    return f" (allowed: {text})" if text else ""


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
