"""The training stages: configuration and folders around the trainers of grpo/ and distill/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from consilience.cli.jobs import rollout_jobs
from consilience.cli.ray_session import domains_of, rollout_pool, worker_share
from consilience.cli.stage import StageContext
from consilience.conf.errors import ConfigError
from consilience.conf.schema import Config, OptimizerConfig, SftConfig
from consilience.distill.train import DistillSettings, TeacherSide, train_distill
from consilience.grpo.sft import Example, SupervisedSettings, train_supervised
from consilience.grpo.train import GrpoSettings, train_grpo
from consilience.model.checkpoint import to_official
from consilience.model.config import PRESETS, ModelConfig
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.encoding import encode_messages
from consilience.rollout.prompts import conversation_ids
from consilience.rollout.records import RolloutRecord
from consilience.rollout.store import RolloutStore
from consilience.rollout.tokenizer import Tokenizer
from consilience.tasks.corpus import Conversation, base_texts, join_episodes
from consilience.tasks.domain import Domain, Problem
from consilience.tasks.recall import recall_texts
from consilience.teachers.admission import admit
from consilience.teachers.heads import HeadCache
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.model_teacher import load_model_teacher
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import TeacherScheduler
from consilience.training.checkpoint import CheckpointMeta, load_checkpoint, read_meta
from consilience.training.metrics import FanOut, MetricsLog, read_metrics
from consilience.training.packing import row_length
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

TOKENIZER = "tokenizer.json"


# ---- base and SFT ---------------------------------------------------------------------------------


def run_base(context: StageContext) -> Mapping[str, Any]:
    """Tokenizer on the task text, then a model from random weights on every domain's train split."""
    cfg, settings = context.cfg, context.cfg.base
    domains = domains_of(cfg)
    texts = base_texts(
        list(domains.values()), settings.num_examples * len(domains), cfg.run.seed, noise=settings.noise
    )
    tokenizer_path = context.folder.path / TOKENIZER
    if not tokenizer_path.exists():
        sample = [encode_messages(c.messages, c.effort) for c in texts[: 1000 * len(domains)]]
        Tokenizer.train(sample, cfg.task.vocab_size).save(tokenizer_path)
    tokenizer = Tokenizer.load(tokenizer_path)
    model = initialize(Transformer(model_config(cfg, tokenizer)), cfg.run.seed)
    groups = []
    for name in domains:
        joined = join_episodes([c for c in texts if c.domain == name], settings.episodes)
        groups.append(encode(tokenizer, joined, settings.prompt_weight))
    shares = tuple(settings.shares.get(name, 1.0) for name in domains)
    if settings.recall:
        exercises = recall_texts(settings.num_examples, cfg.run.seed)
        groups.append(encode(tokenizer, exercises, settings.prompt_weight))
        shares = (*shares, settings.recall)
    return _supervised(context, settings, model, tokenizer_path, groups, parent=None, shares=shares)


def run_sft(context: StageContext) -> Mapping[str, Any]:
    """One specialist: worked solutions of its domain, loss on assistant tokens only."""
    cfg, settings = context.cfg, context.cfg.sft
    start = _start_folder(context, settings.init, "base")
    model, meta = load_checkpoint(start)
    tokenizer = Tokenizer.load(start)
    domain = domains_of(cfg)[_domain(context)]
    texts = base_texts([domain], settings.num_examples, cfg.run.seed, noise=settings.noise)
    joined = join_episodes(texts, settings.episodes)
    examples = encode(tokenizer, joined, settings.prompt_weight)
    return _supervised(context, settings, model, start / TOKENIZER, [examples], parent=meta.digest)


