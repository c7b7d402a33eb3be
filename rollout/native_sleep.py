"""An engine's rest between two phases, while a trainer on the same device has the memory."""

from __future__ import annotations

from collections.abc import Collection

from consilience.conf.errors import EngineError
from consilience.model.host_copies import HostCopies
from consilience.model.state import DecodeState
from consilience.rollout.captured_decode import Decoder
from consilience.rollout.prefill import Prefill
from consilience.rollout.speculative import SpeculativeState

_ASLEEP = "the engine sleeps; wake it"
_EMPTY = "the weights were dropped at sleep; publish some"


class Rest:
    """Whether a native engine sleeps, and what it gave back. Levels are vLLM's: decode state (0), weights to
    the host too (1), weights dropped (2)."""

    def __init__(self, decoder: Decoder, prefill: Prefill, state: DecodeState | SpeculativeState) -> None:
        self._model, self._decoder, self._prefill = decoder.model, decoder, prefill
        self._states = state.states if isinstance(state, SpeculativeState) else [state]
        self._copies = HostCopies()
        self._why = ""
        self._level = 0

    def begin(self, level: int, uids: Collection[str]) -> None:
        """Give memory back. EngineError while there are streams, `uids`."""
        if uids:
            raise EngineError(f"{len(uids)} requests run or are held; an engine sleeps between two phases")
        if self._why == _ASLEEP:
            return
        self._decoder.forget()  # graphs have addresses
        self._prefill.forget()
        layers = [layer for state in self._states for layer in state.layers]
        state = [tensor for layer in layers for tensor in (*layer.rings(), *layer.pages())]
        self._copies.put_away(state, keeps=False)  # zeros again: no mask lets garbage matter, but a NaN would
        if level:
            weights = (*self._model.parameters(), *self._model.buffers())
            self._copies.put_away(weights, keeps=level == 1)
        self._why, self._level = _ASLEEP, level

    def end(self) -> None:
        """Take memory again; nothing happens where the engine is awake."""
        if self._why != _ASLEEP:
            return
        self._copies.restore()
        self._why = _EMPTY if self._level == 2 else ""

    def has_new_weights(self) -> None:
        """All weights were loaded, in place or not."""
        self._decoder.forget()
        self._why = ""

    def check_awake(self) -> None:
        """EngineError while it sleeps."""
        if self._why == _ASLEEP:
            raise EngineError(self._why)

    def check_ready(self) -> None:
        """EngineError while it sleeps, or has no weights yet."""
        if self._why:
            raise EngineError(self._why)
