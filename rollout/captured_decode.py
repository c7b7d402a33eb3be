"""Decoding steps that a GPU runs without its host: static buffers, one CUDA graph a bucket of sizes.

Everything between a step's inputs and its tokens (model, head, sampler, the tokens' way back to where the
next step reads them) is one function of tensors that never move. On a GPU it is captured once for every
bucket of rows and of lengths, and replayed; elsewhere, and in exact mode, the same function is called.
Lengths stay on the device: a row costs what it has, whatever its bucket.

Rows are those at the front of a decode state. A bucket's rows behind the running ones idle: empty, at
position 0, they feed some token, and nothing of what they compute is kept.

R rows, S rows at most, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.model.kernels.gpu_decode import runs_without_host
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer
from consilience.rollout.routing_capture import RoutingCapture, StepRouting
from consilience.rollout.sampling import sample
from consilience.rollout.truncation import sample_kept

SHORTEST, GROWTH = 2048, 4  # buckets of lengths in tokens: 2,048, 8,192, 32,768, …
WARM_UPS = 2  # kernels are compiled and libraries make their workspaces before a capture


class Decoder:
    """One token for each of the front rows of `state`, again and again.

    tokens [S] int64, on the device: what each row feeds next. A step leaves its draws there.
    captures: whether steps are captured on the device where that is possible
    routing: takes down the experts of what a step feeds; `fed` hands them out
    """

    def __init__(
        self,
        model: Transformer,
        state: DecodeState,
        max_rows: int,
        max_length: int,
        captures: bool = True,
        routing: RoutingCapture | None = None,
    ) -> None:
        self.model = model
        self.max_rows, self.max_length = max_rows, max_length
        self.captures = captures
        self._state = state
        device = state.position.device
        self.tokens = torch.zeros(max_rows, dtype=torch.long, device=device)
        # In: temperature, uniform number, 1 if the row runs, and where the distribution is cut. Out: token,
        # log-probability, and the kept tokens as bits where one is cut. One copy each way.
        self._given = torch.zeros(6, max_rows, dtype=torch.float64, device=device)
        size = -(-model.config.vocab_size // 8)
        self._bits = torch.zeros(max_rows, size, dtype=torch.uint8, device=device)
        self._bits_host = torch.zeros(max_rows, size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._found = torch.zeros(2, max_rows, dtype=torch.float64, device=device)
        self._host = torch.zeros(6, max_rows, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._routing = StepRouting(routing or RoutingCapture(model.config, device, False), max_rows)
        self._replays: dict[tuple[int, int, bool], Callable[[], None]] = {}
        self._pool: Any = None

    @torch.no_grad()
    def step(
        self,
        temperatures: Sequence[float],
        uniforms: Sequence[float],
        longest: int,
        cut: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Feed rows 0 … R - 1 and draw: tokens [R] int64, log-probabilities [R] fp64, on the host.

        temperatures [R], 0 greedy; uniforms [R] in [0, 1), as `sample` takes them; longest: tokens that no
        row exceeds after the step, all of which have room; cut [R, 3] as `sample_kept` takes it, after which
        `bits` has the kept tokens. The state's rows R … S - 1 must be empty.
        """
        num_rows, is_cut = len(temperatures), cut is not None
        self._give(temperatures, uniforms, cut)
        if self.captures and runs_without_host(self.model):
            bucket = self._rows_of(num_rows), self._length_of(longest), is_cut
            if bucket not in self._replays:
                self._replays[bucket] = self._capture(lambda: self._run(*bucket, is_bucket=True))
            self._replays[bucket]()
        else:
            self._run(num_rows, longest, is_cut, is_bucket=False)
        self._routing.send(num_rows)
        if is_cut:
            self._bits_host[:num_rows].copy_(self._bits[:num_rows], non_blocking=True)
        found = self._found[:, :num_rows].cpu()
        return found[0].long(), found[1]

    def fed(self, num_rows: int) -> list[np.ndarray]:
        """Arrays [1, layers, K] of the experts of what the last step fed; empty where nothing is recorded."""
        return self._routing.rows(num_rows)

    def bits(self, num_rows: int) -> list[np.ndarray]:
        """Tokens that the rows of the last step, one of which was cut, could have drawn: [⌈V/8⌉] uint8."""
        return list(self._bits_host[:num_rows].numpy().copy())

    def forget(self) -> None:
        """Drop what was captured: weights, or what is derived from them, may lie elsewhere from now on."""
        self._replays.clear()
        self._pool = None

    def _give(self, temperatures: Sequence[float], uniforms: Sequence[float], cut: Tensor | None) -> None:
        """Inputs to the device; those of the last step were read before its tokens came back."""
        host, num_rows = self._host, len(temperatures)
        host[:, num_rows:] = 0.0
        host[:3, :num_rows] = torch.tensor([temperatures, uniforms, [1.0] * num_rows], dtype=torch.float64)
        if cut is not None:
            host[3:, :num_rows] = cut.t()
        self._given.copy_(host, non_blocking=True)

    def _rows_of(self, num_rows: int) -> int:
        """Rows of the bucket: the next power of two, S at most."""
        return min(1 << (num_rows - 1).bit_length(), self.max_rows)

    def _length_of(self, longest: int) -> int:
        """Tokens a row of the bucket can reach."""
        length = SHORTEST
        while length < longest:
            length *= GROWTH
        return min(length, self.max_length)

    def _run(self, num_rows: int, longest: int, is_cut: bool, is_bucket: bool) -> None:
        """The step, from buffers to buffers. In a bucket nothing depends on anything but its sizes and that a
        distribution is cut."""
        view = self._state.view(0, num_rows, longest if is_bucket else None)
        temperature, uniform, is_running = self._given[:3, :num_rows]
        tokens, routing = self.tokens[:num_rows, None], self._routing.routing
        hidden = self.model.hidden(tokens, state=view, longest=longest, routing=routing)
        logits = self.model.head(hidden[:, 0])
        if is_cut:
            cut = self._given[3:, :num_rows].t()
            tokens, logprobs, bits = sample_kept(logits, temperature.float(), uniform, cut)
            self._bits[:num_rows] = bits
        else:
            tokens, logprobs = sample(logits, temperature.float(), uniform)
        view.position.mul_(is_running.long())  # idle rows stay at 0
        self.tokens[:num_rows] = tokens
        self._found[0, :num_rows] = tokens
        self._found[1, :num_rows] = logprobs

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A replay of `work`, which runs here to warm up. From the same inputs it does the same again: what
        it writes into rings and blocks follows from tokens and positions, and these are put back."""
        kept = [(t, t.clone()) for t in (self.tokens, self._state.position)]
        side = torch.cuda.Stream(self.tokens.device)
        side.wait_stream(torch.cuda.current_stream(self.tokens.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work()
                for tensor, before in kept:
                    tensor.copy_(before)
        torch.cuda.current_stream(self.tokens.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Graphs run one at a time and keep nothing but the buffers above, so they share their memory.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay
