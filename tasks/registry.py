"""The one place that chooses a domain by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consilience.conf.errors import TaskError
from consilience.conf.fields import nearest, setting
from consilience.tasks import (
    agent,
    code_domain,
    file_domain,
    mathematics,
    number_lists,
    own_class,
    repository,
)
from consilience.tasks.parameters import plain, read_parameters
from consilience.tasks.split_domain import SplitDomain
from consilience.tasks.splits import SplitFractions


@dataclass(frozen=True)
class DomainSettings:
    """What `load_domain` reads. null: the kind's own value."""

    name: str | None = setting(None, "name in records and reports; null: the kind")
    kind: str | None = setting(None, "one of KINDS, or a class: FILE.py:CLASS; null: the name")
    seed: int = setting(0, "seed of the order problems are drawn in; the splits do not depend on it", low=0)
    path: str | None = setting(None, "data file of kind=file")
    effort: str | None = setting(None, "chat, think, or an effort level of the protocol")
    reward: str | None = setting(None, "module:function or file.py:function")
    max_turns: int | None = setting(None, "assistant turns of an episode", low=1)
    max_tokens: int | None = setting(None, "tokens an episode may sample", low=1)
    needs_sandbox: bool | None = setting(None, "the reward function runs code")
    splits: SplitFractions = setting(SplitFractions, "expected shares of the splits")
    parameters: dict[str, Any] = setting({}, "the kind's own knobs")


def load_domain(settings: Mapping[str, Any] | str) -> SplitDomain:
    """A domain from its settings (or from its kind's name alone, with every default).

    TaskError on an unknown kind (with the nearest), an unknown or wrong setting, a data file that
    cannot be read. Importing reasoning_gym (2 s) happens here, and only for the kinds that use it.
    """
    given = plain({"kind": settings} if isinstance(settings, str) else settings)
    read = read_parameters(DomainSettings, given, where="domain")
    kind = read.kind or read.name or ""
    if kind not in KINDS and ":" not in kind:
        raise TaskError(f"unknown domain {kind!r}; {nearest(kind, KINDS)}")
    name = read.name or kind.rpartition(":")[2]
    domain = _own_class(name, read, kind) if ":" in kind else KINDS[kind](name, read)
    overrides = ("reward", "max_turns", "max_tokens", "needs_sandbox")
    for key in overrides:
        if getattr(read, key) is not None:
            setattr(domain, key, getattr(read, key))
    return domain


def _mathematics(name: str, read: DomainSettings) -> SplitDomain:
    parameters = read_parameters(
        mathematics.MathematicsParameters, read.parameters, where=f"{name}.parameters"
    )
    effort = read.effort or "think"
    source = mathematics.MathematicsSource(name, parameters, effort=effort, seed=read.seed)
    return SplitDomain(name, effort, mathematics.REWARD, 1, 48, False, source, fractions=read.splits)


def _code(name: str, read: DomainSettings) -> SplitDomain:
    parameters = read_parameters(code_domain.CodeParameters, read.parameters, where=f"{name}.parameters")
    effort = read.effort or "chat"
    source = code_domain.CodeSource(name, parameters, effort=effort, seed=read.seed)
    return SplitDomain(name, effort, code_domain.REWARD, 1, 96, True, source, fractions=read.splits)


def _agent(name: str, read: DomainSettings) -> SplitDomain:
    parameters = read_parameters(agent.AgentParameters, read.parameters, where=f"{name}.parameters")
    effort = read.effort or "think"
    source = agent.AgentSource(name, parameters, effort=effort, seed=read.seed)
    max_turns = parameters.hops + 2  # every call, the answer, and one call astray
    max_tokens = 96 * max_turns
    return SplitDomain(
        name, effort, agent.REWARD, max_turns, max_tokens, False, source, agent.TOOLS, fractions=read.splits
    )


def _number_lists(name: str, read: DomainSettings, form: str, reward: str) -> SplitDomain:
    kind = number_lists.NumberListsParameters
    parameters = read_parameters(kind, read.parameters, where=f"{name}.parameters")
    source = number_lists.NumberListsSource(name, parameters, form=form, seed=read.seed)
    return SplitDomain(name, read.effort or "chat", reward, 1, 256, True, source, fractions=read.splits)


def _programs(name: str, read: DomainSettings) -> SplitDomain:
    return _number_lists(name, read, "program", number_lists.PROGRAM_REWARD)


def _functions(name: str, read: DomainSettings) -> SplitDomain:
    return _number_lists(name, read, "function", number_lists.FUNCTION_REWARD)


def _repository(name: str, read: DomainSettings) -> SplitDomain:
    kind = repository.RepositoryParameters
    parameters = read_parameters(kind, read.parameters, where=f"{name}.parameters")
    source = repository.RepositorySource(name, parameters)
    fractions = read.splits if read.splits != SplitFractions() else FEW
    return SplitDomain(
        name, read.effort or "chat", repository.REWARD, 24, 8192, True, source, repository.TOOLS,
        fractions=fractions, hint="ask for fewer, or give parameters.folder tasks of your own",
    )  # fmt: skip


def _file(name: str, read: DomainSettings) -> SplitDomain:
    given = ({"path": read.path} if read.path is not None else {}) | dict(read.parameters)
    parameters = read_parameters(file_domain.FileParameters, given, where=f"{name}.parameters")
    source = file_domain.FileSource(name, parameters)
    reward = parameters.reward or file_domain.REWARD
    max_turns = 8 if source.tools else 1
    return SplitDomain(
        name, read.effort or "chat", reward, max_turns, 256, False, source, source.tools,
        fractions=read.splits, hint="ask for fewer, add rows, or give this split a larger share (splits)",
    )  # fmt: skip


def _own_class(name: str, read: DomainSettings, path: str) -> SplitDomain:
    source = own_class.OwnSource(name, path, read.parameters)
    effort = read.effort or source.setting("effort", "chat")
    limits = (source.setting("max_turns", 1), source.setting("max_tokens", 256))
    return SplitDomain(
        name, effort, f"{path}.score", *limits, source.setting("needs_sandbox", False), source, source.tools,
        fractions=read.splits, hint="ask for fewer, or have the class make more",
    )  # fmt: skip


# A dozen tasks: with the usual shares a split would be empty more often than not.
FEW = SplitFractions(0.6, 0.15, 0.25)

# Short and long names of the kinds.
KINDS = {
    "mathematics": _mathematics,
    "math": _mathematics,
    "code": _code,
    "agent": _agent,
    "programs": _programs,
    "functions": _functions,
    "repository": _repository,
    "file": _file,
}
