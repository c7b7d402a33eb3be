"""The stages that read worked solutions: the base from random weights, and SFT of one specialist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from consilience.cli.prompt_family import prompt_family
from consilience.cli.ray_session import domains_of
from consilience.cli.stage import StageContext
from consilience.cli.training_stage import (
    TOKENIZER,
    Start,
    curves_of,
    micro_tokens,
    open_stage,
    own_domain,
    ranks_of,
    result_of,
    shared,
    start_from,
)
from consilience.conf.schema import Config, SftConfig
from consilience.grpo.sft import SupervisedSettings, train_supervised
from consilience.grpo.supervised_batches import Example
from consilience.model.config import PRESETS, SLIDING, ModelConfig
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.encoding import encode_messages
from consilience.rollout.prompts import conversation_ids
from consilience.rollout.tokenizer import Tokenizer
from consilience.tasks.corpus import Conversation, base_texts, join_episodes
from consilience.tasks.recall import recall_texts
from consilience.training.anticipatory_routing import AnticipatoryRouting, AnticipatorySettings
from consilience.training.packing import row_length


def run_base(context: StageContext) -> Mapping[str, Any]:
    """Tokenizer on the task text, then a model from random weights on every domain's train split."""
    cfg, settings, ranks = context.cfg, context.cfg.base, ranks_of(context)
    domains = domains_of(cfg)
    texts = base_texts(
        list(domains.values()), settings.num_examples * len(domains), cfg.run.seed, noise=settings.noise
    )
    family = prompt_family(cfg, context.folder.path, None, domains.values())
    path = context.folder.path / TOKENIZER
    if ranks.is_first and not path.exists():
        few = texts[: 1000 * len(domains)]
        sample = [encode_messages(c.messages, c.effort, family=family) for c in few]
        Tokenizer.train(sample, cfg.task.vocab_size).save(path)
    ranks.barrier()
    tokenizer = Tokenizer.load(path)
    model = initialize(Transformer(model_config(cfg, tokenizer)), cfg.run.seed)
    groups = []
    for name in domains:
        joined = join_episodes([c for c in texts if c.domain == name], settings.episodes)
        groups.append(encode(tokenizer, joined, settings.prompt_weight, family))
    shares = tuple(settings.shares.get(name, 1.0) for name in domains)
    if settings.recall:
        exercises = recall_texts(settings.num_examples, cfg.run.seed)
        groups.append(encode(tokenizer, exercises, settings.prompt_weight, family))
        shares = (*shares, settings.recall)
    return _supervised(context, settings, Start(model, path.parent, None, family), groups, shares)


def run_sft(context: StageContext) -> Mapping[str, Any]:
    """One specialist: worked solutions of its domain, loss on assistant tokens only."""
    cfg, settings = context.cfg, context.cfg.sft
    domain = domains_of(cfg)[own_domain(context)]
    start = start_from(context, settings.init, "base", [domain])
    tokenizer = Tokenizer.load(start.tokenizer)
    texts = base_texts([domain], settings.num_examples, cfg.run.seed, noise=settings.noise)
    joined = join_episodes(texts, settings.episodes)
    examples = encode(tokenizer, joined, settings.prompt_weight, start.family)
    return _supervised(context, settings, start, [examples])


def _supervised(
    context: StageContext,
    settings: SftConfig,
    start: Start,
    groups: Sequence[Sequence[Example]],
    shares: tuple[float, ...] = (),
) -> dict[str, Any]:
    cfg = context.cfg
    with open_stage(context, start, settings.lr) as parts:
        schedule = SupervisedSettings(
            steps=settings.steps,
            tokens_per_step=settings.tokens_per_step,
            row_tokens=_row_tokens(groups, settings.row_tokens),
            micro_tokens=micro_tokens(cfg, settings.row_tokens),
            warmup=settings.warmup,
            decay_steps=settings.steps // 3,
            final_scale=settings.decay,
            balance_weight=settings.balance_weight,
            indexer_weight=settings.indexer_weight,
            indexer_warmup=settings.indexer_warmup,
            mtp_weight=settings.mtp_weight,
            mtp_decay_weight=settings.mtp_decay_weight,
            shares=shares,
            seed=cfg.run.seed,
        )
        context.progress.start(context.name, settings.steps, "step")
        context.progress.advance(parts["start"])
        checkpoints = parts["checkpoints"]
        anticipatory = AnticipatoryRouting(
            AnticipatorySettings(**asdict(settings.anticipatory)),
            settings.steps,
            parts["cursor"].get("anticipatory"),
            checkpoints.tensors,
        )
        result = train_supervised(
            parts["engine"], groups, schedule, anticipatory=anticipatory, **shared(parts)
        )
        cursor = {"clock": parts["clock"].state(), "anticipatory": anticipatory.cursor()}
        folder = checkpoints.save(settings.steps, cursor)
    if not ranks_of(context).is_first:
        return {}
    counted = {"train_tokens": result["train_tokens"]} | anticipatory.report()
    return result_of(context, parts, folder, counted) | {
        "curves": curves_of(context, {"training loss": "nll"})
    }


def encode(
    tokenizer: Tokenizer, texts: Sequence[Conversation], prompt_weight: float, family: str
) -> list[Example]:
    """Token ids and loss weights: 1 on what the model would sample, `prompt_weight` elsewhere."""
    examples = []
    for conversation in texts:
        ids, mask = conversation_ids(tokenizer, conversation.messages, conversation.effort, family=family)
        examples.append(Example(ids, [max(float(m), prompt_weight) for m in mask]))
    return examples


def model_config(cfg: Config, tokenizer: Tokenizer) -> ModelConfig:
    """The preset with its overrides; the vocabulary is the tokenizer's unless set larger."""
    preset = PRESETS[cfg.model.preset]
    rows = tokenizer.padded_vocab_size(16)
    overrides = cfg.model.overrides()
    overrides["vocab_size"] = max(rows, overrides.get("vocab_size", 0))
    num_blocks = overrides.get("num_nextn_predict_layers", preset.num_nextn_predict_layers)
    overrides["mtp_compress_ratios"] = (SLIDING,) * num_blocks
    return replace(preset, **overrides, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)


def _row_tokens(groups: Sequence[Sequence[Example]], row_tokens: int) -> int:
    longest = max((len(e.token_ids) for group in groups for e in group), default=1)
    return row_length(longest, row_tokens)
