"""Supervised training: next-token loss on worked solutions (post-training notes 2.2).

Base training and specialist SFT are the same loop: the base sees every domain, prompts included at a
small weight; a specialist sees its own, assistant tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from consilience.grpo.supervised_batches import Example, SupervisedBatches
from consilience.model.config import CSA_RATIO
from consilience.model.context_parallel import context_parallel
from consilience.model.forward_trace import Trace
from consilience.model.indexer import warming_up
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.model.ranks import ALONE
from consilience.model.routing import Routing
from consilience.training.anticipatory_routing import (
    AnticipatoryRouting,
    AnticipatorySettings,
    Choices,
    look_up_choices,
    routings,
)
from consilience.training.engine import TrainEngine
from consilience.training.forward import hidden_at_loss, mtp_loss
from consilience.training.metrics import ROLLED_BACK_FROM, MetricsSink
from consilience.training.packing import PackedRows, split_micro_batches
from consilience.training.progress import Progress
from consilience.training.schedule import warmup_constant_cosine
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock


@dataclass(frozen=True)
class SupervisedSettings:
    """steps; tokens_per_step and micro_tokens in padded tokens; schedule; auxiliary loss weights.

    shares  relative share of each group (domain) in the tokens of a step; empty: equal shares
    indexer_warmup  first steps in which attention is dense and the indexers alone learn
    mtp_weight, mtp_decay_weight  of the prediction blocks' loss, before and in the rate's decay
    """

    steps: int
    tokens_per_step: int
    row_tokens: int = 512
    micro_tokens: int = 8192
    warmup: int = 10
    decay_steps: int = 0
    final_scale: float = 0.1
    balance_weight: float = 0.0
    indexer_weight: float = 0.0
    indexer_warmup: int = 0
    mtp_weight: float = 0.3
    mtp_decay_weight: float = 0.1
    shares: tuple[float, ...] = ()
    seed: int = 0


def train_supervised(
    engine: TrainEngine,
    groups: Sequence[Sequence[Example]],
    settings: SupervisedSettings,
    *,
    checkpoints: StageCheckpoints,
    log: MetricsSink,
    clock: StageClock,
    progress: Progress,
    start: int = 0,
    anticipatory: AnticipatoryRouting | None = None,
) -> dict[str, Any]:
    """Train for `settings.steps` updates; every step takes each group's share of its tokens.

    Returns {"train_tokens", "final_nll"}. The examples of a step depend on (seed, step) alone, so a
    resumed run sees what the uninterrupted one saw, and one that went back sees the same again.
    anticipatory  whether and after what the routing of a step is prescribed; None: plain routing
    ConfigError: a group with a share has no examples.
    """
    anticipatory = anticipatory or AnticipatoryRouting(AnticipatorySettings(), settings.steps)
    batches = SupervisedBatches(
        groups,
        tokens_per_step=settings.tokens_per_step,
        row_tokens=settings.row_tokens,
        shares=settings.shares,
        seed=settings.seed,
    )

    def look_up(ahead: int) -> Choices:
        with context_parallel(engine.ranks.context or ALONE):
            return look_up_choices(engine.model, micro_batches_of(batches.at(ahead), settings))

    def save(write: Callable[..., Any], step: int) -> None:
        cursor = {"clock": clock.state(), "anticipatory": anticipatory.cursor()}
        write(step, cursor, anticipatory.tensors())

    checkpoints.points_every = anticipatory.points_every
    if start == 0 and checkpoints.points_every:
        save(checkpoints.save, 0)
    step, nll = start, float("nan")
    while step < settings.steps:
        choices = anticipatory.choices(step, look_up, clock)
        packed = batches.at(step)
        with clock.phase("train") as span:
            if step < settings.indexer_warmup:
                report = indexer_warmup_step(engine, packed, settings, step)
            else:
                report = supervised_step(engine, packed, settings, step, choices)
        clock.add_tokens("train", packed.num_tokens)
        nll = report["nll"]
        log.scalars(step + 1, report | anticipatory.account(span.seconds))
        if anticipatory.must_go_back(nll):
            to, was = checkpoints.go_back(step)
            anticipatory.go_back(step, to, nll, was["anticipatory"], checkpoints.tensors)
            save(checkpoints.save, to)
            log.scalars(to, {ROLLED_BACK_FROM: step + 1, "nll_of_spike": nll})
            progress.advance(to - step)
            step = to
        else:
            step += 1
            batches.forget(step)
            progress.advance(1, nll=nll)
            save(checkpoints.save_if_due, step)
    return {"train_tokens": clock.state()["tokens"].get("train", 0), "final_nll": nll}


def micro_batches_of(
    packed: PackedRows, settings: SupervisedSettings, num_ranks: int = 1
) -> list[PackedRows]:
    """Row slices of at most `micro_tokens`; a row wider than that is one of its own."""
    return split_micro_batches(packed, max(settings.micro_tokens, packed.token_ids.shape[1]), num_ranks)


def supervised_step(
    engine: TrainEngine,
    packed: PackedRows,
    settings: SupervisedSettings,
    step: int,
    choices: Choices | None = None,
) -> dict[str, float]:
    """One update on `packed`: mean weighted NLL plus, where asked for, the auxiliary losses.

    choices  layer -> [R, K] experts that the learned routers take; None: their own
    """
    micro_batches = micro_batches_of(packed, settings, engine.ranks.num_parts)
    denominator, num_samples, num_queries = packed.loss_weight, len(packed.lengths), index_queries(packed)
    wants_losses = settings.balance_weight > 0 or settings.indexer_weight > 0
    trace = Trace(wants_losses=wants_losses)
    decay_steps = min(settings.decay_steps, max(settings.steps - settings.warmup, 0))
    is_decaying = step >= settings.steps - decay_steps
    mtp_weight = settings.mtp_decay_weight if is_decaying else settings.mtp_weight

    def loss_fn(model: Any, routed: tuple[PackedRows, Routing | None]):
        trace.start_losses()
        at = hidden_at_loss(model, routed[0], trace, routed[1], wants_mtp=mtp_weight > 0)
        out = linear_logprob(at.hidden, model.head.weight, at.target_ids)
        nll = -(out.logprob * at.weight).sum()
        loss = nll / denominator
        if settings.balance_weight and trace.balance_loss:
            loss = loss + settings.balance_weight / num_samples * sum(trace.balance_loss)
        sums = {"nll": float(nll.detach()), "tokens": float(at.weight.numel())}
        if trace.indexer_loss:
            index_kl = trace.summed_indexer_loss()
            sums["indexer_kl"] = float(index_kl.detach())
            loss = loss + settings.indexer_weight * index_kl / num_queries
        if at.ahead:
            ahead = mtp_loss(at, model.head.weight)
            loss = loss + mtp_weight * ahead / denominator
            sums["mtp_loss"] = float(ahead.detach())
        return loss, sums

    routed = list(zip(micro_batches, routings(choices, micro_batches)))
    denominators = {"nll": denominator, "mtp_loss": denominator, "indexer_kl": num_queries}
    report = engine.forward_backward(loss_fn, routed, denominators)
    return report | engine.step(_rate(settings, step), trace.expert_load)


def _rate(settings: SupervisedSettings, step: int) -> float:
    return warmup_constant_cosine(
        step,
        num_steps=settings.steps,
        warmup_steps=min(settings.warmup, settings.steps),
        decay_steps=min(settings.decay_steps, max(settings.steps - settings.warmup, 0)),
        final_scale=settings.final_scale,
    )


def index_queries(packed: PackedRows) -> float:
    """Queries that see at least one CSA entry: the denominator of the indexer's loss (1 if there is none)."""
    return float(max(1, sum(max(int(n) - (CSA_RATIO - 1), 0) for n in packed.lengths)))


def indexer_warmup_step(
    engine: TrainEngine, packed: PackedRows, settings: SupervisedSettings, step: int
) -> dict[str, float]:
    """One update of the indexers alone, towards what dense attention attends to (V3.2 report, 2.1)."""
    num_queries = index_queries(packed)
    trace = Trace(wants_losses=True)

    def loss_fn(model: Any, micro: PackedRows):
        trace.start_losses()
        at = hidden_at_loss(model, micro, trace)
        with torch.no_grad():
            out = linear_logprob(at.hidden, model.head.weight, at.target_ids)
        index_kl = trace.summed_indexer_loss()
        sums = {"nll": float(-(out.logprob * at.weight).sum()), "tokens": float(at.weight.numel())}
        return index_kl / num_queries, sums | {"indexer_kl": float(index_kl.detach())}

    denominators = {"nll": packed.loss_weight, "indexer_kl": num_queries}
    with warming_up(engine.model):
        micro_batches = micro_batches_of(packed, settings, engine.ranks.num_parts)
        report = engine.forward_backward(loss_fn, micro_batches, denominators)
        return report | engine.step(_rate(settings, step))
