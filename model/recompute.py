"""Which tensors of a block stay for the backward and which are computed again (report 3; specification 3).

Without a policy autograd keeps what every operation asks for. With one, a block keeps its input streams and
the named tensors that the policy saves; everything else comes back by running the block once more in the
backward. PyTorch's selective checkpointing does that, and decides by operation. What makes a named tensor is
therefore called through `named`, and the policy saves what these calls make and nothing else.

Norms, rotations, gates and sums over experts have no name: computing them again is cheaper than keeping
them. Nothing changes by a bit, as the same operations run on the same values.

B rows, T tokens, R = B·T, D model width, N streams, H heads, C head width, K picks or experts of a token,
E experts, I expert width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from consilience.conf.errors import ConfigError

if TYPE_CHECKING:
    from consilience.model.layout import Layout
    from consilience.model.state import LayerState

NAMES = {
    "streams": "residual streams [R, N, D] between attention and MoE",
    "layer_input": "what a sub-layer reads of the streams [R, D], with post [R, N] and comb [R, N, N]",
    "attention_inner": "projections into queries, keys, compressed entries and the low-rank output",
    "picks": "the indexer's choice [B, T, K]",
    "attention_output": "attention's sum over keys [B, T, H, C] and what it hands to the streams [R, D]",
    "router": "the gate's logits [R, E]",
    "expert_activations": "gate and up projections of the routed [R·K, I] and shared experts; in fp32 on a "
    "CPU, where under a policy those never leave the cache, their outputs [R, D]; of experts over ranks "
    "outputs and the rows that came [R·K, D]",
}
POLICIES = {
    "cheap": (),
    "mhc": ("streams", "layer_input"),
    "attention": ("attention_inner", "picks", "attention_output"),
    "experts": ("router", "expert_activations"),
    "block": tuple(NAMES),
}
# Matrix products make the named tensors that autograd differentiates itself; views and casts are made anew.
PRODUCTS = frozenset(
    (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._grouped_mm.default,
        torch.ops.aten._scaled_mm_v2.default,
    )
)

_is_selective: ContextVar[bool] = ContextVar("is_selective", default=False)
_name: ContextVar[str | None] = ContextVar("name", default=None)
_works: dict[int, Callable[[], list[Tensor]]] = {}
_numbers = itertools.count()
_library = torch.library.Library("consilience", "FRAGMENT")
_library.define("named(str name, int work) -> Tensor[]")
_library.impl("named", lambda _, work: _works[work](), "CompositeExplicitAutograd")
_NAMED = torch.ops.consilience.named.default


def named(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """work(*arguments), of whose result the policy decides by `name`.

    Under autograd the matrix products in `work` are saved. Where gradients are off – in the forward of an
    autograd.Function, whose backward is its own – `work` is one operation to the policy, whatever it calls,
    compiled code included: it must return a tensor, or a tuple of several, that it made.
    """
    if not _is_selective.get():
        return work(*arguments)
    if torch.is_grad_enabled():
        with _set(_name, name):
            return work(*arguments)

    def run() -> list[Tensor]:
        made = work(*arguments)
        return list(made) if isinstance(made, tuple) else [made]

    number = next(_numbers)
    _works[number] = run
    try:
        made = _NAMED(name, number)
    finally:
        del _works[number]
    return tuple(made) if len(made) > 1 else made[0]


def has_policy() -> bool:
    """Whether somebody decides by name what stays for the backward; if not, all that it asks for does."""
    return _is_selective.get()


def name_of(operation: Any, arguments: tuple[Any, ...]) -> str | None:
    """The name under which `operation`, seen by a dispatch mode, makes its result; None: it has none."""
    if operation is _NAMED:
        return arguments[0]
    return _name.get() if operation in PRODUCTS else None


@dataclass(frozen=True)
class Recompute:
    """A policy: the names whose tensors are computed again; all others are saved."""

    names: frozenset[str]

    def decide(self, _context: Any, operation: Any, *arguments: Any, **_keywords: Any) -> CheckpointPolicy:
        """PyTorch's policy function."""
        name = name_of(operation, arguments)
        is_saved = name is not None and name not in self.names
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    def run(
        self, forward: Callable[..., Tensor], streams: Tensor, token_ids: Tensor, layout: Layout
    ) -> Tensor:
        """forward(streams, token_ids, layout, None) [R, N, D], some of it run again in the backward."""
        is_selective = not self.names.issuperset(NAMES)
        with _set(_is_selective, is_selective):
            settings = copy_context()  # exact mode among them; the backward may run outside of it

        def once(streams: Tensor, token_ids: Tensor) -> Tensor:
            return settings.copy().run(forward, streams, token_ids, layout, None)

        contexts = functools.partial(create_selective_checkpoint_contexts, self.decide)
        return checkpoint(  # type: ignore[return-value]
            once,
            streams,
            token_ids,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in a block is random
            context_fn=contexts if is_selective else noop_context_fn,
        )


def unnamed() -> Context:
    """The settings of here, under which `named` is the call itself: for work inside of a named call."""
    with _set(_is_selective, False):
        return copy_context()


def recompute_policy(setting: str | Iterable[str]) -> Recompute | None:
    """The policy of names of POLICIES and NAMES, joined; None for "none". ConfigError on another name."""
    words = [setting] if isinstance(setting, str) else list(setting)
    if words == ["none"]:
        return None
    sets = POLICIES | {name: (name,) for name in NAMES}
    for word in words:
        if word not in sets:
            raise ConfigError(f"recompute names '{word}'; write none alone, or some of {', '.join(sets)}")
    return Recompute(frozenset(name for word in words for name in sets[word]))


def set_recompute(model: nn.Module, policy: Recompute | None) -> None:
    """Give every block of `model` the policy; None: keep everything."""
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = policy  # type: ignore[assignment]


def recomputable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward under its policy `recompute`; on a decode state or without gradients as it is."""

    @functools.wraps(forward)
    def run(self: Any, streams: Any, token_ids: Tensor, layout: Layout, state: LayerState | None) -> Any:
        policy: Recompute | None = self.recompute
        if policy is None or state is not None or not torch.is_grad_enabled():
            return forward(self, streams, token_ids, layout, state)
        return policy.run(functools.partial(forward, self), streams, token_ids, layout)

    return run


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
