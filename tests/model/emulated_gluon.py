"""Runs Gluon kernels on a CPU, as Triton's interpreter does not: their Python text over torch tensors.

What is asynchronous on the chip is done as late as the kernel's waits allow, and its target holds NaN until
then; operands of a product are compared when it is issued and when it is waited for. So a missing wait, a
buffer that is written too early, a wrong phase or an address out of bounds fails. Layouts mean nothing here,
and warps do not race: that is the compiler's part. Partitions of a specialised kernel take turns: each runs
as far as its barriers let it.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Number(torch.Tensor):
    """A kernel's value: operators never work in place."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(layout=None)

    def to(self, dtype, bitcast=False):  # type: ignore[override]
        return self.view(dtype) if bitcast else super().to(dtype)

    def __iadd__(self, other):  # type: ignore[override]
        return self + other

    def __isub__(self, other):  # type: ignore[override]
        return self - other

    def __iand__(self, other):  # type: ignore[override]
        return self & other


def number(x: Any) -> Number:
    return torch.as_tensor(x).as_subclass(Number)


class Pointer:
    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, number(offset)
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Addresses, and which of them are used; those must lie in memory."""
        used = torch.ones_like(self.offset, dtype=torch.bool) if mask is None else number(mask)
        offset, used = torch.broadcast_tensors(self.offset.long(), used)
        inside = (offset >= 0) & (offset < self.memory.numel())
        assert bool((inside | ~used).all()), "an address out of bounds"
        return torch.where(used, offset, 0), used


class Descriptor:
    def __init__(self, memory: Tensor, block: list[int]) -> None:
        self.memory, self.block, self.dtype, self.layout = memory, block, memory.dtype, None

    def at(self, corner: list[Any]) -> Tensor:
        top, left = int(corner[0]), int(corner[1])
        found = self.memory[top : top + self.block[0], left : left + self.block[1]]
        assert list(found.shape) == self.block, "a block out of bounds"
        return found


class Shared:
    """Shared memory, or a part of it; as a barrier it counts phases and the bytes of copies on their way."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.shape, self.dtype = data, data.shape, data.dtype
        self.parity, self.coming, self.num_expected = 0, [], 0
        self.num_arrivals, self.num_arrived = 0, 0
        self.parts: dict[int, Shared] = {}

    def index(self, place: Any) -> Shared:
        return self.parts.setdefault(int(place), Shared(self.data[int(place)]))

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        """[rows, columns] as the blocks of columns of which it is made: [blocks, rows, columns of one]."""
        blocks = self.data.unflatten(1, (shape[0], shape[2])).movedim(1, 0)
        assert list(blocks.shape) == shape
        return Shared(blocks)

    def slice(self, start: int, length: int, axis: int) -> Shared:
        return Shared(self.data.narrow(axis, start, length))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: Any) -> Number:
        assert not self.data.isnan().any(), "read before it was written"
        return number(self.data.clone())

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)


class Product:
    def __init__(self, a: Any, b: Shared, start: Any, use_acc: bool) -> None:
        self.a, self.b = a, b
        self.start = start if use_acc else 0.0
        self.value, self.expected = None, self.multiply()

    def multiply(self) -> Tensor:
        left = self.a.data if isinstance(self.a, Shared) else self.a
        start = self.start.multiply() if isinstance(self.start, Product) else self.start
        assert not left.isnan().any() and not self.b.data.isnan().any(), "a product of what is not there yet"
        return number(left.float() @ self.b.data.float() + start)

    def finish(self) -> None:
        self.value = self.multiply()
        assert torch.equal(self.value, self.expected), "an operand changed under a product"


class Turns:
    """Functions in threads of their own of which one runs at a time: until it ends or has to wait."""

    def __init__(self, functions: list[Callable[[], object]]) -> None:
        self.changed, self.turn = threading.Condition(), 0
        self.waiting: list[Callable[[], bool] | None] = [None] * len(functions)
        self.is_done, self.faults = [False] * len(functions), []
        self.threads = [
            threading.Thread(target=self._run, args=(index, function), daemon=True)
            for index, function in enumerate(functions)
        ]
        self.places = {thread: index for index, thread in enumerate(self.threads)}

    def run(self) -> None:
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join()  # no limit: waits are checked
        if self.faults:
            raise self.faults[0]

    def _run(self, index: int, function: Callable[[], object]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == index)  # no limit: its turn comes
            try:
                if not self.faults:
                    function()
            except BaseException as fault:
                self.faults.append(fault)
            self.is_done[index] = True
            self._pass_on(index)

    def wait_until(self, is_true: Callable[[], bool]) -> None:
        """Others run until it is; an error where none can."""
        index = self.places[threading.current_thread()]
        self.waiting[index] = is_true
        self._pass_on(index)
        self.changed.wait_for(lambda: self.turn == index)  # no limit: its turn comes
        self.waiting[index] = None
        assert is_true() and not self.faults, "a wait for ever"

    def _pass_on(self, index: int) -> None:
        others = [(index + 1 + i) % len(self.threads) for i in range(len(self.threads))]
        alive = [i for i in others if not self.is_done[i]]
        able = [i for i in alive if (wait := self.waiting[i]) is None or wait()]
        self.turn = (able or alive or [-1])[0]
        self.changed.notify_all()


