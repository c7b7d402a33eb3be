"""The error tree. A message says what was found, what is allowed, what to do.

ConsilienceError
├── ConfigError          a wrong key or value, before anything heavy is imported
├── TaskError            an unknown domain, an unreadable data file, splits that overlap
├── ProtocolError        text or tokens that do not follow V4's prompt protocol
├── CheckpointError      missing, truncated, mismatched or corrupt files
├── WeightsRefused       published weights whose digest or shapes do not match
├── AdmissionError       a teacher that cannot teach this student
├── RewardError          a reward function that cannot be loaded or broke its contract
├── SandboxUnavailable   no isolation as strong as asked for
├── SandboxLost          a sandbox died or broke its protocol (infrastructure, never reward 0)
├── EngineError          a rollout or train engine that cannot continue
└── RunError             a run folder or graph that cannot be used or resumed
"""


class ConsilienceError(Exception):
    """Base of every error this project raises on purpose; the CLI prints it as one line."""


class ConfigError(ConsilienceError):
    """A wrong key or value in the configuration."""


class TaskError(ConsilienceError):
    """An unknown domain, an unreadable data file, or splits that overlap."""


class ProtocolError(ConsilienceError):
    """Text or tokens that do not follow V4's prompt protocol."""


class CheckpointError(ConsilienceError):
    """Missing, truncated, mismatched or corrupt checkpoint files."""


class WeightsRefused(ConsilienceError):
    """Published weights whose digest, names, shapes or types do not match what was announced."""


class AdmissionError(ConsilienceError):
    """A teacher that cannot teach this student (vocabulary, special tokens, head shape)."""


class RewardError(ConsilienceError):
    """A reward function that cannot be loaded, or that broke its contract."""


class SandboxUnavailable(ConsilienceError):
    """This machine offers no isolation as strong as the configuration asks for."""


class SandboxLost(ConsilienceError):
    """A sandbox died or broke its protocol. Infrastructure: masks the sample, is never reward 0."""


class EngineError(ConsilienceError):
    """A rollout or train engine that cannot continue."""


class RunError(ConsilienceError):
    """A run folder or run graph that cannot be used or resumed."""
