"""Network (N): nothing arrives at sinks that the suite opens on the host, and nothing leaves."""
# ruff: noqa: E501 (a payload's line is one attempt)

import os
import socket

from attack import Attack, probes

_held: list[socket.socket] = []


def _sinks(box):
    tcp = socket.create_server(("0.0.0.0", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("0.0.0.0", 0))
    six = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    six.bind(("::", 0))
    six.listen()
    _held.extend((tcp, udp, six))
    for one in _held:
        one.settimeout(0.05)
    return {
        "tcp": tcp.getsockname()[1],
        "udp": udp.getsockname()[1],
        "six": six.getsockname()[1],
        "hosts": _addresses(),
        "cwd": os.getcwd(),
    }


def _addresses():
    """Every address of this machine."""
    found = {"127.0.0.1", "127.0.0.11", "172.17.0.1", "0.0.0.0"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; tells the address of the way out
            found.add(probe.getsockname()[0])
        except OSError:
            pass
    return sorted(found)


def _nothing_came(box, result):
    tcp, udp, six = _held[-3:]
    del _held[-3:]
    came = []
    for one, work in ((tcp, tcp.accept), (six, six.accept), (udp, lambda: udp.recv(1))):
        try:
            work()
            came.append(one.getsockname())
        except TimeoutError:
            pass
        one.close()
    assert not came, f"something arrived at {came}"


ATTACKS: list[Attack] = [
    probes(
        "N01",
        "TCP and UDP to every address of the host",
        """
        for host in <hosts>:
            def tcp():
                s = socket.socket(); s.settimeout(0.1); s.connect((host, <tcp>)); return 1
            attempt('tcp ' + host, tcp)
            attempt('udp ' + host, lambda: socket.socket(2, 2).sendto(b'x', (host, <udp>)) if not host.startswith(('127', '0')) else None)
            attempt('udp', lambda: socket.socket(2, 2).sendto(b'x', (host, <udp>)) and None)
        def six():
            s = socket.socket(10, 1); s.settimeout(0.1); s.connect(('::1', <six>)); return 1
        attempt('tcp6', six)
        """,
        arrange=_sinks,
        check=_nothing_came,
    ),
    probes(
        "N02",
        "names asked of the system, of a public server, of the engine's",
        """
        began = time.monotonic()
        for name in ('secret.x.test', 'example.org', 'metadata.google.internal'):
            attempt(name, lambda: socket.getaddrinfo(name, 80))
        for server in ('8.8.8.8', '1.1.1.1', '10.0.2.3', '169.254.169.254'):
            attempt(server, lambda: socket.socket(2, 2).sendto(b'x' * 30, (server, 53)))
        attempt('slow', lambda: time.monotonic() - began > 1)
        """,
    ),
    probes(
        "N03",
        "neighbours, gateways, services of clouds",
        """
        for host in ('10.0.0.1', '172.17.0.1', '172.18.0.1', '192.168.0.1', '192.168.1.1', '169.254.169.254', '100.100.100.200',
                     '224.0.0.1', '255.255.255.255'):
            for port in (22, 53, 80, 443, 2375, 6379, 8000, 8265):
                def reach():
                    s = socket.socket(); s.settimeout(0.02); s.connect((host, port)); return 1
                attempt(f'{host}:{port}', reach)
        for host in ('fe80::1%lo', 'ff02::1', '2001:4860:4860::8888'):
            attempt(host, lambda: socket.socket(10, 2).sendto(b'x', (host, 53)))
        """,
    ),
    probes(
        "N04",
        "interfaces and routes of its own making",
        """
        import fcntl, struct
        s = socket.socket(2, 2)
        for request, data in ((0x8914, struct.pack('16sh', b'eth0', 0x41)), (0x8916, bytes(40)), (0x890b, bytes(120)), (0x89a0, b'br0'.ljust(40, b'\\0'))):
            attempt(hex(request), lambda: fcntl.ioctl(s, request, data) is not None)
        attempt('tun', lambda: opened('/dev/net/tun', os.O_RDWR))
        attempt('interfaces', lambda: {n for _, n in socket.if_nameindex()} - {'lo', 'tunl0', 'gre0', 'gretap0', 'erspan0', 'sit0',
                'ip6tnl0', 'ip6gre0', 'ip_vti0', 'ip6_vti0', 'teql0'})
        attempt('routes', lambda: open('/proc/net/route').read().splitlines()[1:])
        attempt('bind to device', lambda: s.setsockopt(1, 25, b'eth0') is None)
        attempt('packet', lambda: socket.socket(17, 3, 3).family)
        """,
    ),
    probes(
        "N05",
        "what the host listens on, by the table of the kernel",
        """
        for name in ('tcp', 'tcp6', 'udp', 'unix', 'raw'):
            attempt(name, lambda: open('/proc/net/' + name).read().splitlines()[1:])
        count += 1
        """,
    ),
]
