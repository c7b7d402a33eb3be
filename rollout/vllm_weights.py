"""Inside vLLM's worker processes: receives a publication, loads all of it, puts right what vLLM leaves.

vLLM mixes `WeightReceiver` into its worker class (`worker_extension_cls`), so the methods here are what
`collective_rpc` can call. vLLM itself is not imported: everything is reached through `self`.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from consilience.conf.errors import EngineError, WeightsRefused
from consilience.rollout.vllm_proof import tensor_digests

RELOAD_LOG = "vllm.model_executor.model_loader.reload"
# Rotary tables report "Failed to load weights" in every model: they come from config.json and are put back.
TABLE = re.compile(r"\w*RotaryEmbedding$")
SINK = re.compile(r"^(?:model\.)?layers\.\d+\.(?:attn|self_attn)\.(?:attn_sink|sinks)$")


class _Complaints(logging.Handler):
    """What vLLM's loader says of weights that did not arrive: layer class or sentence -> times."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "Failed to load weights" in text:
            self.counts[text.partition(":")[0]] += 1
        elif "were not loaded from checkpoint" in text:
            self.counts[text] += 1


class WeightReceiver:
    """Methods that vLLM's worker gains. `reload_weights` and `model_runner` are the worker's own."""

    def receive_weights(self, tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> dict[str, Any]:
        """Load `tensors`, in checkpoint names, over the live model; what vLLM said, and the sinks copied.

        digests  tensor name -> digest, recomputed here before anything is touched: WeightsRefused otherwise
        EngineError where vLLM left a layer without weights: the model is then neither the old nor the new.
        """
        found = tensor_digests(tensors)
        wrong = sorted(name for name in {*found, *digests} if found.get(name) != digests.get(name))
        if wrong:
            raise WeightsRefused(f"{len(wrong)} tensors arrived with another digest, {wrong[0]} the first")
        complaints = _Complaints()
        log = logging.getLogger(RELOAD_LOG)
        level, propagates = log.level, log.propagate
        log.setLevel(logging.WARNING)  # a quiet vLLM would not even make the record
        log.propagate = False  # what is answered here need not be printed at every update
        log.addHandler(complaints)
        try:
            self.reload_weights(weights_iterator=iter(tensors.items()))  # type: ignore[attr-defined]
        finally:
            log.removeHandler(complaints)
            log.setLevel(level)
            log.propagate = propagates
        owners = self._copy_sinks(tensors)
        failed = sorted(c for c in complaints.counts if not TABLE.match(c) and c not in owners)
        if failed:
            raise EngineError(f"vLLM loaded a part of the weights only; left out: {', '.join(failed)}")
        return {"complaints": dict(complaints.counts), "sinks_of": sorted(owners)}

    def _copy_sinks(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Write attention sinks into the live parameters, which `reload_weights` puts back to old values.

        A live sink holds this rank's share of the heads, and padding behind it where kernels want more heads.
        Returns the classes of layers that have no other parameters of their own: what the loader says of
        these is answered.
        """
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        live = dict(model.named_parameters())
        ranks, rank = self._tensor_parallel()
        owners: set[str] = set()
        for name, sink in tensors.items():
            if not SINK.match(name):
                continue
            place = name if name in live else f"model.{name}"
            if place not in live:
                raise EngineError(f"{name} was published, but vLLM's model has no such parameter")
            share = sink.numel() // ranks
            with torch.no_grad():
                live[place].data[:share].copy_(sink.reshape(-1)[rank * share : (rank + 1) * share])
            owner = model.get_submodule(place.rpartition(".")[0])
            if len(list(owner.parameters(recurse=False))) == 1:
                owners.add(type(owner).__name__)
        return owners

    def _tensor_parallel(self) -> tuple[int, int]:
        """(ranks, this rank) of tensor parallelism."""
        config = self.parallel_config  # type: ignore[attr-defined]
        return config.tensor_parallel_size, self.rank % config.tensor_parallel_size  # type: ignore[attr-defined]
