"""Our own models as teachers: one on the device, the next one read meanwhile."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

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
    a load the copy to the device is left. On a CPU the host is the device: the next teacher is in memory
    beside the present one, and nothing stays. One heavier than `host_bytes` is not read before its turn,
    only its files are warmed.
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
            model = twin_on(self._device, model)
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


def twin_on(device: torch.device, model: Transformer) -> Transformer:
    """A model of its own with copies of the tensors of `model` on `device`; nothing is built or drawn."""
    twins: dict[int, object] = {}
    for parameter in model.parameters():
        moved = parameter.data.to(device, non_blocking=True)
        twins[id(parameter)] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        twins[id(buffer)] = buffer.to(device, non_blocking=True)
    return copy.deepcopy(model, twins)
