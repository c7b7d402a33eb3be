"""What the tests of the decode state's rows share: tokens, a state, feeding one row."""

import torch

from consilience.model.state import DecodeState

# Blocks hold 12 tokens: 3 CSA entries or one of HCA.
BLOCKS_OF_12 = {"num_hidden_layers": 3, "compress_ratios": (0, 4, 12), "hc_sinkhorn_iters": 2}


def random_ids(*shape, seed=7):
    return torch.randint(53, shape, generator=torch.Generator().manual_seed(seed))


def allocate(model, num_slots=4, max_length=60, **options):
    dtype = model.head.weight.dtype
    return DecodeState.allocate(model.config, num_slots, max_length, dtype=dtype, **options)


def feed(model, state, row, tokens):
    return model(tokens[None], state=state.view(row, row + 1))[0]
