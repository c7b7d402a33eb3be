"""Bytes that operations hold, counted operation by operation."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Watches every tensor that an operation returns, forward and backward.

    largest  elements of the largest floating-point tensor
    peak     most bytes alive at once, of all types, above what was there before
    """

    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor, before)
        return out

    def watch(self, tensor, before):
        storage = tensor.untyped_storage()
        if storage in self.seen or id(storage) in before:
            return
        if tensor.is_floating_point():
            self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
        self.seen[storage] = None
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, num_bytes):
        self.alive -= num_bytes