def _supervised(
    context: StageContext,
    settings: SftConfig,
    model: Any,
    tokenizer_path: Path,
    groups: Sequence[Sequence[Example]],
    parent: str | None,
    shares: tuple[float, ...] = (),
) -> dict[str, Any]:
    cfg = context.cfg
    with _stage(context, model, settings.lr, tokenizer_path, parent) as parts:
        schedule = SupervisedSettings(
            steps=settings.steps,
            tokens_per_step=settings.tokens_per_step,
            row_tokens=_row_tokens(groups, settings.row_tokens),
            micro_tokens=_micro_tokens(cfg, settings.row_tokens),
            warmup=settings.warmup,
            decay_steps=settings.steps // 3,
            final_scale=settings.decay,
            balance_weight=settings.balance_weight,
            indexer_weight=settings.indexer_weight,
            shares=shares,
            seed=cfg.run.seed,
        )
        context.progress.start(context.name, settings.steps, "step")
        context.progress.advance(parts["start"])
        result = train_supervised(parts["engine"], groups, schedule, **_shared(parts))
        folder = parts["checkpoints"].save(settings.steps, {"clock": parts["clock"].state()})
    return _result(context, parts, folder, {"train_tokens": result["train_tokens"]}) | {
        "curves": _curves(context, {"training loss": "nll"})
    }


def encode(tokenizer: Tokenizer, texts: Sequence[Conversation], prompt_weight: float) -> list[Example]:
    """Token ids and loss weights: 1 on what the model would sample, `prompt_weight` elsewhere."""
    examples = []
    for conversation in texts:
        ids, mask = conversation_ids(tokenizer, conversation.messages, conversation.effort)
        examples.append(Example(ids, [max(float(m), prompt_weight) for m in mask]))
    return examples


def model_config(cfg: Config, tokenizer: Tokenizer) -> ModelConfig:
    """The preset with its overrides; the vocabulary is the tokenizer's unless set larger."""
    preset = PRESETS[cfg.model.preset]
    rows = tokenizer.padded_vocab_size(16)
    overrides = cfg.model.overrides()
    overrides["vocab_size"] = max(rows, overrides.get("vocab_size", 0))
    overrides |= {"num_nextn_predict_layers": 0, "mtp_compress_ratios": ()}
    return replace(preset, **overrides, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)


# ---- GRPO -----------------------------------------------------------------------------------------


def run_grpo(context: StageContext) -> Mapping[str, Any]:
    """One specialist by GRPO from its SFT checkpoint, which is also the reference."""
    cfg, settings = context.cfg, context.cfg.grpo
    name = _domain(context)
    start = _start_folder(context, settings.init, f"sft/{name}")
    model, meta = load_checkpoint(start)
    reference, _ = load_checkpoint(start, verify=False)
    reference.requires_grad_(False).to(device_of(cfg))
    tokenizer = Tokenizer.load(start)
    domains, num_workers = domains_of(cfg), None
    if context.threads is not None:  # beside others: workers of its own, for its own domain
        domains = {name: domains[name]}
        num_workers = worker_share(cfg.rollout.num_workers, cfg.run.parallel)
    config: ModelConfig = model.config  # type: ignore[assignment]
    pool = rollout_pool(cfg, config, start / TOKENIZER, domains, num_workers)

    def jobs_of(step: int):
        problems = fresh_problems(cfg, domains[name], settings.prompts_per_step, step)
        return rollout_jobs(
            domains[name],
            problems,
            prefix=f"grpo-{name}/{step}",
            samples=settings.group_size,
            temperature=settings.temperature,
            run_seed=cfg.run.seed,
        )

    schedule = GrpoSettings(
        steps=settings.steps,
        mini_batches=settings.mini_batches,
        clip_epsilon=settings.clip_epsilon,
        kl_beta=settings.kl_beta,
        mask_delta=settings.mask_delta,
        temperature=settings.temperature,
        row_tokens=settings.row_tokens,
        micro_tokens=_micro_tokens(cfg, settings.row_tokens),
        warmup=settings.warmup,
        table_rows=cfg.log.table_rows,
        seed=cfg.run.seed,
    )
    with _stage(context, model, settings.lr, start / TOKENIZER, meta.digest) as parts:
        context.progress.start(context.name, settings.steps, "phase")
        context.progress.advance(parts["start"])
        store = RolloutStore(context.folder.rollouts)
        result = train_grpo(
            parts["engine"],
            reference,
            pool,
            jobs_of,
            schedule,
            store=store,
            decode=tokenizer.decode,
            **_shared(parts),
        )
        folder = parts["checkpoints"].save(settings.steps, {"clock": parts["clock"].state()})
    curves = _curves(
        context,
        {
            "GRPO: correct on training prompts": "correct",
            "GRPO: clip share": "clip_share",
            "GRPO: mean |log ratio|": "mean_abs_log_ratio",
            "GRPO: masked share": "masked_share",
        },
    )
    acting = {
        label: max((v for v in curves[f"GRPO: {key}"][context.name][1] if v is not None), default=None)
        for label, key in (
            ("largest clip share", "clip share"),
            ("largest mean |log ratio|", "mean |log ratio|"),
            ("largest masked share", "masked share"),
        )
    }
    counted = {key: result[key] for key in ("train_tokens", "sampled_tokens")}
    counted["mismatch_max"] = max(
        (row["mismatch_max"] for row in read_metrics(context.folder.metrics)), default=None
    )
    return _result(context, parts, folder, counted) | {
        "curves": curves,
        "checks": [{"name": n, "value": v, "relation": ">", "bound": 0.0} for n, v in acting.items()],
        "sandbox": _isolation(store.read()),
    }


