"""The system calls no box may use, as a BPF program (bubblewrap) and as an engine's JSON profile (Docker).

A deny list: programs in a box are ordinary ones, and what they may reach is bounded by namespaces,
uids and limits already. Denied is what reaches the kernel past those: other processes' memory, key
rings, mounts, namespaces, io_uring, bpf, sockets that leave the network namespace (vsock, netlink) or
make the kernel load a protocol, requests whose number is one for the whole machine (aio), and System V
memory and queues, which outlive the processes that made them. The engine's own profile
is never relied on, because what it allows changes with its version.

No library: the filter is assembled here for x86_64 and aarch64 from the kernel's numbers.
"""

from __future__ import annotations

import platform
import struct
from typing import Any

EPERM, ENOSYS, EPROTONOSUPPORT, EAFNOSUPPORT = 1, 38, 93, 97

# name: (x86_64, aarch64), None where the architecture lacks it
DENIED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "unshare": (272, 97),
    "setns": (308, 268),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "uselib": (134, None),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "get_mempolicy": (239, 236),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "memfd_secret": (447, 447),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "semop": (65, 193),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "file_setattr": (469, 469),
}
CLONE3 = (435, 435)  # its flags lie behind a pointer: ENOSYS makes libc fall back to clone
CLONE, SOCKET, SOCKETPAIR, IOCTL = (56, 220), (41, 198), (53, 199), (16, 29)
PRLIMIT64, PERSONALITY, SCHED_SETAFFINITY = (302, 261), (135, 92), (203, 122)
MEMFD_CREATE, MMAP = (319, 279), (9, 222)
SETPRIORITY, IOPRIO_SET = (141, 140), (251, 30)
HUGE_MAP, HUGE_FILE = 0x40000, 0x4  # MAP_HUGETLB, MFD_HUGETLB: a pool of the host's that no cap here counts
NAMESPACE_FLAGS = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x80)
ALLOWED_FAMILIES = (1, 2, 10)  # unix, and the two that stay in the empty network namespace
ALLOWED_PROTOCOLS = (0, 6, 17)  # the usual one, TCP, UDP
DENIED_IOCTLS = (
    0x5412,  # TIOCSTI: type into the terminal
    0x541C,  # TIOCLINUX
    0xC0C0586D,  # XFS_IOC_SWAPEXT
    0x40049409,  # FICLONE
    0x4020940D,  # FICLONERANGE
    0x40086602,  # FS_IOC_SETFLAGS
    0x401C5820,  # FS_IOC_FSSETXATTR
)
PERSONALITIES = (0x0, 0xFFFFFFFF)

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NR, _ARCH, _ARG0, _ARG1, _ARG2, _ARG3 = 0, 4, 16, 24, 32, 40  # offsets in struct seccomp_data, low words


def machine() -> str | None:
    """ "x86_64", "aarch64", or None where no filter is known."""
    name = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return name if name in _AUDIT_ARCH else None


