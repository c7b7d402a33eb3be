"""A sandbox host in a process of its own, spoken to over a unix socket: what Ray does for it, without Ray.

Its boxes are real. A line in `commands` for each command that a box was given; before a box is destroyed its
file `ran` is copied to the folder `final`.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client, Listener
from pathlib import Path

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.host import HostLimits
from consilience.sandboxes.host_client import LocalHost
from consilience.sandboxes.probe import open_sandbox

TREE = Path(__file__).parents[2]


class SocketAsk:
    """`host_client.Ask` over the socket; a connection a call, so that forks and threads do not share one."""

    def __init__(self, path):
        self.path = str(path)

    def __call__(self, verb, *args, limit_s, **options):
        try:
            with Client(self.path, "AF_UNIX") as end:
                end.send((verb, args, options, limit_s))
                if not end.poll(limit_s):
                    raise SandboxLost(f"no answer to {verb} in {limit_s:g} s")
                value, error = end.recv()
        except (OSError, EOFError) as failure:
            raise SandboxLost(f"the host is gone: {failure}") from None
        if error is not None:
            raise error
        return value


class HostProcess:
    """Started at once; `ask` speaks to it. `close` ends it in order, `kill` does not."""

    def __init__(self, folder, ttl_s):
        self.folder = folder
        (folder / "final").mkdir(parents=True)
        socket = folder / "socket"
        env = {**os.environ, "PYTHONPATH": f"{TREE}:{TREE / 'tests' / 'chaos'}"}
        command = [sys.executable, "-c", "import host_process; host_process.main()", str(folder), str(ttl_s)]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not socket.exists():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        self.ask = SocketAsk(socket)

    def metrics(self):
        return self.ask("metrics", limit_s=30)

    def commands(self):
        """(box, command) of everything that a box was given, once for each time."""
        path = self.folder / "commands"
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(line.split(" ", 1)) for line in lines]

    def final(self, box_id):
        return (self.folder / "final" / box_id).read_text()

    def processes(self):
        """Processes of its boxes, by their owner's mark."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(w.startswith(b"owner-") and f"-{self.process.pid}-".encode() in w for w in words):
                found.append(int(name))
        return found

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def kill(self):
        self.process.kill()
        self.process.wait(timeout=60)
        self.process.stdin.close()


def main():
    folder, ttl_s = Path(sys.argv[1]), float(sys.argv[2])

    async def opener(spec):
        box = await open_sandbox(spec)
        run, destroy = box.exec, box.destroy

        async def noted_exec(argv, **options):
            with open(folder / "commands", "a") as file:
                file.write(f"{box.id} {argv[-1]}\n")
            return await run(argv, **options)

        async def noted_destroy():
            with contextlib.suppress(OSError, SandboxLost):
                (folder / "final" / box.id).write_bytes(await box.read("ran"))
            await destroy()

        box.exec, box.destroy = noted_exec, noted_destroy
        return box

    host = LocalHost(HostLimits(ttl_s=ttl_s, sweep_s=ttl_s / 10), opener=opener)

    def serve(end):
        with end:
            verb, args, options, limit_s = end.recv()
            try:
                answer = host.ask(verb, *args, limit_s=limit_s, **options), None
            except Exception as error:
                answer = None, error
            with contextlib.suppress(OSError):  # its caller was killed
                end.send(answer)

    def accept():
        listener = Listener(str(folder / "socket"), "AF_UNIX", backlog=128)
        while True:
            try:
                threading.Thread(target=serve, args=(listener.accept(),), daemon=True).start()
            except (OSError, EOFError):
                continue

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()  # until the test ends, however it ends
    host.close()
