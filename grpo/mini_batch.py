"""The samples of one optimiser step, packed, with what the trainer repeats of the sampler's doing.

n sampled tokens of a micro-batch, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.grpo.kept_replay import KeptReplay
from consilience.grpo.loss import combine
from consilience.grpo.mismatch import mismatch_sums
from consilience.grpo.routing_replay import RoutingReplay
from consilience.model.context_parallel import context_ranks, own_tokens
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.model.routing import Routing
from consilience.rollout.records import RolloutRecord
from consilience.training.engine import TrainEngine
from consilience.training.forward import LossPositions, hidden_at_loss, own_piece
from consilience.training.packing import PackedRows, pack_episodes, split_micro_batches

Measured = tuple[slice, dict[str, np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class MiniBatch:
    """One optimiser step's samples.

    packed   prompts and episodes; by target the sampler's log-prob, the advantage, and where the sampler is
             corrected the trainer's log-prob of before the phase and the weight
    routing, kept  what is replayed, if it is
    """

    packed: PackedRows
    num_samples: int
    routing: RoutingReplay | None = None
    kept: KeptReplay | None = None

    @classmethod
    def of(
        cls, records: Sequence[RolloutRecord], advantages: Sequence[float], settings: Any, model: Any
    ) -> MiniBatch:
        """Of kept episodes and the advantage of each; settings are `GrpoSettings`."""
        streams = [s for r in records for s in r.samples()]
        replay = RoutingReplay(streams, model.config) if settings.replay_routing else None
        kept = KeptReplay(streams) if settings.replay_kept_sets else None
        mask_of = own_mask if kept is None else known_mask
        packed = pack_records(records, advantages, settings.row_tokens, settings.normalisation, mask_of)
        num_samples = len(streams if settings.normalisation == "turn" else records)
        return cls(packed, num_samples, replay, kept)

    def routing_of(self, micro: PackedRows) -> Routing | None:
        """What a forward over these rows follows; None: it routes freely."""
        return None if self.routing is None else self.routing.of(micro)

    def logprob(self, at: LossPositions, head: Tensor, micro: PackedRows, temperature: float) -> Tensor:
        """[n] log-probabilities of the sampled tokens as the sampler defines them: among all, or the kept."""
        if self.kept is None:
            return linear_logprob(at.hidden, head, at.target_ids, temperature=temperature).logprob
        return self.kept.logprob(at.hidden, head, at.target_ids, micro, temperature)

    def mismatch(self, log_ratio: Tensor, micro: PackedRows, routing: Routing | None) -> dict[str, float]:
        """Sums for `mismatch_report`, after a forward of `micro` whose log π − log μ is log_ratio [n]."""
        sums = mismatch_sums(log_ratio)
        return (
            sums
            if self.routing is None or routing is None
            else sums | self.routing.sums(routing, own_piece(micro))
        )


def with_proximal(
    engine: TrainEngine, batches: Sequence[MiniBatch], settings: Any
) -> tuple[list[MiniBatch], dict[str, float]]:
    """The batches with "proximal_logprob", what the weights of now give, and "correction", its weight by
    `settings.corrections`; and the sums of the sampler's mismatch over all of them. No gradient is made."""
    done, sums = [], {}
    for batch in batches:
        micros = micro_batches(batch.packed, settings, engine.ranks.num_parts)
        found = _proximal(engine, batch, micros, settings)
        arrays = {name: np.zeros_like(batch.packed.loss_mask) for name in ("proximal_logprob", "correction")}
        first = 0
        for index, micro in enumerate(micros):
            rows = slice(first, first + len(micro.token_ids))
            for here, values, part in found.get(index, ()):
                sums = combine(sums, part)
                for name, value in values.items():
                    arrays[name][rows, here][micro.loss_mask[:, here] > 0] = value
            first = rows.stop
        done.append(replace(batch, packed=replace(batch.packed, arrays=batch.packed.arrays | arrays)))
    return done, sums


