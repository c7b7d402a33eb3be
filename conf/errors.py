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
│   └── CreationPaused   so many sandboxes could not be made that no more are tried for a while
├── SandboxLost          a sandbox died or broke its protocol (infrastructure, never reward 0)
│   └── OutcomeUnknown   a tool call was begun, its result never seen, and it may not be run twice
├── TrajectoryBroken     a sandbox's log whose hash chain does not hold
├── TrajectoryDiverged   a command that is not the one the log has there
├── EngineError          a rollout or train engine that cannot continue
└── RunError             a run folder or graph that cannot be used or resumed
"""

from enum import StrEnum


class ConsilienceError(Exception):
    """Base of every error this project raises on purpose; the CLI prints it as one line."""


class ConfigError(ConsilienceError):
    """A wrong key or value in the configuration."""


class TaskError(ConsilienceError):
    """An unknown domain, an unreadable data file, or splits that overlap."""


class ProtocolFault(StrEnum):
    """Which rule of V4's prompt protocol was broken; what a caller branches on."""

    NO_END = "no_end"  # a turn that does not end with end-of-sentence
    NO_END_THINK = "no_end_think"  # a thinking turn without </think>
    SPECIAL_TOKEN = "special_token"  # a special token inside reasoning or content
    BLOCK = "block"  # a tool block whose head, calls or end are not the grammar's
    CALL = "call"  # a tool call whose head or end is not the grammar's, or that is no call at all
    PARAMETER = "parameter"  # a parameter without its end, or with one inside its value
    DUPLICATE = "duplicate"  # a parameter given twice
    JSON = "json"  # a value that is not JSON, or that JSON cannot hold
    NAME = "name"  # a tool or parameter name that DSML cannot carry
    MESSAGE = "message"  # a message with a wrong role, content or continuation
    TOOLS = "tools"  # tools declared where none may be, or without a name
    TASK = "task"  # an unknown quick instruction, or one where none may be
    EFFORT = "effort"  # an effort or a checkpoint family that does not exist
    UNICODE = "unicode"  # text that UTF-8 cannot hold


class ProtocolError(ConsilienceError):
    """Text or tokens that do not follow V4's prompt protocol; `fault` says which rule."""

    def __init__(self, fault: ProtocolFault, message: str) -> None:
        super().__init__(fault, message)
        self.fault = fault

    def __str__(self) -> str:
        return self.args[1]


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


class CreationPaused(SandboxUnavailable):
    """Too many of the last sandboxes could not be made; a host tries again by itself in a while."""


class SandboxLost(ConsilienceError):
    """A sandbox died or broke its protocol. Infrastructure: masks the sample, is never reward 0."""


class OutcomeUnknown(SandboxLost):
    """A tool call that must not be run twice was begun, and nobody knows what it did."""


class TrajectoryBroken(ConsilienceError):
    """A sandbox's log was changed after it was written, or a blob of it is gone."""


class TrajectoryDiverged(ConsilienceError):
    """A command, or its result, is not what the sandbox's log has at this place."""


class EngineError(ConsilienceError):
    """A rollout or train engine that cannot continue."""


class RunError(ConsilienceError):
    """A run folder or run graph that cannot be used or resumed."""
