"""Supervised training: next-token loss on worked solutions (post-training notes 2.2).

Base training and specialist SFT are the same loop: the base sees every domain, prompts included at a
small weight; a specialist sees its own, assistant tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilience.conf.errors import ConfigError
from consilience.model.forward_trace import Trace
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.training.engine import TrainEngine
from consilience.training.forward import hidden_at_loss
from consilience.training.metrics import MetricsSink
from consilience.training.packing import PackedRows, pack, split_micro_batches
from consilience.training.progress import Progress
from consilience.training.schedule import warmup_constant_cosine
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock


@dataclass(frozen=True)
class Example:
    """One encoded conversation: token ids and loss weights (0 = no loss) of equal length."""

    token_ids: Sequence[int]
    loss_weight: Sequence[float]


@dataclass(frozen=True)
class SupervisedSettings:
    """steps; tokens_per_step and micro_tokens in padded tokens; schedule; auxiliary loss weights.

    shares  relative share of each group (domain) in the tokens of a step; empty: equal shares
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
) -> dict[str, Any]:
    """Train for `settings.steps` updates; every step takes each group's share of its tokens.

    Returns {"train_tokens", "final_nll"}. The examples of a step depend on (seed, step) alone, so a
    resumed run sees what the uninterrupted one saw. ConfigError: a group with a share has no examples.
    """
    streams = [_Stream(group, settings.seed + index) for index, group in enumerate(groups)]
    weights = settings.shares or (1.0,) * len(groups)
    shares = [settings.tokens_per_step * weight / sum(weights) for weight in weights]
    for number, (group, share) in enumerate(zip(groups, shares)):
        if share > 0 and not group:
            raise ConfigError(
                f"supervised training: group {number} of {len(groups)} has no examples; raise num_examples "
                "to at least episodes, or set the group's share to 0"
            )
    largest = streams[shares.index(max(shares))]
    nll = float("nan")
    for step in range(settings.steps):
        chosen = [example for stream, share in zip(streams, shares) for example in stream.take(share)]
        # Where the examples before were longer than their steps, this step's share is already spent.
        chosen = chosen or [largest.next()]
        if step < start:
            continue
        packed = pack(
            [e.token_ids for e in chosen],
            [e.loss_weight for e in chosen],
            quantum=32,
            max_row_tokens=settings.row_tokens,
        )
        with clock.phase("train"):
            report = supervised_step(engine, packed, settings, step)
        clock.add_tokens("train", packed.num_tokens)
        nll = report["nll"]
        log.scalars(step + 1, report)
        progress.advance(1, nll=nll)
        checkpoints.save_if_due(step + 1, {"clock": clock.state()})
    return {"train_tokens": clock.state()["tokens"].get("train", 0), "final_nll": nll}


def supervised_step(
    engine: TrainEngine, packed: PackedRows, settings: SupervisedSettings, step: int
) -> dict[str, float]:
    """One update on `packed`: mean weighted NLL plus, where asked for, the auxiliary losses."""
    micro_batches = split_micro_batches(packed, max(settings.micro_tokens, packed.token_ids.shape[1]))
    denominator, num_samples = packed.loss_weight, len(packed.lengths)
    wants_losses = settings.balance_weight > 0 or settings.indexer_weight > 0
    trace = Trace(wants_losses=wants_losses)

    def loss_fn(model: Any, micro: PackedRows):
        trace.balance_loss, trace.indexer_loss = [], []
        at = hidden_at_loss(model, micro, trace)
        out = linear_logprob(at.hidden, model.head.weight, at.target_ids)
        nll = -(out.logprob * at.weight).sum()
        loss = nll / denominator
        part = 1.0 / len(micro_batches)
        for weight, terms in (
            (settings.balance_weight / num_samples, trace.balance_loss),
            (settings.indexer_weight * part, trace.indexer_loss),
        ):
            if weight and terms:
                loss = loss + weight * sum(terms)
        sums = {"nll": float(nll.detach()), "tokens": float(at.weight.numel())}
        if trace.indexer_loss:
            sums["indexer_kl"] = part * float(sum(t.detach() for t in trace.indexer_loss))
        return loss, sums

    report = engine.forward_backward(loss_fn, micro_batches, {"nll": denominator})
    scale = warmup_constant_cosine(
        step,
        num_steps=settings.steps,
        warmup_steps=min(settings.warmup, settings.steps),
        decay_steps=min(settings.decay_steps, max(settings.steps - settings.warmup, 0)),
        final_scale=settings.final_scale,
    )
    return report | engine.step(scale, trace.expert_load)


class _Stream:
    """Examples in a seeded order, reshuffled every epoch."""

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self._examples = examples
        self._rng = np.random.default_rng(seed)
        self._order: Iterator[int] = iter(())
        self._surplus = 0.0

    def take(self, num_tokens: float) -> list[Example]:
        """The next examples, until all taken so far hold at least `num_tokens` for each call.

        What one call takes too much the next takes less, so that shares hold on average.
        """
        chosen: list[Example] = []
        held = self._surplus
        while held < num_tokens:
            chosen.append(self.next())
            held += len(chosen[-1].token_ids)
        self._surplus = held - num_tokens
        return chosen

    def next(self) -> Example:
        """The next example, whatever its length. There must be at least one."""
        index = next(self._order, None)
        if index is None:
            self._order = iter(self._rng.permutation(len(self._examples)).tolist())
            index = next(self._order)
        return self._examples[index]
