"""One episode as a pure state machine: which request comes next, what a turn or a tool result changes.

    READY ──next_request──► DECODING ──on_completed──► TOOLS ──on_tool_results──► READY
                     ▲            ├──────────────────► DONE ◄── abort (from any state)
                     └────────────┘ the user speaks again

No engine, no sandbox, no clock: the worker moves tokens and texts in and out. A stream only ever grows, and
text is made from ids for parsing only. In a thinking conversation without tools the protocol drops the
reasoning of earlier turns at each user message: there a stream ends, and the next has the shorter prompt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from consilience.conf.errors import EngineError, ProtocolError
from consilience.rollout.encoding import (
    ParsedTurn,
    ToolCall,
    parse_turn,
    render_tool_results,
    render_user_turn,
)
from consilience.rollout.engine import Completed, Request
from consilience.rollout.grading import ExecutedCall, Graded, GradeItem
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.kept_sets import KeptSets, joined
from consilience.rollout.prompts import prompt_ids as encode_prompt
from consilience.rollout.protocol import END_THINK, THINK
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord, UserTurn
from consilience.rollout.token_routing import TokenRouting, stitched
from consilience.rollout.tokenizer import Tokenizer
from consilience.sandboxes.protocol import Isolation

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that turns of neighbouring seeds do not meet
_MAX_SEED = 1 << 63


class State(StrEnum):
    READY = "ready"
    DECODING = "decoding"
    TOOLS = "tools"
    DONE = "done"


class Episode:
    """The life of one job.

    prompt_ids   ids of the job's prompt (samples of a group share them)
    max_context  longest stream the engine can hold, in tokens; None = no limit known
    family       checkpoint family of the prompt protocol

    `state`, `pending_calls` (to run while TOOLS), `held` (uids to release once DONE), `finish` and
    `outcome_if_ungraded` say where it stands.
    """

    def __init__(
        self,
        job: RolloutJob,
        prompt_ids: tuple[int, ...],
        tokenizer: Tokenizer,
        *,
        max_context: int | None = None,
        family: str = "official",
    ) -> None:
        self.job, self.prompt_ids = job, prompt_ids
        self._first_prompt, self._family = prompt_ids, family
        self._keeps_reasoning = (
            job.effort == "chat" or bool(job.tools) or any(m.get("tools") for m in job.messages)
        )
        # A quick instruction ends the prompt with its own token: its answer never thinks.
        self.thinking = prompt_ids[-1:] == (tokenizer.special_ids[THINK],)
        self.state = State.READY
        self.finish: FinishReason | None = None
        self.failure, self._failure_kind = "", OutcomeKind.INFRA
        self.fault = ""  # the ProtocolFault of a malformed turn
        self.held: list[str] = []
        self.request_uid = ""  # of the newest turn
        self.first_answer_ids: tuple[int, ...] | None = None  # the stream up to its first end of a turn
        self.resumed_at = 0  # sampled tokens when a new worker took the episode over
        self.log_fault = ""  # why its log was of no use
        self.pending_calls: tuple[ToolCall, ...] = ()
        self.answers: list[str] = []  # of the first of them
        self.num_begun = 0  # of them, by what the log of a former worker says
        self._tokenizer, self._max_context = tokenizer, max_context
        self._stop_ids = (tokenizer.eos_id, *(i for i in job.sampling.stop_ids if i != tokenizer.eos_id))
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._loss_mask: list[int] = []
        self._versions: list[int] = []
        self._routing: list[tuple[int, TokenRouting]] = []  # where each turn's ends, and it
        self._kept: list[tuple[int, KeptSets]] = []  # where each turn's begin, and they
        self._num_sampled = self._num_turns = 0
        self._num_here = 0  # assistant turns since the user spoke
        self._earlier: list[UserTurn] = []
        self._answers: list[tuple[str, tuple[int, ...] | None]] = []  # content of each, and its ids
        self._append: tuple[int, ...] = prompt_ids  # what the next request adds before sampling
        self._calls: list[ExecutedCall] = []
        self._last = ParsedTurn("", "")
        self._box_ids: tuple[str, ...] = ()
        self._levels: list[str] = []  # isolation of each box used

    @property
    def is_done(self) -> bool:
        return self.state is State.DONE

    @property
    def turn(self) -> int:
        """Turns that are over."""
        return self._num_turns

    @property
    def num_sampled(self) -> int:
        """Tokens of the turns that are over."""
        return self._num_sampled

    @property
    def stream_ids(self) -> tuple[int, ...]:
        """Prompt and everything behind it up to the turn that comes or runs."""
        return (*self.prompt_ids, *self._token_ids)

    @property
    def executed_calls(self) -> tuple[ExecutedCall, ...]:
        """Tool calls that have answered, in order."""
        newest = (ExecutedCall(c.name, c.arguments, r) for c, r in zip(self.pending_calls, self.answers))
        return (*(call for call in self._calls if call.result is not None), *newest)

    @property
    def boxes(self) -> list[tuple[str, str]]:
        """(id, isolation label) of the boxes used."""
        return list(zip(self._box_ids, self._levels))

    def next_request(self) -> Request:
        """The request of the next turn. EngineError unless READY."""
        self._must_be(State.READY)
        job, turn = self.job, self._num_turns
        may_continue = bool(job.tools) and self._num_here + 1 < job.max_turns
        may_continue = may_continue or (not turn and "title" in job.branches)  # to be forked
        may_continue = may_continue or (self._keeps_reasoning and len(self._answers) < len(job.user_turns))
        sampling = replace(
            job.sampling,
            max_tokens=min(job.sampling.max_tokens, job.max_tokens - self._num_sampled),
            stop_ids=self._stop_ids,
            seed=(job.sampling.seed + turn * _SEED_STRIDE) % _MAX_SEED,
        )
        request = Request(
            uid=f"{job.uid}#{turn}",
            prompt_ids=self._append,
            sampling=sampling,
            parent=self.held[-1] if self._token_ids else None,
            group=None if turn else job.group,
            hold=may_continue,
        )
        if may_continue:
            self.held.append(request.uid)
        self.request_uid = request.uid
        self.state = State.DECODING
        return request

    def on_completed(self, done: Completed) -> None:
        """Take a finished turn: the episode ends, or waits for `pending_calls`."""
        self._must_be(State.DECODING)
        self._token_ids += done.token_ids
        self._logprobs += done.logprobs
        self._versions += done.weight_version
        self._loss_mask += [1] * len(done.token_ids)
        if done.kept is not None:
            self._kept.append((len(self._token_ids) - len(done.token_ids), done.kept))
        if done.routing is not None:  # the turn's last token is not fed, or by the next turn
            self._routing.append((len(self.stream_ids) - 1, done.routing))
        self._num_sampled += len(done.token_ids)
        self._num_turns += 1
        self._num_here += 1
        text = self._tokenizer.decode(done.token_ids)
        if done.finish != "stop":
            self._last = _unfinished(text, self.thinking)
            self._end(FinishReason.LENGTH)
            return
        if self._num_turns == 1:
            self.first_answer_ids = self.stream_ids
        try:
            self._last = parse_turn(text, self.thinking)
        except ProtocolError as error:
            self._last = ParsedTurn("", "")
            self.failure, self.fault = str(error), error.fault.value
            self._end(FinishReason.MALFORMED)
            return
        calls = self._last.tool_calls
        if not calls:
            self._answered(done.token_ids)
        elif not self.job.tools or self._num_here >= self.job.max_turns:
            self._calls += [ExecutedCall(call.name, call.arguments) for call in calls]
            self._end(FinishReason.TURNS)
        elif self._num_sampled >= self.job.max_tokens:
            self._calls += [ExecutedCall(call.name, call.arguments) for call in calls]
            self._end(FinishReason.LENGTH)
        else:
            self.pending_calls, self.answers, self.num_begun = calls, [], 0
            self.state = State.TOOLS

    def on_tool_result(self, result: str) -> None:
        """What the next of the pending calls answered; the last one leads to `on_tool_results`."""
        self._must_be(State.TOOLS)
        self.answers.append(result)
        if len(self.answers) == len(self.pending_calls):
            self.on_tool_results(self.answers)

    def on_tool_results(self, results: Sequence[str]) -> None:
        """Append the observation: one text per pending call, in call order."""
        self._must_be(State.TOOLS)
        if len(results) != len(self.pending_calls):
            raise EngineError(f"{self.job.uid}: {len(self.pending_calls)} calls but {len(results)} results")
        self._calls += [ExecutedCall(c.name, c.arguments, r) for c, r in zip(self.pending_calls, results)]
        self.pending_calls, self.answers, self.num_begun = (), [], 0
        self._observe(self._tokenizer.encode_parts(render_tool_results(results, self.thinking)))

    def _answered(self, turn_ids: tuple[int, ...]) -> None:
        """The user's message has its answer: the next one comes, or the episode ends."""
        content = self._last.content
        self._answers.append((content, self._content_ids(turn_ids, content)))
        if len(self._answers) > len(self.job.user_turns):
            self._end(FinishReason.STOP)
        elif self._num_sampled >= self.job.max_tokens:
            self._end(FinishReason.LENGTH)
        elif self._keeps_reasoning:
            self._num_here = 0
            said = self.job.user_turns[len(self._answers) - 1]
            self._observe(self._tokenizer.encode_parts(render_user_turn(said, self.thinking)))
        else:
            self._num_here = 0
            self._begin_stream(self._history_ids())

    def _content_ids(self, turn_ids: tuple[int, ...], content: str) -> tuple[int, ...] | None:
        """The ids that an answer's content was sampled as; None where its reasoning does not end with a token
        of its own."""
        end = self._tokenizer.special_ids[END_THINK]
        ids = turn_ids[turn_ids.index(end) + 1 : -1] if end in turn_ids else turn_ids[:-1]
        return ids if self._tokenizer.decode(ids) == content else None

    def _history_ids(self) -> tuple[int, ...]:
        """The prompt of the user turn that comes: answers as they were sampled, their reasoning dropped."""
        messages = list(self.job.messages)
        for (content, ids), said in zip(self._answers, self.job.user_turns):
            messages.append({"role": "assistant", "content": content, "content_ids": ids})
            messages.append({"role": "user", "content": said})
        return encode_prompt(self._tokenizer, messages, self.job.effort, (), self._family)

    def _begin_stream(self, prompt: tuple[int, ...]) -> None:
        """Close the stream as a sample of its own and go on with a prompt that does not continue it."""
        if self._max_context is not None and len(prompt) >= self._max_context:
            self._end(FinishReason.LENGTH)
            return
        tokens, mask, versions = tuple(self._token_ids), tuple(self._loss_mask), tuple(self._versions)
        routing, kept = self._recorded()
        self._earlier.append(
            UserTurn(self.prompt_ids, tokens, tuple(self._logprobs), mask, versions, routing, kept)
        )
        self._token_ids, self._logprobs, self._loss_mask, self._versions = [], [], [], []
        self._routing, self._kept = [], []
        self.prompt_ids = self._append = prompt
        self.thinking = prompt[-1:] == (self._tokenizer.special_ids[THINK],)
        self.state = State.READY

    def _recorded(self) -> tuple[TokenRouting | None, KeptSets | None]:
        """Experts and kept sets of the stream so far."""
        routing = stitched(len(self.stream_ids), self._routing)
        return routing, joined(len(self._token_ids), self._kept)

    def _observe(self, ids: list[int]) -> None:
        """Append tokens that were not sampled; the episode ends if there is no room for them."""
        length = len(self.prompt_ids) + len(self._token_ids) + len(ids)
        if self._max_context is not None and length >= self._max_context:
            self._end(FinishReason.LENGTH)
            return
        self._token_ids += ids
        self._logprobs += [math.nan] * len(ids)
        self._versions += [-1] * len(ids)
        self._loss_mask += [0] * len(ids)
        self._append = tuple(ids)
        self.state = State.READY

    def abort(self, detail: str, kind: OutcomeKind = OutcomeKind.INFRA) -> None:
        """End by infrastructure: the sample is masked, whatever it had sampled is kept."""
        self.failure, self._failure_kind = detail, kind
        self.pending_calls, self.answers = (), []
        self._end(FinishReason.ABORT)

    def used_box(self, box_id: str, isolation: str) -> None:
        """Note the box whose tools the episode used."""
        if box_id not in self._box_ids:
            self._box_ids = (*self._box_ids, box_id)
            self._levels.append(isolation)

    def grade_item(self, box: Any = None) -> GradeItem:
        """What the grader sees. EngineError unless DONE."""
        self._must_be(State.DONE)
        job, finish = self.job, self.finish or FinishReason.ABORT
        sampled = [itertools.compress(turn.token_ids, turn.loss_mask) for turn in self._earlier]
        sampled.append(itertools.compress(self._token_ids, self._loss_mask))
        return GradeItem(
            uid=job.uid,
            domain=job.domain,
            reward=job.reward,
            prompt=self._tokenizer.decode(self._first_prompt),
            text=self._last.content,
            thinking=self._last.reasoning,
            token_ids=tuple(itertools.chain.from_iterable(sampled)),
            tool_calls=tuple(self._calls),
            finish=finish.value,
            metadata=job.metadata,
            files=job.files,
            needs_sandbox=job.needs_sandbox,
            sandbox=box,
            answers=tuple(content for content, _ in self._answers),
        )

    def record(self, graded: Graded) -> RolloutRecord:
        """The finished episode with its verdict. EngineError unless DONE."""
        self._must_be(State.DONE)
        job = self.job
        reward = graded.reward if graded.outcome.is_scored else None
        routing, kept = self._recorded()
        judged = [graded.isolation] if graded.sandbox_ids or graded.isolation != "none" else []
        return RolloutRecord(
            uid=job.uid,
            group=job.group,
            domain=job.domain,
            effort=job.effort,
            teacher=job.teacher,
            prompt_ids=self.prompt_ids,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            loss_mask=tuple(self._loss_mask),
            weight_version=tuple(self._versions),
            finish=self.finish or FinishReason.ABORT,
            outcome=graded.outcome,
            reward=reward,
            reward_parts=dict(graded.parts),
            routing=routing,
            kept=kept,
            isolation=_weakest([*self._levels, *judged]),
            sandbox_ids=(*self._box_ids, *(i for i in graded.sandbox_ids if i not in self._box_ids)),
            metadata=self._facts(),
            earlier=tuple(self._earlier),
        )

    def aborted_record(self) -> RolloutRecord:
        """The record of an episode that nobody grades."""
        return self.record(Graded(None, {}, Outcome(self._failure_kind, self.failure)))

    def _facts(self) -> dict[str, Any]:
        """Small facts: the job's scalar metadata, turns, calls, a malformed turn's fault and error."""
        facts: dict[str, Any] = {
            key: value
            for key, value in self.job.metadata.items()
            if value is None or isinstance(value, (bool, int)) or _is_small(value)
        }
        facts["turns"], facts["tool_calls"] = self._num_turns, len(self._calls)
        if self.job.user_turns:
            facts["answers"] = len(self._answers)
        if self.resumed_at:
            facts["resumed_at"] = self.resumed_at
        if self.log_fault:
            facts["log_fault"] = self.log_fault[:200]
        if self.finish is FinishReason.MALFORMED:
            facts["malformed"], facts["fault"] = self.failure[:200], self.fault
        return facts

    def _end(self, finish: FinishReason) -> None:
        self.finish = finish
        self.state = State.DONE

    def _must_be(self, state: State) -> None:
        if self.state is not state:
            raise EngineError(f"{self.job.uid}: episode is {self.state.value}, must be {state.value}")


def _is_small(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or (
        isinstance(value, str) and len(value) <= 200
    )


def _unfinished(text: str, thinking: bool) -> ParsedTurn:
    """What a turn that was cut by the token budget had said so far."""
    if not thinking:
        return ParsedTurn("", text)
    reasoning, _, content = text.partition(END_THINK)
    return ParsedTurn(reasoning, content)


def _weakest(labels: Sequence[str]) -> str:
    """The weakest isolation among the boxes used; "none" where no box was."""
    return min(labels, key=lambda label: Isolation[label.upper()], default="none")
