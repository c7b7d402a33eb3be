"""A trainer's memory while it does not train: model, gradients' room and optimiser in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from consilience.conf.errors import EngineError
from consilience.model.host_copies import HostCopies

if TYPE_CHECKING:
    from consilience.training.optimizers import V4Optimizer


class Offloads(Protocol):
    """What gives its device's memory back between `offload` and `onload`, to the bit."""

    def offload(self) -> None: ...

    def onload(self) -> None: ...


class OffloadedModels:
    """`Offloads` of models that only compute: a reference, a teacher."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._models, self._copies = list(models), HostCopies()

    def offload(self) -> None:
        for model in self._models:
            self._copies.put_away((*model.parameters(), *model.buffers()))

    def onload(self) -> None:
        self._copies.restore()


def trained_tensors(model: nn.Module, optimizer: V4Optimizer) -> Iterator[Tensor]:
    """All that a step needs between two steps. EngineError where gradients wait for one."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            raise EngineError(
                f"{name} has a gradient that no step has taken; step or discard before offloading"
            )
        yield parameter
    yield from model.buffers()
    yield from optimizer.muon.held()
    if optimizer.shards is not None:
        yield from optimizer.shards.adamw.held()
    elif optimizer.adamw is not None:
        yield from held_by(optimizer.adamw.state)


def held_by(state: object) -> Iterator[Tensor]:
    """Tensors among the values of a torch optimiser's state."""
    assert isinstance(state, dict)
    for row in state.values():
        yield from (value for value in row.values() if isinstance(value, Tensor))


@contextmanager
def offloaded(those: Iterable[Offloads]) -> Iterator[None]:
    """The block in which their memory is somebody else's; after an error too they are back."""
    gone = list(those)
    try:
        for each in gone:
            each.offload()
        yield
    finally:
        for each in gone:
            each.onload()