def bpf_program(arch: str, *, is_memory_capped: bool) -> bytes:
    """The filter as `struct sock_filter[]`, for `bwrap --seccomp`.

    `is_memory_capped` False also denies memfd_create: where only rlimits bound memory, a descriptor
    would hold what no limit counts.
    """
    column = list(_AUDIT_ARCH).index(arch)
    code: list[tuple[int, int, int, int]] = []

    def refuse(error: int) -> None:
        code.append((_RET, 0, 0, _ERRNO | error))

    def on_argument(numbers: tuple[int, int], offset: int, body: list[tuple[int, int, int, int]]) -> None:
        """`body` runs for one system call, its accumulator holding an argument, and must return."""
        code.extend([(_JEQ, 0, len(body) + 1, numbers[column]), (_LOAD, 0, 0, offset), *body])

    deny, allow = (_RET, 0, 0, _ERRNO | EPERM), (_RET, 0, 0, _ALLOW)
    no_family = (_RET, 0, 0, _ERRNO | EAFNOSUPPORT)

    def only(
        values: tuple[int, ...], otherwise: tuple[int, int, int, int]
    ) -> list[tuple[int, int, int, int]]:
        tests = [(_JEQ, len(values) - place, 0, value) for place, value in enumerate(values)]
        return [*tests, otherwise, allow]

    code += [(_LOAD, 0, 0, _ARCH), (_JEQ, 1, 0, _AUDIT_ARCH[arch]), (_RET, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    if arch == "x86_64":  # the x32 numbers would be a way around the list
        code += [(_JGE, 0, 1, 0x40000000), (_RET, 0, 0, _ERRNO | ENOSYS)]
    names = [numbers[column] for numbers in DENIED.values()]
    names += [] if is_memory_capped else [MEMFD_CREATE[column]]
    for number in names:
        if number is not None:
            code.append((_JEQ, 0, 1, number))
            refuse(EPERM)
    code.append((_JEQ, 0, 1, CLONE3[column]))
    refuse(ENOSYS)
    flags = sum(NAMESPACE_FLAGS) & ~0x80  # 0x80 (time namespaces) is part of clone's exit signal
    on_argument(CLONE, _ARG0, [(_JSET, 0, 1, flags), deny, allow])
    protocols = [(_LOAD, 0, 0, _ARG2), *only(ALLOWED_PROTOCOLS, (_RET, 0, 0, _ERRNO | EPROTONOSUPPORT))]
    on_argument(SOCKET, _ARG0, [*only(ALLOWED_FAMILIES, no_family)[:-1], *protocols])
    on_argument(SOCKETPAIR, _ARG0, only(ALLOWED_FAMILIES, no_family))
    on_argument(PERSONALITY, _ARG0, only(PERSONALITIES, deny))
    on_argument(PRLIMIT64, _ARG0, only((0,), deny))  # a limit put on the runner would end the box
    on_argument(SCHED_SETAFFINITY, _ARG0, only((0,), deny))
    for numbers, own in ((SETPRIORITY, 0), (IOPRIO_SET, 1)):  # which, who: only the caller itself
        rest = [(_LOAD, 0, 0, _ARG1), *only((0,), deny)]
        on_argument(numbers, _ARG0, [(_JEQ, 1, 0, own), deny, *rest])
    on_argument(MMAP, _ARG3, [(_JSET, 0, 1, HUGE_MAP), deny, allow])
    on_argument(MEMFD_CREATE, _ARG1, [(_JSET, 0, 1, HUGE_FILE), deny, allow])
    denied_ioctls = [test for value in DENIED_IOCTLS for test in ((_JEQ, 0, 1, value), deny)]
    on_argument(IOCTL, _ARG1, [*denied_ioctls, allow])
    code.append(allow)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def docker_profile() -> dict[str, Any]:
    """The same denials as a seccomp profile of the Docker Engine (runc skips names it does not know)."""

    def rule(names: list[str], error: int, *args: dict[str, Any]) -> dict[str, Any]:
        return {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": error, "args": list(args)}

    def when(index: int, op: str, value: int, value_two: int = 0) -> dict[str, Any]:
        return {"index": index, "op": "SCMP_CMP_" + op, "value": value, "valueTwo": value_two}

    rules = [rule(sorted(DENIED), EPERM), rule(["clone3"], ENOSYS)]
    rules += [rule(["clone"], EPERM, when(0, "MASKED_EQ", f, f)) for f in NAMESPACE_FLAGS if f != 0x80]
    first_denied = max(ALLOWED_FAMILIES) + 1
    families = [f for f in range(first_denied) if f not in ALLOWED_FAMILIES]
    for names in (["socket"], ["socketpair"]):
        rules += [rule(names, EAFNOSUPPORT, when(0, "EQ", family)) for family in families]
        rules.append(rule(names, EAFNOSUPPORT, when(0, "GE", first_denied)))
    last = max(ALLOWED_PROTOCOLS)
    protocols = [when(2, "EQ", number) for number in range(last) if number not in ALLOWED_PROTOCOLS]
    for number in [*protocols, when(2, "GE", last + 1)]:
        rules.append(rule(["socket"], EPROTONOSUPPORT, number))
    rules += [rule(["ioctl"], EPERM, when(1, "MASKED_EQ", 0xFFFFFFFF, value)) for value in DENIED_IOCTLS]
    rules.append(
        rule(["prlimit64", "sched_setaffinity", "personality", "setpriority"], EPERM, when(0, "NE", 0))
    )
    rules.append(rule(["setpriority", "ioprio_set"], EPERM, when(1, "NE", 0)))
    rules.append(rule(["ioprio_set"], EPERM, when(0, "NE", 1)))
    rules.append(rule(["mmap"], EPERM, when(3, "MASKED_EQ", HUGE_MAP, HUGE_MAP)))
    rules.append(rule(["memfd_create"], EPERM, when(1, "MASKED_EQ", HUGE_FILE, HUGE_FILE)))
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        # no 32-bit calls: socketcall and ipc hide behind one number what is denied above
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []},
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": []},
        ],
        "syscalls": rules,
    }