class Chip:
    """One program's asynchronous work, and what its kernel calls `gl`, `async_copy`, `tma` and `mbarrier`."""

    def __init__(self, program: int, num_programs: int) -> None:
        self.program, self.num_programs = program, num_programs
        self.turns: Turns | None = None
        # Of each partition: copies not yet committed, groups of copies, products, stores.
        self.work: dict[threading.Thread, tuple[list, list, list, list]] = {}

    def own(self) -> tuple[list, list, list, list]:
        return self.work.setdefault(threading.current_thread(), ([], [], [], []))

    def specialize(
        self, functions: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]
    ) -> None:
        assert len(functions) == len(warps) + 1 == len(registers) + 1
        self.turns = Turns([lambda f=f, given=given: f(*given) for f, given in functions])
        self.turns.run()

    def modules(self) -> dict[str, Any]:
        space = types.SimpleNamespace
        return {
            "gl": self.language(),
            "async_copy": space(
                async_copy_global_to_shared=self.copy, commit_group=self.commit, wait_group=self.wait_group
            ),
            "tma": space(
                async_copy_global_to_shared=self.bring,
                async_copy_shared_to_global=self.send,
                store_wait=self.wait_stores,
            ),
            "mbarrier": space(
                init=self.init,
                MBarrierLayout=lambda: None,
                expect=self.expect,
                arrive=self.arrive,
                wait=self.wait,
            ),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.wait_products,
        }

    def language(self) -> Any:
        def load(pointer, mask=None, other=0):
            places, used = pointer.places(mask)
            return number(torch.where(used, pointer.memory.flatten()[places], other))

        def store(pointer, value, mask=None):
            places, used = pointer.places(mask)
            pointer.memory.view(-1)[places[used]] = value.expand(places.shape)[used].to(pointer.memory.dtype)

        def atomic_add(pointer, value, mask=None, sem=None):
            places, used = pointer.places(mask)
            value = value.expand(places.shape)[used].as_subclass(Tensor)
            pointer.memory.view(-1).index_add_(0, places[used].as_subclass(Tensor), value)

        def atomic_max(pointer, value, sem=None):
            place = int(pointer.offset)
            pointer.memory.view(-1)[place] = max(int(pointer.memory.view(-1)[place]), int(value))

        def where(condition, x, y):
            if isinstance(x, Pointer):
                return x if condition else y
            return number(torch.where(number(condition), number(x), number(y)))

        def allocate(dtype, shape, layout):
            data = torch.zeros(shape, dtype=dtype)
            return Shared(data.fill_(float("nan")) if data.is_floating_point() else data)

        return types.SimpleNamespace(
            int32=torch.int32, int64=torch.int64, float32=torch.float32, constexpr=None,
            load=load, store=store, where=where, allocate_shared_memory=allocate,
            arange=lambda low, high, layout: number(torch.arange(low, high, dtype=torch.int32)),
            zeros=lambda shape, dtype, layout: number(torch.zeros(shape, dtype=dtype)),
            maximum=lambda x, y: number(torch.maximum(number(x), number(y))),
            minimum=lambda x, y: number(torch.minimum(number(x), number(y))),
            max=lambda x, axis: x.amax(axis), min=lambda x, axis: x.amin(axis), abs=torch.abs,
            atomic_add=atomic_add, atomic_max=atomic_max, sum=lambda x, axis: x.sum(axis),
            exp2=torch.exp2, log2=torch.log2, cdiv=lambda x, y: (x + y - 1) // y,
            join=lambda x, y: torch.stack((x, y), -1), split=lambda x: x.unbind(-1),
            convert_layout=lambda x, layout, assert_trivial=False: x, SliceLayout=lambda axis, parent: None,
            static_range=range, thread_barrier=lambda: None, warp_specialize=self.specialize,
            fma=lambda x, y, z: x * y + z, zeros_like=lambda x: number(torch.zeros_like(x)),
            program_id=lambda axis: number(self.program), num_programs=lambda axis: number(self.num_programs),
        )  # fmt: skip

    # ---- copies by all threads -----------------------------------------------------------------

    def copy(self, target: Shared, source: Pointer) -> None:
        target.data.fill_(float("nan"))
        self.own()[0].append((target, source))

    def commit(self) -> None:
        copies, groups, *_ = self.own()
        groups.append(list(copies))
        copies.clear()

    def wait_group(self, num_left: int) -> None:
        groups = self.own()[1]
        while len(groups) > num_left:
            for target, source in groups.pop(0):
                target.data.copy_(source.memory.flatten()[source.places(None)[0]])

    # ---- copies of blocks ------------------------------------------------------------------------

    def init(self, barrier: Shared, count: int) -> None:
        barrier.num_arrivals = count

    def arrive(self, barrier: Shared, count: int = 1, pred: Any = True) -> None:
        if pred:
            barrier.num_arrived += count
            assert barrier.num_arrived <= barrier.num_arrivals and not barrier.coming
            if barrier.num_arrived == barrier.num_arrivals:
                barrier.parity, barrier.num_arrived = 1 - barrier.parity, 0

    def expect(self, barrier: Shared, num_bytes: int) -> None:
        barrier.num_expected += num_bytes

    def bring(self, source: Descriptor, corner: list[Any], barrier: Shared, target: Shared) -> None:
        target.data.fill_(float("nan"))
        barrier.coming.append((target, source.at(corner)))

    def wait(self, barrier: Shared, phase: Any) -> None:
        if barrier.parity != int(phase):
            return
        if not barrier.coming:
            assert self.turns, "a wait for ever"
            self.turns.wait_until(lambda: barrier.parity != int(phase) or bool(barrier.coming))
        if barrier.parity != int(phase):
            return
        assert sum(x.numel() * x.element_size() for _, x in barrier.coming) == barrier.num_expected
        for target, found in barrier.coming:
            target.data.copy_(found)
        barrier.coming, barrier.num_expected, barrier.parity = [], 0, 1 - barrier.parity

    def send(self, target: Descriptor, corner: list[Any], source: Shared) -> None:
        self.own()[3].append((target.at(corner), source, source.data.clone()))

    def wait_stores(self, num_left: int) -> None:
        leaving = self.own()[3]
        while len(leaving) > num_left:
            target, source, expected = leaving.pop(0)
            assert torch.equal(source.data, expected), "a buffer changed while it was stored"
            target.copy_(source.data)

    # ---- products ----------------------------------------------------------------------------------

    def multiply(self, a, b, acc, use_acc=True, is_async=False) -> Product:
        assert is_async
        products = self.own()[2]
        products.append(Product(a, b, acc, use_acc))
        return products[-1]

    def wait_products(self, num_left: int, deps: tuple[Product, ...]) -> Any:
        products = self.own()[2]
        while len(products) > num_left:
            products.pop(0).finish()
        assert all(product.value is not None for product in deps), "a product that is not waited for"
        values = [product.value for product in deps]
        return values[0] if len(values) == 1 else values

    def check_idle(self) -> None:
        assert not any(any(own) for own in self.work.values()), "work left behind"


def run(kernel: Any, num_programs: int, *given: Any, **constants: Any) -> None:
    """`kernel[(num_programs,)](*given, **constants)`; tensors become pointers, integers numbers."""
    wrap = lambda x: Pointer(x) if isinstance(x, Tensor) else number(x) if isinstance(x, int) else x
    for program in range(num_programs):
        chip = Chip(program, num_programs)
        _bind(kernel, chip.modules(), {})(*map(wrap, given), **constants)
        chip.check_idle()


def _bind(kernel: Any, modules: dict[str, Any], made: dict[int, Any]) -> Any:
    """The kernel's Python function over emulated modules; so the kernels that it calls."""
    if id(kernel) not in made:
        names: dict[str, Any] = {"__builtins__": __builtins__}
        made[id(kernel)] = types.FunctionType(kernel.fn.__code__, names)
        for name, x in kernel.fn.__globals__.items():
            is_kernel = hasattr(x, "fn") and hasattr(x, "arg_names")
            names[name] = _bind(x, modules, made) if is_kernel else getattr(x, "value", x)
        names.update(modules)
    return made[id(kernel)]
