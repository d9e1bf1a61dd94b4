"""TFF's worker never outlives its run, however that ends."""

import errno
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

from harness.engine import worker as worker_module
from harness.engine.execution import WATCH, NotRetried, WorkerLost
from harness.engine.worker import LocalWorker, Unreachable

import grpc
import numpy as np
import psutil
import pytest
import tensorflow_federated as tff
from runs import (
    MLP_ON_DIGITS,
    NO_FIGURES,
    ROOT,
    SECONDS,
    after_first_round,
    call_script,
    command,
    find_worker,
    gone,
    read_csv,
    run_script,
    start,
    wait_for_round,
    worker_of,
)
from tensorflow_federated.proto.v0 import executor_pb2

LONG = ("--dataset", "digits", "--model", "mlp", "--rounds", "100000")
SHORT = (*MLP_ON_DIGITS, *NO_FIGURES, "--rounds", "3", "--local-epochs", "20")


ONEDNN = "TF_ENABLE_ONEDNN_OPTS"


@pytest.mark.thorough
def test_exception_leaves_no_worker(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from harness.engine.worker import LocalWorker\n"
        "with LocalWorker(1): input(); raise RuntimeError('in the run')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT)],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    worker = worker_of(process)  # it waits for a line until we hold its worker
    assert (
        "in the run" in process.communicate("go on\n", timeout=SECONDS)[1]
        and process.returncode == 1
    )
    assert gone(worker, 0.5)


@pytest.mark.parametrize(
    ("sent", "exit_code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGUSR1, 138),
        pytest.param(signal.SIGXCPU, 152, marks=pytest.mark.thorough),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.thorough),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.thorough),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.thorough),
    ],
)
def test_signal_leaves_no_worker(tmp_path, sent, exit_code):
    if sent != signal.SIGKILL and signal.getsignal(sent) == signal.SIG_IGN:
        pytest.skip(f"{sent.name} is ignored, as behind nohup")
    process = start(tmp_path, *LONG)
    worker = worker_of(process)
    wait_for_round(process)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=5 if sent == signal.SIGKILL else 30)
    assert process.returncode == exit_code and "Traceback" not in errors
    assert gone(worker, 2)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.csv").read_text().count("\n") >= 2  # the rounds done are kept
    if sent != signal.SIGKILL:
        assert (run / "convergence_plot.png").stat().st_size > 10_000 and (
            run / "global_model.keras"
        ).exists()


@pytest.mark.thorough
def test_killed_while_the_worker_starts_which_has_onednn_whatever_the_user_says(tmp_path):
    process = start(tmp_path, *LONG, env={**os.environ, ONEDNN: "0"})
    worker = worker_of(process)
    assert worker.environ()[ONEDNN] == "1"
    process.kill()
    process.communicate(timeout=5)
    assert gone(worker, 2)


def test_a_pipe_behind_the_script_ends_with_it(tmp_path):
    line = shlex.join(command("--dataset", "digits", "--model", "mlp", "--rounds", "1"))
    done = subprocess.run(
        f"{line} | cat", shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS
    )
    assert "final test accuracy" in done.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The rows of a run's metrics.csv, without the seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert call_script(folder, *SHORT).returncode == 0
    return rows_of(folder)


