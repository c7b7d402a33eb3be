"""Rows, models' results and losses for tests of context parallelism; runs on ranks of their own."""

import pickle

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from consilience.model import pieces
from consilience.model.context_parallel import context_parallel
from consilience.model.exact import exact_mode
from consilience.model.expert_parallel import shard_experts, sharded_names
from consilience.model.forward_trace import Trace
from consilience.model.indexer import warming_up
from consilience.model.recompute import recompute_policy, set_recompute
from consilience.model.routing import Routing

SIZES = (pieces.WHOLE_BYTES, pieces.PIECE_BYTES, pieces.MULTIPLE)


def rows_of(lengths, num_tokens, vocabulary=53, seed=3):
    """ids, segments, positions [B, T] of packed samples."""
    ids = torch.randint(vocabulary, (len(lengths), num_tokens), generator=torch.Generator().manual_seed(seed))
    segments, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    for row, samples in enumerate(lengths):
        start = 0
        for number, length in enumerate(samples):
            span = slice(start, start + length)
            segments[row, span], positions[row, span] = number, torch.arange(length)
            start += length
    return ids, segments, positions


def probe(*shape, dtype):
    """Fixed weights that make a number of a result."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def run(ranks, model, rows, borders=None, how="plain"):
    """Results of this rank's piece; losses and gradients of what it has to add.

    how  "plain", "exact", "pieces" (work in pieces of 4 tokens), "warm up" of the indexers, or a policy
    """
    sizes = (0, 1 << 8, 4) if how == "pieces" else SIZES
    pieces.WHOLE_BYTES, pieces.PIECE_BYTES, pieces.MULTIPLE = sizes
    if how not in ("plain", "exact", "pieces", "warm up"):
        set_recompute(model, recompute_policy(how))
    model.zero_grad()
    if how == "warm up":
        with warming_up(model):
            return _run(ranks, model, rows, borders)
    with exact_mode(how == "exact"):
        return _run(ranks, model, rows, borders)


def _run(ranks, model, rows, borders):
    ids, segments, positions = rows
    trace, routing = Trace(wants_losses=True), Routing()
    with context_parallel(ranks, borders):
        streams, layout = model.streams(ids, segments, positions, trace=trace, routing=routing)
        hidden = model.norm(model.hc_head(streams)).view(*layout.position.shape, -1)
        ahead = model.mtp_hidden(streams, ids.roll(-1, 1), layout)
        logits = model.head(hidden)
    dtype = hidden.dtype
    is_token = layout.cut(segments >= 0)[..., None]
    found = [logits, *ahead]
    terms = [(layout.cut(probe(*ids.shape, x.shape[2], dtype=dtype)) * x * is_token).sum() for x in found]
    terms += [3 * trace.summed_indexer_loss(), 50 * torch.stack(trace.balance_loss).sum()]
    losses = torch.stack(terms)
    losses.sum().backward()
    return {
        "results": [x.detach() for x in found],
        "losses": losses.detach(),
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "routing": routing.experts,
        "counts": [trace.csa_visible, trace.csa_dropped, trace.hca_attended],
        "load": trace.expert_load,
    }


def run_all(ranks, cases):
    """`run` of every case (model, rows, borders, how), one after the other. They come pickled."""
    return [run(ranks, *case) for case in pickle.loads(cases)]


def run_composed(ranks, model, batches, borders):
    """`run` of this rank's batch: pairs of ranks cut rows, pairs take a batch each, all share the experts."""
    context, data = ranks.split(2)
    shard_experts(model, ranks)
    found = run(context, model, batches[data.rank], borders)
    places = {name: (shard.own.start, shard.own.stop) for name, shard in sharded_names(model).items()}
    return found["losses"], found["grads"], places


class Shapes(TorchDispatchMode):
    """Shapes of all floating-point and complex tensors that operations return, forward and backward."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()):
                self.found.add(tuple(x.shape))
        return out


def shapes(ranks, model, rows, borders):
    """Shapes that a forward and backward of this rank's piece makes."""
    trace = Trace(wants_losses=True)
    with context_parallel(ranks, borders), Shapes() as watched:
        streams, _ = model.streams(*rows, trace=trace)
        (streams.sum() + trace.summed_indexer_loss()).backward()
    return watched.found