# ---- distillation ---------------------------------------------------------------------------------


def run_distill(context: StageContext) -> Mapping[str, Any]:
    """All specialists into one student that starts from the base."""
    cfg, settings = context.cfg, context.cfg.distill
    start = _start_folder(context, settings.init, "base")
    model, meta = load_checkpoint(start)
    tokenizer = Tokenizer.load(start)
    domains = domains_of(cfg)
    registry = teacher_registry(context)
    for record in registry:
        admit(start, record.checkpoint, record.name)
    pool = rollout_pool(cfg, model.config, start / TOKENIZER, domains)  # type: ignore[arg-type]
    hidden = HiddenStore(context.folder.path / "hidden_states")
    heads = HeadCache(device_of(cfg))
    side = TeacherSide(registry, TeacherScheduler(registry, load_model_teacher, hidden), hidden, heads)
    schedule = DistillSettings(
        steps=settings.steps,
        mini_batches=settings.mini_batches,
        chunk_tokens=settings.chunk_tokens,
        normalisation=settings.normalisation,
        row_tokens=settings.row_tokens,
        micro_tokens=_micro_tokens(cfg, settings.row_tokens),
        warmup=settings.warmup,
        decay_steps=settings.steps // 2,
        final_scale=settings.decay,
        table_rows=cfg.log.table_rows,
        seed=cfg.run.seed,
    )
    with _stage(context, model, settings.lr, start / TOKENIZER, meta.digest) as parts:
        context.progress.start(context.name, settings.steps, "phase")
        context.progress.advance(parts["start"])
        result = train_distill(
            parts["engine"],
            pool,
            lambda step: distill_jobs(cfg, domains, registry, step),
            side,
            schedule,
            store=RolloutStore(context.folder.rollouts),
            decode=tokenizer.decode,
            earlier=parts["cursor"].get("rows", ()),
            **_shared(parts),
        )
        cursor = {"clock": parts["clock"].state(), "rows": result["rows"]}
        folder = parts["checkpoints"].save(settings.steps, cursor)
    counted = {key: result[key] for key in ("train_tokens", "sampled_tokens", "kl", "head_loads")}
    return _result(context, parts, folder, counted) | {
        "self_kl": _self_kl(folder, RolloutStore(context.folder.rollouts), settings.row_tokens),
    }


