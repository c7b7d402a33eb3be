"""Settings of what trains: stages, teachers, optimiser, engine. `schema.py` puts the groups together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from consilience.conf.fields import setting

RECOMPUTE = (
    "none", "cheap", "mhc", "attention", "experts", "block",
    "streams", "layer_input", "attention_inner", "picks", "attention_output", "router", "expert_activations",
)  # fmt: skip
ENGINES = ("torch", "deepspeed", "fsdp")
"""Names of `engine.kind`; `cli/engines.py` has the class of each."""


@dataclass(frozen=True)
class AnticipatoryConfig:
    """Experts chosen by older weights after a loss spike (report 4.2.3). All numbers here are our own."""

    mode: str = setting(
        "off",
        "after_spike: watch the loss, go back, route so until it is quiet; always: from the start",
        choices=("off", "after_spike", "always"),
    )
    delay: int = setting(
        8, "age of the weights that choose; 0 changes nothing but the cost", unit="steps", low=0, high=1000
    )
    window: int = setting(64, "losses that the next one is compared with", unit="steps", low=8, high=100_000)
    threshold: float = setting(
        6.0, "a loss so many robust deviations above their median is a spike", above=0, high=1000
    )
    rollback_steps: int = setting(
        50, "between checkpoints to go back to; a rollback is one to two times as long", unit="steps", low=1
    )
    quiet_steps: int = setting(200, "without a spike until routing is plain again", unit="steps", low=1)


@dataclass(frozen=True)
class SftConfig:
    """Supervised training on worked solutions; also the shape of group `base`."""

    steps: int = setting(200, "optimiser steps", unit="steps", low=1)
    tokens_per_step: int = setting(4096, "tokens of a step, padding included", unit="tokens", low=16)
    row_tokens: int = setting(512, "length of a packed row", unit="tokens", low=16)
    lr: float = setting(1e-3, "peak learning rate", above=0, high=10)
    warmup: int = setting(10, "steps of linear warm-up", unit="steps", low=0)
    decay: float = setting(0.1, "learning rate at the last step, as a share of the peak", low=0, high=1)
    num_examples: int = setting(4000, "worked solutions per domain", unit="problems", low=1)
    episodes: int = setting(
        1, "episodes of a tool domain joined into one conversation", unit="episodes", low=1, high=64
    )
    noise: dict[str, float] = setting(
        {}, "domain -> share of its solutions whose final answer has one word of another problem's"
    )
    recall: float = setting(
        0.0, "relative share of a step's tokens for exercises in copying (base)", low=0, high=100
    )
    prompt_weight: float = setting(
        0.0, "loss weight of tokens the model would not sample (prompts, tool results)", low=0, high=1
    )
    indexer_weight: float = setting(0.0, "weight of the indexer's own loss", low=0, high=100)
    indexer_warmup: int = setting(
        0, "first steps with dense attention in which the indexers alone learn", unit="steps", low=0
    )
    balance_weight: float = setting(0.0, "weight of the sequence-wise balance loss", low=0, high=100)
    mtp_weight: float = setting(0.3, "weight of the MTP blocks' loss, if the model has any", low=0, high=10)
    mtp_decay_weight: float = setting(0.1, "the same while the learning rate decays", low=0, high=10)
    shares: dict[str, float] = setting(
        {}, "domain -> relative share of a step's tokens (base); domains not named count 1"
    )
    anticipatory: AnticipatoryConfig = setting(AnticipatoryConfig, "experts chosen by older weights")
    init: str | None = setting(None, "checkpoint folder to start from; null: the stage before it")


# How a stage that samples goes beside its training; GRPO and distillation have the same three.
_MODE = setting(
    "sync",
    "sync: sample, then train; one_step_off: sample the next step meanwhile, each by one version of the "
    "weights; async: sample up to max_age steps ahead, with new weights between two tokens",
    choices=("sync", "one_step_off", "async"),
)
_MAX_AGE = setting(
    1,
    "async: oldest token that a step trains on; older ones cannot arise, nothing is dropped",
    unit="versions",
    low=0,
    high=1000,
)
_STATE_ON_PUBLISH = setting(
    "keep",
    "async: decode state of running requests when weights change: kept, or computed again with the new",
    choices=("keep", "recompute"),
)


@dataclass(frozen=True)
class GrpoConfig:
    """Group relative policy optimisation as the report's section on specialists states it."""

    steps: int = setting(50, "rollout phases", unit="steps", low=1)
    prompts_per_step: int = setting(16, "prompts of a rollout phase P", unit="prompts", low=1)
    group_size: int = setting(16, "samples per prompt G", unit="samples", low=2)
    mini_batches: int = setting(2, "optimiser steps per rollout phase", unit="steps", low=1)
    clip_epsilon: float = setting(0.2, "half-width of the ratio's clip", above=0, high=1)
    kl_beta: float = setting(1e-3, "weight of the KL to the SFT reference", low=0, high=10)
    mask_delta: float = setting(
        0.5,
        "a sequence with negative advantage and a mean log-ratio below minus this is masked",
        unit="nats",
        above=0,
    )
    replay_routing: bool = setting(
        False, "record the experts that each token visits while sampling, and train on the same ones"
    )
    top_k: int = setting(0, "draw from the K most probable tokens; 0: all", unit="tokens", low=0)
    top_p: float = setting(1.0, "draw from the fewest tokens with this probability", above=0, high=1)
    min_p: float = setting(
        0.0, "draw from tokens with at least this share of the highest probability", low=0, high=1
    )
    replay_kept_sets: bool = setting(
        False,
        "record which tokens top_k, top_p and min_p kept, and renormalise the trainer over the same ones",
    )
    token_truncate: float | None = setting(
        None, "weight tokens by their ratio trainer / sampler, at most this; null: no weight", above=0
    )
    token_mask: tuple[float, float] | None = setting(
        None, "weight tokens by that ratio, those outside of [LOW,HIGH] by 0; null: no weight", low=0
    )
    sequence_truncate: float | None = setting(
        None, "weight samples by the product of their tokens' ratios, at most this; null: no weight", above=0
    )
    sequence_mask: tuple[float, float] | None = setting(
        None, "drop samples whose product of ratios is outside of [LOW,HIGH]; null: none", low=0
    )
    geometric_mask: tuple[float, float] | None = setting(
        None, "drop samples whose geometric mean of ratios is outside of [LOW,HIGH]; null: none", low=0
    )
    temperature: float = setting(1.0, "sampling temperature", above=0, high=10)
    normalisation: str = setting(
        "episode",
        "what counts as one sample where a conversation is trained on user turn by user turn",
        choices=("episode", "turn"),
    )
    mtp_weight: float = setting(
        0.1, "weight of the loss that keeps MTP blocks, and nothing else, in step", low=0, high=10
    )
    lr: float = setting(3e-4, "peak learning rate; 0: no weight moves", low=0, high=10)
    warmup: int = setting(2, "steps of linear warm-up", unit="steps", low=0)
    row_tokens: int = setting(512, "length of a packed row", unit="tokens", low=16)
    init: str | None = setting(None, "checkpoint folder to start from; null: the domain's SFT stage")
    mode: str = _MODE
    max_age: int = _MAX_AGE
    state_on_publish: str = _STATE_ON_PUBLISH


