"""DeepSpeed's own Muon (0.19.8): which known defects are gone, and why V4 does not train with it.

Gone: updates without ZeRO that were plain SGD, and weights made under `zero.Init` that went to AdamW. Left
are differences to V4's Algorithm 1 that no setting reaches, each shown below.
"""

import os
import re

import pytest
import torch
from torch import nn

from consilience.model.kernels.newton_schulz import newton_schulz_plainly
from consilience.training.optimizers import Owner, owner_of
from tests.rank_processes import on_ranks
from tests.training.v4_ranks import v4_model

pytestmark = pytest.mark.row("DeepSpeed's own Muon", "-")

torch.set_num_threads(1)
ROWS, COLUMNS, LR = 32, 64, 0.1


def update_of(stage, clip, uses_init=False):
    """(W before − W after) / lr of one step without weight decay, [32, 64]: the same gradient every time."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Muon", "params": {"lr": LR, "weight_decay": 0.0, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_scatter": False},
        "gradient_clipping": clip,
    }
    torch.manual_seed(0)
    if uses_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = nn.Linear(COLUMNS, ROWS, bias=False)
    else:
        model = nn.Linear(COLUMNS, ROWS, bias=False)
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        before = model.weight.detach().float().clone()
    x = torch.randn(96, COLUMNS, generator=torch.Generator().manual_seed(1))
    engine.backward(engine(x).square().sum())
    engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return (before - model.weight.detach().float()) / LR


def updates(ranks):
    os.environ["LOCAL_RANK"] = str(ranks.rank)  # it asks for its launcher's variable
    torch._dynamo.config.disable = True  # its updates are compiled at import, a minute each
    found = {(stage, clip): update_of(stage, clip) for stage in (0, 1, 3) for clip in (0.0, 1.0)}
    return found | {"init": update_of(3, 0.0, uses_init=True)}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_deepspeeds_muon_does_with_one_matrix(tmp_path):
    found = on_ranks(2, updates, folder=tmp_path, is_apart=True)[0]
    # Repaired: without ZeRO, and under zero.Init, it is Muon; SGD and Adam give other singular values.
    for case in ((0, 0.0), (1, 0.0), (3, 0.0), "init"):
        values = torch.linalg.svdvals(found[case])
        assert values.min() > 0.6 and values.max() < 1.3, case
    # Left: with ZeRO the clip is of the finished update, not of the gradient. An orthogonal matrix of 32 rows
    # has norm 32 ** 0.5; clipped to 1 the step is a sixth of the one it would be, whatever the gradient was.
    assert found[0, 1.0].norm() == pytest.approx(ROWS**0.5, rel=0.15)
    for stage in (1, 3):
        assert found[stage, 1.0].norm() == pytest.approx(1.0, rel=1e-4)
    # Left: five fast steps and no polish. V4's ten leave every singular value at 1 to 1 %.
    fives = torch.linalg.svdvals(found[1, 0.0])
    tens = torch.linalg.svdvals(newton_schulz_plainly(found[1, 0.0][None])[0])
    assert (fives - 1).abs().max() > 0.1 > 0.01 > (tens - 1).abs().max()
    # Left: the update's RMS is an orthogonal matrix's, 1 / sqrt(64), not 0.18: AdamW's rate does not fit.
    assert found[1, 0.0].square().mean().sqrt() == pytest.approx(COLUMNS**-0.5, rel=0.15)


@pytest.mark.slow
def test_deepspeed_gives_the_head_and_position_biases_to_muon():
    """It goes by dimensions and the words embed and lm_head; V4's `head.weight` and `ape` have neither."""
    import deepspeed
    from deepspeed.runtime.config import MUON_OPTIMIZER

    class Config:
        optimizer_name = MUON_OPTIMIZER
        optimizer_params: dict = {}  # noqa: RUF012

    model = v4_model()
    deepspeed.set_optimizer_flags(Config, model)
    wrong = {
        re.sub(r"\.\d+\.", ".N.", name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.use_muon != (owner_of(name) is Owner.MUON)
    }
    assert wrong == {"head.weight", "layers.N.attn.compressor.ape", "layers.N.attn.indexer.compressor.ape"}