def teacher_registry(context: StageContext) -> TeacherRegistry:
    """The configured teachers; without any, the run's own specialists, one a domain."""
    cfg = context.cfg

    def specialist(domain: str) -> Path:
        return context.run.path / context.inputs[f"grpo/{domain}"]["checkpoint"]

    given = cfg.teachers.registry
    if not given:
        return TeacherRegistry([TeacherRecord(d, specialist(d), (d,), 1.0) for d in cfg.task.domains])
    return TeacherRegistry(
        [
            TeacherRecord(
                name,
                Path(t.checkpoint) if t.checkpoint else specialist(t.domains[0]),
                tuple(t.domains),
                t.weight,
            )
            for name, t in given.items()
        ]
    )


def distill_jobs(cfg: Config, domains: Mapping[str, Domain], registry: TeacherRegistry, step: int) -> list:
    """One phase's prompts, in equal parts of every domain, each stamped with its owner teacher."""
    settings = cfg.distill
    jobs = []
    for name, share in split_prompts(settings.prompts_per_step, list(domains), settings.shares).items():
        jobs += rollout_jobs(
            domains[name],
            fresh_problems(cfg, domains[name], share, step),
            prefix=f"distill/{step}/{name}",
            samples=settings.samples_per_prompt,
            temperature=settings.temperature,
            run_seed=cfg.run.seed,
            teacher=registry.owner(name).name,
            is_graded=False,
        )
    return jobs


def fresh_problems(cfg: Config, domain: Domain, num: int, step: int) -> list[Problem]:
    """Training problems of one phase, after those whose solutions base and SFT have seen, then around again.

    Where the training split ends before that, from its beginning.
    """
    first = max(cfg.base.num_examples, cfg.sft.num_examples)
    room = cfg.task.num_train - first
    if room < num:
        first, room = 0, max(cfg.task.num_train, num)
    return domain.problems("train", num, start=first + step * num % (room - num + 1))


