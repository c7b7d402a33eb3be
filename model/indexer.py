"""The lightning indexer: which compressed entries a CSA query attends to (report 2.3.1; specification 5.2).

B rows, T queries, M entries, H index heads, C index width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from consilience.model.compressor import Compressor
from consilience.model.config import CSA_RATIO, ModelConfig
from consilience.model.layout import MASKED, Layout
from consilience.model.rope import rotate
from consilience.model.state import CompressorState


class Indexer(nn.Module):
    """Scores I[t, i] = Σ_h w_h · ReLU(q_h · K_i), masked to visible entries, then top-k.

    Queries come from the attention's normed latent without a norm of their own; weights may be
    negative. Gets no gradient from the language-model loss; `index_loss` trains it.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.num_heads = config.index_n_heads
        self.width = config.index_head_dim
        self.topk = config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, self.num_heads * self.width, bias=False, dtype=dtype)
        self.weights_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False, dtype=dtype)
        self.compressor = Compressor(config, self.width, CSA_RATIO, dtype)

    def keys(self, hidden: Tensor, layout: Layout, state: CompressorState | None) -> Tensor:
        """Index keys [B, M, C]; advances the state."""
        return self.compressor(hidden, layout, state)

    def scores(self, hidden: Tensor, latent: Tensor, keys: Tensor, layout: Layout) -> Tensor:
        """Index scores [B, T, M] in fp32, -inf where an entry is not visible."""
        num_rows, num_tokens = hidden.shape[:2]
        query = self.wq_b(latent).view(num_rows, num_tokens, self.num_heads, self.width)
        query = rotate(query, layout.compressed_rotation[:, :, None])
        scale = self.num_heads**-0.5 * self.width**-0.5
        weight = self.weights_proj(hidden) * scale
        match = torch.bmm(query.flatten(1, 2), keys.transpose(1, 2)).relu_()
        match = match.view(num_rows, num_tokens, self.num_heads, -1)
        scores = (match * weight[..., None]).sum(2)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        return wide + layout.windows[CSA_RATIO].bias

    def select(self, scores: Tensor) -> Tensor:
        """Scores [B, T, M] -> bool [B, T, M]: the top-k visible entries; ties take the lowest index."""
        is_visible = scores > MASKED
        if scores.shape[-1] <= self.topk:
            return is_visible
        threshold = scores.topk(self.topk, dim=-1).values[..., -1:]
        above = scores > threshold
        equal = scores == threshold
        room = self.topk - above.sum(-1, keepdim=True)
        return (above | (equal & (equal.cumsum(-1) <= room))) & is_visible


def index_loss(probabilities: Tensor, scores: Tensor, is_selected: Tensor, is_valid: Tensor) -> Tensor:
    """Mean KL(target ‖ softmax(scores)) over valid queries that see at least one selected entry.

    probabilities [B, T, H, M]: main attention on the compressed entries (window and sink in the
    denominator), detached here; summed over heads and L1-normalised over selected entries.
    """
    target = probabilities.detach().to(scores.dtype).sum(2).masked_fill(~is_selected, 0.0)
    total = target.sum(-1, keepdim=True)
    is_used = is_valid & (total[..., 0] > 0)
    target = target / total.clamp(min=1e-20)
    logits = scores.masked_fill(~is_selected, -1e30)
    log_index = torch.log_softmax(logits, dim=-1)
    kl = torch.special.xlogy(target, target) - target * log_index.clamp(min=-1e4)
    return (kl.sum(-1) * is_used).sum() / is_used.sum().clamp(min=1)
