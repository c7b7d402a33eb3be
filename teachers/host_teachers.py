"""Our own models as teachers: one on the device, the next one read meanwhile.

On a GPU a teacher is copied to the device layer by layer, and scores from the first layer on: while a layer
computes, the next ones arrive. So there are never the weights of two in its memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from consilience.model.quantization import Quantization
from consilience.model.transformer import Transformer
from consilience.teachers.heads import head_digest
from consilience.teachers.model_teacher import ModelTeacher
from consilience.teachers.read_ahead import ReadAhead, WarmFiles
from consilience.teachers.registry import TeacherRecord
from consilience.training.checkpoint import load_checkpoint

HOST_BYTES = 32 << 30


@dataclass(frozen=True)
class _Read:
    """A teacher in host memory, its digests checked."""

    model: Transformer
    digest: str
    head_digest: str
    num_bytes: int


class HostTeachers:
    """Loads teachers for the scheduler, the announced one in the background.

        teachers = HostTeachers(device)
        teacher = teachers.load(math)  # on the device
        teachers.announce(code)        # read and checked in a thread while math scores
        del teacher
        teacher = teachers.load(code)  # there already

    On a GPU what was read stays in pinned host memory, the longest unused going first beyond `host_bytes`; of
    a load the copy to the device is left, of which the first layer is waited for. On a CPU the host is the
    device: the next teacher is in memory beside the present one, and nothing stays. One heavier than
    `host_bytes` is not read before its turn, only its files are warmed.
    quantization  "fp4" where the teachers were trained so (`Transformer.quantize`)
    row_tokens, batch_tokens  as in `ModelTeacher`
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        row_tokens: int = 512,
        batch_tokens: int = 8192,
        quantization: str = "off",
        host_bytes: int = HOST_BYTES,
    ) -> None:
        self._device, self._quantization = torch.device(device), Quantization.from_name(quantization)
        self._row_tokens, self._batch_tokens = row_tokens, batch_tokens
        self._host_bytes = host_bytes
        self._kept: OrderedDict[Path, _Read] = OrderedDict()
        self._ahead: tuple[Path, ReadAhead[_Read]] | None = None
        self._warm: WarmFiles | None = None

    def announce(self, record: TeacherRecord) -> None:
        """This teacher is loaded next. What goes wrong in reading it is raised there."""
        self.stop()
        folder = Path(record.checkpoint)
        if folder in self._kept:
            return
        try:
            is_heavy = sum(p.stat().st_size for p in folder.glob("*.safetensors")) > self._host_bytes
        except OSError:  # gone, or a link to what is gone: said when it is loaded
            return
        if is_heavy:
            self._warm = WarmFiles(folder)
        else:
            self._ahead = folder, ReadAhead(lambda: self._read(folder), f"teacher '{record.name}'")

    def load(self, record: TeacherRecord) -> ModelTeacher:
        """The teacher on the device. CheckpointError as `load_checkpoint`."""
        folder = Path(record.checkpoint)
        if folder in self._kept:
            self._kept.move_to_end(folder)
            found = self._kept[folder]
        elif self._ahead is not None and self._ahead[0] == folder:
            found, self._ahead = self._ahead[1].take(), None
        else:
            found = self._read(folder)
        self.stop()
        model = found.model
        if self._device.type != "cpu":
            self._keep(folder, found)
            model = twin_of(model, CopyStream(self._device))
        model.quantize(self._quantization)
        return ModelTeacher(
            record.name,
            model,
            found.digest,
            head=found.head_digest,
            row_tokens=self._row_tokens,
            batch_tokens=self._batch_tokens,
        )

    def stop(self) -> None:
        """Nothing is to come: what is being read is dropped."""
        if self._ahead is not None:
            self._ahead[1].drop()
        if self._warm is not None:
            self._warm.stop()
        self._ahead = self._warm = None

    def _read(self, folder: Path) -> _Read:
        model, meta = load_checkpoint(folder)
        transformer = cast(Transformer, model.eval().requires_grad_(False))
        transformer.mtp = nn.ModuleList()  # no teacher is asked for tokens further ahead
        digest = head_digest(transformer.head.weight)
        tensors = [*transformer.parameters(), *transformer.buffers()]
        if self._device.type != "cpu":
            for tensor in tensors:
                tensor.data = tensor.data.pin_memory()
        return _Read(transformer, meta.digest, digest, sum(tensor.nbytes for tensor in tensors))

    def _keep(self, folder: Path, found: _Read) -> None:
        self._kept[folder] = found
        while self._kept and sum(kept.num_bytes for kept in self._kept.values()) > self._host_bytes:
            self._kept.popitem(last=False)


class Copies(Protocol):
    """Copies of tensors, in the order asked for, beside whatever computes."""

    def copy(self, tensor: Tensor) -> Tensor:
        """Where the copy will be; not to be used before a later mark is waited for."""
        ...

    def mark(self) -> Callable[[], None]:
        """What waits, in the stream that computes, for all copies asked for so far."""
        ...


class CopyStream:
    """Copies from pinned host memory to a GPU, on a stream beside the one that computes.

    Memory is the computing stream's. The first copy begins when what was computed so far is done, as it may
    have used that memory; memory freed early is not used again before the copy to it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, tensor: Tensor) -> Tensor:
        found = torch.empty_like(tensor, device=self._device)
        with torch.cuda.stream(self._stream):
            found.copy_(tensor, non_blocking=True)
        found.record_stream(self._stream)
        return found

    def mark(self) -> Callable[[], None]:
        event = self._stream.record_event()
        return lambda: torch.cuda.current_stream(self._device).wait_event(event)


def twin_of(model: Transformer, copies: Copies) -> Transformer:
    """A model of its own with copies of the tensors of `model`; nothing is built or drawn.

    What lies outside of the layers is there when this returns, head included. Each layer waits for its own
    tensors when it is called.
    """
    twins: dict[int, Any] = {}
    twin = cast(Transformer, _shell(model, twins))
    in_layer = {id(module) for layer in twin.layers for module in layer.modules()}
    _fill([module for module in twin.modules() if id(module) not in in_layer], copies, twins)
    wait = copies.mark()
    for layer in twin.layers:
        _fill(list(layer.modules()), copies, twins)
        layer.register_forward_pre_hook(_waiting(copies.mark()))
    wait()
    return twin


def _waiting(wait: Callable[[], None]) -> Callable[..., None]:
    return lambda *_: wait()


def _shell(module: nn.Module, twins: dict[int, Any]) -> nn.Module:
    """A module with modules and hooks of its own, and the tensors of this one."""
    if id(module) not in twins:
        twins[id(module)] = twin = module.__class__.__new__(module.__class__)
        own = {n: value.copy() if isinstance(value, dict) else value for n, value in vars(module).items()}
        vars(twin).update(own)
        twin._modules.update({n: _shell(m, twins) for n, m in module._modules.items() if m is not None})
    return twins[id(module)]


def _fill(modules: list[nn.Module], copies: Copies, twins: dict[int, Any]) -> None:
    """Copies in the place of the modules' tensors; one tensor in two places stays one."""
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in twins:
                    moved = copies.copy(tensor.detach())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    twins[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
                tensors[name] = twins[id(tensor)]
