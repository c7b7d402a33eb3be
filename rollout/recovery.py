"""Episodes whose worker died, back to where its log ends: their turns, their next requests, their boxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from consilience.conf.errors import (
    ConsilienceError,
    EngineError,
    OutcomeUnknown,
    SandboxLost,
    SandboxUnavailable,
)
from consilience.rollout.boxes import Box, BoxPool
from consilience.rollout.engine import Completed, Prefix, Request
from consilience.rollout.episode import Episode, State
from consilience.rollout.log_frames import LoggedEpisode, crc_of
from consilience.rollout.log_replay import replay
from consilience.rollout.parsing import ToolCall
from consilience.rollout.records import OutcomeKind
from consilience.rollout.token_log import TokenLog
from consilience.rollout.tools import TOOLS, argument_error, run_tool

Begun = tuple[Request, Prefix | None]  # a turn that was being decoded, and what it had sampled, if anything


def take_over(
    log: TokenLog, episodes: list[Episode], rebuild: Callable[[Episode], Episode]
) -> tuple[dict[str, Begun | None], set[str]]:
    """Lead episodes to where a former owner's log ends, and copy that into the own one.

    Returns job uid -> the request that was being decoded, as `restore` returns it; and uids of requests whose
    decode state died with that owner. A log that cannot be used is noted in the record, and its episode
    starts anew: `rebuild` makes a fresh one, which takes its place in `episodes`.
    """
    lease, uids = log.lease, [episode.job.uid for episode in episodes]
    logged = replay(lease.folder, only=uids, copy=lease.copy_folder)
    damage = "; ".join(f"{name}: {what}" for name, what in logged.faults.items() if name.endswith(".log"))
    begun: dict[str, Begun | None] = {}
    lost: set[str] = set()
    claims = []
    for place, episode in enumerate(episodes):
        uid = episode.job.uid
        episode.log_fault = logged.faults.get(uid, damage)
        if (former := logged.episodes.get(uid)) is None:
            continue
        try:
            begun[uid] = restore(episode, former)
        except ConsilienceError as error:
            episode = episodes[place] = rebuild(episode)
            episode.log_fault = str(error)
            continue
        names = [f"{uid}#{number}" for number in range(len(former.turns))]
        lost.update(names)
        claims.append((former, names))
        episode.resumed_at = sum(len(turn.token_ids) for turn in former.turns)
    log.claim(claims)
    return begun, lost


def restore(episode: Episode, logged: LoggedEpisode) -> Begun | None:
    """Lead a fresh episode through its logged turns.

    Returns the request of the turn that was being decoded with what it had sampled (None: nothing yet), or
    None where the log ends between two turns or two tool calls; `episode.state` then says what comes next.
    EngineError if the log is of other prompts or seeds than the job's.
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
        episode.num_begun = turn.num_begun
        for result in turn.results or ():
            episode.on_tool_result(result)
    return None


def without_parent(request: Request, episode: Episode, max_context: int | None) -> Request:
    """The same turn for an engine that does not hold the stream: all of it is the prompt."""
    stream = episode.stream_ids
    sampling = request.sampling
    if max_context is not None:
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, max_context - len(stream)))
    return replace(request, prompt_ids=stream, parent=None, sampling=sampling)


def box_for(pool: BoxPool, episode: Episode, max_chars: int) -> Box:
    """The episode's own box if it outlived its worker, else a leased one brought to the same state.

    OutcomeUnknown if a call was begun that may not be run again nor asked for; SandboxLost if the box is gone
    and cannot be rebuilt. A box is given back before either.
    """
    box = pool.find(episode.boxes[-1][0]) if episode.boxes else None
    survived = box is not None
    box = box if box is not None else pool.lease()
    try:
        if survived and hasattr(box, "resume"):
            _resume(box, episode)
        else:
            _check_begun(episode, acts_on=survived or box.enforced.network)
        if not survived:
            for path, text in episode.job.files.items():
                box.write(path, text.encode("utf-8"))
            _rebuild(box, episode, max_chars)
    except BaseException:
        pool.release(box)
        raise
    return box


def _resume(box: Any, episode: Episode) -> None:
    """Where a call was begun: have the box answer it from what it did then (`HostBox.resume`).

    Every file and every call that was run is one verb of the box.
    """
    if episode.num_begun > len(episode.answers):
        tools = episode.job.tools
        ran = [c for c in episode.executed_calls if not argument_error(ToolCall(c.name, c.arguments), tools)]
        box.resume(len(episode.job.files) + len(ran))


def _check_begun(episode: Episode, *, acts_on: bool) -> None:
    """OutcomeUnknown if a call without a result may have done something that is still there (`acts_on`)."""
    if not acts_on or episode.num_begun <= len(episode.answers):
        return
    call = episode.pending_calls[episode.num_begun - 1]
    if not _is_repeatable(call.name):
        raise OutcomeUnknown(
            f"{call.name} was begun in box {episode.boxes[-1][0]}, its worker died before the result was "
            "logged; it is not run a second time"
        )


def _rebuild(box: Box, episode: Episode, max_chars: int) -> None:
    """Run the episode's calls again in a fresh box, in order: its workspace as it was.

    The old box had no network and is gone, so nothing happens twice. SandboxLost where it had one, or if a
    call answers otherwise.
    """
    for done in episode.executed_calls:
        if box.enforced.network and not _is_repeatable(done.name):
            raise SandboxLost(
                f"the box of {episode.job.uid} died with its worker; {done.name} may have acted through its "
                "network and is not run a second time"
            )
        again = run_tool(box, ToolCall(done.name, done.arguments), episode.job.tools, max_chars=max_chars)
        if again != done.result:
            raise SandboxLost(
                f"the box of {episode.job.uid} died with its worker and cannot be rebuilt: {done.name} "
                f"answered {done.result!r:.80} then, {again!r:.80} now"
            )


def _is_repeatable(name: str) -> bool:
    return name not in TOOLS or TOOLS[name].is_repeatable  # an unknown tool answers with an error, no more


def kind_of(error: Exception) -> OutcomeKind:
    """Which outcome an episode has whose lease or call raised this."""
    if isinstance(error, OutcomeUnknown):
        return OutcomeKind.UNKNOWN
    return OutcomeKind.LOST if isinstance(error, (SandboxLost, SandboxUnavailable)) else OutcomeKind.INFRA