@dataclass(frozen=True)
class GuardConfig:
    """Failures that others report of on-policy distillation: when to warn, what to do. Our own numbers."""

    max_truncated: float = setting(0.3, "warn above this share of samples cut at their limit", low=0, high=1)
    max_growth: float = setting(2.0, "warn above this multiple of the first phase's mean length", above=1)
    ngram: int = setting(8, "length of the n-grams that repetition is counted in", unit="tokens", low=1)
    max_repeated: float = setting(
        0.5, "a sample repeats above this share of n-grams that it has had before", low=0, high=1
    )
    max_repeating: float = setting(0.1, "warn above this share of samples that repeat", low=0, high=1)
    max_eos_gap: float = setting(
        0.3, "warn above this difference of student and teacher in the probability of ending", low=0, high=1
    )
    max_late_ratio: float = setting(
        3.0, "warn where a sample's last three tenths have more than this times the KL of its first", above=1
    )
    mask_repeated: bool = setting(False, "leave samples that repeat out of loss and denominators")
    ramp_phases: int = setting(
        0, "phases in which the longest sample grows to its full length; 0: none", unit="phases", low=0
    )
    ramp_from: float = setting(0.25, "share of the full length that the ramp begins with", above=0, high=1)
    late_weight: float = setting(
        1.0, "weight of a sample's last token relative to its first, linear between", above=0, high=100
    )
    eos_weight: float = setting(1.0, "weight of the end of text relative to other tokens", above=0, high=1000)
    horizon: float = setting(1.0, "share of a sample's tokens, from its first, to train on", above=0, high=1)
    reference_weight: float = setting(
        0.0, "weight of a KL to the student's own start, on every prompt", low=0, high=1000
    )


