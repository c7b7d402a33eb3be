"""The channel: frames in any portions, and one way out of everything that goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import struct

import pytest

from consilience.conf.errors import SandboxLost
from consilience.sandboxes import channel as channel_module
from consilience.sandboxes.channel import Channel, PipeEnds


def frame(header: dict, blob: bytes = b"") -> bytes:
    text = json.dumps({**header, "blob": len(blob)}).encode()
    return struct.pack(">I", len(text)) + text + blob


class ScriptedTransport:
    """Answers each request with prepared bytes, in portions; keeps what was sent and counts kills."""

    def __init__(self, *answers: bytes, portion: int = 1 << 20) -> None:
        self.answers = list(answers)
        self.portion = portion
        self.sent: list[bytes] = []
        self.num_kills = 0
        self.channel: Channel | None = None

    async def send(self, data: bytes) -> None:
        self.sent.append(data)
        if self.answers and self.channel is not None:
            answer = self.answers.pop(0)
            for start in range(0, len(answer), self.portion):
                self.channel.feed(answer[start : start + self.portion])

    async def kill(self) -> None:
        self.num_kills += 1

    def describe_end(self) -> str:
        return "said why"


def connected(*answers: bytes, portion: int = 1 << 20) -> tuple[Channel, ScriptedTransport]:
    transport = ScriptedTransport(*answers, portion=portion)
    transport.channel = channel = Channel("box-1", transport)
    return channel, transport


@pytest.mark.parametrize("portion", [1, 3, 1000])
def test_answers_come_together_from_any_portions(portion):
    channel, transport = connected(frame({"id": 1, "a": 2}, b"data"), frame({"id": 2}), portion=portion)

    async def calls():
        first = await channel.call({"verb": "x"}, b"in", b"put", timeout_s=1)
        return first, await channel.call({"verb": "y"}, timeout_s=1)

    first, second = asyncio.run(calls())
    assert (first[0]["a"], first[1], second[1]) == (2, b"data", b"")
    assert transport.sent[0] == frame({"verb": "x", "id": 1}, b"input")
    assert transport.num_kills == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (frame({"id": 9}), "answer to request 9"),
        (struct.pack(">I", 5) + b"nojso", "not one"),
        (struct.pack(">I", 2) + b"{}", "not one"),
        (struct.pack(">I", 1 << 31), "frame header of"),
        (frame({"id": 1})[:-1] + b"," + b'"blob":-5}', "not one|bytes"),
        (struct.pack(">I", 11) + b'{"blob":-5}', "frame of -5 bytes"),
        (struct.pack(">I", 21) + b'{"blob":999999999999}', "frame of 999999999999 bytes"),
        (struct.pack(">I", 6) + b"[1, 2]", "not one"),
    ],
)
def test_what_is_no_answer_kills_the_box(answer, words):
    channel, transport = connected(answer)
    with pytest.raises(SandboxLost, match=words):
        asyncio.run(channel.call({"verb": "x"}, timeout_s=0.05))
    assert transport.num_kills == 1
    with pytest.raises(SandboxLost, match="box-1 is gone"):
        asyncio.run(channel.call({"verb": "x"}, timeout_s=1))
    assert len(transport.sent) == 1


def test_an_answer_nobody_asked_for_breaks_the_channel():
    channel, _ = connected()
    channel.feed(frame({"id": 1}))
    with pytest.raises(SandboxLost, match="nobody asked"):
        asyncio.run(channel.call({"verb": "x"}, timeout_s=1))


def test_no_answer_within_the_limit_and_two_seconds_kills_the_box():
    channel, transport = connected()

    async def timed():
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(SandboxLost, match=r"no answer to exec within 2\.1 s"):
            await channel.call({"verb": "exec"}, timeout_s=0.1)
        return loop.time() - began

    waited_s = asyncio.run(timed())
    assert channel_module.GRACE_S < waited_s < channel_module.GRACE_S + 1
    assert transport.num_kills == 1


def test_an_end_in_the_middle_of_an_answer_is_lost_and_never_a_short_one():
    channel, _ = connected(frame({"id": 1}, b"whole answer")[:-3])

    async def ended():
        asyncio.get_running_loop().call_later(0.02, channel.feed_eof)
        await channel.call({"verb": "x"}, timeout_s=5)

    with pytest.raises(SandboxLost, match=r"it ended .said why."):
        asyncio.run(ended())


def test_a_cancelled_request_kills_the_box_as_its_command_may_still_run():
    channel, transport = connected()

    async def cancelled():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await channel.call({"verb": "x"}, timeout_s=5)
        assert transport.num_kills == 1
        with pytest.raises(SandboxLost, match="cancelled"):
            await channel.call({"verb": "x"}, timeout_s=5)

    asyncio.run(cancelled())


def test_requests_of_many_tasks_take_turns():
    channel, transport = connected(*(frame({"id": number}) for number in range(1, 9)))

    async def many():
        return await asyncio.gather(*(channel.call({"verb": "x"}, timeout_s=1) for _ in range(8)))

    assert [reply["id"] for reply, _ in asyncio.run(many())] == list(range(1, 9))
    assert len(transport.sent) == 8


def test_pipe_ends_carry_more_than_a_pipe_holds_and_tell_of_a_closed_one():
    async def carried():
        request_r, request_w = os.pipe()
        reply_r, reply_w = os.pipe()
        pipes, (channel, _) = PipeEnds(request_w, reply_r), connected()
        await pipes.connect(channel)
        reading = asyncio.to_thread(lambda: sum(len(os.read(request_r, 1 << 16)) for _ in range(4)))
        sending = asyncio.create_task(pipes.send(b"x" * (2 << 20)))
        assert await reading > 64 << 10
        os.close(request_r)
        with pytest.raises(BrokenPipeError):
            await sending
            await pipes.send(b"more")
        os.close(reply_w)
        await asyncio.sleep(0.05)
        pipes.close()
        pipes.close()
        return channel.lost

    assert "it ended" in str(asyncio.run(carried()))
