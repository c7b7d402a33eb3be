"""The filter, run by a small interpreter of BPF: which calls it lets through on either processor."""

from __future__ import annotations

import struct

import pytest

from consilience.sandboxes import seccomp

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
EPROTONOSUPPORT, EAFNOSUPPORT = 0x5005D, 0x50061
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
COLUMN = {"x86_64": 0, "aarch64": 1}


def decide(
    arch: str, number: int, *args: int, is_memory_capped: bool = True, audit: int | None = None
) -> int:
    """The filter's verdict on a system call, by executing its instructions."""
    program = seccomp.bpf_program(arch, is_memory_capped=is_memory_capped)
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    padded = [*args, *[0] * (6 - len(args))]
    data = struct.pack("=IIQ6Q", number, ARCH[arch] if audit is None else audit, 0, *padded)
    accumulator = place = 0
    for _ in range(len(code)):
        what, if_true, if_false, value = code[place]
        place += 1
        if what == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif what == 0x06:
            return value
        else:
            test = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[
                what
            ]
            place += if_true if test else if_false
    raise AssertionError("the filter runs off its end")


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_every_listed_call_is_refused_and_ordinary_ones_pass(arch):
    for numbers in seccomp.DENIED.values():
        if (number := numbers[COLUMN[arch]]) is not None:
            assert decide(arch, number) == EPERM
    ordinary = {"x86_64": (0, 1, 2, 9, 57, 59, 61, 231), "aarch64": (63, 64, 56, 222, 221, 260, 94)}
    assert {decide(arch, number) for number in ordinary[arch]} == {ALLOW}


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_calls_are_judged_by_their_arguments_where_it_matters(arch):
    column = COLUMN[arch]
    clone, socket, ioctl = seccomp.CLONE[column], seccomp.SOCKET[column], seccomp.IOCTL[column]
    assert decide(arch, clone, 0x11) == decide(arch, clone, 0x3D0F00) == ALLOW  # fork, a thread
    assert {decide(arch, clone, flag | 17) for flag in seccomp.NAMESPACE_FLAGS if flag != 0x80} == {EPERM}
    assert decide(arch, seccomp.CLONE3[column]) == ENOSYS
    assert {decide(arch, socket, family) for family in (1, 2, 10)} == {ALLOW}
    assert {decide(arch, socket, family) for family in (0, 3, 16, 17, 29, 38, 40, 44)} == {EAFNOSUPPORT}
    assert {decide(arch, socket, 2, 1, protocol) for protocol in (0, 6, 17)} == {ALLOW}
    assert {decide(arch, socket, 10, 1, kind) for kind in (1, 132, 136, 255, 262)} == {EPROTONOSUPPORT}
    assert decide(arch, seccomp.SOCKETPAIR[column], 1) == ALLOW
    assert decide(arch, ioctl, 0, 0x5412) == decide(arch, ioctl, 0, 0xFFFFFFFF00005412) == EPERM
    assert decide(arch, ioctl, 0, 0x5413) == ALLOW
    assert decide(arch, seccomp.PRLIMIT64[column], 0) == ALLOW
    assert decide(arch, seccomp.PRLIMIT64[column], 1) == EPERM
    assert decide(arch, seccomp.PERSONALITY[column], 0xFFFFFFFF) == ALLOW
    assert decide(arch, seccomp.PERSONALITY[column], 0x0040000) == EPERM
    priority, io_priority = seccomp.SETPRIORITY[column], seccomp.IOPRIO_SET[column]
    assert decide(arch, priority, 0, 0) == decide(arch, io_priority, 1, 0) == ALLOW  # its own
    assert {decide(arch, priority, *who) for who in ((0, 1), (1, 0), (2, 0), (2, 7))} == {EPERM}
    assert {decide(arch, io_priority, *who) for who in ((1, 1), (2, 0), (3, 0), (0, 0))} == {EPERM}
    mmap, memfd = seccomp.MMAP[column], seccomp.MEMFD_CREATE[column]
    assert decide(arch, mmap, 0, 4096, 3, 0x22) == decide(arch, memfd, 0, 1) == ALLOW
    assert decide(arch, mmap, 0, 4096, 3, 0x40022) == decide(arch, memfd, 0, 5) == EPERM  # huge pages


def test_another_architecture_and_x32_numbers_are_no_way_around():
    assert decide("x86_64", 165, audit=0x40000003) == KILL
    assert decide("x86_64", 0x40000000 + 165) == ENOSYS


def test_anonymous_files_are_refused_only_where_nothing_counts_their_memory():
    number = seccomp.MEMFD_CREATE[0]
    assert decide("x86_64", number, is_memory_capped=True) == ALLOW
    assert decide("x86_64", number, is_memory_capped=False) == EPERM


def test_the_engines_profile_denies_what_the_filter_denies():
    profile = seccomp.docker_profile()
    always = {
        name
        for rule in profile["syscalls"]
        if not rule["args"] and rule["action"] == "SCMP_ACT_ERRNO"
        for name in rule["names"]
    }
    assert always == set(seccomp.DENIED) | {"clone3"}
    sockets = [rule["args"][0] for rule in profile["syscalls"] if rule["names"] == ["socket"]]
    for index, allowed in ((0, seccomp.ALLOWED_FAMILIES), (2, seccomp.ALLOWED_PROTOCOLS)):
        told = [arg for arg in sockets if arg["index"] == index]
        refused = {arg["value"] for arg in told if arg["op"] == "SCMP_CMP_EQ"}
        (floor,) = [arg["value"] for arg in told if arg["op"] == "SCMP_CMP_GE"]
        assert {f for f in range(64) if f not in refused and f < floor} == set(allowed)
