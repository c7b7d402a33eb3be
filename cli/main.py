"""`consilience VERB [GROUP=OPTION] [GROUP.KEY=VALUE] …`: parse, check, call, report what went wrong.

Exit codes: 0 done, 1 an error of the run, 2 a wrong command line or configuration, 130 Ctrl-C,
143 SIGTERM. Nothing heavy is imported before the configuration has been checked.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from consilience.cli.verbs import PURPOSE, VERBS
from consilience.conf.errors import ConfigError, ConsilienceError
from consilience.conf.fields import fields_of, nearest
from consilience.conf.overrides import own_setting
from consilience.conf.schema import Config
from consilience.training.durable_files import is_disk_full

EXIT_ERROR, EXIT_CONFIG, EXIT_INTERRUPT, EXIT_TERMINATED = 1, 2, 130, 143
RESUMABLE = ("run", "sft", "grpo", "distill", "evaluate")
PASSED = ("run.from=", "run.resume=", "from=", "resume=")  # said once, not again by whoever goes on


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    verb: str
    overrides: tuple[str, ...]
    config_dir: str | None = None
    is_debug: bool = False


class Terminated(KeyboardInterrupt):
    """SIGTERM: the same orderly end as Ctrl-C."""


def main(argv: Sequence[str] | None = None, verbs: Mapping[str, str] = VERBS) -> int:
    """Run one verb; the exit code. `verbs` is the table that names the function of each."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    try:
        with _terminate_as_interrupt():
            return _call(parse(arguments), verbs)
    except KeyboardInterrupt as interrupt:
        if is_debug:
            raise
        _say(_resume_line(arguments))
        return EXIT_TERMINATED if isinstance(interrupt, Terminated) else EXIT_INTERRUPT
    except ConfigError as error:
        return _fail(error, EXIT_CONFIG, is_debug)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); point stdout at nothing for the exit flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        return _fail(error, EXIT_ERROR, is_debug)


def parse(arguments: Sequence[str]) -> Command:
    """The command line as a Command. ConfigError on an unknown verb or option."""
    rest = list(arguments)
    config_dir, is_debug, words = None, False, []
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            words.insert(0, "help")
        elif word == "--debug":
            is_debug = True
        elif word == "--config-dir" or word.startswith("--config-dir="):
            config_dir = word.partition("=")[2] or (rest.pop(0) if rest else "")
            if not config_dir:
                raise ConfigError("--config-dir needs a folder")
        elif word.startswith("-"):
            raise ConfigError(
                f"unknown option '{word}'; {nearest(word, ('--help', '--debug', '--config-dir'))}"
            )
        else:
            words.append(word)
    verb = words.pop(0) if words else "help"
    if verb not in PURPOSE:
        raise ConfigError(f"unknown verb '{verb}'; {nearest(verb, PURPOSE)}")
    return Command(verb, tuple(own_setting(verb, word) for word in words), config_dir, is_debug)


def _call(command: Command, verbs: Mapping[str, str]) -> int:
    if command.verb == "help":
        return _help(command.overrides)
    from consilience.conf.load import compose

    cfg = compose(command.overrides, command.config_dir)
    from consilience.cli.stages import load_function

    return load_function(verbs[command.verb])(cfg)


def _help(topics: Sequence[str]) -> int:
    from consilience.conf.load import describe

    for topic in topics:
        if topic in PURPOSE:
            print(f"consilience {topic}: {PURPOSE[topic]}")
        if topic not in PURPOSE or topic in fields_of(Config):
            for key, default, allowed, meaning in describe(topic):
                print(f"{key}={default}\n    {meaning}{f' ({allowed})' if allowed else ''}")
    if not topics:
        print("consilience VERB [GROUP=OPTION] [GROUP.KEY=VALUE] … [--config-dir DIR] [--debug]\n")
        for verb, purpose in PURPOSE.items():
            print(f"  {verb:<9} {purpose}")
        from consilience.conf.overrides import CONF, group_options

        print("\ngroups and their options (consilience help GROUP: every setting)\n")
        for group, options in group_options([CONF]).items():
            print(f"  {group:<11} {' '.join(options)}")
    return 0


def _fail(error: Exception, code: int, is_debug: bool) -> int:
    if is_debug:
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ConsilienceError):
        _say(f"consilience: {text}")
    elif is_disk_full(error):
        _say(
            f"consilience: {text}: the disk takes no more; free space and run again, what is finished is kept"
        )
    else:
        _say(f"consilience: {type(error).__name__}: {text} (--debug shows where; finished stages are kept)")
    return code


def _resume_line(arguments: Sequence[str]) -> str:
    words = [word for word in arguments if not word.startswith(PASSED)]
    if not any(word in RESUMABLE for word in words[:1]):
        return "consilience: interrupted"
    return f"consilience: interrupted; finished stages are kept, go on with: consilience {shlex.join(words)}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a stopped job) unwinds like Ctrl-C, so that workers and boxes are taken down."""

    def on_sigterm(_signum: int, _frame: FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, on_sigterm)
    except ValueError:  # not the main thread: whoever embeds us handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