@dataclass(frozen=True)
class DistillConfig:
    """On-policy distillation: the student samples, the owner teacher scores, exact reverse KL."""

    steps: int = setting(50, "rollout phases", unit="steps", low=1)
    prompts_per_step: int = setting(96, "prompts of a rollout phase, all domains", unit="prompts", low=1)
    samples_per_prompt: int = setting(1, "trajectories per prompt", unit="samples", low=1)
    shares: dict[str, float] = setting(
        {}, "domain -> relative share of a phase's prompts; domains not named count 1"
    )
    mini_batches: int = setting(2, "optimiser steps per rollout phase", unit="steps", low=1)
    chunk_tokens: int = setting(
        1024, "tokens whose logits exist at once", unit="tokens", low=1, speed_only=True
    )
    temperature: float = setting(1.0, "sampling temperature of the student", above=0, high=10)
    lr: float = setting(1e-3, "peak learning rate; 0: no weight moves", low=0, high=10)
    warmup: int = setting(2, "steps of linear warm-up", unit="steps", low=0)
    decay: float = setting(0.1, "learning rate at the last step, as a share of the peak", low=0, high=1)
    objective: str = setting(
        "reverse_kl",
        "what is minimised; all but reverse_kl are there to be compared with it",
        choices=("reverse_kl", "forward_kl", "jsd", "top_k_tail", "generalised_kl", "sampled_token"),
    )
    top_k: int = setting(64, "tokens that top_k_tail and generalised_kl look at", unit="tokens", low=1)
    support: str = setting("student", "whose likeliest tokens these are", choices=("student", "teacher"))
    beta: float = setting(0.5, "share of the teacher in jsd's mixture", low=0.001, high=0.999)
    normalisation: str = setting(
        "tokens",
        "denominator: loss tokens of the mini-batch, of each teacher, or samples times own tokens",
        choices=("tokens", "teacher", "sequences"),
    )
    balance: str = setting(
        "weights",
        "what a teacher's weight is a share of: of the loss as normalised, or of the measured update",
        choices=("weights", "update"),
    )
    mtp_weight: float = setting(
        0.1, "weight of the loss that keeps MTP blocks, and nothing else, in step", low=0, high=10
    )
    row_tokens: int = setting(512, "length of a packed row", unit="tokens", low=16)
    init: str | None = setting(None, "checkpoint folder of the student's start; null: the base stage")
    keep_states: bool = setting(
        False,
        "teachers' hidden states stay after their mini-batch, for other losses and weights",
        speed_only=True,
    )
    store_bytes: int | None = setting(
        None,
        "most hidden states on disk at once; null: what the disk takes",
        unit="bytes",
        low=1,
        speed_only=True,
    )
    replay: str | None = setting(
        None,
        "folder of a distillation stage that kept its states: train on its rollouts and states, sample and "
        "score nothing",
    )
    reward_weight: float = setting(
        0.0, "weight of a policy-gradient term beside the KL; above 0 samples are graded", low=0, high=1000
    )
    clip_epsilon: float = setting(0.2, "half-width of that term's clip", above=0, high=1)
    guard: GuardConfig = setting(GuardConfig, "against length blow-up, repetition, wrong ends, late decay")
    mode: str = _MODE
    max_age: int = _MAX_AGE
    state_on_publish: str = _STATE_ON_PUBLISH


@dataclass(frozen=True)
class TeacherConfig:
    """One teacher of the registry."""

    checkpoint: str | None = setting(None, "checkpoint folder; null: the run's GRPO stage of its domain")
    domains: tuple[str, ...] = setting((), "domains it owns; a domain has one owner unless teachers.shared")
    weight: float = setting(1.0, "weight of its KL in the loss", above=0, high=1000)


