"""Every setting there is: what it means, its unit, its range, its default.

One frozen dataclass a group; the groups are the folders of conf/. The defaults are those of the
report where it states one. `consilience help GROUP` prints this file's content. Importing it needs
the standard library only, so a wrong key is refused before torch or ray are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from consilience.conf.fields import setting
from consilience.conf.schema_rollout import RolloutConfig
from consilience.conf.schema_training import (
    DistillConfig,
    EngineConfig,
    GrpoConfig,
    OptimizerConfig,
    SftConfig,
    TeachersConfig,
)

ISOLATION = (
    "none", "rlimit", "bwrap_user", "bwrap_root", "container", "container_userns", "gvisor", "vm",
)  # fmt: skip


# of domains
KINDS = ("math", "mathematics", "code", "agent", "programs", "functions", "repository", "file")
EFFORTS = ("chat", "think", "low", "high", "max")
FAMILIES = ("preview", "official")


@dataclass(frozen=True)
class ModelConfig:
    """A preset and what differs from it; names are those of the released `config.json`."""

    preset: str = setting("tiny", "sizes to start from", choices=("tiny", "mini", "small", "flash", "pro"))
    vocab_size: int | None = setting(None, "rows of embedding and head; null: the tokenizer's", low=2)
    hidden_size: int | None = setting(None, "model width D", low=8)
    num_hidden_layers: int | None = setting(None, "layers L, without the MTP block", low=1)
    num_attention_heads: int | None = setting(None, "query heads H", low=1)
    head_dim: int | None = setting(None, "width of a head C", low=4)
    qk_rope_head_dim: int | None = setting(None, "rotated channels of a head", low=2)
    q_lora_rank: int | None = setting(None, "rank of the query projection", low=1)
    o_groups: int | None = setting(None, "groups of the output projection", low=1)
    o_lora_rank: int | None = setting(None, "rank of a group's output projection", low=1)
    sliding_window: int | None = setting(None, "tokens each layer sees uncompressed", unit="tokens", low=1)
    compress_ratios: tuple[int, ...] | None = setting(
        None, "tokens per compressed entry of each layer; 0 is a sliding-window layer", low=0
    )
    index_n_heads: int | None = setting(None, "indexer query heads", low=1)
    index_head_dim: int | None = setting(None, "width of an indexer head", low=2)
    index_topk: int | None = setting(None, "compressed entries kept per query", low=1)
    n_routed_experts: int | None = setting(None, "routed experts E", low=1)
    num_experts_per_tok: int | None = setting(None, "experts a token visits K", low=1)
    n_shared_experts: int | None = setting(None, "experts every token visits", low=0)
    moe_intermediate_size: int | None = setting(None, "width inside an expert", low=1)
    num_hash_layers: int | None = setting(None, "first layers routed by a hash of the token", low=0)
    hc_mult: int | None = setting(None, "hyper-connection streams N", low=1)
    num_nextn_predict_layers: int | None = setting(
        None, "MTP blocks: each predicts one token further ahead", low=0, high=8
    )
    max_position_embeddings: int | None = setting(None, "longest stream", unit="tokens", low=1)

    def overrides(self) -> dict[str, Any]:
        """What differs from the preset: official field name -> value."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preset"}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class DomainConfig:
    """One domain: where its problems come from, what an episode may do, who judges it."""

    kind: str = setting(
        "file",
        f"source of the problems: {', '.join(KINDS)}, or a class of your own: FILE.py:CLASS or "
        "package.module:CLASS",
    )
    path: str | None = setting(None, "JSONL or parquet file; needed by kind=file only")
    effort: str | None = setting(None, "whether and how long the model thinks first", choices=EFFORTS)
    reward: str | None = setting(None, "module:function or file.py:function; null: the kind's own")
    max_turns: int | None = setting(
        None, "assistant turns of an episode; 1: no tools", unit="turns", low=1, high=1000
    )
    max_tokens: int | None = setting(None, "tokens an episode may sample", unit="tokens", low=1)
    needs_sandbox: bool | None = setting(None, "the reward function runs code in a box; null: the kind's own")
    parameters: dict[str, Any] = setting({}, "settings of the kind's own generator or reader")

    def to_settings(self, name: str, seed: int) -> dict[str, Any]:
        """What `tasks.registry.load_domain` reads; settings left null are the kind's own."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            "name": name,
            "seed": seed,
            **{key: value for key, value in given.items() if value is not None},
        }


@dataclass(frozen=True)
class TaskConfig:
    """The domains, the sizes of their splits, the tokenizer trained on their text."""

    domains: dict[str, DomainConfig] = setting({}, "name -> domain; `task.domains.NAME.KEY=VALUE`")
    num_train: int = setting(20_000, "training problems a domain offers", unit="problems", low=1)
    num_test: int = setting(512, "held-out problems a domain offers", unit="problems", low=1)
    seed: int = setting(1, "seed of the problems; splits never overlap", low=0)
    vocab_size: int = setting(672, "size of the tokenizer, special tokens included", unit="tokens", low=300)
    family: str | None = setting(
        None, "whose reasoning efforts prompts have; null: the checkpoint's own", choices=FAMILIES
    )


@dataclass(frozen=True)
class SpecialistConfig:
    """Which specialist a verb is about, and what single specialists do differently."""

    domain: str | None = setting(None, "domain of the specialist; null: every domain in turn")
    settings: dict[str, dict[str, dict[str, Any]]] = setting(
        {}, "domain -> group -> key: values for that domain only (groups sft grpo rollout optimizer)"
    )


@dataclass(frozen=True)
class RewardsConfig:
    """The reward function and the process it runs in."""

    path: str | None = setting(
        None, "module:function or file.py:function for every domain; null: each domain's own"
    )
    timeout_s: float = setting(10.0, "wall limit of one score", unit="s", above=0, high=86_400)
    num_processes: int = setting(1, "killable reward processes", unit="processes", low=1, speed_only=True)


@dataclass(frozen=True)
class LimitsConfig:
    """Caps of one sandbox."""

    memory_bytes: int = setting(256 << 20, "memory", unit="bytes", low=16 << 20)
    processes: int = setting(64, "processes and threads", unit="processes", low=1)
    file_bytes: int = setting(16 << 20, "largest file", unit="bytes", low=1024)
    workspace_bytes: int = setting(64 << 20, "whole workspace", unit="bytes", low=4096)
    cpu_s: float = setting(10.0, "processor time of a command", unit="s", above=0)
    wall_s: float = setting(10.0, "wall time of a command", unit="s", above=0)
    output_bytes: int = setting(64 << 10, "kept of each output stream", unit="bytes", low=256)


@dataclass(frozen=True)
class SandboxConfig:
    """Where code of the model runs. Fails closed: nothing weaker than `min_isolation` starts."""

    driver: str = setting(
        "auto", "auto: the strongest present", choices=("auto", "docker", "bwrap", "insecure_subprocess")
    )
    min_isolation: str = setting("bwrap_user", "weakest level accepted", choices=ISOLATION)
    limits: LimitsConfig = setting(LimitsConfig, "caps of a box")
    warm: int = setting(2, "boxes kept ready", unit="boxes", low=0, high=1024, speed_only=True)
    gradings_per_box: int = setting(
        1,
        "gradings that a judge's box serves, each as another user (one, where it has no other)",
        unit="gradings",
        low=1,
        high=10_000,
        speed_only=True,
    )
    log_folder: str | None = setting(
        None,
        "folder for the trajectory log of each box of an agent, written where it runs; null: in memory",
        speed_only=True,
    )
    allow_insecure: bool = setting(False, "accept the insecure_subprocess driver (trusted code only)")
    image: str | None = setting(None, "container image of the docker driver; null: the driver's own")
    runtime: str = setting("runc", "its runtime, as the engine knows it: runc, runsc, a Kata runtime's name")


@dataclass(frozen=True)
class ClusterConfig:
    """Ray: a cluster to join, or the small one a run starts for itself."""

    address: str | None = setting(None, "host:port or 'auto'; null: start Ray on this machine for the run")
    num_cpus: int | None = setting(None, "cores Ray may use; null: all", unit="cores", low=1, speed_only=True)
    object_store_bytes: int = setting(
        200 << 20, "shared memory of the object store", unit="bytes", low=80 << 20
    )
    placement: str = setting(
        "free",
        "free: workers where there are cores, ranks on this machine; apart, colocated: cores and GPUs of all "
        "roles reserved before anything starts, ranks on any machine, workers beside them or on their GPUs",
        choices=("free", "apart", "colocated"),
        speed_only=True,
    )
    spread: bool = setting(
        False, "placed workers over many machines, instead of as few as hold them", speed_only=True
    )
    trainer_cores: int = setting(1, "placed: cores of a rank", unit="cores", low=1, speed_only=True)
    sandbox_cores: int = setting(
        0, "placed: cores kept for a worker's boxes", unit="cores", low=0, speed_only=True
    )
    worker_gpus: float = setting(
        0.0, "of one rollout worker; below 1 where roles share a GPU", unit="GPUs", low=0, speed_only=True
    )
    placement_limit_s: float = setting(
        120.0, "until all that is asked for must be reserved", unit="s", above=0, speed_only=True
    )
    rank_restarts: int = setting(
        2,
        "placed: times that a stage goes on from its last checkpoint where a rank, or its machine, is gone",
        unit="times",
        low=0,
        high=1000,
        speed_only=True,
    )
    port: int | None = setting(
        None, "where placed ranks meet on this machine; null: a free one", low=1, high=65_535, speed_only=True
    )
    dashboard: bool = setting(False, "serve Ray's web page")
    dashboard_port: int = setting(8265, "its port on 127.0.0.1", low=1, high=65_535)


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out measurement: one sample a problem, paired bootstrap intervals."""

    num_problems: int = setting(512, "test problems per domain", unit="problems", low=1)
    temperature: float = setting(1.0, "sampling temperature", above=0, high=10)
    greedy_problems: int = setting(
        128, "of these, problems also answered greedily; 0: none", unit="problems", low=0
    )
    num_resamples: int = setting(10_000, "bootstrap resamples", low=100, high=10_000_000)
    checkpoint: str | None = setting(
        None, "evaluate this checkpoint folder alone; null: every model of the run"
    )


