"""What a program in a box can see and reach, and that a box which shows too much is refused."""

from __future__ import annotations

import json
import os

import pytest

from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes.protocol import Isolation
from consilience.sandboxes.verify import check_isolation, host_namespaces, probe_program


def test_the_record_says_what_is_enforced(box, driver):
    enforced = box.enforced
    levels = {"bwrap_root": Isolation.BWRAP_ROOT, "bwrap_user": Isolation.BWRAP_USER}
    assert enforced.level == levels.get(driver, enforced.level) and enforced.level >= Isolation.BWRAP_USER
    assert not enforced.network and enforced.seccomp
    assert enforced.memory_cap in ("cgroup", "rlimit") and enforced.process_cap in ("cgroup", "rlimit")


def test_there_is_no_network(box):
    code = (
        "import socket\nfor host in ('127.0.0.1', '10.0.0.1', '169.254.169.254', '8.8.8.8'):\n"
        "    s = socket.socket(); s.settimeout(1)\n"
        "    try: s.connect((host, 53)); print('reached', host)\n    except OSError: pass\n"
        "try: print(socket.getaddrinfo('example.org', 80))\nexcept OSError: print('no names')"
    )
    assert box.run_python(code, timeout_s=8).stdout == b"no names\n"


def test_a_listener_of_the_host_hears_nothing(box):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        told = box.run_python(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)")
        assert told.exit_code == 1
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_host_file_environment_or_argument_is_visible(box, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("host secret")
    os.environ["SANDBOX_TEST_CANARY"] = "host-secret-value"
    try:
        paths = [
            str(canary),
            os.getcwd(),
            os.path.expanduser("~/.bashrc"),
            "/var/run/docker.sock",
            "/etc/ssh",
        ]
        code = (
            f"import os, glob, json\nseen = [p for p in {paths!r} if os.path.lexists(p)]\ntext = b''\n"
            "for p in glob.glob('/proc/*/environ') + glob.glob('/proc/*/cmdline'):\n"
            "    try: text += open(p, 'rb').read()\n    except OSError: pass\n"
            "print(json.dumps([seen, b'host-secret' in text]))"
        )
        assert json.loads(box.run_python(code).stdout) == [[], False]
    finally:
        del os.environ["SANDBOX_TEST_CANARY"]


def test_a_program_has_no_privilege_and_can_gain_none(box):
    code = (
        "import os\nstatus = open('/proc/self/status').read()\n"
        "wanted = ('CapEff', 'NoNewPrivs', 'Seccomp:')\n"
        "print([l.split()[1] for l in status.splitlines() if l.startswith(wanted)])\n"
        "print(0 in os.getresuid() + os.getresgid() or 0 in os.getgroups())\n"
        "for f in (lambda: os.setuid(0), lambda: os.chroot('/'), lambda: os.kill(1, 9)):\n"
        "    try: f()\n    except OSError: pass\n"
        "print(os.getuid() != 0)"
    )
    out = box.run_python(code).stdout.decode().splitlines()
    assert out == ["['0000000000000000', '1', '2']", "False", "True"]
    assert box.exec(["echo", "alive"]).stdout == b"alive\n"


def test_dangerous_system_calls_are_refused(box):
    code = """
import ctypes, errno, platform, socket
libc = ctypes.CDLL(None, use_errno=True)
x86 = platform.machine() == "x86_64"
calls = {"add_key": (248, 217), "keyctl": (250, 219), "io_uring_setup": (425, 425), "bpf": (321, 280),
         "userfaultfd": (323, 282), "ptrace": (101, 117), "unshare": (272, 97), "mount": (165, 40),
         "perf_event_open": (298, 241), "shmget": (29, 194)}
for name, numbers in calls.items():
    done = libc.syscall(numbers[not x86], 0x10000000 if name == "unshare" else 0, 0, 0, 0, 0)
    if done != -1 or ctypes.get_errno() != errno.EPERM: print(name, done, ctypes.get_errno())
for flag in (0x10000000, 0x20000000, 0x40000000):
    done = libc.syscall(56 if x86 else 220, flag | 17, 0, 0, 0, 0)
    if done == 0: libc._exit(0)
    if done != -1: print("clone", hex(flag), done)
for family in (16, 17, 40, 38, 44):
    try: socket.socket(family, socket.SOCK_DGRAM); print("family", family)
    except OSError as e:
        if e.errno != errno.EAFNOSUPPORT: print("family", family, e)
import resource
try: resource.prlimit(1, resource.RLIMIT_CPU, (1, 1)); print("prlimit of the runner")
except OSError: pass
print("done")
"""
    assert box.run_python(code).stdout == b"done\n"


def test_the_runner_cannot_be_signalled_stopped_or_read(box):
    code = (
        "import os, signal\nfor n in (2, 9, 15, 19, 1):\n    try: os.kill(1, n)\n    except OSError: pass\n"
        "for name in ('mem', 'environ', 'maps', 'fd/0', 'cwd'):\n"
        "    try: open('/proc/1/' + name, 'rb').read(1); print('read', name)\n    except OSError: pass\n"
        "try: open('/proc/1/oom_score_adj', 'w').write('1000'); print('oom')\nexcept OSError: pass"
    )
    assert box.run_python(code).stdout == b""
    assert box.exec(["echo", "alive"]).stdout == b"alive\n"


def test_only_the_folders_that_reset_empties_can_be_written(box):
    find = (
        "import os\nfound = []\nfor top, folders, files in os.walk('/'):\n"
        "    folders[:] = [f for f in folders if (top, f) not in (('/', 'proc'), ('/', 'sys'))]\n"
        "    try:\n        os.close(os.open(top + '/probe', os.O_CREAT | os.O_WRONLY)); found.append(top)\n"
        "    except OSError: pass\n"
        "print(sorted(found))"
    )
    writable = eval(box.run_python(find, timeout_s=60).stdout)  # a cold disk has all of /usr to read
    assert set(writable) <= {"/workspace", "/tmp", "/dev/shm", "/dev/mqueue"}
    refused = box.exec(["sh", "-c", "echo 1 > /proc/sys/kernel/core_pattern || echo 1 > /proc/sysrq-trigger"])
    assert refused.exit_code != 0


GOOD = {
    "uid": 1000,
    "parent_uid": 0,
    "seccomp": 2,
    "no_new_privs": 1,
    "capabilities": 0,
    "interfaces": ["lo", "tunl0"],
    "routes": 0,
    "namespaces": {name: name + ":[1]" for name in ("mnt", "pid", "net", "ipc", "uts")},
    "visible": [],
    "core_pattern": False,
    "root_writable": False,
    "is_mapped": True,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"uid": 0}, "runs as root"),
        ({"seccomp": 0}, "without a seccomp filter"),
        ({"no_new_privs": 0}, "may gain privileges"),
        ({"capabilities": 0x21}, "capabilities 0x21"),
        ({"interfaces": ["lo", "eth0"]}, "the interface eth0"),
        ({"routes": 2}, "a network route"),
        ({"namespaces": {"net": host_namespaces()["net"]}}, "shares the host's net namespace"),
        ({"visible": ["/home"]}, "sees /home of the host"),
        ({"core_pattern": True}, "core_pattern"),
        ({"root_writable": True}, "write outside its workspace"),
    ],
)
def test_each_promise_that_does_not_hold_refuses_the_box_and_is_named(change, words):
    assert check_isolation("driver", json.dumps(GOOD).encode())["uid"] == 1000
    with pytest.raises(SandboxUnavailable, match=words):
        check_isolation("driver", json.dumps(GOOD | change).encode())


def test_a_probe_that_prints_no_report_refuses_the_box():
    with pytest.raises(SandboxUnavailable, match="instead of a report"):
        check_isolation("driver", b"")


def test_the_probe_run_outside_a_box_is_refused_on_many_counts():
    import subprocess
    import sys

    told = subprocess.run([sys.executable, "-c", probe_program(["/"])], capture_output=True, check=True)
    with pytest.raises(SandboxUnavailable) as refused:
        check_isolation("none", told.stdout)
    for words in ("pid namespace", "net namespace", "sees / of the host", "seccomp"):
        assert words in str(refused.value)
