"""Memory (R04 to R06, R92): what is taken, where it counts for nobody, and who is killed for it."""

# ruff: noqa: E501 (a payload's line is one attempt)

from attack import Attack, python, shell

ATTACKS: list[Attack] = [
    python(
        "R04",
        "heap bomb",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        expect="oom",
        by_rlimit="nonzero",
    ),
    shell(
        "R04b",
        "heap bomb of a shell's variable",
        "x=xxxxxxxxxxxxxxxx; while :; do x=$x$x; done",
        expect="oom nonzero",
        timeout_s=8.0,
    ),
    python(
        "R04c",
        "stack bomb",
        """
        import threading
        sys.setrecursionlimit(10**9); threading.stack_size(32 << 20)
        def f(): f()
        for _ in range(8): threading.Thread(target=f).start()
        """,
        expect="oom nonzero timeout",
        timeout_s=6.0,
    ),
    python(
        "R05",
        "anonymous shared memory",
        """
        import mmap
        held = []
        while True:
            held.append(mmap.mmap(-1, 8 << 20)); held[-1].write(b'x' * (8 << 20))
        """,
        expect="oom",
        by_rlimit="nonzero",
    ),
    python(
        "R05b",
        "memory files that are never mapped",
        """
        while True:
            fd = os.memfd_create('x')
            for _ in range(3): os.write(fd, bytes(1 << 20))
        """,
        expect="oom nonzero",
        by_rlimit="nonzero",
        ends_box=True,
    ),
    python(
        "R05c",
        "/dev/shm, /tmp and the workspace at once",
        """
        for folder in ('/dev/shm', '/tmp', '/workspace'):
            try:
                for i in range(100):
                    with open(f'{folder}/{i}', 'wb') as f: f.write(bytes(1 << 20))
            except OSError: pass
        sys.exit(4)
        """,
        expect="disk oom",
    ),
    python(
        "R05d",
        "huge pages",
        """
        import mmap
        for flags in (0x40000, 0x40000 | 21 << 26, 0x40000 | 30 << 26):
            try: mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags); print('BREACH')
            except (OSError, ValueError): pass
        """,
    ),
    python(
        "R05e",
        "pipes grown as far as they go, filled and never read",
        """
        import fcntl
        pipes, kept = [], 0
        for _ in range(100):
            try: pipes.append(os.pipe())
            except OSError: break
            os.set_blocking(pipes[-1][1], False)
            try: fcntl.fcntl(pipes[-1][1], 1031, 1 << 20)
            except OSError: pass
            try:
                while True: kept += os.write(pipes[-1][1], bytes(1 << 16))
            except BlockingIOError: pass
        print(kept)
        """,
        expect="ok oom nonzero",
        ends_box=True,
    ),
    python(
        "R05f",
        "descriptors in flight over sockets",
        """
        a, b = socket.socketpair(); b.setblocking(False); a.setblocking(False)
        sent = 0
        try:
            while sent < 100_000:
                socket.send_fds(a, [b'x'], [a.fileno()] * 200); sent += 200
        except OSError: pass
        print(sent)
        """,
    ),
    python(
        "R06",
        "memory that its holder excuses from the OOM killer",
        """
        try: open('/proc/self/oom_score_adj', 'w').write('-1000')
        except OSError: pass
        x = []
        while True: x.append(bytearray(1 << 20))
        """,
        expect="oom",
        by_rlimit="nonzero",
        ends_box=True,
    ),
    python(
        "R06b",
        "a small process fills memory that counts for nobody, so that the runner looks largest",
        """
        try: open('/proc/self/oom_score_adj', 'w').write('500')
        except OSError: pass
        fds = [os.memfd_create('x') for _ in range(60)]
        for fd in fds: os.set_inheritable(fd, True)
        words = ' '.join(map(str, fds))
        os.execvp('sh', ['sh', '-c', f'for i in {words}; do head -c 3000000 /dev/zero >/proc/self/fd/$i; done'])
        """,
        expect="oom nonzero",
        by_rlimit="nonzero",
        ends_box=True,
        timeout_s=5.0,
    ),
    python(
        "R92",
        "memory taken and given back, over and over",
        """
        end = time.monotonic() + 8
        while time.monotonic() < end:
            if os.fork() == 0: x = bytearray(70 << 20); os._exit(0)
            os.wait()
        """,
        timeout_s=10.0,
        is_long=True,
        limits={"wall_s": 12.0, "cpu_s": 12.0},
        expect="ok oom",
    ),
    python(
        "R17",
        "every descriptor that there is, in every process that there may be",
        """
        for _ in range(20):
            try:
                if os.fork() == 0: break
            except OSError: break
        held = []
        try:
            while True: held.append(os.open('/dev/null', os.O_RDONLY))
        except OSError as error: os.write(2, str(error.errno).encode())
        time.sleep(60)
        """,
        expect="timeout",
        timeout_s=0.8,
        within_s=2.0,
    ),
]
