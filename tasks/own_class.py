"""A user's class as a domain: problems, limits and judge in one place (`examples/` has one).

    task.domains.mine.kind=my_environment.py:MyEnvironment    (or package.module:MyEnvironment)

The class takes the domain's `parameters` as keyword arguments and has

    problem(index)   the index-th problem as a mapping, or None where there are no more:
                     prompt (text) or messages; and if wanted metadata, files, demo (an answer, or messages)
    score(completion, *, prompt, metadata, sandbox)    a static method, the reward (rewards/interface.py)

and may set tools, max_turns, max_tokens, needs_sandbox and effort. Its module declares `TIER` if it likes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consilience.conf.errors import TaskError
from consilience.rollout.tools import declare_tools
from consilience.tasks.domain import Problem
from consilience.tasks.parameters import plain, require
from consilience.tasks.splits import content_id

KEYS = ("prompt", "messages", "metadata", "files", "demo")


class OwnSource:
    """The problems of one instance of the class (a `Source`)."""

    def __init__(self, domain: str, path: str, parameters: Mapping[str, Any]) -> None:
        """TaskError: the class cannot be loaded, refuses its parameters, or lacks a method."""
        self.domain, self.path = domain, path
        kind = load_class(path)
        for method in ("problem", "score"):
            require(callable(getattr(kind, method, None)), f"{path}: the class has no method {method!r}.")
        try:
            self.environment = kind(**parameters)
        except TypeError as error:
            raise TaskError(f"{domain}.parameters: {path} refuses them ({error}).") from error
        self.tools = tuple(getattr(self.environment, "tools", ()))

    def setting(self, name: str, default: Any) -> Any:
        """What the class says, or else `default`."""
        return getattr(self.environment, name, default)

    def draw(self, index: int) -> tuple[str, Any] | None:
        row = self.environment.problem(index)
        if row is None:
            return None
        where = f"{self.path}, problem {index}"
        require(isinstance(row, Mapping), f"{where} is a {type(row).__name__}; a mapping is needed.")
        row = plain(row)
        for key in row:
            require(key in KEYS, f"{where}: unknown key {key!r}; there are {', '.join(KEYS)}.")
        require(bool(row.get("prompt") or row.get("messages")), f"{where} has neither prompt nor messages.")
        return content_id("own", row.get("prompt"), row.get("messages"), row.get("files")), row

    def build(self, problem_id: str, draft: Mapping[str, Any]) -> Problem:
        messages = draft.get("messages") or [{"role": "user", "content": draft["prompt"]}]
        demo = draft.get("demo") or ()
        return Problem(
            id=problem_id,
            domain=self.domain,
            messages=tuple(declare_tools(messages, self.tools)),
            metadata=draft.get("metadata") or {},
            files=draft.get("files") or {},
            demo=({"role": "assistant", "content": demo},) if isinstance(demo, str) else tuple(demo),
        )


def load_class(path: str) -> type:
    """The class that `FILE.py:CLASS` or `package.module:CLASS` names. TaskError."""
    place, _, name = path.rpartition(":")
    try:
        module = _file_module(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise TaskError(f"kind {path!r}: importing it failed ({type(error).__name__}: {error}).") from error
    kind = getattr(module, name, None)
    require(isinstance(kind, type), f"kind {path!r}: {place} has no class {name!r}.")
    return kind  # type: ignore[return-value]


def _file_module(file: Path) -> Any:
    file = file.expanduser().absolute()
    # A name of its own, so that a user's `json.py` replaces no module.
    name = f"consilience_domain_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
