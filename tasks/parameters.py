"""From a mapping (YAML, JSON, keyword arguments) to one domain's typed parameters.

Every domain documents its knobs as a frozen dataclass of `conf/fields.py` settings; this is the one
place that reads a user's mapping into it, so that each wrong key or value gives the same message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from consilience.conf.errors import ConfigError, TaskError
from consilience.conf.fields import read_record

ParametersT = TypeVar("ParametersT")


def read_parameters(kind: type[ParametersT], given: Mapping[str, Any] | None, *, where: str) -> ParametersT:
    """A `kind` from plain data; absent keys keep their defaults. `where` opens the messages.

    TaskError on an unknown key (with the nearest one), a value of another type or out of range.
    """
    try:
        return read_record(kind, plain(given or {}), where)
    except ConfigError as error:
        raise TaskError(str(error)) from error


def require(condition: bool, message: str) -> None:
    """TaskError with `message` unless the condition holds."""
    if not condition:
        raise TaskError(message)


def plain(value: Any) -> Any:
    """The value with mappings as dicts and sequences as lists (an OmegaConf node becomes plain)."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [plain(v) for v in value]
    return value
