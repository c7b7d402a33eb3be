"""`consilience prove`, and the same proof at the start of stages that sample (`rollout/proof.py`).

What was proven is a line of the stage's `proofs.jsonl`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from consilience.cli.generate import find_checkpoint
from consilience.cli.prompt_family import prompt_family
from consilience.cli.ray_session import rollout_pool, vllm_updates
from consilience.cli.stage import StageContext
from consilience.cli.training_stage import device_of
from consilience.conf.errors import EngineError, WeightsRefused
from consilience.conf.rules import sampler_quantization
from consilience.conf.schema import Config
from consilience.model.checkpoint import to_official
from consilience.model.config import ModelConfig
from consilience.model.exact import exact_mode
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.model.quantization import Quantization
from consilience.model.transformer import Transformer
from consilience.rollout.proof import (
    CHANGED_VERSION,
    Logprobs,
    Prompts,
    Proof,
    ProvableSampler,
    ProvingTrainer,
    WholeTrainer,
    changed_weights,
    fixed_prompts,
)
from consilience.rollout.proof import prove as prove_sampler
from consilience.rollout.publishing import Publication, announce
from consilience.rollout.ray_workers import RolloutPool
from consilience.rollout.store import RolloutStore
from consilience.rollout.vllm_proof import FOLLOWED
from consilience.training.checkpoint import load_checkpoint
from consilience.training.engine import CutEngine, TrainEngine, is_cut
from consilience.training.forward import hidden_at_loss
from consilience.training.packing import pack

PROOFS = "proofs.jsonl"


def prove(cfg: Config) -> int:
    """Prove that rollout workers compute with the weights of a checkpoint, under changed ones too."""
    folder = find_checkpoint(cfg)
    loaded, meta = load_checkpoint(folder)
    model = cast("Transformer", loaded)
    model.to(device_of(cfg)).quantize(Quantization.from_name(cfg.engine.quantization))
    family = prompt_family(cfg, folder, meta)
    pool = rollout_pool(cfg, model.config, folder / "tokenizer.json", {}, family)
    if cfg.rollout.engine == "vllm":
        print(f"checkpoint: {folder}")
        print(_prove_updates(cfg, pool, to_official(model), meta.step))
        return 0
    proof = _prove(cfg, pool, WholeTrainer(model, trainer_logprobs), model.config, meta.step)
    print(f"checkpoint: {folder}")
    print(
        f"{proof.num_workers} workers ({pool.transport}) hold the {proof.num_tensors} tensors of digest "
        f"{meta.digest[:12]}…; {proof.num_tokens} log-probabilities are the trainer's to the last bit, under "
        f"changed weights too\n"
        f"as sampled (exact={str(cfg.engine.exact).lower()}, quantization {sampler_quantization(cfg)}) and "
        f"as trained ({cfg.engine.quantization}): mean |difference| {proof.mismatch_mean:.3g}, largest "
        f"{proof.mismatch_max:.3g} nats"
    )
    return 0


def _prove_updates(cfg: Config, pool: RolloutPool, weights: Mapping[str, Tensor], version: int) -> str:
    """What vLLM's workers, which cannot show their bytes, found of these weights, of others, of these again.

    EngineError where log-probabilities are more than `rollout.vllm.max_mismatch` off; WeightsRefused where
    the changed weights moved them by too little to tell.
    """
    path = vllm_updates(cfg)
    num_before = len(path.read_bytes().splitlines()) if path.is_file() else 0
    for given, number in (
        (weights, version),
        (changed_weights(weights), CHANGED_VERSION),
        (weights, version),
    ):
        pool.publish(given, announce(given, number), number)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[num_before:]]
    off, moved = (
        max(row["mean"] for row in rows),
        min(row["moved"] for row in rows if row["moved"] is not None),
    )
    if not off < FOLLOWED * moved:
        raise WeightsRefused(
            f"changed weights moved the probes by {moved:.3g} nats, and vLLM is {off:.3g} off on average: "
            "an update that does not arrive would not be seen"
        )
    return (
        f"{len({row['pid'] for row in rows})} workers of vLLM took the weights, others and these again; "
        f"log-probabilities moved by {moved:.3g} nats and are {off:.3g} off on average, "
        f"{max(row['largest'] for row in rows):.3g} at most"
    )


def prove_start(
    context: StageContext,
    pool: ProvableSampler | None,
    engine: TrainEngine,
    version: int,
    store: RolloutStore,
) -> Mapping[str, Any]:
    """The proof before a stage samples, if `rollout.proof` asks for it; what the stage's result says of it.

    All ranks call, with the pool of the first. WeightsRefused where it fails: the stage does not go on.
    """
    if context.cfg.rollout.proof == "off" or not (engine.ranks.is_first or is_cut(engine)):
        return {}
    whole = cast("Transformer", engine.model)
    trainer = CutTrainer(engine) if is_cut(engine) else WholeTrainer(whole, trainer_logprobs)
    proof = _prove(context.cfg, pool, trainer, whole.config, version, store)
    row = {"version": version, **dataclasses.asdict(proof)}
    row["quantization"] = [context.cfg.engine.quantization, sampler_quantization(context.cfg)]
    if engine.ranks.is_first:
        with Path(context.folder.path / PROOFS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return {"proof": row}


def _prove(
    cfg: Config,
    pool: ProvableSampler | None,
    trainer: ProvingTrainer,
    config: ModelConfig,
    version: int,
    store: RolloutStore | None = None,
) -> Proof:
    def announced() -> Publication:
        weights = trainer.weights()
        assert weights is not None  # the first rank has them
        publication = announce(weights, version, sampler_quantization(cfg))
        if store is not None:  # opened here: it is the first rank's alone
            store.publications.record(publication)
        return publication

    prompts = fixed_prompts(config.vocab_size, cfg.rollout.max_length)
    publication = trainer.ranks.first(announced)
    return prove_sampler(pool, trainer, publication, prompts, is_exact=cfg.engine.exact)


class CutTrainer:
    """A model of which each rank has a part: all of them compute, the first one shows and compares."""

    def __init__(self, engine: CutEngine) -> None:
        self.ranks, self._engine, self._weights = engine.ranks, engine, engine.gather_weights()

    def weights(self) -> Mapping[str, Tensor] | None:
        return self._weights

    def expected(
        self, weights: Mapping[str, Tensor] | None, device: str, quantization: str, prompts: Prompts
    ) -> Logprobs:
        """EngineError on another kind of device than the ranks have: the numbers would be others."""
        if device != self.ranks.device.type:
            raise EngineError(
                f"rollout workers compute on {device}, the cut model on {self.ranks.device.type}, and a "
                "proof to the last bit needs one kind of device; set cluster.worker_gpus or rollout.proof=off"
            )
        is_other = self.ranks.broadcast(weights is not self._weights)
        if is_other:
            self._engine.put_weights(weights)
        found = trainer_logprobs(self._engine.model, prompts, True)
        if is_other:
            self._engine.put_weights(self._weights)
        return found

    def own(self, prompts: Prompts, exact: bool) -> Logprobs:
        return trainer_logprobs(self._engine.model, prompts, exact)


@torch.no_grad()
def trainer_logprobs(model: Any, prompts: Prompts, exact: bool) -> Logprobs:
    """What training computes of the prompts, packed as its rows are (`rollout.proof.TrainerLogprobs`)."""
    length = len(prompts[0])
    packed = pack(prompts, quantum=32, max_row_tokens=-(-2 * length // 32) * 32)
    with exact_mode(exact):
        at = hidden_at_loss(model, packed)
        logprob = linear_logprob(at.hidden, model.head.weight, at.target_ids).logprob
    rows: list[list[float]] = [[] for _ in prompts]
    for sample, value in zip(at.sample_index.tolist(), logprob.tolist()):
        rows[sample].append(value)
    return tuple(map(tuple, rows))