def _proximal(
    engine: TrainEngine, batch: MiniBatch, micros: Sequence[PackedRows], settings: Any
) -> dict[int, list[Measured]]:
    """proximal_logprob [n] and correction [n] of each micro-batch with loss tokens, and its mismatch's sums.

    By the micro-batch's number, with the tokens of the rows that they are of: where ranks cut rows there are
    several. Each rank computes its part; all have all of it in the end.
    """
    own: dict[int, Measured] = {}

    def measure(model: Any, numbered: tuple[int, PackedRows]):
        index, rows = numbered
        with torch.no_grad():
            routing = batch.routing_of(rows)
            at = hidden_at_loss(model, rows, routing=routing)
            logprob = batch.logprob(at, model.head.weight, rows, settings.temperature)
        if (
            not logprob.numel() and context_ranks().size == 1
        ):  # rows without loss, or those an engine fills up with
            return logprob.new_zeros(()), {}
        log_ratio = logprob - at.arrays["old_logprob"]
        correction = settings.corrections.weights(log_ratio, at.sample_index)
        values = {"proximal_logprob": logprob.cpu().numpy(), "correction": correction.cpu().numpy()}
        own[index] = own_tokens(rows.token_ids.shape[1]), values, batch.mismatch(log_ratio, rows, routing)
        return logprob.new_zeros(()), {}

    engine.forward_backward(measure, list(enumerate(micros)), {})  # in its own arithmetic; no gradient
    found: dict[int, list[Measured]] = {}
    for part in engine.ranks.gather(own):
        for index, measured in part.items():
            found.setdefault(index, []).append(measured)
    return found


def micro_batches(packed: PackedRows, settings: Any, num_ranks: int = 1) -> list[PackedRows]:
    """Rows for one forward each; a row widened for a long episode is a micro-batch of its own."""
    return split_micro_batches(packed, max(settings.micro_tokens, packed.token_ids.shape[1]), num_ranks)


def known_mask(record: RolloutRecord) -> list[int]:
    """The loss mask without tokens whose kept set nobody knows: those from before a worker's death.

    EngineError where the record has no sets at all and nobody died.
    """
    if record.kept is None and "resumed_at" in record.metadata:
        return [0] * len(record.token_ids)
    if record.kept is None:
        raise EngineError(
            f"{record.uid}: no kept sets, but grpo.replay_kept_sets asks for them; sample with an engine "
            "that records them, or without top_k, top_p and min_p"
        )
    return [int(m and size > 0) for m, size in zip(record.loss_mask, record.kept.num_ids())]


def own_mask(record: RolloutRecord) -> Sequence[int]:
    return record.loss_mask


def pack_records(
    records: Sequence[RolloutRecord],
    advantages: Sequence[float],
    row_tokens: int,
    normalisation: str = "episode",
    mask_of: Callable[[RolloutRecord], Sequence[int]] = own_mask,
) -> PackedRows:
    """Prompt and episode of each record as one sample; sampler log-probs and advantage per target.

    A conversation whose reasoning was dropped at each user message is one sample a user turn, all with the
    episode's advantage. Counted by "episode", each has the `share` of its tokens in the episode's, so that
    the loss is that of one sample with all the tokens; by "turn" each is one. Tokens that `mask_of` leaves
    out count in neither.
    """
    parts = [(s, a) for r, a in zip(records, advantages) for s in r.samples()]
    masks = [mask_of(s) for s, _ in parts]
    arrays = {
        "old_logprob": [s.logprobs for s, _ in parts],
        "advantage": [np.full(len(s.token_ids), a, np.float32) for s, a in parts],
    }
    if normalisation == "episode" and len(parts) > len(records):
        totals = iter([int(np.asarray(mask).sum()) for mask in masks])
        arrays["share"] = []
        for record in records:
            own = [(len(s.token_ids), next(totals)) for s in record.samples()]
            of_all = max(1, sum(total for _, total in own))
            arrays["share"] += [np.full(length, total / of_all, np.float32) for length, total in own]
    return pack_episodes(
        [s.prompt_ids for s, _ in parts],
        [s.token_ids for s, _ in parts],
        masks,
        row_tokens,
        arrays,
    )
