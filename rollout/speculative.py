"""Self-speculative decoding: the prediction block drafts a token, the trunk verifies it (specification 10).

A round of one row. The trunk has consumed tokens 0 … P - 1, token P is sampled:

    the block reads pair (X_{P-1}, token P)                    -> q of token P + 1, a draft from it
    the trunk reads token P and the draft in one chunk         -> p of token P + 1 and of P + 2
    the draft stands with min(1, p/q): tokens P + 1 and P + 2 are found, the trunk stands at P + 2
    otherwise token P + 1 comes from the rest of p, and the trunk is set back to P + 1

Pair t is the trunk's streams X_t with token t + 1. The block's state holds pairs of sampled tokens only, so
it is never set back; streams whose next token is not known yet wait here, one or two a row.

R rows, T tokens, N streams, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from consilience.conf.errors import ConfigError
from consilience.model.layout import chunk_layout
from consilience.model.mtp import MTPBlock
from consilience.model.routing import Routing
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer
from consilience.rollout.sampling import accept, draw, tempered

NUM_UNIFORMS = 3  # random numbers a token has: its draw or its draft's, the verdict, the draw after a refusal


@dataclass(frozen=True)
class Round:
    """tokens, logprobs [R, 2] of the trunk; num_found [R] how many of the two are valid (1 or 2)."""

    tokens: Tensor
    logprobs: Tensor
    num_found: Tensor
    num_fed: Tensor
    streams: Tensor


class SpeculativeState:
    """Decode states of trunk and prediction block, row by row in step; rows are handled as `DecodeState`'s.

    drafted, accepted  drafts made and drafts that stood, since the start. ConfigError: no prediction block.
    """

    def __init__(self, model: Transformer, num_slots: int, max_length: int, num_rows: int) -> None:
        if not len(model.mtp):
            raise ConfigError(
                "speculative decoding drafts with the model's MTP block, and this model has none "
                "(num_nextn_predict_layers is 0); set rollout.speculative=false or train a model with a block"
            )
        self.model = model
        self._config = model.config.mtp_config()
        weight = model.head.weight
        options = {"device": weight.device, "dtype": weight.dtype}
        self.trunk, self._block = (
            DecodeState.allocate(
                config,
                num_slots,
                max_length,
                num_blocks=num_rows * DecodeState.blocks_of(config, max_length),
                lookahead=lookahead,
                **options,
            )
            for config, lookahead in ((model.config, 1), (self._config, 0))
        )
        shape = (num_slots, 2, model.config.hc_mult, model.config.hidden_size)
        self._waiting = torch.zeros(
            shape, **options
        )  # the newest stream in place 1, the one before in place 0
        self._num_waiting = torch.zeros(num_slots, dtype=torch.long, device=weight.device)
        self._between = torch.zeros_like(self._num_waiting)  # token after the stream in place 0
        self.drafted = self.accepted = 0

    # ---- rows ----------------------------------------------------------------------------------

    @property
    def states(self) -> list[DecodeState]:
        """Both states."""
        return [self.trunk, self._block]

    @property
    def position(self) -> Tensor:
        """[S] tokens the trunk has consumed."""
        return self.trunk.position

    def view(self, start: int, stop: int) -> DecodeState:
        """The trunk's slots start..stop-1."""
        return self.trunk.view(start, stop)

    def reserve(self, row: int, length: int) -> None:
        self.trunk.reserve(row, length)
        self._block.reserve(row, length)

    def free(self, row: int) -> None:
        self.trunk.free(row)
        self._block.free(row)
        self._num_waiting[row] = 0

    def fork(self, source: list[int], target: list[int]) -> None:
        self.trunk.fork(source, target)
        self._block.fork(source, target)
        self._copy(source, target)

    def move(self, source: list[int], target: list[int]) -> None:
        self.trunk.move(source, target)
        self._block.move(source, target)
        self._copy(source, target)
        self._num_waiting[source] = 0

    def _copy(self, source: list[int], target: list[int]) -> None:
        for own in (self._waiting, self._num_waiting, self._between):
            own[target] = own[source]

    # ---- tokens --------------------------------------------------------------------------------

    def feed(self, first: int, tokens: Tensor, lengths: Tensor, routing: Routing | None = None) -> Tensor:
        """Feed rows first.. their next tokens [R, T], of which lengths [R] count: hidden states [R, T, D].

        routing takes the trunk's experts down.

        The block reads every pair that is complete now; the stream of each row's last token waits.
        """
        num_rows = len(tokens)
        here = slice(first, first + num_rows)
        view = self.trunk.view(here.start, here.stop)
        streams, _ = self.model.streams(tokens, state=view, lengths=lengths, routing=routing)
        joined = torch.cat((self._waiting[here], streams.unflatten(0, tokens.shape)), dim=1)
        next_ids = torch.cat((self._between[here, None], tokens), dim=1)  # of joined's streams but the last
        count = self._num_waiting[here]
        self._read_pairs(here, joined, next_ids, 2 - count, count - 1 + lengths)
        rows = torch.arange(num_rows, device=tokens.device)
        self._waiting[here, 1] = joined[rows, 1 + lengths]
        self._num_waiting[here] = 1
        return self._hidden(streams, tokens)

    def round(
        self,
        last: Tensor,
        temperature: Tensor,
        uniforms: Tensor,
        has_room: Tensor,
        routing: Routing | None = None,
    ) -> Round:
        """One round of rows 0 … R - 1, whose sampled but not yet fed tokens are `last` [R].

        temperature [R]; uniforms [R, 2, NUM_UNIFORMS] of the next two tokens; has_room bool [R]: whether
        the row may get two (else the draft decides the one token, but is not fed); routing takes the trunk's
        experts down, of two tokens a row. `settle` must follow.
        """
        here, rows = slice(0, len(last)), torch.arange(len(last), device=last.device)
        count = self._num_waiting[here]
        next_ids = torch.stack((self._between[here], last), dim=1)
        read = self._read_pairs(here, self._waiting[here], next_ids, 2 - count, count)
        _, q = tempered(self.model.head(read[rows, count - 1]), temperature)
        draft = draw(q, uniforms[:, 0, 0])
        tokens, num_fed = torch.stack((last, draft), dim=1), 1 + has_room.long()
        view = self.view(0, len(last))
        streams, _ = self.model.streams(tokens, state=view, lengths=num_fed, routing=routing)
        logits = self.model.head(self._hidden(streams, tokens))
        logprobs, p = tempered(logits.flatten(0, 1), temperature.repeat_interleave(2))
        logprobs, p = logprobs.view_as(logits), p.view_as(logits)
        token, is_accepted = accept(p[:, 0], q, draft, uniforms[:, 0, 1:])
        found = torch.stack((token, draw(p[:, 1], uniforms[:, 1, 0])), dim=1)
        self.drafted += len(last)
        self.accepted += int(is_accepted.sum())
        return Round(
            tokens=found,
            logprobs=logprobs.gather(2, found[:, :, None])[:, :, 0],
            num_found=1 + (is_accepted & has_room).long(),
            num_fed=num_fed,
            streams=streams.unflatten(0, tokens.shape),
        )

    def settle(self, found: Round, num_kept: Sequence[int]) -> Tensor:
        """Keep num_kept [R] of a round's tokens (at least 1, at most those found): the last kept ones [R]."""
        here, rows = slice(0, len(num_kept)), torch.arange(len(num_kept), device=found.tokens.device)
        kept = torch.tensor(num_kept, device=found.tokens.device)
        self.trunk.position[here] -= found.num_fed - kept
        self._waiting[here, 0] = found.streams[:, 0]
        self._waiting[here, 1] = found.streams[rows, kept - 1]
        self._between[here] = found.tokens[:, 0]
        self._num_waiting[here] = kept
        return found.tokens[rows, kept - 1]

    def _hidden(self, streams: Tensor, tokens: Tensor) -> Tensor:
        return self.model.norm(self.model.hc_head(streams)).unflatten(0, tokens.shape)

    def _read_pairs(
        self, here: slice, streams: Tensor, next_ids: Tensor, start: Tensor, lengths: Tensor
    ) -> Tensor:
        """The block reads lengths [R] pairs of each row from place start [R] on: hidden [R, longest, D].

        streams [R, ≥ T, N, D], next_ids [R, T].
        """
        longest = int(lengths.max())
        if longest == 0:
            return streams.new_zeros(len(lengths), 0, streams.shape[-1])
        place = start[:, None] + torch.arange(longest, device=start.device)
        place = place.clamp_(max=next_ids.shape[1] - 1)
        rows = torch.arange(len(lengths), device=start.device)[:, None]
        ids = next_ids[rows, place].flatten()
        view = self._block.view(here.start, here.stop)
        is_even = bool((lengths == longest).all())
        layout = chunk_layout(self._config, view, longest, None if is_even else lengths, None)
        block = cast("MTPBlock", self.model.mtp[0])
        hidden, _ = block.predict(
            streams[rows, place].flatten(0, 1), self.model.embed(ids), ids, layout, view.layers[0]
        )
        view.position += lengths
        return hidden.unflatten(0, place.shape)
