"""The proof that a sampler's weights are the trainer's: the same bytes, and the same log-probabilities.

    trainer ─ publish ─► worker: load, export again, decode fixed prompts ─► evidence ─► compare

Bytes alone do not prove that an engine computes with what it stores, and equal log-probabilities under the
weights of the start do not prove that an update arrives: an engine may keep what it loaded first. So the
proof is repeated under changed weights, every tensor of which differs, and again when the real ones are back.

Both sides compute in exact mode (`model/exact.py`), in which decoding gives the trainer's numbers to the
last bit: no tolerance is needed, and a difference is a fault. What the sampler's own mode makes of the same
prompts is measured beside it.

P prompts of T tokens each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import WeightsRefused
from consilience.model.checkpoint import load_official, to_official
from consilience.model.exact import exact_mode
from consilience.model.quantization import Quantization
from consilience.model.ranks import ALONE, Ranks
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer
from consilience.rollout.publishing import (
    Announced,
    Publication,
    TensorRecord,
    announce,
    compare,
    tensor_records,
)
from consilience.rollout.sampling import tempered

NUM_PROMPTS, PROMPT_TOKENS = 4, 160  # longer than V4's window and its widest compression, 128
SINGLE_TOKENS = 8  # at the end of a prompt, each a decoding step: two of CSA's compressed entries begin there
CHANGED_VERSION = -1  # no token ever carries it
CHANGE = 0.05  # of a tensor's root mean square; a tensor of zeros changes by it

Prompts = tuple[tuple[int, ...], ...]
Logprobs = tuple[tuple[float, ...], ...]
TrainerLogprobs = Callable[[Any, Prompts, bool], Logprobs]
"""(model, prompts, exact) -> log-probability of each token after a prompt's first, as trained."""
Weights = Mapping[str, Tensor]  # official name -> tensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a worker holds and computes.

    tensors   official name -> the tensor as its engine exports it
    logprobs  of token t + 1 of each prompt, for t from 0: P rows of T - 1
    device    type of the device that computed them
    """

    tensors: Mapping[str, TensorRecord]
    logprobs: Logprobs
    device: str


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proven of each worker.

    num_tokens     log-probabilities that were equal under each set of weights
    mismatch_mean, mismatch_max   |sampler − trainer| over them in nats, each in its own mode and quantisation
    """

    num_workers: int
    num_tensors: int
    num_tokens: int
    mismatch_mean: float
    mismatch_max: float


class ProvableSampler(Protocol):
    """What the proof needs of the rollout workers (`ray_workers.RolloutPool`)."""

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None: ...

    def evidence(self, prompts: Sequence[Sequence[int]], exact: bool) -> Mapping[str, Evidence]: ...


class ProvingTrainer(Protocol):
    """What the proof needs of the side that trains.

    ranks  that hold the model together and make the same calls; `ALONE` where one has it whole
    """

    @property
    def ranks(self) -> Ranks: ...

    def weights(self) -> Weights | None:
        """As published, on the first rank; None on others."""
        ...

    def expected(self, weights: Weights | None, device: str, quantization: str, prompts: Prompts) -> Logprobs:
        """What training computes in exact mode on such a device with these weights, which the first rank
        gives; the trainer's own are the same afterwards."""
        ...

    def own(self, prompts: Prompts, exact: bool) -> Logprobs:
        """What it computes with its own, in its own mode and quantisation."""
        ...


@dataclass(frozen=True)
class WholeTrainer:
    """A model that one process has. A second copy of it exists while `expected` runs."""

    model: Transformer
    logprobs: TrainerLogprobs
    ranks: Ranks = ALONE

    def weights(self) -> Weights:
        return to_official(self.model)

    def expected(self, weights: Weights | None, device: str, quantization: str, prompts: Prompts) -> Logprobs:
        twin = copy.deepcopy(self.model).to(device).requires_grad_(False)
        twin.quantize(Quantization.from_name(quantization))
        assert weights is not None
        load_official(twin, weights)
        return self.logprobs(twin, prompts, True)

    def own(self, prompts: Prompts, exact: bool) -> Logprobs:
        return self.logprobs(self.model, prompts, exact)


def model_evidence(model: Transformer, prompts: Sequence[Sequence[int]], exact: bool) -> Evidence:
    """The evidence of an engine that decodes with `model`, beside whatever it is decoding."""
    with exact_mode(exact):
        logprobs = decoded_logprobs(model, prompts)
    return Evidence(tensor_records(to_official(model)), logprobs, model.head.weight.device.type)


@torch.no_grad()
def decoded_logprobs(model: Transformer, prompts: Sequence[Sequence[int]]) -> Logprobs:
    """Log-probability of every token after a prompt's first, as sampling computes it: two chunks, then single
    tokens, on a decode state. Prompts of equal length, 2 tokens at least."""
    weight = model.head.weight
    tokens = torch.tensor([list(p) for p in prompts], device=weight.device)
    num_rows, length = tokens.shape
    state = DecodeState.allocate(model.config, num_rows, length, device=weight.device, dtype=weight.dtype)
    singles = max(1, length - 1 - SINGLE_TOKENS)
    borders = sorted({0, -(-singles // 2), *range(singles, length)})
    columns = []
    for first, last in pairwise(borders):
        hidden = model.hidden(tokens[:, first:last], state=state)
        for at in range(first, last):
            logits = model.head(hidden[:, at - first])
            logprobs, _ = tempered(logits, torch.ones(num_rows))
            columns.append(logprobs.gather(1, tokens[:, at + 1, None])[:, 0])
    return tuple(map(tuple, torch.stack(columns, 1).tolist()))


def fixed_prompts(vocab_size: int, max_length: int) -> Prompts:
    """The prompts of every proof: a function of the vocabulary and of the longest stream alone."""
    length = max(2, min(PROMPT_TOKENS, max_length))
    ids = np.random.default_rng(0).integers(vocab_size, size=(NUM_PROMPTS, length))
    return tuple(map(tuple, ids.tolist()))


@torch.no_grad()
def changed_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of the same names, types and shapes; no tensor with two different rows stays as it is.

    Floating-point tensors get noise of `CHANGE`, tables of expert ids are turned by a row.
    """
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            changed[name] = tensor.roll(1, 0)
            continue
        size = float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        changed[name] = (tensor.double() + CHANGE * (size or 1.0) * noise).to(tensor.dtype)
    return changed


def prove(
    sampler: ProvableSampler | None,
    trainer: ProvingTrainer,
    publication: Publication,
    prompts: Prompts,
    *,
    is_exact: bool = False,
    tolerance: float = 0.0,
) -> Proof:
    """Publish the trainer's weights as `publication` and prove them of every worker, then changed ones, then
    the first again.

    publication  of the trainer's weights as they are; its quantisation is how the workers compute
    is_exact     whether trainer and sampler work in exact mode: what the measured mismatch is of
    tolerance    largest difference of log-probabilities in nats; above 0 only for engines without exact mode
    The workers end with the publication. WeightsRefused names worker and tensor, or worker, prompt and
    position, with what was found and what was expected. Of several ranks that hold one model together all
    call, the first one alone with a sampler; what the workers did wrong is its error.
    """
    ranks, weights, how = trainer.ranks, trainer.weights(), publication.quantization
    evidence: dict[str, Evidence] = {}

    def look(given: Weights | None, announced: Publication) -> str:
        assert sampler is not None and given is not None  # the first rank has them
        sampler.publish(given, announced, announced.version)
        evidence.update(sampler.evidence(prompts, True))
        return next(iter(evidence.values())).device

    device = ranks.first(look, weights, publication)
    expected = trainer.expected(weights, device, how, prompts)
    ranks.first(_check, evidence, publication, expected, tolerance)

    changed = None if weights is None else changed_weights(weights)
    expected_changed = trainer.expected(changed, device, how, prompts)
    if expected_changed == expected:
        raise WeightsRefused(
            "the proof is blind: changed weights have the log-probabilities of the real ones"
        )

    def look_at_changed() -> None:
        assert changed is not None
        other = announce(changed, CHANGED_VERSION, how)
        look(changed, other)
        _check(evidence, other, expected_changed, tolerance)

    def look_again() -> Mapping[str, Logprobs]:
        look(weights, publication)
        _check(evidence, publication, expected, tolerance)
        assert sampler is not None
        found = evidence if is_exact else sampler.evidence(prompts, False)
        return {worker: own.logprobs for worker, own in found.items()}

    ranks.first(look_at_changed)
    sampled = ranks.first(look_again)
    own = np.asarray(trainer.own(prompts, is_exact))
    gaps = np.abs(np.stack([np.asarray(logprobs) for logprobs in sampled.values()]) - own)
    return Proof(len(sampled), len(publication.tensors), own.size, float(gaps.mean()), float(gaps.max()))


def _check(
    evidence: Mapping[str, Evidence], publication: Publication, expected: Logprobs, tolerance: float
) -> None:
    for worker, found in evidence.items():
        compare(found.tensors, publication, worker)
        compare_logprobs(found.logprobs, expected, publication.version, worker, tolerance)


def compare_logprobs(
    found: Logprobs, expected: Logprobs, version: int, where: str, tolerance: float = 0.0
) -> None:
    """WeightsRefused at the first log-probability that is not the trainer's; NaN never is."""
    for prompt, (rows, wanted) in enumerate(zip(found, expected, strict=True)):
        for position, (value, right) in enumerate(zip(rows, wanted, strict=True), 1):
            if not abs(value - right) <= tolerance:
                raise WeightsRefused(
                    f"{where}: version {version}: prompt {prompt}, position {position}: found "
                    f"log-probability {value!r}, expected {right!r} (tolerance {tolerance:g} nats), though "
                    "every tensor it exports is as published: the engine does not compute with what it holds"
                )
