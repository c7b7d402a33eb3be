"""The killable process in which a reward function lives: `python -m consilience.rewards.child FD`.

First message in: {"path", "sandbox", "gradings_per_box"}; then {"items": [...]}, when there is work. Out:
    ["busy"]                       something slow but expected happens (import, opening a box)
    ["ready"]                      calls may be timed from here
    ["refused", error name, text]  the function cannot be loaded; the process ends
    ["boxless", text]              a spent box cannot be replaced; the process ends
    ["score", reward, parts, kind, detail, isolation, box ids]  one an item, in order
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from consilience.conf.errors import ConsilienceError, SandboxLost, SandboxUnavailable
from consilience.rewards.frames import FrameSocket
from consilience.rewards.interface import Completion, RewardFunction, Tamper, ToolCall
from consilience.rewards.judge_box import JudgeBox, spec_from_dict
from consilience.rewards.load import load_reward
from consilience.rewards.verdict import failed, infra, tamper, verdict_of
from consilience.rollout.grading import Graded

MAX_REQUEST_BYTES = 1 << 30


def main() -> None:
    """Serve until the other end closes. stdout and stderr are not the protocol's: prints are harmless."""
    frames = FrameSocket(socket.socket(fileno=int(sys.argv[1])), max_bytes=MAX_REQUEST_BYTES)
    os.set_inheritable(frames.end.fileno(), False)
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        settings = frames.receive()  # no limit: `_die_with_parent`
        frames.send(["busy"])
        try:
            function = load_reward(settings["path"])
            box = None
            if settings["sandbox"]:
                box = JudgeBox.open(spec_from_dict(settings["sandbox"]), settings["gradings_per_box"])
        except ConsilienceError as error:
            frames.send(["refused", type(error).__name__, str(error)])
            return
        frames.send(["ready"])
        with asyncio.Runner() as runner:
            while True:
                for item in frames.receive()["items"]:  # no limit: idle until the parent asks or ends
                    _serve(frames, runner, function, item, box)
    except (EOFError, OSError):
        return


def _serve(
    frames: FrameSocket,
    runner: asyncio.Runner,
    function: RewardFunction,
    item: Mapping[str, Any],
    box: JudgeBox | None,
) -> None:
    verdict, is_box_lost = _score(runner, function, item, box)
    if is_box_lost and box is not None:
        verdict, is_box_lost = _score_again(frames, runner, function, item, box)
    label, ids = (box.label, [box.id]) if box is not None else ("none", [])
    outcome = verdict.outcome
    frames.send(["score", verdict.reward, verdict.parts, outcome.kind.value, outcome.detail, label, ids])
    if box is not None and (is_box_lost or box.is_soiled):
        frames.send(["busy"])
        try:
            box.renew(is_lost=is_box_lost)
        except ConsilienceError as error:
            frames.send(["boxless", str(error)])
            raise EOFError from error
        frames.send(["ready"])


def _score_again(
    frames: FrameSocket,
    runner: asyncio.Runner,
    function: RewardFunction,
    item: Mapping[str, Any],
    box: JudgeBox,
) -> tuple[Graded, bool]:
    """A second verdict in another box, as the first one's was lost.

    A box that is lost twice, while a third runs a program of ours, was ended by the candidate: or it could
    have any bad answer masked as a fault of the machinery.
    """
    try:
        _renew(frames, box)
        verdict, is_lost = _score(runner, function, item, box)
        if not is_lost:
            return verdict, False
        _renew(frames, box)
        if box.run_python("print(1)").stdout != b"1\n":
            return verdict, True
        return tamper(f"the candidate ended two boxes ({verdict.outcome.detail}); a third one works"), False
    except ConsilienceError as error:
        return infra(f"{type(error).__name__}: {error}"), True


def _renew(frames: FrameSocket, box: JudgeBox) -> None:
    frames.send(["busy"])
    box.renew(is_lost=True)
    frames.send(["ready"])


def _score(
    runner: asyncio.Runner, function: RewardFunction, item: Mapping[str, Any], box: JudgeBox | None
) -> tuple[Graded, bool]:
    """The verdict on one item, and whether the box died under it."""
    try:
        if box is not None:
            box.begin()
        value = function(
            completion_from_dict(item["completion"]),
            prompt=item["prompt"],
            metadata=item["metadata"],
            sandbox=box,
        )
        if inspect.isawaitable(value):
            value = runner.run(_await(value))
        return verdict_of(value), False
    except (SandboxLost, SandboxUnavailable) as error:
        return infra(f"{type(error).__name__}: {error}"), True
    except Tamper as error:
        return tamper(str(error)), False
    except BaseException as error:
        return failed(f"the reward function raised {type(error).__name__}: {error}{_line(error)}"), False


async def _await(value: Any) -> Any:
    return await value


def _line(error: BaseException) -> str:
    """` (file.py, line 12)`: where the exception was raised."""
    traceback = error.__traceback__
    if traceback is None:
        return ""
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return f" ({os.path.basename(traceback.tb_frame.f_code.co_filename)}, line {traceback.tb_lineno})"


def completion_to_dict(completion: Completion) -> dict[str, Any]:
    """JSON-plain form; `completion_from_dict` is its inverse."""
    return {
        "text": completion.text,
        "thinking": completion.thinking,
        "token_ids": list(completion.token_ids),
        "tool_calls": [[call.name, dict(call.arguments), call.result] for call in completion.tool_calls],
        "finish": completion.finish,
        "answers": list(completion.answers),
        "patch": completion.patch,
    }


def completion_from_dict(row: Mapping[str, Any]) -> Completion:
    return Completion(
        text=row["text"],
        thinking=row["thinking"],
        token_ids=tuple(row["token_ids"]),
        tool_calls=tuple(ToolCall(*call) for call in row["tool_calls"]),
        finish=row["finish"],
        answers=tuple(row["answers"]),
        patch=row["patch"],
    )


def _die_with_parent(parent: int) -> None:
    """A hung reward function must not outlive a killed trainer."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main()
