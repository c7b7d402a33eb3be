"""The processes that train one model together, and the few things they say to each other.

Every rank runs the same program on its own part of a step's work. All ranks make the same calls in the same
order, with tensors of the same shapes; results are the same bits on all of them. One process is `ALONE`, for
which every call is free: nothing that uses ranks has a second path for it.

R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import (
    Store,  # pyright: ignore[reportPrivateImportUsage]
    distributed_c10d,
)

from consilience.conf.errors import EngineError

BUCKET_BYTES = 64 << 20
BACKENDS = {"gloo": "cpu", "nccl": "cuda"}
WAITS, WAITS_FOR_FIRST, HAS, BROKE = "waits", "waits for the first", "has", "broke"
WAITS_FOR_WORK = "waits for unequal work"
WORKS = "works in step with the others"
T = TypeVar("T")


def _unheard(state: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Ranks:
    """This process is `rank` of `size`.

    group   carries tensors (gloo or NCCL); None: alone
    talk    carries Python values, by gloo; the same group where tensors go by gloo too
    device  where tensors of the group must lie
    patient talk behind what some ranks may take long for; None: as `talk`
    context those that cut rows with this one, of whom each micro-batch takes all; None: rows stay whole
    on_call told WAITS, WAITS_FOR_FIRST or WAITS_FOR_WORK when a call begins, HAS when it returns, BROKE when
            it raises; WORKS and HAS around `in_step`
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    talk: dist.ProcessGroup | None = None
    device: torch.device = torch.device("cpu")
    patient: dist.ProcessGroup | None = None
    on_call: Callable[[str], None] = _unheard
    context: Ranks | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what the ranks leave behind: logs, checkpoints, publications."""
        return self.rank == 0

    @property
    def num_parts(self) -> int:
        """Into how many parts a step's micro-batches go: R, or as many as there are groups that cut rows."""
        return self.size // (self.context or ALONE).size

    @property
    def part_number(self) -> int:
        """Which of the parts is this rank's; the ranks of a context have the same."""
        return self.rank // (self.context or ALONE).size

    def part(self, items: Sequence[T]) -> list[T]:
        """This rank's items, every num_parts-th one; the first parts may have one more."""
        return list(items[self.part_number :: self.num_parts])

    def with_context(self, size: int, *, timeout_s: float = 600.0) -> Ranks:
        """These ranks, each `size` neighbours of which cut rows among them; all ranks call it together.

        EngineError if the groups do not come out even.
        """
        return self if size == 1 else replace(self, context=self.split(size, timeout_s=timeout_s)[0])

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes its sum over the ranks, in place. They travel in buckets, one dtype each.

        Types below fp32 are summed in fp32 and rounded once.
        """
        if self.group is None:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            if flat.is_floating_point():
                flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
            with self._call(WAITS):
                dist.all_reduce(flat, group=self.group)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts):
                tensor.copy_(part.view_as(tensor))

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Name -> sum over the ranks that have the name, added in the order of the ranks, in fp64."""
        total: dict[str, float] = {}
        for own in self.gather(dict(values)):
            for name, value in own.items():
                total[name] = total.get(name, 0.0) + float(value)
        return total

    def stack(self, tensor: Tensor) -> Tensor:
        """[R, …]: what each rank gave, in the order of the ranks; the same shape from all."""
        if self.group is None:
            return tensor[None]
        found = tensor.new_empty(self.size, *tensor.shape)
        with self._call(WAITS):
            dist.all_gather([*found.unbind(0)], tensor.contiguous(), group=self.group)
        return found

    def spread_(self, tensor: Tensor, source: int) -> None:
        """The contiguous tensor becomes that of the rank `source`, in place."""
        if self.group is not None:
            with self._call(WAITS):
                dist.broadcast(tensor, group=self.group, group_src=source)

    def start_exchange(
        self, found: Tensor, given: Tensor, found_rows: Sequence[int], given_rows: Sequence[int]
    ) -> Callable[[], object]:
        """Rows of `given`, given_rows[r] of them to rank r, set out for `found`, found_rows[r] from rank r;
        both stand in the order of the ranks.

        Returned is what waits for their arrival: on a GPU the current stream, not the host. Until then other
        work goes on; neither tensor may change. Both are contiguous, of one type.
        """
        if self.group is None:
            found.copy_(given)
            return lambda: None
        work = dist.all_to_all_single(
            found, given, list(found_rows), list(given_rows), group=self.group, async_op=True
        )
        assert work is not None

        def wait() -> None:
            with self._call(WAITS):
                work.wait()

        return wait

    def split(self, size: int, *, timeout_s: float = 600.0) -> tuple[Ranks, Ranks]:
        """(this rank among its `size` neighbours, this rank among those of its place in the other groups).

        Of 4 ranks in groups of 2, rank 1 is of (0, 1) and of (1, 3). All ranks call it together, and with all
        ranks it is called, not with a part; a part ends when the whole is closed. EngineError if the groups
        do not come out even.
        """
        if size < 1 or self.size % size:
            raise EngineError(
                f"{self.size} ranks cannot be split into groups of {size}; choose a divisor of {self.size}"
            )
        if size == self.size:
            return self, Ranks(device=self.device)
        if size == 1:
            return Ranks(device=self.device), self
        if self.group is not dist.group.WORLD:
            raise EngineError("only the whole of the ranks can be split; split it, not a part of it")
        starts = range(0, self.size, size)
        rooms = [[*range(start, start + size)] for start in starts]
        lanes = [[*range(place, self.size, size)] for place in range(size)]
        within, across = (self._one_of(groups, timedelta(seconds=timeout_s)) for groups in (rooms, lanes))
        return within, across

    def _one_of(self, groups: list[list[int]], limit: timedelta) -> Ranks:
        """This rank in that of the groups of ranks which has it; every rank makes all of them."""
        found = ALONE
        for members in groups:
            group = dist.new_group(members, timeout=limit)
            talk = group if self.group is self.talk else dist.new_group(members, limit, backend="gloo")
            if self.rank in members:
                found = Ranks(members.index(self.rank), len(members), group, talk, self.device)  # type: ignore[arg-type]
        return found

    def gather(self, value: T, *, is_uneven: bool = False) -> list[T]:
        """What each rank gave, in the order of the ranks, on every rank. The value must pickle.

        is_uneven  some ranks may have worked much longer than others before this: wait as `first` does
        """
        if self.talk is None:
            return [value]
        found: list[Any] = [None] * self.size
        with self._call(WAITS_FOR_WORK if is_uneven else WAITS):
            group = self.patient or self.talk if is_uneven else self.talk
            dist.all_gather_object(found, value, group=group)
        return found

    def broadcast(self, value: T | None) -> T:
        """The first rank's value, on every rank; what the others gave is not looked at."""
        if self.talk is None:
            return value  # type: ignore[return-value]
        with self._call(WAITS):
            return _sent(value if self.is_first else None, self.talk)

    def first(self, make: Callable[..., T], *arguments: Any) -> T:
        """What `make(*arguments)` gives on the first rank, on every rank; the others do not call it.

        They wait as long as it takes. Where it raises, only the first rank has the error: whoever started
        the ranks ends the others.
        """
        if self.talk is None:
            return make(*arguments)
        value = make(*arguments) if self.is_first else None
        with self._call(WAITS if self.is_first else WAITS_FOR_FIRST):
            return _sent(value, self.patient or self.talk)

    def barrier(self) -> None:
        """Return when every rank is here. EngineError names the ranks that are not, within the limit."""
        if self.talk is None:
            return
        try:
            with self._call(WAITS):
                dist.monitored_barrier(self.talk, wait_all_ranks=True)
        except RuntimeError as error:
            raise EngineError(f"rank {self.rank} of {self.size} waited in vain: {error}") from None

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """A piece of work in which an engine's own collectives wait for the other ranks, who do the same."""
        self.on_call(WORKS)
        try:
            yield
        finally:
            self.on_call(HAS)

    def close(self) -> None:
        """Leave the group; the process may open another."""
        if self.group is not None:
            dist.destroy_process_group()

    @contextmanager
    def _call(self, begins: str) -> Iterator[None]:
        self.on_call(begins)
        try:
            yield
        except BaseException:
            self.on_call(BROKE)
            raise
        self.on_call(HAS)


