"""An episode whose worker died, back to where its log ends: its turns, its next request, its box."""

from __future__ import annotations

from dataclasses import replace

from consilience.conf.errors import EngineError, SandboxLost
from consilience.rollout.boxes import Box
from consilience.rollout.engine import Completed, Prefix, Request
from consilience.rollout.episode import Episode, State
from consilience.rollout.log_frames import LoggedEpisode, crc_of
from consilience.rollout.parsing import ToolCall
from consilience.rollout.tools import run_tool


def restore(episode: Episode, logged: LoggedEpisode) -> tuple[Request, Prefix | None] | None:
    """Lead a fresh episode through its logged turns.

    Returns the request of the turn that was being decoded with what it had sampled (None: nothing yet), or
    None where the log ends between two turns; `episode.state` then says what comes next. EngineError if the
    log is of other prompts or seeds than the job's.
    """
    for number, turn in enumerate(logged.turns):
        if episode.state is not State.READY:
            raise EngineError(f"the log has a turn {number}, the episode ends or waits before it")
        request = episode.next_request()
        if (turn.prompt_crc, turn.seed) != (crc_of(request.prompt_ids), request.sampling.seed):
            raise EngineError(f"the log's turn {number} has another prompt or seed than the job's")
        ids, logprobs, versions = tuple(turn.token_ids), tuple(turn.logprobs), tuple(turn.versions)
        if turn.finish is None:
            return request, Prefix(ids, logprobs, versions) if ids else None
        episode.on_completed(Completed(request.uid, ids, logprobs, versions, turn.finish))
        for box_id, isolation in turn.boxes:
            episode.used_box(box_id, isolation)
        if turn.results is not None:
            episode.on_tool_results(turn.results)
    return None


def without_parent(request: Request, episode: Episode, max_context: int | None) -> Request:
    """The same turn for an engine that does not hold the stream: all of it is the prompt."""
    stream = episode.stream_ids
    sampling = request.sampling
    if max_context is not None:
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, max_context - len(stream)))
    return replace(request, prompt_ids=stream, parent=None, sampling=sampling)


def rebuild(box: Box, episode: Episode, max_chars: int) -> None:
    """Run the episode's calls again in a fresh box, in order: its workspace as it was.

    The old box had no network and is gone, so nothing happens twice. SandboxLost if a call answers otherwise.
    """
    for done in episode.executed_calls:
        again = run_tool(box, ToolCall(done.name, done.arguments), episode.job.tools, max_chars=max_chars)
        if again != done.result:
            raise SandboxLost(
                f"the box of {episode.job.uid} died with its worker and cannot be rebuilt: {done.name} "
                f"answered {done.result!r:.80} then, {again!r:.80} now"
            )
