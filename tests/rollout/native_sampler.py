"""A sampler over the native engine in this process, for tests of whole GRPO runs."""

from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord

SHARED = tuple(range(5, 45))  # a prefix that all prompts have


class NativeSampler:
    """Samples two groups of three a step; every first answer of a group is right."""

    def __init__(self, model, *, exact=False):
        self.engine = NativeEngine(model, max_rows=5, max_length=200, exact=exact)
        self.published = []

    def publish(self, weights, announced, version):
        self.engine.publish(weights, announced, version)
        self.published.append(announced)

    def evidence(self, prompts, exact):
        return {"the worker": self.engine.evidence(prompts, exact)}

    def generate(self, jobs, on_progress=None, *, durable=None):
        requests = [self._request(job.uid) for job in jobs]
        self.engine.submit(requests)
        done = {}
        while len(done) < len(requests):
            done |= {c.uid: c for c in self.engine.step()}
        return [record(r, done[r.uid]) for r in requests]

    def _request(self, uid):
        step, group, number = map(int, uid.split("/"))
        seed = 100 * step + 10 * group + number
        sampling = SamplingParams(max_tokens=8 + 5 * number, seed=seed)
        return Request(uid, SHARED + tuple(range(50, 53 + 7 * group)), sampling, group=f"{step}/{group}")


def record(request, completed):
    tokens = completed.token_ids
    reward = float(request.uid.endswith("/0"))
    return RolloutRecord(
        uid=request.uid,
        group=request.group,
        domain="math",
        effort="chat",
        teacher=None,
        prompt_ids=request.prompt_ids,
        token_ids=tokens,
        logprobs=completed.logprobs,
        loss_mask=(1,) * len(tokens),
        weight_version=completed.weight_version,
        finish=FinishReason.STOP,
        outcome=Outcome(OutcomeKind.GRADED),
        reward=reward,
        reward_parts={"correct": reward},
    )
