"""Memory of a device given back for a while: tensors keep their identity, their bytes wait on the host.

A tensor's storage is emptied and filled again in place, so whoever refers to it (views, optimisers, modules)
notices nothing but a change of address. What was captured with addresses (CUDA graphs) must be forgotten
first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class HostCopies:
    """Nothing is put away at first."""

    def __init__(self) -> None:
        self._away: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []

    @property
    def num_bytes(self) -> int:
        """Bytes that were given back on the tensors' devices."""
        return sum(size for _, size, _ in self._away)

    @torch.no_grad()
    def put_away(self, tensors: Iterable[Tensor], *, keeps: bool = True) -> None:
        """Give back the memory of these tensors, and of all that share it; nobody uses them until `restore`.

        keeps  False: the values are not needed, and are 0 afterwards
        Memory that cannot be resized (of mapped files) stays where it is.
        """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size = storage.nbytes()
            if not size or not storage.resizable():  # put away already, or not ours
                continue
            copy = None
            if keeps:
                copy = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                copy.copy_(_bytes(storage))
            self._away.append((storage, size, copy))
            storage.resize_(0)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # to where another process can have it

    @torch.no_grad()
    def restore(self) -> None:
        """Every tensor as it was. Nothing happens where nothing is away."""
        while self._away:
            storage, size, copy = self._away[-1]
            storage.resize_(size)
            here = _bytes(storage)
            here.zero_() if copy is None else here.copy_(copy)
            self._away.pop()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """[n] uint8 over the whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
