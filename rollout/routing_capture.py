"""Takes down the experts that the trunk's routers choose while an engine feeds tokens.

The model writes them into a buffer beside itself, which the host reads with the step's tokens: one more copy,
no wait of its own. Streams keep the rows of what was fed to them.

R rows, T tokens fed to each, L layers with a learned router, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from consilience.model.config import ModelConfig
from consilience.model.routing import Routing
from consilience.rollout.token_routing import TokenRouting, choice_dtype

_TORCH = {"u1": torch.uint8, "i2": torch.int16}


class RoutingCapture:
    """layers: those with a learned router, prediction blocks left out; none where nothing is recorded."""

    def __init__(self, config: ModelConfig, device: torch.device, is_on: bool) -> None:
        self.layers = tuple(range(config.num_hash_layers, config.num_hidden_layers)) if is_on else ()
        self._topk, self._device = config.num_experts_per_tok, device
        self._dtype = _TORCH[choice_dtype(config.n_routed_experts, self._topk)]

    def routing(self, num_tokens: int) -> Routing | None:
        """For forwards of up to `num_tokens` tokens in all rows; each writes over the one before."""
        if not self.layers:
            return None
        shape = (num_tokens, len(self.layers), self._topk)
        into = torch.zeros(shape, dtype=self._dtype, device=self._device)
        return Routing.recorded(into, self.layers)

    def stored(self, chunks: Sequence[np.ndarray]) -> TokenRouting | None:
        """Chunks [n, L, K] of one stream as one record; None without any."""
        return TokenRouting.of(self.layers, np.concatenate(chunks)) if chunks else None


def fed_rows(routing: Routing | None, shape: Sequence[int], counts: Sequence[int]) -> list[np.ndarray]:
    """R arrays [counts[r], L, K] of what a forward of `shape` [R, T] tokens chose for the first of each row.

    Waits for the device. Empty where nothing was recorded.
    """
    if routing is None or routing.into is None:
        return []
    num_rows, num_tokens = shape
    chosen = routing.into[: num_rows * num_tokens].unflatten(0, (num_rows, num_tokens)).cpu().numpy()
    return [rows[:count].copy() for rows, count in zip(chosen, counts)]


class StepRouting:
    """A decoding step's choices of up to S rows: a buffer that never moves, and its copy on the host."""

    def __init__(self, capture: RoutingCapture, max_rows: int) -> None:
        self.routing = capture.routing(max_rows)
        into = None if self.routing is None else self.routing.into
        self._into, self._host = into, None
        if into is not None:
            self._host = torch.zeros(into.shape, dtype=into.dtype, pin_memory=into.is_cuda)

    def send(self, num_rows: int) -> None:
        """Start the copy of the first rows to the host; it is there once the device has been waited for."""
        if self._into is not None and self._host is not None:
            self._host[:num_rows].copy_(self._into[:num_rows], non_blocking=True)

    def rows(self, num_rows: int) -> list[np.ndarray]:
        """Arrays [1, L, K] of the rows, once the device has been waited for; empty if nothing is recorded."""
        return [] if self._host is None else list(self._host[:num_rows].numpy().copy()[:, None])
