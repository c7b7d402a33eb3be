"""Where tensors of a model with divided experts lie: the rows of every expert are somebody's, once."""

import pytest
import torch

from consilience.model.checkpoint import to_official
from consilience.model.expert_parallel import shard_experts, sharded_names
from consilience.model.ranks import ALONE, Ranks
from consilience.training.divided_experts import official_weights, stored_state
from consilience.training.optimizers import V4Optimizer, parameter_groups
from tests.training.v4_ranks import v4_model


@pytest.mark.parametrize("rank", [0, 1])
def test_every_expert_is_a_piece_of_its_rank_and_all_else_is_the_first_ranks(rank):
    model, whole = v4_model(), to_official(v4_model())
    shard_experts(model, Ranks(rank, 2))
    found = official_weights(model, sharded_names(model))
    assert list(found) == list(whole)  # the order of a checkpoint
    for name, tensor in found.items():
        expected = whole[name]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, tuple(expected.shape))
        (piece,) = tensor.pieces
        owner = int(name.split(".experts.")[1].split(".")[0]) // 2 if ".ffn.experts." in name else 0
        assert (piece.rank, piece.first, piece.last) == (owner, 0, expected.shape[0] if expected.ndim else 1)
        if ".ffn.experts." in name and owner != rank:
            assert tensor.local is None
        else:
            assert tensor.local is not None and torch.equal(tensor.local, expected)


@pytest.mark.parametrize("use_muon", [True, False])
def test_stored_state_has_the_names_and_shapes_of_one_process_in_its_order(use_muon):
    model, whole = v4_model(), v4_model()
    shard_experts(model, Ranks(1, 2))
    split = sharded_names(model)
    own, alone = (
        V4Optimizer(parameter_groups(m, use_muon=use_muon), lr=1e-3, split=names)
        for m, names in ((model, split), (whole, {}))
    )
    found, expected = stored_state(own.state_types(), split), alone.state_tensors()
    assert list(found) == list(expected) == list(own.state_tensors())
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, tuple(expected[name].shape))
        pieces = [(piece.rank, piece.first, piece.last) for piece in tensor.pieces]
        is_stack = ".ffn.experts." in name and tensor.shape
        assert pieces == ([(0, 0, 2), (1, 2, 4)] if is_stack else [(0, 0, (tensor.shape or (1,))[0])])


def test_a_whole_model_lies_on_the_first_rank():
    model = v4_model()
    shard_experts(model, ALONE)
    found = official_weights(model, sharded_names(model))
    assert all(torch.equal(found[name].local, value) for name, value in to_official(model).items())
