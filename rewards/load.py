"""From `package.module:function` or `file.py:function` to a reward function that can be called."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from consilience.conf.errors import RewardError
from consilience.conf.fields import nearest
from consilience.rewards.interface import RewardFunction

SIGNATURE = "score(completion, *, prompt, metadata, sandbox)"


def load_reward(path: str) -> RewardFunction:
    """The function `path` names (`CLASS.METHOD` for a static method); it may be a coroutine function.

    A file's folder joins the module search path, so that the file may import its neighbours.
    RewardError: the path has another form, the file or module is missing or raises on import, it has
    no such function (the nearest is named), or the function cannot take the four arguments.
    """
    place, separator, name = path.rpartition(":")
    names = name.split(".")
    if not separator or not place or not all(each.isidentifier() for each in names):
        raise RewardError(
            f"reward {path!r}: expected 'package.module:function' or 'file.py:function', "
            "such as rewards.path=my_rewards.py:score"
        )
    module = _import_file(place, path) if place.endswith(".py") else _import_module(place, path)
    function: Any = module
    for each in names:
        if not hasattr(function, each):
            functions = [n for n, v in vars(function).items() if callable(v) and not n.startswith("_")]
            raise RewardError(
                f"reward {path!r}: {place} has no function {name!r}; {nearest(each, functions)}"
            )
        function = getattr(function, each)
    _check_signature(function, path)
    return function


def _import_file(place: str, path: str) -> ModuleType:
    file = Path(place).expanduser().absolute()
    if not file.is_file():
        raise RewardError(f"reward {path!r}: there is no file {file}; give the path of an existing file")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    # A name of its own, so that a user's `json.py` replaces no module.
    module_name = f"consilience_reward_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise RewardError(f"reward {path!r}: {file} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _import_failed(path, str(file), error) from error
    return module


def _import_module(place: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _import_failed(path, place, error) from error


def _import_failed(path: str, place: str, error: BaseException) -> RewardError:
    where = ""
    if isinstance(error, SyntaxError) and error.lineno:
        where = f", line {error.lineno}"
    elif error.__traceback__ is not None:
        frames = inspect.getinnerframes(error.__traceback__, context=0)
        own = [frame.lineno for frame in frames if frame.filename == place]
        where = f", line {own[-1]}" if own else ""
    return RewardError(
        f"reward {path!r}: importing {place} failed{where} ({type(error).__name__}: {error}); "
        "repair it, or name another function"
    )


def _check_signature(function: Any, path: str) -> None:
    if not callable(function):
        raise RewardError(f"reward {path!r} is a {type(function).__name__}; a function {SIGNATURE} is needed")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a readable signature: the first call will tell
        return
    try:
        signature.bind(None, prompt="", metadata={}, sandbox=None)
    except TypeError as error:
        raise RewardError(
            f"reward {path!r} takes {signature} ({error}); it must be callable as {SIGNATURE}"
        ) from error