@dataclass(frozen=True)
class GenerateConfig:
    """What `generate` and `chat` sample from."""

    checkpoint: str | None = setting(None, "checkpoint folder; null: the run's newest model")
    prompt: str | None = setting(None, "what to answer; null: problems of the domain's test split")
    domain: str | None = setting(None, "domain whose test problems are answered; null: the first")
    num: int = setting(4, "answers", low=1)
    temperature: float = setting(1.0, "sampling temperature; 0 is greedy", low=0, high=10)
    max_tokens: int = setting(256, "tokens of an answer", unit="tokens", low=1)
    effort: str = setting("chat", "whether the model thinks first", choices=EFFORTS)


@dataclass(frozen=True)
class PlanConfig:
    """What `plan` counts and draws."""

    context: str | None = setting(
        None, "context length: 4096, 64K (64,000), 64Ki or 2^16 (65,536), 1M; null: the model's longest"
    )
    checkpoint: str | None = setting(None, "folder with the model's config.json; null: group model")
    plot: str | None = setting(None, "PNG, SVG or PDF file for a picture of cost against context length")


@dataclass(frozen=True)
class ConvertConfig:
    """What `convert` reads and writes; each may be written without its group: `convert source=DIR`."""

    source: str | None = setting(None, "folder of weights in any layout; must be given")
    target: str | None = setting(None, "folder to write, which must not exist; must be given")
    layout: str = setting(
        "official",
        "official: quantised as released; native: released names, for training here and vLLM; transformers",
        choices=("official", "native", "transformers"),
    )
    experts: str | None = setting(
        None,
        "how layout=official stores routed experts; null: as the source does, else fp4",
        choices=("fp4", "fp8", "bf16"),
    )
    dtype: str = setting("bfloat16", "type of what is not quantised", choices=("bfloat16", "float32"))
    like: str | None = setting(
        None,
        "released folder the source was trained from: its scales, files and config are kept where they fit",
    )
    max_shard_bytes: int = setting(4 << 30, "largest file, unless one tensor is larger", unit="bytes", low=1)


