"""The reverse KL with its vocabulary on several ranks equals one rank's."""

import pytest
import torch
import torch.distributed as dist

from consilience.model.kernels.reverse_kl import reverse_kl
from consilience.model.kernels.vocabulary_parallel import Vocabulary

torch.set_num_threads(1)
V, D, N = 23, 6, 11


def inputs():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    hidden, head, teacher, teacher_head = draw(N, D), draw(V, D), draw(N, 4), draw(V, 4)
    teacher_head[20] = 9 * teacher_head[20]  # some largest logits lie on the last rank
    return hidden, head, teacher, teacher_head, draw(N).abs(), torch.arange(N) * 2


def run(vocabulary, rows):
    hidden, head, teacher, teacher_head, weight, target = inputs()
    hidden, head = hidden.requires_grad_(), head[rows].clone().requires_grad_()
    given = (hidden, head, teacher, teacher_head[rows], weight, 4)
    out = reverse_kl(*given, target_ids=target, vocabulary=vocabulary)
    return out, torch.autograd.grad(out.loss, (hidden, head))


def one_rank(rank, ranks, address):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    vocabulary = Vocabulary.shard(V)
    rows = slice(vocabulary.start, vocabulary.start + vocabulary.num_rows)
    out, grads = run(vocabulary, rows)
    whole, (dH, dW) = run(None, slice(None))
    for x, y in zip((*out, *grads), (*whole, dH, dW[rows])):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_gets_the_values_and_gradients_of_one_rank(ranks, tmp_path):
    address = f"file://{tmp_path / 'meeting'}"
    torch.multiprocessing.spawn(one_rank, (ranks, address), nprocs=ranks)  # raises what a rank raised


def test_a_head_that_is_not_this_ranks_part_is_refused():
    with pytest.raises(
        ValueError, match=r"head has 23 rows, this rank's vocabulary 12 \(rows 0 to 12 of 23\)"
    ):
        run(Vocabulary(V, 0, 12), slice(None))
