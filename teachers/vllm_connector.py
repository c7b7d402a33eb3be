"""Hands hidden states out of vLLM: its own example connector, which needs CUDA's streams, without them.

vLLM imports this file in its workers, by the name that `vllm_teacher.py` gives it.
"""

from __future__ import annotations

import os

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (  # pyright: ignore
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class _Written:
    """Stands for a copy that has ended, where vLLM's connector keeps an event of CUDA."""

    def query(self) -> bool:
        return True


class StatesConnector(ExampleHiddenStatesConnector):
    """Writes {"hidden_states" [T, layers, D], "token_ids" [T]} of a finished request into its file, at once.

    A file that is there is whole: it is written beside and renamed.
    """

    def _submit_async_write(self, pending: PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        assert self._kv_cache is not None
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)[:, None] * self._block_size
        slots = (blocks + torch.arange(self._block_size)).flatten().to(self._kv_cache.device)
        states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).cpu()
        beside = f"{pending.filename}.partial"
        save_file({"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}, beside)
        os.replace(beside, pending.filename)
        self._req_copy_events[pending.req_id] = _Written()