@dataclass(frozen=True)
class TeachersConfig:
    """Who teaches what. Empty: the run's own specialists, one a domain, weight 1."""

    shared: bool = setting(False, "several teachers may own a domain: their weighted KLs add up")
    engine: str = setting(
        "auto",
        "what scores teachers that are not V4: transformers' own forward, or vLLM, held against it first; V4 "
        "is always scored by our own",
        choices=("auto", "vllm"),
    )
    settings: dict[str, Any] = setting(
        {}, "arguments of vLLM for teachers (teachers/vllm_teacher.py says which)", speed_only=True
    )
    registry: dict[str, TeacherConfig] = setting({}, "name -> teacher; `teachers.registry.NAME.KEY=VALUE`")


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for matrices and AdamW for the rest, by V4's parameter split; or AdamW alone."""

    kind: str = setting("muon", "muon: with AdamW for what Muon leaves", choices=("muon", "adamw"))
    muon_momentum: float = setting(0.95, "momentum of Muon", low=0, high=0.9999)
    update_rms: float = setting(0.18, "root mean square a Muon update is scaled to", above=0, high=10)
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's two decay rates", low=0, high=0.99999)
    eps: float = setting(1e-20, "AdamW's epsilon", above=0, high=1)
    weight_decay: float = setting(0.1, "decoupled weight decay", low=0, high=10)
    grad_clip: float = setting(1.0, "largest gradient norm", above=0)


@dataclass(frozen=True)
class EngineConfig:
    """What holds parameters, gradients and optimiser."""

    kind: str = setting(
        "torch",
        "train engine; fsdp cuts the model over the ranks, else each has it whole",
        choices=ENGINES,
        speed_only=True,
    )
    ranks: int = setting(
        1,
        "processes that train a stage together, on GPUs each with one of its own",
        unit="processes",
        low=1,
        high=65_536,
        speed_only=True,
    )
    context_ranks: int = setting(
        1,
        "neighbouring ranks that cut the rows of a micro-batch among them; a divisor of ranks",
        unit="processes",
        low=1,
        high=65_536,
        speed_only=True,
    )
    expert_ranks: int = setting(
        1,
        "kind=torch: neighbouring ranks that divide the routed experts of every layer among them; a divisor "
        "of ranks and of the number of experts",
        unit="processes",
        low=1,
        high=65_536,
        speed_only=True,
    )
    shard_state: bool = setting(
        False,
        "kind=torch: each rank keeps and updates its part of the optimiser's state, Muon by whole matrices",
        speed_only=True,
    )
    bf16_exchange: bool = setting(
        False, "with shard_state: experts' gradients travel in BF16, rounded stochastically, summed in fp32"
    )
    zero_stage: int = setting(
        2,
        "kind=deepspeed: 1 divides the optimiser's state over the ranks, 2 the gradients too, 3 the weights "
        "too (optimizer.kind=adamw and weights in fp32)",
        low=1,
        high=3,
        speed_only=True,
    )
    offload: bool = setting(
        False, "kind=deepspeed: the optimiser's state in the memory of the CPU", speed_only=True
    )
    rank_limit_s: float = setting(
        600.0,
        "longest wait of a rank for another one; then it is named and the stage ends, to be resumed",
        unit="s",
        low=1,
        speed_only=True,
    )
    device: str = setting(
        "auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"), speed_only=True
    )
    threads: int = setting(
        0, "CPU threads of the trainer; 0: all cores", unit="threads", low=0, speed_only=True
    )
    micro_batch_rows: int = setting(8, "packed rows of one forward pass", unit="rows", low=1, speed_only=True)
    exact: bool = setting(
        False, "trainer and rollout workers agree on log-probabilities to the last bit; several times slower"
    )
    quantization: str = setting(
        "off",
        "fp4: train and sample with experts, index keys and KV as stored; fp8: with the products of dense "
        "projections in FP8, forward and backward; fp4_fp8: both, V4's recipe",
        choices=("off", "fp4", "fp8", "fp4_fp8"),
    )
    checkpoint_s: float = setting(
        60.0,
        "between two checkpoints of a running stage; 0: after every step it can go on from",
        unit="s",
        low=0,
        speed_only=True,
    )
    recompute: tuple[str, ...] = setting(
        ("none",),
        "what the backward computes again instead of keeping it; sets and tensors of model/recompute.py",
        choices=RECOMPUTE,
        speed_only=True,
    )