def rows_of(folder):
    (run,) = (folder / "runs").iterdir()
    rows = read_csv(run / "metrics.csv")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (signal.SIGKILL, "worker ended"),
        pytest.param(signal.SIGSTOP, "hung for 2 s", marks=pytest.mark.thorough),
    ],
)
def test_a_worker_lost_in_a_round_is_replaced_and_the_end_is_the_same(
    tmp_path, undisturbed, sent, said
):

    def lose_worker():
        os.kill(find_worker(os.getpid()).pid, sent)

    with after_first_round(tmp_path, lose_worker):
        done = call_script(tmp_path, *SHORT, "--patience", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "retrying the round on a new one" in done.stderr
    assert said in done.stderr
    assert rows_of(tmp_path) == undisturbed and len(undisturbed) == 3


def test_what_watches_waits_for_no_finalizer():
    """TFF frees values wherever garbage is collected; in a stopped worker that would take for
    ever."""
    with LocalWorker(1) as worker:
        os.kill(worker.pid, signal.SIGSTOP)
        waiting = {}
        for name in (WATCH, "another"):
            free = (executor_pb2.DisposeRequest(),)
            waiting[name] = threading.Thread(
                target=worker.stub.dispose, args=free, name=name, daemon=True
            )
            waiting[name].start()
            waiting[name].join(1)
        assert {name: thread.is_alive() for name, thread in waiting.items()} == {
            WATCH: False,
            "another": True,
        }


@pytest.mark.thorough
def test_a_worker_lost_three_times_in_a_round_ends_the_run_with_one_line(tmp_path):
    process = start(tmp_path, *LONG, "--model", "cnn", "--local-epochs", "50")
    workers = []
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        worker = find_worker(process.pid, besides=workers)
        if worker and worker.cpu_times().user > 1:  # it trains
            workers.append(worker)
            worker.kill()
    _, errors = process.communicate(timeout=5)
    lines = errors.splitlines()
    assert process.returncode == 1 and "3 failures in this round" in lines[-1], errors
    assert len(lines) == len(workers) + 1


def test_nobody_else_reaches_the_worker(tmp_path, monkeypatch):
    """The worker's network namespace is its own, and its listening port is none of this
    machine's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with LocalWorker(1):
        worker = find_worker(os.getpid())
        ours, its = (os.readlink(f"/proc/{pid}/ns/net") for pid in (os.getpid(), worker.pid))
        assert ours != its, "this machine allows no namespaces; then the run must say so"
        inside = {
            c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN
        }
        assert 8000 not in inside
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("localhost", 8000), timeout=1)
        assert not list(tmp_path.glob("fl-*"))  # the way in is closed behind us
    assert gone(worker, 2)


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_where_namespaces_are_forbidden_the_run_says_so(tmp_path):
    forbid = 'echo 0 > /proc/sys/user/max_net_namespaces; exec "$@"'
    run = command("--dataset", "digits", "--model", "mlp", "--rounds", "1", *NO_FIGURES)
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", forbid, "sh", *run],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0 and "final test accuracy" in done.stdout
    assert (
        done.stderr.count("\n") == 1
        and "other users of this machine's network can reach" in done.stderr
    )


@pytest.mark.thorough
def test_a_dead_proxy_does_not_stand_between(tmp_path):
    dead = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    assert (
        run_script(
            tmp_path, "--dataset", "digits", "--model", "mlp", "--rounds", "1", **dead
        ).returncode
        == 0
    )


def test_where_no_unix_socket_can_be_made_it_is_one_line(monkeypatch):
    """As in some sandboxes: nobody is told that others can reach the worker, which is not there."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    none = SimpleNamespace(socket=refuse, AF_UNIX=socket.AF_UNIX)
    monkeypatch.setattr(worker_module, "socket", none)
    with pytest.raises(Unreachable, match="Unix sockets cannot be created here"), LocalWorker(1):
        pass


@pytest.mark.slow
def test_workers_of_one_process_are_reached_each_by_its_own_connection():
    """gRPC shares connections of one address, and a folder's descriptor may be an earlier one's."""

    @tff.tensorflow.computation(np.int32)
    def add_one(x):
        return x + 1

    with LocalWorker(1) as first, LocalWorker(1) as second:
        before = (first.bytes_sent, second.bytes_sent)
        killed = psutil.Process(second.pid)
        killed.kill()
        assert gone(killed)
        assert first.invoke("call", add_one, 1) == 2
        assert first.bytes_sent > before[0] and second.bytes_sent == before[1]
        with pytest.raises(WorkerLost):
            second.invoke("call", add_one, 1)
        with LocalWorker(1) as third:
            assert third.call("call", add_one, 2) == 3 and third.pid != first.pid
        assert first.invoke("call", add_one, 3) == 4


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (grpc.StatusCode.UNAVAILABLE, WorkerLost, "TFF's worker lost its connection"),
        (grpc.StatusCode.FAILED_PRECONDITION, NotRetried, "a table is missing"),
    ],
)
def test_what_tff_would_ask_for_without_end_ends(code, error, said):
    """Of a worker that lives: a socket that is gone, and an error of the computation."""
    call = SimpleNamespace(code=lambda: code, details=lambda: "a table is missing\nat node 3")
    lost = LocalWorker(1)
    lost.process = subprocess.Popen(["sleep", "60"])
    try:
        with pytest.raises(error, match=said):
            lost.intercept_unary_unary(lambda *_: call, None, SimpleNamespace(ByteSize=lambda: 1))
        if error is WorkerLost:
            assert lost.process.wait(5) == -signal.SIGKILL
        else:
            assert not lost.ended
    finally:
        lost.process.kill()
        lost.process.wait()
