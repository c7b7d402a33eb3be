"""Muon and AdamW on parts of flattened parameters, against the optimisers that see them whole, in fp64."""

import threading

import pytest
import torch

from consilience.model.ranks import ALONE
from consilience.training.deepspeed_optimizer import (
    Matrix,
    Segment,
    ZeroV4Optimizer,
    matrices_of,
    optimizer_groups,
)
from consilience.training.muon import Muon, MuonParameter
from consilience.training.optimizers import ParameterGroups
from consilience.training.torch_engine import OptimizerSettings

torch.set_num_threads(1)
SETTINGS = OptimizerSettings(lr=0.1, weight_decay=0.2, eps=1e-8)
SHAPES = {"a": ((4, 6), (4,)), "experts": ((3, 5, 4), (5,)), "blocks": ((6, 4), (2, 4))}


class ThreadRanks:
    """Ranks that are threads of this process: what `Group` and the optimiser ask of `Ranks`."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self.shared, self.device = rank, size, shared, torch.device("cpu")

    def gather(self, value):
        self.shared["values"][self.rank] = value
        self.shared["barrier"].wait(10)
        found = list(self.shared["values"])
        self.shared["barrier"].wait(10)
        return found

    def sum_(self, tensors):
        for tensor in tensors:
            tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, (s, _) in SHAPES.items()}


def owners(parameters):
    muon = tuple(MuonParameter(n, parameters[n], SHAPES[n][1]) for n in ("a", "experts", "blocks"))
    return ParameterGroups(muon, {}, {}, {}, {})


def on_threads(size, function):
    shared = {"values": [None] * size, "barrier": threading.Barrier(size)}
    found = [None] * size

    def run(rank):
        found[rank] = function(ThreadRanks(rank, size, shared))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def in_parts(ranks):
    """Two updates on this rank's part of all parameters laid end to end; the parameters whole."""
    parameters = {name: torch.nn.Parameter(value) for name, value in weights(0).items()}
    (group,) = optimizer_groups(owners(parameters), SETTINGS.weight_decay, is_fp32_first=True)
    optimizer = ZeroV4Optimizer([group], SETTINGS, ranks)
    total = sum(p.numel() for p in parameters.values())
    size = -(-total // ranks.size)
    low, first, segments = size * ranks.rank, 0, []
    for name, parameter in parameters.items():
        start, stop = max(first, low), min(first + parameter.numel(), low + size)
        if start < stop:
            segments.append(Segment(name, start - low, start - first, stop - start))
        first += parameter.numel()
    flat = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    group.divide(segments, flat, ranks)
    group.take(flat.data, weights(0))
    for row in optimizer.param_groups:
        row["params"] = [flat]
    for step in (1, 2):
        flat.grad = torch.zeros_like(flat)
        group.take(flat.grad, weights(step))
        optimizer.touched = frozenset(parameters if step == 1 else {"a", "experts"})
        optimizer.step()
    return {name: value.clone() for name, value in group.whole(flat.data, ranks)}, len(group.cut)


def whole():
    parameters = {name: torch.nn.Parameter(value) for name, value in weights(0).items()}
    muon = Muon(owners(parameters).muon, weight_decay=SETTINGS.weight_decay)
    for step in (1, 2):
        for name, grad in weights(step).items():
            parameters[name].grad = grad if step == 1 or name != "blocks" else None
        muon.step(SETTINGS.lr)
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize(("size", "num_cut"), [(1, 0), (2, 1), (3, 2), (7, 5)])
def test_muon_on_parts_moves_matrices_as_on_wholes(size, num_cut):
    # 24 + 3 * 20 + 8 + 16 = 108 elements: borders at 54, at 36 and 72, and at 16, 32, 48, 64, 80, 96;
    # 64 and no other lies between two matrices.
    expected = whole()
    for found, cut in on_threads(size, in_parts) if size > 1 else [in_parts(ALONE)]:
        assert cut == num_cut
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


def test_a_parameter_falls_into_its_row_blocks_and_its_experts():
    blocks = MuonParameter("w", torch.zeros(2, 6, 4), (2, 4))
    assert matrices_of(blocks) == [
        Matrix("w", 0, 2, 4), Matrix("w", 8, 4, 4), Matrix("w", 24, 2, 4), Matrix("w", 32, 4, 4)
    ]  # fmt: skip