def split_prompts(num: int, domains: Sequence[str], shares: Mapping[str, float]) -> dict[str, int]:
    """`num` prompts over the domains by relative share, largest remainders first; zeros left out."""
    weights = {name: shares.get(name, 1.0) for name in domains}
    exact = {name: num * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(domains, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: num - sum(counts.values())]:
        counts[name] += 1
    return {name: count for name, count in counts.items() if count}


def _self_kl(checkpoint: Path, store: RolloutStore, row_tokens: int) -> float:
    """Mean KL of the finished student to itself as a teacher, through the stored-state path."""
    from consilience.distill.loss import distill_loss
    from consilience.distill.train import pack_records, score_request
    from consilience.training.forward import hidden_at_loss, sample_order

    records = [r for r in store.read(store.phases()[-1]) if r.num_sampled][:32]
    teacher = load_model_teacher(TeacherRecord("self", checkpoint, (), 1.0))
    requests = [score_request(r) for r in records]
    states = teacher.score([r.token_ids for r in requests], [r.positions for r in requests])
    model, _ = load_checkpoint(checkpoint, verify=False)
    with torch.no_grad():
        at = hidden_at_loss(model, pack_records(records, row_tokens))
        target = torch.cat([states[s] for s in sample_order(at)])
        out = distill_loss(
            at.hidden,
            to_official(model)["head.weight"],  # type: ignore[arg-type]
            target,
            teacher.head(),
            teacher_weight=1.0,
            num_loss_tokens=len(target),
        )
    return abs(out.sums["kl"]) / out.sums["tokens"]


# ---- what the stages share ------------------------------------------------------------------------


def optimizer_settings(given: OptimizerConfig, lr: float) -> OptimizerSettings:
    return OptimizerSettings(
        lr=lr,
        weight_decay=given.weight_decay,
        beta1=given.betas[0],
        beta2=given.betas[1],
        eps=given.eps,
        momentum=given.muon_momentum,
        update_rms=given.update_rms,
        grad_clip=given.grad_clip,
        kind=given.kind,
    )


def device_of(cfg: Config) -> torch.device:
    """Where the trainer's tensors live. ConfigError if a GPU is asked for and there is none."""
    wanted = cfg.engine.device
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("engine.device is cuda, but torch finds no GPU; take engine.device=auto")
    return torch.device("cuda" if has_gpu and wanted != "cpu" else "cpu")


@contextmanager
def _stage(context: StageContext, model: Any, lr: float, tokenizer_path: Path, parent: str | None):
    """Engine, checkpoints, logs and clock of a stage, resumed where it was cut short."""
    from consilience.training.wandb_sink import WandbSink

    cfg = context.cfg
    if threads := context.threads or cfg.engine.threads:
        torch.set_num_threads(threads)
    context.folder.create()
    model.to(device_of(cfg))
    engine = TorchEngine(model, optimizer_settings(cfg.optimizer, lr))
    tokenizer = Tokenizer.load(tokenizer_path)
    meta = CheckpointMeta(
        stage=context.name,
        seed=cfg.run.seed,
        step=0,
        special_tokens=dict(tokenizer.special_ids),
        domain=context.domain,
        parent=parent,
    )
    checkpoints = StageCheckpoints(context.folder.checkpoints, engine, tokenizer_path, meta)
    start, cursor = checkpoints.resume()
    log = FanOut(
        [
            MetricsLog(context.folder.metrics, resume_step=start),
            WandbSink(
                context.run.path,
                mode=cfg.log.wandb,
                project=cfg.log.project,
                name=f"{cfg.run.name}/{context.name}",
                group=cfg.run.name,
                config={"stage": context.name, "seed": cfg.run.seed, "lr": lr},
            ),
        ]
    )
    parts = {
        "engine": engine,
        "checkpoints": checkpoints,
        "log": log,
        "clock": StageClock(earlier=cursor.get("clock")),
        "progress": context.progress,
        "start": start,
        "cursor": cursor,
    }
    try:
        yield parts
    finally:
        log.finish()
        context.progress.finish()


def _shared(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: parts[name] for name in ("checkpoints", "log", "clock", "progress", "start")}


def _result(
    context: StageContext, parts: Mapping[str, Any], folder: Path, counted: Mapping[str, Any]
) -> dict[str, Any]:
    """What every training stage leaves: its checkpoint, its counts, where its time went."""
    return {
        "checkpoint": str(folder.relative_to(context.run.path)),
        "digest": read_meta(folder).digest,
        "time": parts["clock"].report({"train": "train", "sampled": "rollout"}),
        **counted,
    }


def _start_folder(context: StageContext, init: str | None, stage: str) -> Path:
    return Path(init) if init else context.run.path / context.inputs[stage]["checkpoint"]


def _domain(context: StageContext) -> str:
    assert context.domain is not None
    return context.domain


def _row_tokens(groups: Sequence[Sequence[Example]], row_tokens: int) -> int:
    longest = max((len(e.token_ids) for group in groups for e in group), default=1)
    return row_length(longest, row_tokens)


def _micro_tokens(cfg: Config, row_tokens: int) -> int:
    return cfg.engine.micro_batch_rows * row_tokens


def _curves(context: StageContext, titles: Mapping[str, str]) -> dict[str, Any]:
    """Chart title -> {stage: [[step, …], [value, …]]} from the stage's metrics.jsonl."""
    rows = read_metrics(context.folder.metrics)
    return {
        title: {context.name: [[r["step"] for r in rows], [r.get(key) for r in rows]]}
        for title, key in titles.items()
    }


def _isolation(records: Any) -> dict[str, int]:
    """Isolation label -> rollouts that had it."""
    counts: dict[str, int] = {}
    for record in records:
        assert isinstance(record, RolloutRecord)
        counts[record.isolation] = counts.get(record.isolation, 0) + 1
    return counts
