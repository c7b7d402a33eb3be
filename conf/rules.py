"""What must hold between settings, checked once after each setting was read on its own.

Standard library only. Every rule raises ConfigError and says which key to change.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from consilience.conf.cut_rules import check_cut
from consilience.conf.errors import ConfigError
from consilience.conf.expert_rules import check_experts
from consilience.conf.fields import nearest, read_record
from consilience.conf.placement_rules import check_placement
from consilience.conf.schema import KINDS, Config, DomainConfig, GrpoConfig, SftConfig
from consilience.conf.token_count import token_count
from consilience.conf.zero_rules import check_zero

PER_DOMAIN_GROUPS = ("sft", "grpo", "rollout", "optimizer")
PLOT_FORMATS = (".png", ".svg", ".pdf")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_rules(cfg: Config) -> Config:
    """`cfg` itself. ConfigError on the first rule it breaks."""
    _check_domains(cfg)
    _check_specialists(cfg)
    _check_teachers(cfg)
    _check_sizes(cfg)
    _check_shares(cfg)
    _check_model(cfg)
    _check_sandbox(cfg)
    _check_engine(cfg)
    _check_sampler(cfg)
    _check_ranks(cfg)
    check_cut(cfg)
    check_zero(cfg)
    check_experts(cfg)
    check_placement(cfg)
    _check_vllm(cfg)
    _check_files(cfg)
    _check_plan(cfg)
    if cfg.rollout.speculative and cfg.rollout.prefix_store.path is not None:
        raise ConfigError(
            "rollout.prefix_store.path is set and rollout.speculative too, but prefixes on disk hold no "
            "state of the MTP block; set one of them to null or false"
        )
    if not NAME.fullmatch(cfg.run.name):
        raise ConfigError(
            f"run.name is '{cfg.run.name}', but it names a folder: letters, digits, '_', '.', '-', at most 64"
        )
    return cfg


def sampler_quantization(cfg: Config) -> str:
    """How the rollout workers compute: `rollout.quantization`, or as the trainer does."""
    return cfg.rollout.quantization or cfg.engine.quantization


def check_domain(cfg: Config, name: str, key: str) -> None:
    """ConfigError unless `name` is a configured domain."""
    if name not in cfg.task.domains:
        raise ConfigError(f"{key} names unknown domain '{name}'; {nearest(name, cfg.task.domains)}")


def _check_domains(cfg: Config) -> None:
    if not cfg.task.domains:
        raise ConfigError("task.domains is empty, but at least one domain is needed; take task=three")
    for name, domain in cfg.task.domains.items():
        key = f"task.domains.{name}"
        if not NAME.fullmatch(name):
            raise ConfigError(f"{key}: a domain's name is letters, digits, '_', '.', '-', at most 64")
        _check_domain_source(key, domain)
        if domain.max_tokens is not None and domain.max_tokens >= cfg.rollout.max_length:
            raise ConfigError(
                f"{key}.max_tokens is {domain.max_tokens}, but rollout.max_length is "
                f"{cfg.rollout.max_length} with the prompt; raise rollout.max_length or lower max_tokens"
            )


def _check_domain_source(key: str, domain: DomainConfig) -> None:
    if ":" in domain.kind:
        _check_code_path(f"{key}.kind", domain.kind, "CLASS")
    elif domain.kind not in KINDS:
        raise ConfigError(f"{key}.kind is unknown: '{domain.kind}'; {nearest(domain.kind, KINDS)}")
    if domain.kind == "file":
        if domain.path is None:
            raise ConfigError(f"{key}.kind is 'file' without a file; set {key}.path=PROBLEMS.jsonl")
        if not Path(domain.path).is_file():
            raise ConfigError(f"{key}.path is '{domain.path}', but no such file exists")
    elif domain.path is not None:
        raise ConfigError(f"{key}.path is for kind=file, but kind is '{domain.kind}'; set {key}.kind=file")


def _check_specialists(cfg: Config) -> None:
    if cfg.specialist.domain is not None:
        check_domain(cfg, cfg.specialist.domain, "specialist.domain")
    if cfg.generate.domain is not None:
        check_domain(cfg, cfg.generate.domain, "generate.domain")
    for name, groups in cfg.specialist.settings.items():
        check_domain(cfg, name, "specialist.settings")
        for group, values in groups.items():
            key = f"specialist.settings.{name}.{group}"
            if group not in PER_DOMAIN_GROUPS:
                raise ConfigError(
                    f"{key}: only some groups vary by domain; {nearest(group, PER_DOMAIN_GROUPS)}"
                )
            read_record(type(getattr(cfg, group)), values, key)


def for_domain(cfg: Config, domain: str) -> Config:
    """`cfg` as the specialist of `domain` sees it: its own settings applied. ConfigError if unknown."""
    check_domain(cfg, domain, "specialist.domain")
    changed = {}
    for group, values in cfg.specialist.settings.get(domain, {}).items():
        current = getattr(cfg, group)
        own = read_record(type(current), values, f"specialist.settings.{domain}.{group}")
        names = [f.name for f in dataclasses.fields(current) if f.name.rstrip("_") in values]
        changed[group] = dataclasses.replace(current, **{name: getattr(own, name) for name in names})
    specialist = dataclasses.replace(cfg.specialist, domain=domain)
    return dataclasses.replace(cfg, specialist=specialist, **changed)


def _check_teachers(cfg: Config) -> None:
    owner: dict[str, str] = {}
    for name, teacher in cfg.teachers.registry.items():
        key = f"teachers.registry.{name}"
        if not NAME.fullmatch(name):
            raise ConfigError(f"{key}: a teacher's name is letters, digits, '_', '.', '-', at most 64")
        if not teacher.domains:
            raise ConfigError(f"{key}.domains is empty; name the domains it owns: {key}.domains=[math]")
        for domain in teacher.domains:
            check_domain(cfg, domain, f"{key}.domains")
            if domain in owner and not cfg.teachers.shared:
                raise ConfigError(
                    f"domain '{domain}' has two teachers, '{owner[domain]}' and '{name}'; keep one, or set "
                    "teachers.shared=true to add up their weighted KLs"
                )
            owner[domain] = name
        if teacher.checkpoint is None and len(teacher.domains) > 1:
            raise ConfigError(
                f"{key} owns {len(teacher.domains)} domains and has no checkpoint; set {key}.checkpoint"
            )
    if cfg.teachers.engine == "vllm":
        _check_vllm_python(cfg)
    elif cfg.teachers.settings:
        raise ConfigError(
            "teachers.settings are arguments of vLLM; set teachers.engine=vllm, or leave them out"
        )
    missing = sorted(set(cfg.task.domains) - set(owner)) if owner else []
    if missing:
        raise ConfigError(
            f"domain '{missing[0]}' has no teacher; add it to one of teachers.registry.*.domains"
        )


def _check_shares(cfg: Config) -> None:
    for key, shares in (("base.shares", cfg.base.shares), ("distill.shares", cfg.distill.shares)):
        for name, share in shares.items():
            check_domain(cfg, name, key)
            if not (0 <= share < float("inf")):
                raise ConfigError(f"{key}.{name} is {share}; a share is 0 or more")
        if not sum(shares.get(name, 1.0) for name in cfg.task.domains) > 0:
            raise ConfigError(f"{key} leaves no domain a share; give at least one a value above 0")
    for key, noise in (("base.noise", cfg.base.noise), ("sft.noise", cfg.sft.noise)):
        for name, share in noise.items():
            check_domain(cfg, name, key)
            if not 0 <= share <= 1:
                raise ConfigError(f"{key}.{name} is {share}; a share of noise lies between 0 and 1")


def _check_sizes(cfg: Config) -> None:
    for domain in (None, *cfg.task.domains):
        own, key = (
            (cfg, "") if domain is None else (for_domain(cfg, domain), f"specialist.settings.{domain}.")
        )
        for name in ("base", "sft"):
            _check_rows(getattr(own, name), key + name)
        _check_corrections(own.grpo, key + "grpo")
        _check_truncation(own, key)
        if own.grpo.mini_batches > own.grpo.prompts_per_step:
            _too_many_parts(key + "grpo", own.grpo.mini_batches, own.grpo.prompts_per_step)
    if cfg.distill.mini_batches > cfg.distill.prompts_per_step:
        _too_many_parts("distill", cfg.distill.mini_batches, cfg.distill.prompts_per_step)
    if cfg.distill.reward_weight and cfg.distill.samples_per_prompt < 2:
        raise ConfigError(
            f"distill.reward_weight is {cfg.distill.reward_weight}, but an advantage needs several samples "
            "of a prompt to compare; set distill.samples_per_prompt to 2 or more"
        )
    if cfg.distill.reward_weight and cfg.distill.balance == "update":
        raise ConfigError(
            "distill.balance=update measures what teachers pull, and distill.reward_weight pulls too; set "
            "one of them to weights or 0"
        )
    if cfg.evaluate.num_problems > cfg.task.num_test:
        raise ConfigError(
            f"evaluate.num_problems is {cfg.evaluate.num_problems}, but task.num_test offers "
            f"{cfg.task.num_test}; raise task.num_test"
        )


def _check_corrections(grpo: GrpoConfig, key: str) -> None:
    weights = ("token_truncate", "token_mask", "sequence_truncate")
    given = [name for name in weights if getattr(grpo, name) is not None]
    if len(given) > 1:
        raise ConfigError(
            f"{key}.{given[0]} and {key}.{given[1]} both weight by the same ratios; set one of them to null"
        )
    for name in ("token_mask", "sequence_mask", "geometric_mask"):
        bounds = getattr(grpo, name)
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ConfigError(f"{key}.{name} is {list(bounds)}; write [LOW,HIGH] with LOW below HIGH")


def _check_truncation(cfg: Config, key: str) -> None:
    grpo = cfg.grpo
    cuts = [n for n, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)) if getattr(grpo, n) != off]
    if cuts and not grpo.replay_kept_sets:
        raise ConfigError(
            f"{key}grpo.{cuts[0]} is {getattr(grpo, cuts[0])}: GRPO weights tokens by probability ratios, "
            "which mean nothing between a truncated sampler and a trainer that does not know what was kept; "
            f"set {key}grpo.replay_kept_sets=true, or leave top_k, top_p and min_p at 0, 1 and 0"
        )
    if grpo.replay_kept_sets and not cuts:
        raise ConfigError(
            f"{key}grpo.replay_kept_sets is true, but nothing is cut; set {key}grpo.top_p below 1, top_k or "
            "min_p, or leave it false"
        )
    if cuts and cfg.rollout.speculative:
        raise ConfigError(
            f"{key}grpo.{cuts[0]} is {getattr(grpo, cuts[0])}, but drafts are judged by the whole "
            "distribution; set rollout.speculative=false"
        )


def _check_rows(sft: SftConfig, key: str) -> None:
    if sft.row_tokens > sft.tokens_per_step:
        raise ConfigError(
            f"{key}.row_tokens is {sft.row_tokens}, more than a step's {sft.tokens_per_step} tokens"
        )
    quiet, back = sft.anticipatory.quiet_steps, sft.anticipatory.rollback_steps
    if quiet < 2 * back:
        raise ConfigError(
            f"{key}.anticipatory.quiet_steps is {quiet}, but a spike lies up to 2 · rollback_steps = "
            f"{2 * back} steps ahead after a rollback and must be met with it on; raise it to {2 * back}"
        )


def _too_many_parts(key: str, parts: int, prompts: int) -> None:
    raise ConfigError(f"{key}.mini_batches is {parts}, but a step has {prompts} prompts; lower it")


def _check_model(cfg: Config) -> None:
    model = cfg.model
    ratios, layers = model.compress_ratios, model.num_hidden_layers
    if ratios is not None and layers is not None and len(ratios) != layers:
        raise ConfigError(
            f"model.compress_ratios has {len(ratios)} entries for {layers} layers; give one a layer"
        )
    pairs = (("qk_rope_head_dim", "head_dim"), ("num_experts_per_tok", "n_routed_experts"))
    for small, large in pairs:
        few, many = getattr(model, small), getattr(model, large)
        if few is not None and many is not None and few > many:
            raise ConfigError(f"model.{small} is {few}, more than model.{large} = {many}")


def _check_engine(cfg: Config) -> None:
    words = cfg.engine.recompute
    if not words or ("none" in words and len(words) > 1):
        raise ConfigError(
            f"engine.recompute is {list(words)}; write none alone, or what the backward computes again"
        )


def _check_sampler(cfg: Config) -> None:
    sampler, trainer = sampler_quantization(cfg), cfg.engine.quantization
    if cfg.rollout.proof == "off" and sampler != trainer:
        raise ConfigError(
            f"rollout.quantization is {sampler}, engine.quantization {trainer}: samples then come from "
            "another model than the one that trains, which must be measured; set rollout.proof=start"
        )


def _check_ranks(cfg: Config) -> None:
    engine = cfg.engine
    if engine.ranks % engine.context_ranks:
        raise ConfigError(
            f"engine.context_ranks is {engine.context_ranks}, which does not divide engine.ranks="
            f"{engine.ranks}; set it to a divisor of engine.ranks, 1 for whole rows on every rank"
        )
    if engine.shard_state and engine.kind != "torch":
        raise ConfigError(
            f"engine.shard_state divides the state of engine.kind=torch, and this is {engine.kind}, which "
            "divides it anyway; set engine.shard_state=false"
        )
    if engine.bf16_exchange and not engine.shard_state:
        raise ConfigError(
            "engine.bf16_exchange is how gradients reach those who keep a part of the state; set "
            "engine.shard_state=true too, or engine.bf16_exchange=false"
        )
    if engine.offload and engine.kind != "deepspeed":
        raise ConfigError("engine.offload is of engine.kind=deepspeed; set one of them")


def _check_vllm(cfg: Config) -> None:
    if cfg.rollout.engine != "vllm":
        return
    for key, is_on in (
        ("rollout.speculative", cfg.rollout.speculative),
        ("engine.exact", cfg.engine.exact),
        ("grpo.replay_kept_sets", cfg.grpo.replay_kept_sets),
    ):
        if is_on:
            raise ConfigError(f"{key}=true is of the native engine; vLLM has it not: set it to false")
    if cfg.rollout.prefix_store.path is not None:
        raise ConfigError("rollout.prefix_store.path is of the native engine; with vLLM set it to null")
    if {cfg.grpo.mode, cfg.distill.mode} != {"sync"}:
        raise ConfigError("vLLM takes nothing in while it samples; set grpo.mode and distill.mode to sync")
    if cfg.rollout.proof != "off":
        raise ConfigError(
            "rollout.proof=start reads back what a worker holds, and vLLM packs its weights: each update is "
            "proven by log-probabilities instead; set rollout.proof=off"
        )
    _check_vllm_python(cfg)


def _check_vllm_python(cfg: Config) -> None:
    python = cfg.rollout.vllm.python
    if python is not None and not Path(python).is_file():
        raise ConfigError(f"rollout.vllm.python is '{python}', but no such file exists; make vllm builds one")


def _check_sandbox(cfg: Config) -> None:
    weak = cfg.sandbox.min_isolation in ("none", "rlimit")
    if (weak or cfg.sandbox.driver == "insecure_subprocess") and not cfg.sandbox.allow_insecure:
        raise ConfigError(
            "sandbox.driver=insecure_subprocess and min_isolation below bwrap_user run model code almost "
            "unprotected; set sandbox.allow_insecure=true if you trust it"
        )
    if cfg.sandbox.driver == "insecure_subprocess" and not weak:
        raise ConfigError(
            f"sandbox.driver=insecure_subprocess cannot reach "
            f"sandbox.min_isolation={cfg.sandbox.min_isolation}; set sandbox.min_isolation=rlimit"
        )


def _check_files(cfg: Config) -> None:
    rewards = {f"task.domains.{n}.reward": d.reward for n, d in cfg.task.domains.items()}
    for key, path in {"rewards.path": cfg.rewards.path, **rewards}.items():
        if path is not None:
            _check_code_path(key, path, "FUNCTION")
    for key, folder in _checkpoints(cfg):
        if folder is not None and not (Path(folder) / "config.json").is_file():
            raise ConfigError(
                f"{key} is '{folder}', but no checkpoint lies there (no config.json); "
                "give a folder under runs/<name>/stages/<stage>/checkpoints/"
            )


def _check_plan(cfg: Config) -> None:
    if cfg.plan.context is not None:
        token_count(cfg.plan.context, "plan.context")
    if cfg.plan.plot is not None:
        path = Path(cfg.plan.plot)
        if path.suffix.lower() not in PLOT_FORMATS:
            raise ConfigError(f"plan.plot is '{path}'; its name must end in {', '.join(PLOT_FORMATS)}")
        if not path.parent.is_dir():
            raise ConfigError(f"plan.plot is '{path}', but there is no folder '{path.parent}'")


def _check_code_path(key: str, path: str, what: str) -> None:
    source, colon, name = path.rpartition(":")
    if not colon or not source or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{key} is '{path}', but FILE.py:{what} or package.module:{what} is needed")
    if source.endswith(".py") and not Path(source).is_file():
        raise ConfigError(f"{key} is '{path}', but there is no file '{source}' in {Path.cwd()}")


def _checkpoints(cfg: Config) -> Iterable[tuple[str, str | None]]:
    for group in ("base", "sft", "grpo", "distill"):
        yield f"{group}.init", getattr(cfg, group).init
    yield "evaluate.checkpoint", cfg.evaluate.checkpoint
    yield "generate.checkpoint", cfg.generate.checkpoint
    yield "plan.checkpoint", cfg.plan.checkpoint
    for name, teacher in cfg.teachers.registry.items():
        yield f"teachers.registry.{name}.checkpoint", teacher.checkpoint