ALONE = Ranks()


def open_ranks(
    address: str | Store,
    rank: int,
    size: int,
    *,
    backend: str = "gloo",
    timeout_s: float = 600.0,
    patience_s: float | None = None,
    on_call: Callable[[str], None] = _unheard,
    gpu: int | None = None,
) -> Ranks:
    """Join the group that meets at `address`, as the process's default group.

    address    file:///path that all ranks see, tcp://host:port of rank 0, or a connection to their store
    timeout_s  the longest any rank waits for the others, then and in every call
    patience_s the same behind work that the first does alone or that is uneven; None: timeout_s
    on_call    see `Ranks`
    gpu        number of this rank's GPU on its machine; None: the ranks of one machine take theirs in turn
    EngineError if the ranks do not come together, or there is no GPU for a rank of NCCL.
    """
    if not 0 <= rank < size:
        raise EngineError(f"rank {rank} of {size}: ranks count from 0 to {max(size, 1) - 1}")
    if size == 1:
        return ALONE
    device = torch.device("cpu")
    if BACKENDS[backend] == "cuda":
        if not torch.cuda.is_available():
            raise EngineError("NCCL needs a GPU for each rank, this process sees none; use gloo on CPUs")
        device = torch.device("cuda", rank % torch.cuda.device_count() if gpu is None else gpu)
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout_s)
    how: dict[str, Any] = {"init_method": address} if isinstance(address, str) else {"store": address}
    if not dist.is_initialized():
        # torch names a group by how many it began, those that nobody joined too: ranks with different counts
        # would wait for each other under different names until the limit.
        distributed_c10d._world.group_count = 0
    try:
        dist.init_process_group(backend, **how, rank=rank, world_size=size, timeout=limit)
        whole = dist.group.WORLD
        talk = whole if backend == "gloo" else dist.new_group(backend="gloo", timeout=limit)
        patience = timedelta(seconds=patience_s or timeout_s)
        patient = talk if patience == limit else dist.new_group(backend="gloo", timeout=patience)
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise EngineError(
            f"rank {rank} of {size} found no others at {_named(address)} within {timeout_s:g} s: {error}"
        ) from None
    return Ranks(rank, size, whole, talk, device, patient, on_call)  # type: ignore[arg-type]


def _named(address: str | Store) -> str:
    return address if isinstance(address, str) else "the store of rank 0"


def _sent(value: T | None, group: dist.ProcessGroup) -> T:
    """The first rank's value."""
    found = [value]
    dist.broadcast_object_list(found, group=group, group_src=0)
    return found[0]  # type: ignore[return-value]


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Runs of one dtype, of at most BUCKET_BYTES where a tensor is not larger itself."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or held + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.nbytes
    if bucket:
        yield bucket
