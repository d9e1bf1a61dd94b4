"""Runs TFF's worker, hides it, and relays a listening Unix socket to it: a program of its own, for a bare Python.

    python3 -ISc GUARD PARENT DOOR BINARY ISOLATED

TFF's worker listens on all interfaces, lets anybody in, runs any graph it is sent, and stays when its user ends. In a
network namespace of its own only this process reaches it; and the kernel kills this process when PARENT ends, however
that is, `kill -9` included, and the worker when this process ends. (A preexec_fn of the parent would do for that, but
may deadlock in a process with threads, which TensorFlow makes of ours.)

It prints one line: the worker's process id once it answers, or why it cannot be isolated.
"""

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def die_with(process):
    """Have the kernel kill us when `process`, our parent, ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != process:  # it has ended already
        os._exit(1)


def isolate():
    """Move into user and network namespaces of our own, with the loopback interface up. Raise OSError where refused."""
    user, group = os.getuid(), os.getgid()
    if LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, b"lo".ljust(16, b"\0") + IFF_UP.to_bytes(24, "little"))


def free_port():
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def relay(door, port):
    """Accept connections at `door`, a listening socket's descriptor, and pump each to the worker and back."""
    with socket.socket(fileno=door) as listener:
        while True:
            outside, inside = listener.accept()[0], socket.create_connection(("127.0.0.1", port))
            inside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((outside, inside), (inside, outside)):
                threading.Thread(target=pump, args=(source, sink), daemon=True).start()


def pump(source, sink):
    """Copy bytes until `source` ends."""
    buffer = memoryview(bytearray(1 << 20))
    try:
        while size := source.recv_into(buffer):
            sink.sendall(buffer[:size])
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        sink.close()


def wait_until_it_answers(worker, port):
    """Return once the worker listens, or has ended."""
    while worker.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.02)


def main(parent, door, binary, isolated):
    """Guard a worker until it or the parent ends."""
    port = 8000  # in a namespace of its own every port is free
    if isolated:
        try:
            isolate()
        except OSError as error:
            print(f"cannot isolate the worker ({error.strerror})", flush=True)
            os._exit(1)
    else:
        port = free_port()
    die_with(parent)
    me = os.getpid()
    worker = subprocess.Popen(
        [binary, f"--port={port}"], stdin=subprocess.DEVNULL, stdout=2, preexec_fn=lambda: die_with(me)
    )
    wait_until_it_answers(worker, port)
    threading.Thread(target=relay, args=(door, port), daemon=True).start()
    print(worker.pid, flush=True)
    os._exit(worker.wait() and 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
