"""Runs TFF's worker, hides it, and relays a listening Unix socket to it: a program of its own, for
a bare Python.

    python3 -ISc GUARD PARENT DOOR BINARY ISOLATED CLIENTS_AT_ONCE FOLDER

TFF's worker listens on all interfaces, lets anybody in, runs any graph it is sent, and stays when
its user ends. In a network namespace of its own only this process reaches it; and the kernel kills
this process when PARENT ends, however that is, `kill -9` included, and the worker when this process
ends. (A preexec_fn of the parent would do for that, but may deadlock in a process with threads,
which TensorFlow makes of ours.)

DOOR is a listening socket's descriptor. On another machine it is the path of a socket to be made,
in a folder that only this user can enter, both gone once somebody is in; and PARENT is 0: then this
process lives as long as bytes come to its standard input.

It prints the worker's process id once it answers, or in one line what it cannot do, and from then
on twice a second the processor time, in ticks, that the worker has spent.
"""

import ctypes
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
# seconds without a byte from a parent on another machine, after which it counts as gone
SILENCE = 20.0
BETWEEN = 0.5  # seconds
THREADS = 2  # of all clients that train at once, as on a machine of two cores
# variables that kernels follow
DECIDING = (
    "TF_",
    "XLA_",
    "DNNL_",
    "ONEDNN_",
    "MKL_",
    "OMP_",
    "KMP_",
    "GOMP_",
)


def die_with(process):
    """Have the kernel kill us when `process`, our parent, ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != process:  # it has ended already
        os._exit(1)


def isolate():
    """Move into user and network namespaces of our own, with the loopback interface up.

    Raise OSError where refused.
    """
    user = os.getuid()
    group = os.getgid()
    if LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    with socket.socket() as any_socket:
        fcntl.ioctl(
            any_socket, SIOCSIFFLAGS, b"lo".ljust(16, b"\0") + IFF_UP.to_bytes(24, "little")
        )


def free_port():
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def refuse(reason):
    """Say what cannot be done, and end."""
    print(f"cannot {reason}", flush=True)
    os._exit(1)


def open_door(door):
    """Return (the listening socket, the path that is to go once somebody is in, or nothing)."""
    if door.isdigit():
        return socket.socket(fileno=int(door)), ""
    listener = socket.socket(socket.AF_UNIX)
    try:
        os.mkdir(os.path.dirname(door), 0o700)  # fails where somebody else has made it
        listener.bind(door)
    except OSError as error:
        refuse(f"make {door} ({error.strerror})")
    listener.listen()
    return listener, door


def close_door(path):
    """Remove the way in, behind who is in or behind nobody."""
    if path:
        try:
            os.unlink(path)
            os.rmdir(os.path.dirname(path))
        except OSError:
            pass


def relay(listener, path, port):
    """Accept connections and pump each to the worker and back."""
    with listener:
        while True:
            outside = listener.accept()[0]
            inside = socket.create_connection(("127.0.0.1", port))
            close_door(path)
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


def worker_environment(clients_at_once):
    """Return the worker's environment: of the user's nothing that numbers follow, and of ours all
    that they do.

    The threads within one op decide how it splits its sums. They are as many on every machine,
    whatever its cores; clients train side by side as it is, so that only a client alone has two.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(DECIDING)}
    threads = max(1, THREADS // clients_at_once)
    # TensorFlow uses oneDNN of its own accord only with AVX-512 VNNI; processors with AVX2 are 2.4
    # times as fast by it.
    return {
        **own,
        "TF_ENABLE_ONEDNN_OPTS": "1",
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def listen_to_parent(worker, path):
    """End all when the parent on the other machine does, or the way there."""
    while select.select([0], [], [], SILENCE)[0] and os.read(0, 1024):
        pass
    worker.kill()
    close_door(path)
    os._exit(1)


def tell_ticks(worker):
    """Print the processor time that the worker has spent, again and again."""
    try:
        while worker.poll() is None:
            with open(f"/proc/{worker.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            print(int(fields[11]) + int(fields[12]), flush=True)
            time.sleep(BETWEEN)
    except OSError:
        pass  # it, or the parent, has ended


def main(parent, door, binary, isolated, clients_at_once, folder):
    """Guard a worker until it or the parent ends."""
    os.chdir(folder)  # where paths of shards begin on another machine
    port = 8000  # in a namespace of its own every port is free
    if isolated:
        try:
            isolate()
        except OSError as error:
            refuse(f"isolate the worker ({error.strerror})")
    else:
        port = free_port()
    if parent:
        die_with(parent)
    me = os.getpid()
    env = worker_environment(clients_at_once)
    listener, path = open_door(door)
    try:
        worker = subprocess.Popen(
            [binary, f"--port={port}"],
            stdin=subprocess.DEVNULL,
            stdout=2,
            env=env,
            preexec_fn=lambda: die_with(me),
        )
    except OSError as error:
        close_door(path)
        refuse(f"start {binary} ({error.strerror})")
    if not parent:
        threading.Thread(target=listen_to_parent, args=(worker, path), daemon=True).start()
    wait_until_it_answers(worker, port)
    if worker.poll() is not None:
        close_door(path)
        refuse(f"keep {binary} alive (it ended with status {worker.poll()})")
    threading.Thread(target=relay, args=(listener, path, port), daemon=True).start()
    print(worker.pid, flush=True)
    threading.Thread(target=tell_ticks, args=(worker,), daemon=True).start()
    status = worker.wait()
    close_door(path)
    os._exit(status and 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5]), sys.argv[6])
