"""Lifetime and resources (R): what a program leaves running, fills up, or refuses to give back."""

from attack import Attack, python, shell
from neighbour import Neighbour

from consilience.sandboxes.protocol import Isolation

SPINNING = """
began, until = time.monotonic(), time.monotonic() + <seconds>
for _ in range(16):
    if os.fork() == 0:
        while time.monotonic() < until: pass
        os._exit(0)
while True:
    try: os.wait()
    except ChildProcessError: break
used = os.times()
print(used.children_user + used.children_system, time.monotonic() - began)
"""
SPINS = Neighbour(SPINNING)
LATE = "timeout output_capped pids nonzero ok"  # a shell whose forks fail may also give up
ATTACKS: list[Attack] = [
    shell(
        "R01",
        "fork bomb of a shell",
        "b(){ b|b& }; b; while :; do b; sleep 0.01; done",
        expect=LATE,
        timeout_s=0.8,
        within_s=2.0,
    ),
    python(
        "R02",
        "fork bomb that swallows errors",
        """
        while True:
            try: os.fork()
            except OSError: pass
        """,
        expect="timeout",
        timeout_s=0.8,
        within_s=2.0,
    ),
    python(
        "R02b",
        "fork bomb whose processes each make a session, ignore signals and stop themselves",
        """
        for number in (1, 2, 3, 15, 17): signal.signal(number, signal.SIG_IGN)
        while True:
            try:
                if os.fork() == 0:
                    os.setsid()
                    if os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)
            except OSError: pass
        """,
        expect="timeout oom",  # stopped processes fill a box's memory sooner or later
        timeout_s=0.8,
        within_s=2.0,
    ),
    python(
        "R02c",
        "comet: each process forks a successor and ends, so that no pid lives long",
        """
        while True:
            try:
                if os.fork(): os._exit(0) if os.getppid() != 1 else time.sleep(0.001)
            except OSError: pass
        """,
        expect="timeout",
        timeout_s=0.8,
        within_s=2.0,
    ),
    python(
        "R02d",
        "children made brothers of their parent (CLONE_PARENT)",
        """
        import ctypes, platform
        libc = ctypes.CDLL(None)
        for _ in range(12):
            if libc.syscall(56 if platform.machine() == 'x86_64' else 220, 0x8000 | 17, 0, 0, 0, 0) == 0:
                os.execvp('sleep', ['sleep', '60'])
        os._exit(7)
        """,
        expect="nonzero pids",
        within_s=2.0,
    ),
    python(
        "R03",
        "100,000 threads",
        """
        import threading
        started = 0
        try:
            for _ in range(100_000):
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); started += 1
        except RuntimeError: print('stopped at', started, flush=True)
        os._exit(3)
        """,
        expect="nonzero pids",
        says=b"stopped at",
    ),
    python(
        "R07",
        "inode flood",
        """
        i = 0
        while True:
            open(f'{i}', 'w').close(); i += 1
        """,
        expect="disk oom nonzero",
        timeout_s=8.0,
        ends_box=True,
    ),
    python(
        "R07b",
        "a flood of folders, links and attributes in /tmp",
        """
        os.chdir('/tmp'); i = 0
        while True:
            os.mkdir(f'd{i}'); os.symlink('x' * 200, f'd{i}/l')
            try: os.setxattr(f'd{i}', 'user.x', b'x' * 60000)
            except OSError: pass
            i += 1
        """,
        expect="disk oom nonzero",
        timeout_s=8.0,
        ends_box=True,
    ),
    python(
        "R08",
        "workspace filled",
        """
        i = 0
        while True:
            with open(f'{i}', 'wb') as f: f.write(bytes(1 << 20))
            i += 1
        """,
        expect="disk",
    ),
    python(
        "R08b",
        "files removed while a daemon holds them",
        """
        fds = []
        try:
            while True:
                fds.append(os.open('gone', os.O_RDWR | os.O_CREAT)); os.unlink('gone')
                os.write(fds[-1], bytes(1 << 20))
        except OSError: pass
        if os.fork() == 0: os.setsid(); time.sleep(60)
        """,
        expect="ok",
    ),
    python(
        "R09",
        "a sparse file of terabytes",
        """
        with open('sparse', 'wb') as f:
            for size in (1 << 44, 1 << 33):
                try: os.truncate(f.fileno(), size); print('BREACH')
                except OSError: pass
        """,
        expect="nonzero disk",
    ),
    python(
        "R10",
        "spinning processes, more than there are processors, beside another box that works",
        SPINNING,
        level=Isolation.BWRAP_ROOT,
        arrange=SPINS.arrange,
        check=SPINS.check,
    ),
    python(
        "R11",
        "every signal ignored",
        """
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: time.sleep(60)
        """,
        expect="timeout",
        timeout_s=0.4,
        within_s=1.0,
    ),
    shell("R12", "sleep past the limit", "sleep 1000000", expect="timeout", timeout_s=0.3, within_s=1.0),
    python(
        "R12b",
        "an end exactly at the limit",
        "time.sleep(0.4)",
        expect="timeout ok",
        timeout_s=0.4,
        within_s=1.0,
    ),
    python(
        "R13",
        "double fork, setsid, stdout kept open",
        """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while True: os.write(1, b'.'); time.sleep(0.01)
            os._exit(0)
        """,
        within_s=1.5,
    ),
    shell(
        "R14",
        "nohup for the next command",
        "nohup sh -c 'sleep 0.2; echo late >late' >/dev/null 2>&1 &",
        within_s=1.5,
        check=lambda box, _: _nothing_late(box),
    ),
    python(
        "R15",
        "stopped by its own hand",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        expect="timeout",
        timeout_s=0.4,
        within_s=1.0,
    ),
    python(
        "R16",
        "all descriptors closed, still running",
        """
        os.closerange(0, 1024)
        time.sleep(60)
        """,
        expect="timeout",
        timeout_s=0.4,
        within_s=1.0,
    ),
    python(
        "R18",
        "10,000 zombies",
        """
        for _ in range(10_000):
            try:
                if os.fork() == 0: os._exit(0)
            except OSError: break
        """,
        expect="ok pids",
    ),
    python(
        "R19",
        "a parent suspended by vfork",
        """
        import ctypes, platform
        libc = ctypes.CDLL(None)
        if platform.machine() == 'x86_64': libc.syscall(58)
        else: libc.syscall(220, 0x4000 | 0x100 | 17, 0, 0, 0, 0)
        while True: time.sleep(60)
        """,
        expect="timeout",
        timeout_s=0.5,
        within_s=1.5,
    ),
    python(
        "R20",
        "core dump of a large process",
        """
        import resource
        try: resource.setrlimit(resource.RLIMIT_CORE, (-1, -1)); print('BREACH')
        except (OSError, ValueError): pass
        held = b'x' * (20 << 20); os.abort()
        """,
        expect="nonzero",
        check=lambda box, _: _nothing_there(box),
    ),
    python(
        "R21",
        "limits lifted again",
        """
        import resource
        for name in ('NPROC', 'NOFILE', 'FSIZE', 'CPU', 'AS', 'DATA', 'MEMLOCK', 'CORE', 'NICE', 'RTPRIO'):
            which = getattr(resource, 'RLIMIT_' + name)
            soft, hard = resource.getrlimit(which)
            if hard == resource.RLIM_INFINITY: continue
            try: resource.setrlimit(which, (hard + 1, hard + 1)); print('BREACH', name)
            except (OSError, ValueError): pass
        """,
    ),
    python(
        "R22",
        "real-time and high priority",
        """
        for work in (lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)),
                     lambda: os.setpriority(os.PRIO_PROCESS, 0, -20)):
            try: work(); print('BREACH')
            except OSError: pass
        """,
    ),
    python(
        "R23",
        "all processes spin",
        """
        for _ in range(8):
            if os.fork() == 0: break
        while True: pass
        """,
        expect="timeout",
        timeout_s=0.6,
        within_s=1.6,
    ),
    python(
        "R24",
        "folders 20,000 deep",
        """
        for i in range(20_000):
            try: os.mkdir('d'); os.chdir('d')
            except OSError: break
        """,
        expect="ok nonzero disk",
        timeout_s=8.0,
        ends_box=True,
    ),
    python(
        "R25",
        "names no shell likes, folders without rights",
        r"""
        for name in (b'\n', b'-rf', b' ', b'\xff\xfe', b'a' * 255, b'*', b"'", b'$(x)', b'\x1b[2J'):
            os.mkdir(name); open(name + b'/' + name, 'w').close()
            os.chmod(name + b'/' + name, 0); os.chmod(name, 0)
        os.mkdir('sealed'); os.mkdir('sealed/in'); open('sealed/in/f', 'w').close()
        os.chmod('sealed/in', 0); os.chmod('sealed', 0o100)
        """,
    ),
    python(
        "R26",
        "the workspace closed to everybody",
        """
        for folder in ('/workspace', '/tmp', '/dev/shm'):
            try: os.chmod(folder, 0)
            except OSError: pass
        """,
    ),
    python(
        "R27",
        "clocks set",
        """
        import ctypes
        libc = ctypes.CDLL(None)
        for work in (lambda: time.clock_settime(time.CLOCK_REALTIME, 0), lambda: time.clock_settime(7, 1)):
            try: work(); print('BREACH')
            except OSError: pass
        """,
    ),
    shell(
        "R28",
        "a pipeline of processes that hand on for ever",
        "python3 -c 'import os; os.mkfifo(\"a\")'; cat <a >a & echo x >a; wait",
        expect="timeout",
        timeout_s=0.5,
        within_s=1.5,
    ),
    python(
        "R90",
        "fork bomb for as long as a command may take",
        """
        while True:
            try: os.fork()
            except OSError: pass
        """,
        expect="timeout",
        timeout_s=9.0,
        is_long=True,
        limits={"wall_s": 10.0, "cpu_s": 10.0},
    ),
    python(
        "R91",
        "a million files",
        """
        for i in range(1_000_000): open(f'{i}', 'w').close()
        """,
        expect="disk oom nonzero",
        timeout_s=30.0,
        ends_box=True,
        is_long=True,
        limits={"wall_s": 30.0, "cpu_s": 30.0},
    ),
]


def _nothing_late(box):
    assert box.exec(["sh", "-c", "sleep 0.4; ls -A"]).stdout == b""


def _nothing_there(box):
    assert box.exec(["sh", "-c", "ls -A"]).stdout == b""
