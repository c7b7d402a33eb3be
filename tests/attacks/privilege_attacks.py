"""Privileges (K): mounts, namespaces, key rings, terminals, users, and calls that only root may use."""

# ruff: noqa: E501 (a payload's line is one attempt)

import ctypes
import os
import platform

from attack import Attack, probes, shell

AIO = {"x86_64": 206, "aarch64": 0}  # io_setup; io_destroy is the next
ATTACKS: list[Attack] = [
    probes(
        "K06",
        "mounts by the old and the new calls",
        """
        b = lambda text: ctypes.c_char_p(text)
        for target in (b'/workspace', b'/usr', b'/etc', b'/proc', b'/'):
            attempt('tmpfs', lambda: call(165, 40, b(b'x'), b(target), b(b'tmpfs'), 0, 0) == 0)
            attempt('bind', lambda: call(165, 40, b(b'/'), b(target), b(b''), 4096, 0) == 0)
            attempt('remount', lambda: call(165, 40, b(b''), b(target), b(b''), 32, 0) == 0)
            attempt('umount', lambda: call(166, 39, b(target), 2) == 0)
        attempt('pivot_root', lambda: call(155, 41, b(b'/workspace'), b(b'/workspace')) == 0)
        attempt('chroot', lambda: call(161, 51, b(b'/workspace')) == 0)
        attempt('fsopen', lambda: call(430, 430, b(b'tmpfs'), 0))
        attempt('fspick', lambda: call(433, 433, -100, b(b'/'), 0))
        attempt('open_tree', lambda: call(428, 428, -100, b(b'/'), 1))
        attempt('mount_setattr', lambda: call(442, 442, -100, b(b'/'), 0, b(bytes(32)), 32))
        attempt('open_by_handle', lambda: call(304, 265, -100, b(bytes(16)), 0))
        attempt('name_to_handle', lambda: call(303, 264, -100, b(b'/'), b(bytes(64)), b(bytes(8)), 0))
        """,
    ),
    probes(
        "K07",
        "namespaces",
        """
        for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x80):
            attempt(f'unshare {flag:#x}', lambda: call(272, 97, flag) == 0)
        for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
            def child():
                pid = call(56, 220, flag | 17, 0, 0, 0, 0)
                if pid == 0: os._exit(0)
                return pid
            attempt(f'clone {flag:#x}', child)
        attempt('clone3', lambda: call(435, 435, ctypes.c_char_p(bytes(88)), 88))
        for name in ('mnt', 'pid', 'net', 'user', 'uts', 'ipc'):
            attempt('setns ' + name, lambda: call(308, 268, os.open('/proc/1/ns/' + name, 0), 0) == 0)
            attempt('setns own ' + name, lambda: call(308, 268, os.open('/proc/self/ns/' + name, 0), 0) == 0)
        for name in ('uid_map', 'gid_map', 'setgroups'):
            attempt(name, lambda: written('/proc/self/' + name, b'0 0 1'))
        """,
    ),
    probes(
        "K09",
        "key rings",
        """
        key = ctypes.c_char_p(b'user')
        attempt('add_key', lambda: call(248, 217, key, key, key, 4, -3))
        attempt('request_key', lambda: call(249, 218, key, key, key, -3))
        for command in (0, 1, 6, 11, 22): attempt(f'keyctl {command}', lambda: call(250, 219, command, -3, 0, 0, 0))
        """,
    ),
    probes(
        "K17",
        "a terminal to type into",
        """
        import fcntl
        attempt('controlling terminal', lambda: opened('/dev/tty', os.O_RDWR))
        attempt('session', lambda: os.tcgetpgrp(0))
        for path in ('/dev/tty', '/dev/console', '/dev/pts/0', '/dev/tty0', '/dev/tty1'):
            attempt(path, lambda: fcntl.ioctl(os.open(path, os.O_RDWR | os.O_NONBLOCK), 0x5412, b'x') is not None)
        def own_terminal():
            master = os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY)
            return fcntl.ioctl(master, 0x5412, b'x') is not None
        attempt('push into an own terminal', own_terminal)
        """,
    ),
    shell(
        "K18",
        "programs with the setuid bit",
        """
        for tool in su sudo mount umount newuidmap newgidmap passwd chsh gpasswd pkexec ping; do
          command -v $tool >/dev/null && $tool -c 'id -u' root </dev/null 2>/dev/null | grep -qx 0 && echo BREACH $tool
        done
        cp /bin/sh s 2>/dev/null; chmod 6755 s; ./s -p -c 'id -u' | grep -qx 0 && echo BREACH
        echo tried
        """,
        says=b"tried",
        timeout_s=9.0,  # su takes its time to refuse
    ),
    probes(
        "K18b",
        "other users, root again, capabilities",
        """
        for work in (lambda: os.setuid(0), lambda: os.setresuid(-1, 0, -1), lambda: os.setgroups([0]), lambda: os.setgid(0),
                     lambda: os.setuid(1), lambda: os.seteuid(65534), lambda: os.setgroups([])):
            attempt('user', lambda: work() or 1)
        attempt('capset', lambda: call(126, 91, ctypes.c_char_p((0x20080522).to_bytes(4, 'little') + bytes(4)),
                                       ctypes.c_char_p(b'\\xff' * 24)) == 0)
        attempt('no_new_privs', lambda: call(157, 167, 39, 0, 0, 0) == 0 or call(157, 167, 38, 0, 0, 0, 0) == 0)
        attempt('ambient', lambda: call(157, 167, 47, 2, 21, 0, 0) == 0)
        attempt('file capability', lambda: os.setxattr('/workspace', 'security.capability', bytes(20)) or 1)
        attempt('chown', lambda: os.chown('/workspace', 0, 0) or 1)
        attempt('chown own', lambda: (open('/workspace/c', 'w').close(), os.chown('/workspace/c', 0, 0), 1)[2])
        """,
    ),
    probes(
        "K19",
        "personality, modules, reboot, names of the machine",
        """
        zero = ctypes.c_char_p(bytes(64))
        for value in (0x0040000, 0x0400000, 0x0020000, 0x8): attempt(f'personality {value:#x}', lambda: call(135, 92, value) is not None)
        attempt('init_module', lambda: call(175, 105, zero, 64, zero) == 0)
        attempt('finit_module', lambda: call(313, 273, 0, zero, 0) == 0)
        attempt('delete_module', lambda: call(176, 106, zero, 0) == 0)
        attempt('reboot', lambda: call(169, 142, 0xfee1dead, 672274793, 0, 0) == 0)
        attempt('sethostname', lambda: socket.sethostname('x') or 1)
        attempt('iopl', lambda: call(172, None, 3) == 0)
        attempt('settimeofday', lambda: call(164, 170, zero, 0) == 0)
        attempt('adjtimex', lambda: call(159, 171, ctypes.c_char_p((1).to_bytes(4, 'little') + bytes(250))) == 0)
        attempt('modify_ldt', lambda: call(154, None, 1, zero, 16) == 0)
        """,
    ),
    probes(
        "K20",
        "what survives a process: System V and POSIX objects",
        """
        attempt('shmget', lambda: call(29, 194, 0, 4096, 0o1600))
        attempt('semget', lambda: call(64, 190, 0, 1, 0o1600))
        attempt('msgget', lambda: call(68, 186, 0, 0o1600))
        attempt('mq_open', lambda: call(240, 180, ctypes.c_char_p(b'x'), 0o102, 0o600, 0))
        """,
    ),
    probes(
        "K08d",
        "the runner's limits, turn on the processor, pages and descriptors",
        """
        import resource
        for pid in (1, os.getppid()):
            for name in ("oom_score_adj", "timerslack_ns", "comm", "coredump_filter", "clear_refs", "uid_map"):
                attempt(f"write {pid} {name}", lambda: written(f"/proc/{pid}/{name}", b"0"))
            for name in ("auxv", "pagemap", "stack", "syscall", "io"):
                attempt(f"read {pid} {name}", lambda: held(f"/proc/{pid}/{name}", 8))
            for name in ("fd", "map_files", "root"):
                attempt(f"list {pid} {name}", lambda: os.listdir(f"/proc/{pid}/{name}"))
            attempt("prlimit", lambda: (resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3)), "set"))
            attempt("priority", lambda: (os.setpriority(os.PRIO_PROCESS, pid, 19), "set"))
            attempt("affinity", lambda: (os.sched_setaffinity(pid, {0}), "set"))
            attempt("scheduler", lambda: (os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)), "set"))
            attempt("ioprio_set", lambda: call(251, 30, 1, pid, 3 << 13) == 0)
            attempt("migrate_pages", lambda: call(256, 238, pid, 8, 0, 0) == 0)
            attempt("kcmp", lambda: call(312, 272, pid, os.getpid(), 1, 0, 0) is not None)
            fd = call(434, 434, pid, 0)
            for number in range(8 if fd is not None else 0):
                attempt("pidfd_getfd", lambda: call(438, 438, fd, number, 0) is not None)
        """,
    ),
    probes(
        "K08e",
        "the runner signalled by other ways: owners of descriptors, timers, the end of children",
        """
        import fcntl
        for number in (0, 9, 15, 19, 29):
            for who in (1, -1, os.getppid()):
                def by_owner():
                    reader, writer = os.pipe()
                    fcntl.fcntl(reader, fcntl.F_SETOWN, who); fcntl.fcntl(reader, 10, number)
                    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK); os.write(writer, b'x')
                attempt('owner', by_owner)
            event = (ctypes.c_int * 16)(0, 0, number, 4, 1)
            attempt('timer', lambda: call(222, 107, 1, event, ctypes.byref(ctypes.c_int())) == 0)
            if os.fork() == 0:
                for flags in (number | 0x8000, number):
                    if libc.syscall(56 if X86 else 220, flags, 0, 0, 0, 0) == 0: os._exit(0)
                time.sleep(0.05); os._exit(0)
            os.wait()
        libc.prctl(36, 1)
        for _ in range(3):
            if os.fork() == 0:
                if os.fork() == 0: os.setsid(); time.sleep(60)
                os._exit(0)
        """,
    ),
    probes(
        "K23",
        "what is one for the whole machine: aio, watches, terminals, locks",
        """
        import fcntl
        attempt('aio', lambda: call(206, 0, 60000, ctypes.byref(ctypes.c_ulong())) == 0)
        for _ in range(4):
            if os.fork() == 0: break
        taken = []
        for work in (lambda: os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY), lambda: libc.inotify_init1(0)):
            try:
                for _ in range(200): taken.append(work())
            except OSError: pass
        """,
        check=lambda box, result: _machine_goes_on(),
    ),
]


def _machine_goes_on():
    """This process, outside, still gets one of each."""
    for fd in os.openpty():
        os.close(fd)
    libc = ctypes.CDLL(None, use_errno=True)
    watch, context = libc.inotify_init1(0), ctypes.c_ulong()
    assert watch >= 0 and libc.syscall(AIO[platform.machine()], 4000, ctypes.byref(context)) == 0
    os.close(watch)
    libc.syscall(AIO[platform.machine()] + 1, context)
