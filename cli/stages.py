"""The pipeline as a graph: base -> SFT x domains -> GRPO x domains -> distillation -> evaluation.

`STAGE_FUNCTIONS` names the function of each kind of stage, imported only when the stage runs:
`function(context: StageContext) -> Mapping`, the mapping JSON-plain.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from consilience.cli.stage import Stage, StageContext, up_to
from consilience.conf.errors import ConfigError
from consilience.conf.fields import nearest
from consilience.conf.load import config_digest
from consilience.conf.rules import for_domain
from consilience.conf.schema import Config

StageFunction = Callable[[StageContext], Mapping[str, Any]]
StageFunctions = Mapping[str, str | StageFunction]

STAGE_FUNCTIONS: StageFunctions = MappingProxyType(
    {
        "base": "consilience.cli.supervised_stages:run_base",
        "sft": "consilience.cli.supervised_stages:run_sft",
        "grpo": "consilience.cli.grpo_stage:run_grpo",
        "distill": "consilience.cli.distill_stage:run_distill",
        "evaluate": "consilience.cli.evaluate:run_evaluate",
    }
)

SETTINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "base": ("model", "task", "base", "optimizer", "engine"),
        "sft": ("task", "sft", "optimizer", "engine"),
        "grpo": ("task", "grpo", "rollout", "rewards", "sandbox", "optimizer", "engine"),
        "distill": ("task", "distill", "teachers", "rollout", "optimizer", "engine"),
        "evaluate": ("task", "evaluate", "rollout", "rewards", "sandbox"),
    }
)
"""Groups a kind of stage depends on: a change of another group does not redo it."""

SAMPLING = ("grpo", "distill", "evaluate")
"""Kinds of stage that sample, and so need rollout workers."""

TRAINING = ("base", "sft", "grpo", "distill")
"""Kinds of stage that train, and so run on `engine.ranks` processes."""


def build_graph(cfg: Config, functions: StageFunctions = STAGE_FUNCTIONS) -> list[Stage]:
    """Every stage of `cfg`, in order. A stage with its own `init` checkpoint needs no earlier stage."""
    domains = list(cfg.task.domains)
    stages = [] if cfg.sft.init and cfg.distill.init else [_stage("base", cfg, functions, ())]
    for kind, before in (("sft", "base"), ("grpo", "sft/{}")):
        for domain in domains:
            own = for_domain(cfg, domain)
            needs = () if getattr(own, kind).init else (before.format(domain),)
            stages.append(_stage(kind, own, functions, needs, domain))
    stages.append(_stage("distill", cfg, functions, _distill_needs(cfg)))
    models = () if cfg.evaluate.checkpoint else tuple(stage.name for stage in stages)
    stages.append(_stage("evaluate", cfg, functions, models))
    return stages


def targets_of(cfg: Config, kind: str) -> list[str]:
    """Stages that `consilience KIND` is about: one domain's, or every domain's."""
    if kind in ("sft", "grpo"):
        domains = [cfg.specialist.domain] if cfg.specialist.domain else list(cfg.task.domains)
        return [f"{kind}/{domain}" for domain in domains]
    return ["evaluate" if kind == "run" else kind]


def chosen(cfg: Config, kind: str, stages: Iterable[Stage]) -> list[Stage]:
    """The targets of a verb and what they need. ConfigError if `run.from` names none of them."""
    picked = up_to(list(stages), targets_of(cfg, kind))
    names = [stage.name for stage in picked]
    if cfg.run.from_ is not None and cfg.run.from_ not in names:
        raise ConfigError(
            f"run.from is '{cfg.run.from_}', which is no stage of this; {nearest(cfg.run.from_, names)}"
        )
    return picked


def _distill_needs(cfg: Config) -> tuple[str, ...]:
    registry = cfg.teachers.registry
    own = (
        [t.domains[0] for t in registry.values() if t.checkpoint is None]
        if registry
        else list(cfg.task.domains)
    )
    return (*(() if cfg.distill.init else ("base",)), *(f"grpo/{domain}" for domain in dict.fromkeys(own)))


def _stage(
    kind: str, cfg: Config, functions: Mapping[str, Any], needs: tuple[str, ...], domain: str | None = None
) -> Stage:
    name = f"{kind}/{domain}" if domain else kind
    settings = config_digest(cfg, SETTINGS[kind])
    files, samples = tuple(_files(cfg, kind)), kind in SAMPLING
    run = _lazily(functions[kind])
    if kind in TRAINING and cfg.engine.ranks > 1:
        run = functools.partial(_on_ranks, run)
    return Stage(name, needs, run, cfg, settings, domain, files, samples)


def _lazily(
    function: str | Callable[[StageContext], Mapping[str, Any]],
) -> Callable[[StageContext], Mapping[str, Any]]:
    """A stage function that is imported when it is called, and travels to another process as its name."""
    return function if callable(function) else functools.partial(_call, function)


def _call(path: str, context: StageContext) -> Mapping[str, Any]:
    return load_function(path)(context)


def _on_ranks(run: StageFunction, context: StageContext) -> Mapping[str, Any]:
    from consilience.cli.rank_processes import on_ranks  # imports torch

    return on_ranks(run, context)


def load_function(path: str) -> Callable[..., Any]:
    """The function at "package.module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _files(cfg: Config, kind: str) -> Iterable[str]:
    """Files whose content decides a stage's result: data, reward code, checkpoints to start from."""
    yield from (d.path for d in cfg.task.domains.values() if d.path)
    kinds = (d.kind.rpartition(":")[0] for d in cfg.task.domains.values())
    yield from sorted({kind for kind in kinds if kind.endswith(".py")})
    if kind in ("grpo", "evaluate"):
        rewards = [cfg.rewards.path] if cfg.rewards.path else [d.reward for d in cfg.task.domains.values()]
        sources = (path.rpartition(":")[0] for path in rewards if path)
        yield from sorted({source for source in sources if source.endswith(".py")})
    if kind == "distill":
        yield from (t.checkpoint for t in cfg.teachers.registry.values() if t.checkpoint)
    start = cfg.evaluate.checkpoint if kind == "evaluate" else getattr(cfg, kind).init
    if start:
        yield start
