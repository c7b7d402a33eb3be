"""A model that trains in milliseconds, and an engine that shows its gradients, for the tests of trainers."""

from dataclasses import replace

from consilience.model.config import TINY
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.training.torch_engine import TorchEngine

CONFIG = replace(
    TINY,
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    compress_ratios=(0, 4),
    n_routed_experts=4,
    moe_intermediate_size=8,
)
AHEAD = replace(CONFIG, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))


def small_model(seed=0, config=CONFIG):
    return initialize(Transformer(config), seed)


class GradientKeeper(TorchEngine):
    """Keeps the gradients of every step and the last expert loads; the parameters stay where they are."""

    def __init__(self, model):
        super().__init__(model)
        self.steps = []

    def step(self, lr_scale=1.0, expert_load=None):
        self.expert_load = {layer: load.tolist() for layer, load in (expert_load or {}).items()}
        self.steps.append({n: p.grad for n, p in self.model.named_parameters() if p.grad is not None})
        self._clear()
        return {"grad_norm": 0.0, "lr": lr_scale}
