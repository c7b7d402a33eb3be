"""A function run again in the backward: the gradients of a plain run, and only its arguments kept."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from consilience.model.run_again import run_again

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]


def work(x, y, factor, constant):
    z = (x * y).exp() * factor
    return (z * constant).sum(), (z > 1).sum()


def arguments():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    return draw(4, 5).requires_grad_(), draw(5).requires_grad_(), 1.5, draw(4, 5)


@pytest.mark.parametrize("twin", [lambda w, *a: w(*a), lambda w, *a: checkpoint(w, *a, use_reentrant=False)])
def test_values_and_gradients_are_those_of_a_plain_run_to_the_bit(twin):
    found = []
    for run in (run_again, twin):
        given = arguments()
        loss, count = run(work, *given)
        (3 * loss).backward()
        assert not count.requires_grad and given[3].grad is None
        found.append((loss.detach(), count, given[0].grad, given[1].grad))
    assert all(torch.equal(one, two) for one, two in zip(*found))


def test_the_backward_sees_nothing_but_the_arguments():
    """Bytes saved for the backward: x, y and the constant, not exp's result."""
    saved = []
    x, y, factor, constant = arguments()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss, _ = run_again(work, x, y, factor, constant)
    assert sum(t.nbytes for t in saved) == x.nbytes + y.nbytes + constant.nbytes
    loss.backward()


def test_work_runs_once_without_a_backward_and_once_more_in_it():
    runs = []

    def counted(x):
        runs.append(torch.is_grad_enabled())
        return (x.sin(),)

    x = torch.ones(3, requires_grad=True)
    (y,) = run_again(counted, x)
    assert runs == [False]
    y.sum().backward()
    assert runs == [False, True] and torch.equal(x.grad, torch.ones(3).cos())


def test_arguments_that_ask_for_nothing_get_nothing():
    x, y, factor, constant = arguments()
    loss, _ = run_again(work, x.detach(), y.detach(), factor, constant)
    assert not loss.requires_grad
    run_again(work, x, y.detach(), factor, constant)[0].backward()
    assert x.grad is not None and y.grad is None
    unused = torch.ones(2, requires_grad=True)
    run_again(lambda a, b: (a.sum(),), x, unused)[0].backward()
    assert unused.grad is None


def test_a_training_step_with_an_index_loss_imports_no_compiler():
    code = """if True:
        import sys, torch
        torch.set_num_threads(1)
        from dataclasses import replace
        from consilience.model.config import TINY
        from consilience.model.forward_trace import Trace
        from consilience.model.initialize import initialize
        from consilience.model.transformer import Transformer
        model = initialize(Transformer(replace(TINY, vocab_size=64)), 0)
        trace = Trace(wants_losses=True)
        out = model(torch.arange(40)[None], trace=trace)
        (out.sum() + trace.summed_indexer_loss()).backward()
        assert len(trace.indexer_loss) and "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
