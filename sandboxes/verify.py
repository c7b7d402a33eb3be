"""What a started box really enforces, asked from inside it before any foreign code has run there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from consilience.conf.errors import SandboxUnavailable

# the kernel puts these, down and without a route, into every new network namespace of some hosts
FALLBACK_INTERFACES = {"lo", "tunl0", "gre0", "gretap0", "erspan0", "sit0", "ip6tnl0", "ip6gre0", "ip_vti0"}
FALLBACK_INTERFACES |= {"ip6_vti0", "teql0"}
NAMESPACES = ("mnt", "pid", "net", "ipc", "uts")
PROBE = """
import errno, json, os
status = dict(line.rstrip("\\n").split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
def can(flags, path):
    try:
        os.close(os.open(path, flags))
        return True
    except OSError:
        return False
def first_line(path):
    try:
        return open(path).readline().strip()
    except OSError:
        return ""
def spaces():
    return {name: os.readlink("/proc/self/ns/" + name) for name in %(names)r}
print(json.dumps({
    "uid": os.getuid(),
    "parent_uid": os.stat("/proc/1").st_uid,
    "seccomp": int(status.get("Seccomp", 0)),
    "no_new_privs": int(status.get("NoNewPrivs", 0)),
    "capabilities": int(status.get("CapEff", "0"), 16),
    "interfaces": [l.split(":")[0].strip() for l in open("/proc/net/dev").read().splitlines()[2:]],
    "routes": len(open("/proc/net/route").read().splitlines()) - 1,
    "namespaces": spaces(),
    "visible": [path for path in %(paths)r if os.path.lexists(path)],
    "core_pattern": can(os.O_WRONLY, "/proc/sys/kernel/core_pattern"),
    "root_writable": any(can(os.O_WRONLY | os.O_CREAT, d + "/.probe") for d in ("", "/usr", "/etc", "/dev")),
    "boot_id": first_line("/proc/sys/kernel/random/boot_id"),
    "is_mapped": open("/proc/self/uid_map").read().split() != ["0", "0", "4294967295"],
}))
"""


def probe_program(host_paths: Sequence[str]) -> str:
    """The program that reports on the box; `host_paths` must not exist inside."""
    return PROBE % {"names": NAMESPACES, "paths": list(host_paths)}


def host_paths() -> list[str]:
    """Places of this host that no box may see."""
    candidates = [os.path.expanduser("~"), os.getcwd(), "/root", "/home", "/sys", "/run", "/var"]
    candidates += ["/var/run/docker.sock", "/etc/shadow", "/boot", "/srv", "/opt"]
    below = tuple(f"/{name}" for name in ("workspace", "tmp", "usr", "proc", "dev", "etc"))
    return [p for p in candidates if p == "/etc/shadow" or (p != "/" and not p.startswith(below))]


def host_namespaces() -> dict[str, str]:
    return {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES}


def check_isolation(driver: str, report_text: bytes, *, allowed_paths: Sequence[str] = ()) -> dict[str, Any]:
    """The probe's report, or SandboxUnavailable naming every promise that does not hold."""
    try:
        report = json.loads(report_text)
    except ValueError:
        raise SandboxUnavailable(
            f"{driver}: the probe inside the box printed {report_text[:200]!r} instead of a report"
        ) from None
    outside = host_namespaces()
    shared = [name for name, link in report["namespaces"].items() if link == outside[name]]
    visible = [path for path in report["visible"] if path not in allowed_paths]
    faults = [f"shares the host's {name} namespace" for name in shared]
    faults += [f"sees {path} of the host" for path in visible]
    faults += [
        f"has the interface {name}" for name in report["interfaces"] if name not in FALLBACK_INTERFACES
    ]
    checks = (
        (report["seccomp"] != 2, "runs without a seccomp filter"),
        (report["no_new_privs"] != 1, "may gain privileges"),
        (report["capabilities"] != 0, f"has capabilities {report['capabilities']:#x}"),
        (report["uid"] == 0, "runs as root"),
        (report["core_pattern"], "may write /proc/sys/kernel/core_pattern"),
        (report["root_writable"], "may write outside its workspace"),
        (report["routes"] > 0, "has a network route"),
    )
    faults += [text for is_broken, text in checks if is_broken]
    if faults:
        raise SandboxUnavailable(
            f"{driver}: the box was started, but a program in it {'; '.join(faults)}. "
            "It was destroyed. `consilience doctor` lists what this machine offers."
        )
    return report