@dataclass(frozen=True)
class LogConfig:
    """What is written down and shown."""

    wandb: str = setting("offline", "offline needs no account", choices=("offline", "online", "disabled"))
    project: str = setting("consilience", "wandb project")
    table_rows: int = setting(32, "rollouts in the table of a logged step", unit="rows", low=0)
    progress: str = setting(
        "auto", "auto: bars on a terminal, lines elsewhere", choices=("auto", "bars", "lines", "off")
    )


@dataclass(frozen=True)
class RunConfig:
    """The run folder and what a second `run` does with it."""

    name: str = setting("default", "name of the run")
    folder: str = setting("runs", "where run folders lie")
    seed: int = setting(1, "seed of everything random", low=0, high=2**31 - 1)
    profile: str = setting("default", "the values a profile of this group set (recorded in the report)")
    resume: bool = setting(True, "go on where the run folder stands; false: refuse a folder that exists")
    from_: str | None = setting(
        None, "redo from this stage on, whatever is finished (base, sft/math, distill, …)"
    )
    parallel: int = setting(
        1, "stages that run side by side, each in a process of its own", unit="stages", low=1, speed_only=True
    )
    phase_limit_s: float = setting(
        86_400.0,
        "one rollout, training or publishing of a step; then the stage is ended, to be resumed",
        unit="s",
        low=1,
        speed_only=True,
    )
    silence_limit_s: float = setting(
        600.0,
        "a stage's process that gives no sign of life for so long is ended",
        unit="s",
        low=1,
        speed_only=True,
    )
    margins: bool = setting(True, "fail the run when a check misses its bound; false: structure only")


