"""Kernel, host and secrets (K): every attempt of a program must be refused, and the runner must not feel it."""
# ruff: noqa: E501 (a payload's line is one attempt)

import os
import socket
import tempfile
from pathlib import Path

from attack import Attack, probes

SECRET = "canary-4f1d77"


def _secrets(box):
    os.environ["RLSBX_CANARY"] = SECRET
    folder = tempfile.mkdtemp(prefix="attack-")
    Path(folder, "secret").write_text(SECRET)
    return {"folder": folder, "cwd": os.getcwd(), "home": os.path.expanduser("~"), "pid": os.getpid()}


def _forget(box, result):
    del os.environ["RLSBX_CANARY"]


def _listeners(box):
    """An abstract socket and a file socket of the host that nothing inside may reach."""
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0attack-{os.getpid()}-{id(abstract)}")
    abstract.listen()
    abstract.settimeout(0.05)
    _held.append(abstract)
    return {"name": abstract.getsockname()[1:].decode()}


def _nobody_came(box, result):
    server = _held.pop()
    try:
        server.accept()
    except TimeoutError:
        return
    finally:
        server.close()
    raise AssertionError("a program in the box reached a socket of the host")


_held: list[socket.socket] = []

ATTACKS: list[Attack] = [
    probes(
        "K01",
        "environments and arguments of everybody",
        """
        import glob
        for path in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline') + glob.glob('/proc/*/task/*/environ'):
            attempt(path, lambda: b'canary-' in open(path, 'rb').read())
        attempt('own', lambda: 'canary-' in repr(os.environ) + repr(sys.argv))
        attempt('auxv', lambda: held('/proc/1/auxv'))
        """,
        arrange=_secrets,
        check=_forget,
    ),
    probes(
        "K02",
        "places of the host",
        """
        for path in ('<folder>/secret', '<cwd>', '/root/.ssh', '/root/.netrc', '/root/.bashrc', '/root/.cache', '/tmp/ray',
                     '/etc/shadow', '/etc/ssh', '/home', '/boot', '/var/lib/docker', '/run/secrets', '/var/run/secrets',
                     '/proc/<pid>/cwd', '/proc/1/root/root', '/proc/1/cwd/../root/.bashrc', '/proc/self/root/root/.ssh'):
            attempt(path, lambda: os.path.lexists(path) and (os.listdir(path) if os.path.isdir(path) else held(path)))
        """,
        arrange=_secrets,
        check=_forget,
    ),
    probes(
        "K03",
        "sockets of engines",
        """
        for path in ('/var/run/docker.sock', '/run/docker.sock', '/run/containerd/containerd.sock', '/run/podman/podman.sock',
                     '/run/dbus/system_bus_socket', '/run/systemd/private', '/tmp/hd/docker.sock', '/run/crio/crio.sock'):
            attempt(path, lambda: socket.socket(socket.AF_UNIX).connect(path) or 1)
        for port in (2375, 2376, 6379, 8265, 10001, 8000):
            for host in ('127.0.0.1', '172.17.0.1', '10.0.2.2', '169.254.169.254'):
                def reach():
                    s = socket.socket(); s.settimeout(0.05); s.connect((host, port)); return 1
                attempt(f'{host}:{port}', reach)
        """,
    ),
    probes(
        "K04",
        "kernel settings",
        """
        for name in ('kernel/core_pattern', 'kernel/modprobe', 'kernel/hostname', 'kernel/sysrq', 'vm/drop_caches',
                     'kernel/ns_last_pid', 'vm/overcommit_memory', 'fs/file-max', 'kernel/randomize_va_space',
                     'net/ipv4/ip_forward', 'user/max_user_namespaces', 'fs/binfmt_misc/register', 'kernel/poweroff_cmd'):
            attempt(name, lambda: opened('/proc/sys/' + name, os.O_WRONLY))
        for path in ('/proc/sysrq-trigger', '/proc/kcore', '/proc/kmsg', '/proc/kpagecgroup', '/proc/kpagecount',
                     '/proc/kpageflags', '/proc/timer_list', '/proc/sched_debug', '/proc/keys',
                     '/proc/latency_stats', '/proc/vmallocinfo', '/proc/slabinfo'):
            attempt('read ' + path, lambda: set(held(path, 1 << 20) or b'') - set(b'0\\n') and held(path, 99))
        """,
    ),
    probes(
        "K05",
        "device and kernel trees",
        """
        for path in ('/sys/kernel/debug', '/sys/kernel/tracing', '/sys/firmware/efi/efivars', '/sys/kernel/security'):
            attempt('write ' + path, lambda: os.access(path, os.W_OK))
            attempt('list ' + path, lambda: os.listdir(path))
        for root, folders, files in os.walk('/sys', followlinks=False):
            if root.count('/') > 4: folders.clear()
            for name in files:
                attempt(root + '/' + name, lambda: opened(root + '/' + name, os.O_WRONLY))
        for path in ('/proc/bus', '/proc/fs', '/proc/irq', '/proc/acpi', '/proc/scsi'):
            for root, folders, files in os.walk(path):
                for name in files: attempt(root + '/' + name, lambda: opened(root + '/' + name, os.O_WRONLY))
        for path in ('/sys/kernel/uevent_helper', '/sys/power/state', '/sys/kernel/mm/ksm/run'):
            attempt(path, lambda: opened(path, os.O_WRONLY))
        """,
    ),
    probes(
        "K08",
        "the runner: read it, stop it, starve it",
        """
        for name in ('mem', 'environ', 'maps', 'fd', 'fd/0', 'fd/1', 'fd/3', 'fd/4', 'cwd', 'root', 'exe', 'stack', 'syscall',
                     'map_files', 'pagemap', 'auxv', 'io', 'smaps', 'ns/mnt', 'fdinfo/0', 'task/1/mem', 'personality'):
            path = '/proc/1/' + name
            attempt(name, lambda: os.listdir(path) if os.path.isdir(path) else held(path))
            attempt('write ' + name, lambda: opened(path, os.O_WRONLY))
        for name in ('oom_score_adj', 'coredump_filter', 'clear_refs', 'comm', 'timerslack_ns', 'attr/current', 'autogroup',
                     'loginuid', 'sched', 'timens_offsets'):
            attempt(name, lambda: written('/proc/1/' + name))
        import resource
        for limit in (resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_NPROC):
            attempt('prlimit', lambda: resource.prlimit(1, limit, (1, 1)) or 1)
        for which, who in ((0, 1), (1, 0), (2, 0), (2, os.getuid()), (1, 1)):
            attempt(f'setpriority {which} {who}', lambda: os.setpriority(which, who, 19) or 1)
        attempt('ioprio', lambda: call(251, 30, 1, 1, 3 << 13) == 0)
        attempt('ioprio of the user', lambda: call(251, 30, 3, os.getuid(), 3 << 13) == 0)
        attempt('affinity', lambda: os.sched_setaffinity(1, {0}) or 1)
        attempt('scheduler', lambda: os.sched_setscheduler(1, 5, os.sched_param(0)) or 1)
        attempt('ptrace', lambda: call(101, 117, 16, 1, 0, 0) == 0)
        attempt('seize', lambda: call(101, 117, 0x4206, 1, 0, 0) == 0)
        buffer = ctypes.create_string_buffer(16)
        vec = (ctypes.c_ulong * 2)(ctypes.addressof(buffer), 16)
        attempt('vm_readv', lambda: call(310, 270, 1, vec, 1, vec, 1, 0))
        attempt('vm_writev', lambda: call(311, 271, 1, vec, 1, vec, 1, 0))
        attempt('kcmp', lambda: call(312, 272, 1, 1, 0, 0, 0))
        def steal():
            fd = os.pidfd_open(1)
            return call(438, 438, fd, 0, 0)
        attempt('pidfd_getfd', steal)
        attempt('process_madvise', lambda: call(440, 440, os.pidfd_open(1), vec, 1, 21, 0))
        attempt('move_pages', lambda: call(279, 239, 1, 0, 0, 0, 0, 0))
        for number in (1, 2, 3, 9, 13, 14, 15, 17, 19, 20, 24, 25, 31, 34, 64):
            for work in (lambda: os.kill(1, number), lambda: signal.pidfd_send_signal(os.pidfd_open(1), number),
                         lambda: call(234, 131, 1, 1, number), lambda: os.killpg(1, number)):
                try: work()
                except OSError: pass
        """,
    ),
    probes(
        "K08b",
        "every process but the own, by number",
        """
        me = os.getpid()
        for pid in range(1, 400):
            if pid == me: continue
            for number in (19, 9):
                try: os.kill(pid, number)
                except OSError: pass
            attempt(f'fd of {pid}', lambda: os.listdir(f'/proc/{pid}/fd'))
        """,
    ),
    probes(
        "K08c",
        "descriptors inherited from the runner",
        """
        import fcntl
        kinds = {}
        for fd in range(256):
            try: info = os.fstat(fd)
            except OSError: continue
            if fd > 2: attempt(f'descriptor {fd}', lambda: os.readlink(f'/proc/self/fd/{fd}') if not _own(fd) else None)
        attempt('stdin', lambda: os.write(0, b'x'))
        """.replace(
            "if not _own(fd) else None",
            "if not os.readlink(f'/proc/self/fd/{fd}').startswith('/proc') else None",
        ),
        kind="isolated",
    ),
    probes(
        "K10",
        "io_uring, aio, bpf, perf, userfaultfd, fanotify",
        """
        zero = ctypes.c_char_p(bytes(256))
        attempt('io_uring_setup', lambda: call(425, 425, 8, zero))
        attempt('io_uring_enter', lambda: call(426, 426, 3, 1, 0, 0, 0, 0))
        attempt('bpf', lambda: call(321, 280, 0, zero, 64))
        attempt('perf', lambda: call(298, 241, zero, 0, -1, -1, 0))
        attempt('userfaultfd', lambda: call(323, 282, 1))
        attempt('/dev/userfaultfd', lambda: opened('/dev/userfaultfd', os.O_RDWR))
        attempt('fanotify', lambda: call(300, 262, 0, 0))
        attempt('memfd_secret', lambda: call(447, 447, 0))
        attempt('aio', lambda: call(206, 0, 1000, ctypes.byref(ctypes.c_ulong())) is not None)
        attempt('kexec', lambda: call(246, 104, 0, 0, 0, 0))
        attempt('lookup', lambda: call(103, 116, 3, zero, 100))
        """,
    ),
    probes(
        "K11",
        "sockets that leave the namespace, vsock, netlink, packets, and protocols that the kernel would load",
        """
        for family in range(3, 46):
            if family == 10: continue
            for kind in (1, 2, 3, 5):
                attempt(f'family {family} {kind}', lambda: socket.socket(family, kind, 0).family)
            attempt(f'pair {family}', lambda: socket.socketpair(family, 2))
        for family in (2, 10):
            for protocol in (1, 6, 17, 58, 255): attempt(f'raw {family}', lambda: socket.socket(family, 3, protocol).family)
            for kind in (1, 2, 5, 6):
                for protocol in (33, 115, 132, 136, 262): attempt(f'loads {protocol}', lambda: socket.socket(family, kind, protocol).family)
        attempt('ping', lambda: _ping())
        """.replace("lambda: _ping()", "lambda: socket.socket(2, 2, 1).connect(('127.0.0.1', 0)) and 1"),
    ),
    probes(
        "K12",
        "calls of another architecture, that pass a filter by number",
        """
        import mmap
        if X86:
            for number, first in ((102, 1), (286, 0), (288, 0), (26, 0), (117, 23), (21, 0)):
                pid = os.fork()
                if pid == 0:
                    import resource
                    code = bytes([0xB8]) + number.to_bytes(4, 'little') + bytes([0xBB]) + first.to_bytes(4, 'little')
                    code += bytes([0x31, 0xC9, 0x31, 0xD2, 0x31, 0xF6, 0x31, 0xFF, 0xCD, 0x80, 0xC3])
                    area = mmap.mmap(-1, 4096, prot=7); area.write(code)
                    run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(area)))
                    os._exit(1 if run() >= 0 else 0)
                attempt(f'int80 {number}', lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1)
            for number in (101, 250, 321, 41):
                pid = os.fork()
                if pid == 0: os._exit(1 if call(0x40000000 | number, 0, 40, 1, 0, 0, 0) else 0)
                attempt(f'x32 {number}', lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1)
        else: count = 1
        """,
    ),
    probes(
        "K13",
        "ioctls of file systems, leases, watches, swaps",
        """
        import fcntl
        fd = os.open('/workspace/f', os.O_RDWR | os.O_CREAT)
        for request in (0xC0C0586D, 0x40049409, 0x4020940D, 0x40086602, 0x401C5820, 0x5412, 0x541C, 0x40087602):
            attempt(hex(request), lambda: fcntl.ioctl(fd, request, bytes(192)) is not None)
        attempt('swapon', lambda: call(167, 224, ctypes.c_char_p(b'/workspace/f'), 0) == 0)
        attempt('quotactl', lambda: call(179, 60, 0x800007 << 8, 0, 0, 0) == 0)
        attempt('acct', lambda: call(163, 89, ctypes.c_char_p(b'/workspace/f')) == 0)
        """,
    ),
    probes(
        "K14",
        "device nodes, and what lies in /dev",
        """
        for name, kind, major, minor in (('sda', stat.S_IFBLK, 8, 0), ('vda', stat.S_IFBLK, 254, 0), ('mem', stat.S_IFCHR, 1, 1),
                                         ('kmsg', stat.S_IFCHR, 1, 11), ('kvm', stat.S_IFCHR, 10, 232)):
            attempt('mknod ' + name, lambda: os.mknod('/workspace/' + name, kind | 0o666, os.makedev(major, minor)) or 1)
        allowed = {'null', 'zero', 'full', 'random', 'urandom', 'tty', 'ptmx', 'console', 'core', 'stdin', 'stdout', 'stderr', 'fd',
                   'shm', 'pts', 'mqueue'}
        attempt('names', lambda: set(os.listdir('/dev')) - allowed)
        for name in ('kvm', 'fuse', 'mem', 'kmsg', 'vda', 'sda', 'loop-control', 'net/tun', 'vsock', 'vhost-vsock', 'tty', 'console'):
            attempt(name, lambda: opened('/dev/' + name, os.O_RDWR))
        attempt('write null over', lambda: os.unlink('/dev/null') or 1)
        attempt('new in /dev', lambda: opened('/dev/x', os.O_CREAT | os.O_WRONLY))
        """,
    ),
    probes(
        "K15",
        "control groups",
        """
        for root, folders, files in os.walk('/sys/fs/cgroup'):
            for name in files:
                attempt(root + '/' + name, lambda: opened(root + '/' + name, os.O_WRONLY))
            attempt('mkdir ' + root, lambda: os.mkdir(root + '/x') or 1)
        attempt('release_agent', lambda: opened('/sys/fs/cgroup/memory/release_agent', os.O_WRONLY))
        count += 1
        """,
    ),
    probes(
        "K16",
        "a listener of the host in the abstract space",
        """
        attempt('connect', lambda: socket.socket(socket.AF_UNIX).connect('\\0' + '<name>') or 1)
        attempt('send', lambda: socket.socket(socket.AF_UNIX, 2).sendto(b'x', '\\0' + '<name>'))
        attempt('list', lambda: b'<name>' in open('/proc/net/unix', 'rb').read())
        """,
        arrange=_listeners,
        check=_nobody_came,
    ),
    probes(
        "K21",
        "finger marks: whose box this is",
        """
        texts = ''
        for path in ('/proc/self/cgroup', '/proc/self/mountinfo', '/proc/self/environ', '/proc/1/cmdline', '/etc/hostname',
                     '/etc/hosts', '/proc/sys/kernel/hostname', '/proc/self/cmdline'):
            try: texts += open(path, errors='replace').read()
            except OSError: pass
        attempt('place of the project', lambda: '<cwd>' in texts)
        attempt('process and box', lambda: [w for w in ('owner-', '-<pid>-', '<box>') if w in texts])
        attempt('control group', lambda: {line.split(':', 2)[2] for line in open('/proc/1/cgroup')} - {'/\\n'})
        attempt('name of the host', lambda: '<host>' in texts and '<host>' != 'box')
        """,
        arrange=lambda box: {
            "cwd": os.getcwd(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "box": box.id,
        },
    ),
    probes(
        "K22",
        "system files overwritten",
        """
        for path in ('/bin/bash', '/bin/sh', '/usr/bin/python3', '/etc/ld.so.preload', '/etc/passwd', '/etc/runner.py', '/etc/hosts',
                     '/usr/lib/python3/sitecustomize.py', '/usr/local/bin/python3', '/usr/local/bin/sh', '/lib/ld-linux.so.2',
                     sys.prefix + '/lib/python3.11/site-packages/x.pth', '/proc/self/exe', '/usr/bin/env', '/init', '/x'):
            attempt('write ' + path, lambda: opened(path, os.O_WRONLY))
            attempt('make ' + path, lambda: opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            attempt('replace ' + path, lambda: os.rename('/workspace', path) or 1)
            attempt('remove ' + path, lambda: os.unlink(path) or 1)
            attempt('link ' + path, lambda: os.link(path, '/workspace/l') or 1)
        """,
    ),
]
