"""A model cut over ranks by FSDP2: which parameters are cut, and in which groups they are gathered.

Every block is a group, gathered when it runs and again for its backward. Embedding and prediction head are
one more, gathered with the trunk and kept until the backward is through: the losses read `head.weight` beside
any forward, as often as they like, and its gradient is reduce-scattered once a micro-batch.

Parameters that V4 keeps in fp32, and all vectors, are whole on every rank: they are a few thousandths of a
model, a group must be of one type, and so they stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from consilience.conf.errors import EngineError
from consilience.model.quantization import mark_passing
from consilience.model.ranks import Ranks

_WHOLE = re.compile(r"(.*\.)?(hc_\w+\.\w+|ape|bias)")


def is_cut(name: str, parameter: nn.Parameter, main: torch.dtype) -> bool:
    """Whether a parameter is cut over the ranks: the matrices in the main type of the weights."""
    return parameter.ndim >= 2 and parameter.dtype == main and not _WHOLE.fullmatch(name)


def check_version(part: type = FSDPModule) -> None:
    """EngineError if this PyTorch, of which `part` is what FSDP2 makes of a module, is too old."""
    if not hasattr(part, "set_reduce_scatter_unused_params"):
        raise EngineError(
            f"PyTorch {torch.__version__} cannot reduce a group of which a rank has only some gradients; "
            "install 2.13 or newer, or take engine.kind=torch or deepspeed"
        )


def cut_model(model: nn.Module, ranks: Ranks) -> None:
    """Cut the model's matrices over the ranks, in place; gradients are summed in fp32 (fp64 stays).

    After it parameters are `DTensor`s on the ranks' device, rows r · ceil(n / R) onward on rank r; a model's
    forward, `streams` and prediction blocks gather what they read. The model may come from the host, a block
    at a time of which is then whole on the device, or from the meta device: then its values are still to be
    read. EngineError with one rank, or a PyTorch that is too old.
    """
    if ranks.group is None:
        raise EngineError("FSDP cuts a model over several ranks, this is one; take engine.kind=torch")
    check_version()
    mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
    main = next(iter(model.parameters())).dtype
    wide = None if main == torch.float64 else torch.float32
    whole_ones = {p for n, p in model.named_parameters() if not is_cut(n, p, main)}
    given = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False),
        "ignored_params": whole_ones,
    }
    is_empty = any(p.is_meta for p in model.parameters())
    for parameter in whole_ones if not is_empty else ():
        parameter.data = parameter.data.to(ranks.device)
    ahead = list(getattr(model, "mtp", ()))
    for block in ahead:  # these are read before the block's own forward
        fully_shard(block.e_proj, **given)
        fully_shard(block.h_proj, **given)
    for block in (*_layers(model), *ahead):
        fully_shard(block, **given)
    fully_shard(model, **given)
    if is_empty:
        model.to_empty(device=ranks.device)
    whole: Any = model
    whole.set_reduce_scatter_unused_params(True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    register_fsdp_forward_method(whole, "streams")
    # A group that no forward has run, as a prediction block without its loss, fails in a backward that keeps
    # its gradients (PyTorch 2.13); once gathered it does not. The whole model first: so it is the root.
    whole.unshard()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            for parameter in module.parameters():
                mark_passing(parameter)  # gathered weights look unchanged, at the same address even
            module.reshard()


class Anchor:
    """What the last layer of the newest forward returned, to hang a loss on.

    Some losses leave a block beside its output, by the trace. FSDP gathers a block's weights again when the
    gradient of its output comes, and reduces when that of its input has: a loss that does not depend on the
    outputs would find weights freed, and one that alone trains what stands beside them, as the warm-up of
    indexers does, would never be reduced. So the first layer's input always asks for a gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self.streams: Any = None
        layers = _layers(model)
        layers[0].register_forward_pre_hook(
            self._ask, prepend=True
        )  # ahead of FSDP's own, which looks for it
        layers[-1].register_forward_hook(self._keep)

    def _ask(self, _module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return given
        is_constant = lambda x: isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad
        return tuple(x.detach().requires_grad_() if is_constant(x) else x for x in given)

    def _keep(self, _module: nn.Module, _given: Any, made: Any) -> None:
        self.streams = made if torch.is_grad_enabled() else None

    def hang(self, loss: Tensor) -> Tensor:
        """The same loss with the same gradient, whose backward passes through every layer's output."""
        streams, self.streams = self.streams, None
        parts = streams if isinstance(streams, tuple) else (streams,)
        tied = [x for x in parts if isinstance(x, Tensor) and x.requires_grad]
        return loss + sum((0 * x.sum().to(loss.dtype) for x in tied), torch.zeros_like(loss))


def _layers(model: nn.Module) -> list[nn.Module]:
    if not hasattr(model, "layers"):
        raise EngineError(
            f"{type(model).__name__} has no layers to cut; FSDP trains V4 models, take engine.kind=torch"
        )
    return list(model.layers)  # type: ignore[arg-type]
