"""Leftovers go by their owner's label: dead owners' only, on every kind of thing that can be left."""

import http.server
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

from consilience.sandboxes.cgroups import start_time
from consilience.sandboxes.host_reaper import is_dead_owner, reap_containers, reap_processes
from consilience.sandboxes.janitor import Owner, is_alive, new_mark, read_mark

TREE = Path(__file__).parents[2]
ORPHAN = """
import subprocess
from consilience.sandboxes.janitor import new_mark
child = subprocess.Popen(["sh", "-c", "sleep 100; true", new_mark()], start_new_session=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(child.pid)
"""


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_mark_names_its_process_and_says_whether_it_lives():
    owner = read_mark(new_mark())
    assert owner is not None and owner.pid == os.getpid() and is_alive(owner)
    assert not is_alive(owner._replace(start="1"))  # the id was used again
    assert is_alive(Owner(owner.namespace + 1, 1 << 30, "1"))  # of elsewhere: nobody can tell
    assert new_mark() != new_mark()
    for word in ("owner-12", "owner-1-2-3-xyz", new_mark() + "0", ""):
        assert read_mark(word) is None


def test_processes_of_a_dead_owner_are_killed_and_others_are_not():
    env = {**os.environ, "PYTHONPATH": str(TREE)}
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, env=env, timeout=60)
    orphan = int(done.stdout)
    ours = subprocess.Popen(["sh", "-c", "sleep 100; true", new_mark()], start_new_session=True)
    strange = subprocess.Popen(["sh", "-c", "sleep 100; true", "owner-somebody"], start_new_session=True)
    try:
        assert running(orphan)
        assert reap_processes() >= 1
        deadline = 200
        while running(orphan) and deadline:
            threading.Event().wait(0.01)
            deadline -= 1
        assert not running(orphan) and ours.poll() is None and strange.poll() is None
    finally:
        for process in (ours, strange):
            os.killpg(process.pid, 9)
            process.wait(timeout=10)


def test_labels_of_this_host_only_are_judged_by_id_and_start_time():
    me, here = os.getpid(), socket.gethostname()
    gone = subprocess.Popen(["true"])
    gone.wait(timeout=10)
    assert is_dead_owner(f"{here}:{gone.pid}") and is_dead_owner(f"{here}:{me}:1")
    for label in (
        f"{here}:{me}",
        f"{here}:{me}:{start_time(me)}",
        f"elsewhere:{gone.pid}",
        "x",
        f"{here}:1x",
        "",
    ):
        assert not is_dead_owner(label)


class Engine(http.server.BaseHTTPRequestHandler):
    """Lists three containers over a unix socket; notes what it is told to remove."""

    rows = ()
    removed: tuple[str, ...] = ()

    def do_GET(self):
        body = json.dumps(list(self.rows)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_DELETE(self):
        Engine.removed += (self.path,)
        self.send_response(204)
        self.end_headers()

    def address_string(self):
        return "unix"

    def log_message(self, *args):
        pass


def test_containers_of_a_dead_owner_are_removed_by_label(tmp_path):
    here = socket.gethostname()
    owners = {"a" * 12: f"{here}:{1 << 22}:5", "b" * 12: f"{here}:{os.getpid()}", "c" * 12: "elsewhere:5"}
    Engine.rows = tuple({"Id": name, "Labels": {"consilience.owner": owners[name]}} for name in owners)
    path = str(tmp_path / "engine.sock")
    with socketserver.ThreadingUnixStreamServer(path, Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert reap_containers(path) == 1
        server.shutdown()
    assert Engine.removed == (f"/containers/{'a' * 12}?force=1&v=1",)
    assert reap_containers(str(tmp_path / "none")) == 0 and reap_containers(path) == 0
