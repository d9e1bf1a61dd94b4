"""Supervisor of TFF's worker: runs and isolates it, and relays a Unix socket to it.

    python3 -IS supervisor.py PARENT SOCKET BINARY ISOLATED CLIENTS_AT_ONCE FOLDER

It is a program of its own, for a bare Python. TFF's worker listens on all interfaces, lets anybody
in, runs any graph that it is sent, and stays when its user ends. In a network namespace of its own
only this process reaches it. The kernel kills this process when PARENT ends, however that is,
`kill -9` included, and the worker when this process ends. (A preexec_fn of the parent would do for
that, but may deadlock in a process with threads, and TensorFlow makes threads in ours.)

SOCKET is a listening socket's descriptor. On another machine it is the path of a socket to be made,
in a folder that only this user can enter; both are removed once somebody is in. There PARENT is 0,
and this process lives as long as bytes come to its standard input.

After MARK, as a login there may print lines of its own, it prints the worker's process id once it
answers, or what it cannot do; from then on, twice a second, the processor time that the worker has
spent, in ticks.
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

MARK = "federated_learning: "
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

    Raises OSError if refused.
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
    print(f"\n{MARK}cannot {reason}", flush=True)
    os._exit(1)


def open_listener(address):
    """Return (a listening socket, its path if that must be removed once somebody is in)."""
    if address.isdigit():
        return socket.socket(fileno=int(address)), ""
    listener = socket.socket(socket.AF_UNIX)
    try:
        os.mkdir(os.path.dirname(address), 0o700)  # fails where somebody else has made it
        listener.bind(address)
    except OSError as error:
        refuse(f"make {address} ({error.strerror})")
    listener.listen()
    return listener, address


def remove_path(path):
    """Remove the socket at this path, and its folder, so that nobody else gets in."""
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
            remove_path(path)
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
    """Return the worker's environment, without user variables that affect the results.

    The number of threads within one op determines how its sums are divided, so it is the same on
    every machine, whatever its cores: two for a client that trains alone, else one.
    """
    users = {name: value for name, value in os.environ.items() if not name.startswith(DECIDING)}
    threads = max(1, THREADS // clients_at_once)
    # TensorFlow uses oneDNN of its own accord only with AVX-512 VNNI; processors with AVX2 are 2.4
    # times as fast by it.
    return {
        **users,
        "TF_ENABLE_ONEDNN_OPTS": "1",
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def listen_to_parent(worker, path):
    """End all when the parent on the other machine does, or the way there."""
    while select.select([0], [], [], SILENCE)[0] and os.read(0, 1024):
        pass
    worker.kill()
    remove_path(path)
    os._exit(1)


def print_ticks(worker):
    """Print the processor time that the worker has spent, again and again."""
    try:
        while worker.poll() is None:
            with open(f"/proc/{worker.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            print(int(fields[11]) + int(fields[12]), flush=True)
            time.sleep(BETWEEN)
    except OSError:
        pass  # it, or the parent, has ended


def main(parent, address, binary, isolated, clients_at_once, folder):
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
    listener, path = open_listener(address)
    try:
        worker = subprocess.Popen(
            [binary, f"--port={port}"],
            stdin=subprocess.DEVNULL,
            stdout=2,
            env=env,
            preexec_fn=lambda: die_with(me),
        )
    except OSError as error:
        remove_path(path)
        refuse(f"start {binary} ({error.strerror})")
    if not parent:
        threading.Thread(target=listen_to_parent, args=(worker, path), daemon=True).start()
    wait_until_it_answers(worker, port)
    if worker.poll() is not None:
        remove_path(path)
        refuse(f"keep {binary} alive (it ended with status {worker.poll()})")
    threading.Thread(target=relay, args=(listener, path, port), daemon=True).start()
    print(f"\n{MARK}{worker.pid}", flush=True)
    threading.Thread(target=print_ticks, args=(worker,), daemon=True).start()
    status = worker.wait()
    remove_path(path)
    os._exit(status and 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), sys.argv[6])
