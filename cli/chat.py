"""`consilience chat`: a conversation with a checkpoint, line by line."""

from __future__ import annotations

from consilience.cli.generate import open_talker
from consilience.cli.talk import chat_loop
from consilience.conf.schema import Config


def chat(cfg: Config) -> int:
    """Talk until end of input (Ctrl-D); "/new" starts over."""
    talker, folder = open_talker(cfg)
    print(f"checkpoint: {folder}; /new starts over, Ctrl-D ends")
    return chat_loop(talker, input, print)
