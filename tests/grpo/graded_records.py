"""Records of a small model with its own log-probabilities, for the tests of GRPO's phases and stage."""

import math

import torch
from small_trainer import small_model

from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

PROMPT = (3, 9, 17, 18)
GRADED = Outcome(OutcomeKind.GRADED)


def engine_of(seed=0, lr=3e-3):
    return TorchEngine(small_model(seed), OptimizerSettings(lr=lr, weight_decay=0.0))


@torch.no_grad()
def logprobs(policy, prompt, tokens):
    """[N] log-probability of each token after the prompt, through plain logits."""
    ids = torch.tensor([[*prompt, *tokens]])
    logp = torch.log_softmax(policy.head(policy.hidden(ids))[0].float(), -1)
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return logp[places, ids[0, len(prompt) :]].tolist()


def record(uid, tokens, reward, *, group="g", mask=None, policy=None, prompt=PROMPT):
    """A record whose log-probs are the policy's own, and NaN where the token was not sampled."""
    mask = mask or (1,) * len(tokens)
    own = logprobs(policy or small_model(), prompt, tokens)
    return RolloutRecord(
        uid=uid,
        group=group,
        domain="math",
        effort="chat",
        teacher=None,
        prompt_ids=prompt,
        token_ids=tuple(tokens),
        logprobs=tuple(x if m else math.nan for x, m in zip(own, mask)),
        loss_mask=tuple(mask),
        weight_version=tuple(0 if m else -1 for m in mask),
        finish=FinishReason.STOP,
        outcome=GRADED if reward is not None else Outcome(OutcomeKind.INFRA, "box lost"),
        reward=reward,
        reward_parts={} if reward is None else {"correct": reward},
    )
