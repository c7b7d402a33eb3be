"""Log-probabilities of probes without vLLM: what an update of its weights is held against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.rollout.vllm_proof import Reference, Scores
from consilience.rollout.vllm_settings import V4


def reference_of(checkpoint: Path, device: str = "cpu") -> Reference:
    """Our own forward for V4, transformers' in fp32 for any other causal model; on `device`.

    The folder is read now and not needed later; the model is built when there is something to score.
    """
    row = json.loads((checkpoint / "config.json").read_text())
    if row["architectures"] == [V4]:
        return _native(row, device)
    from transformers import AutoConfig

    return _transformers(AutoConfig.from_pretrained(checkpoint), device)


def _scores(logits: Tensor, tokens: Sequence[int]) -> np.ndarray:
    """logits [T, V] of a sequence -> log-probabilities of its tokens 1 … T-1, [T-1] fp64."""
    chosen = torch.tensor(tokens[1:], device=logits.device)[:, None]
    return torch.log_softmax(logits[:-1].double(), -1).gather(1, chosen)[:, 0].cpu().numpy()


def _transformers(config: Any, device: str) -> Reference:
    model = None

    @torch.no_grad()
    def score(weights: Mapping[str, Tensor], sequences: Sequence[Sequence[int]]) -> Scores:
        nonlocal model
        from transformers import AutoModelForCausalLM

        if model is None:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
            model = model.to(device).eval()
        missing, unexpected = model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
        tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
        if set(missing) - tied or unexpected:
            raise ValueError(f"the reference lacks {sorted(set(missing) - tied)} or has no {unexpected}")
        return [
            _scores(model(torch.tensor([list(s)], device=device), use_cache=False).logits[0], s)
            for s in sequences
        ]

    return score


def _native(row: Mapping[str, Any], device: str) -> Reference:
    """Without prediction blocks: no log-probability depends on them, and not every checkpoint has them."""
    model = None

    @torch.no_grad()
    def score(weights: Mapping[str, Tensor], sequences: Sequence[Sequence[int]]) -> Scores:
        nonlocal model
        from consilience.model.checkpoint import load_official
        from consilience.model.config import ModelConfig
        from consilience.model.transformer import Transformer

        if model is None:
            config = replace(
                ModelConfig.from_json_dict(row), num_nextn_predict_layers=0, mtp_compress_ratios=()
            )
            model = Transformer(config).to(device).eval()
        load_official(model, {name: t for name, t in weights.items() if not name.startswith("mtp.")})
        return [_scores(model(torch.tensor([list(s)], device=device))[0], s) for s in sequences]

    return score