@dataclass(frozen=True)
class Config:
    """All of it; one attribute a group."""

    model: ModelConfig = setting(ModelConfig, "the architecture")
    task: TaskConfig = setting(TaskConfig, "domains and splits")
    specialist: SpecialistConfig = setting(SpecialistConfig, "which specialist")
    base: SftConfig = setting(SftConfig, "training from random weights")
    sft: SftConfig = setting(SftConfig, "specialist supervised fine-tuning")
    grpo: GrpoConfig = setting(GrpoConfig, "specialist reinforcement learning")
    rollout: RolloutConfig = setting(RolloutConfig, "workers that sample")
    distill: DistillConfig = setting(DistillConfig, "many teachers into one student")
    teachers: TeachersConfig = setting(TeachersConfig, "who teaches what")
    rewards: RewardsConfig = setting(RewardsConfig, "who judges")
    sandbox: SandboxConfig = setting(SandboxConfig, "where code runs")
    optimizer: OptimizerConfig = setting(OptimizerConfig, "Muon and AdamW")
    engine: EngineConfig = setting(EngineConfig, "what trains")
    cluster: ClusterConfig = setting(ClusterConfig, "Ray")
    evaluate: EvaluateConfig = setting(EvaluateConfig, "held-out measurement")
    generate: GenerateConfig = setting(GenerateConfig, "what generate and chat sample from")
    plan: PlanConfig = setting(PlanConfig, "what plan counts and draws")
    convert: ConvertConfig = setting(ConvertConfig, "what convert reads and writes")
    log: LogConfig = setting(LogConfig, "what is written down")
    run: RunConfig = setting(RunConfig, "the run folder")
