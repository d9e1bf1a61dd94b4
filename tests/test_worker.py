"""TFF's worker never outlives its run, however that ends."""

import os
import shlex
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import ROOT, SECONDS, command, gone, run_script, worker_of

LONG = ("--dataset", "digits", "--model", "mlp", "--rounds", "100000")


def start(folder, *words):
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_round(process):
    """Reads the run's lines until one of a round; then rounds are going on."""
    for line in process.stdout:
        if line.startswith("round "):
            return
    raise AssertionError(process.stderr.read())


def test_normal_end_leaves_no_worker(tmp_path):
    process = start(tmp_path, *command("--dataset", "digits", "--model", "mlp", "--rounds", "2"))
    worker = worker_of(process)
    assert process.communicate(timeout=SECONDS)[1] == "" and process.returncode == 0
    assert gone(worker, 0.5)


def test_exception_leaves_no_worker(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import federated_learning as fl\n"
        "with fl.Worker(1) as worker: print(worker.process.pid, flush=True); raise RuntimeError('in the run')"
    )
    process = start(tmp_path, sys.executable, "-c", code, str(ROOT))
    worker = psutil.Process(int(process.stdout.readline()))
    assert "in the run" in process.communicate(timeout=SECONDS)[1] and process.returncode == 1
    assert gone(worker, 0.5)


@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signal_leaves_no_worker(tmp_path, sent, exit_code):
    process = start(tmp_path, *command(*LONG))
    worker = worker_of(process)
    wait_for_round(process)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=5 if sent == signal.SIGKILL else 30)
    assert process.returncode == exit_code and "Traceback" not in errors
    assert gone(worker, 2)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.csv").read_text().count("\n") >= 2  # the rounds done are kept
    if sent != signal.SIGKILL:
        assert (run / "convergence_plot.png").stat().st_size > 10_000 and (run / "global_model.keras").exists()


def test_killed_while_the_worker_starts(tmp_path):
    process = start(tmp_path, *command(*LONG))
    worker = worker_of(process)
    process.kill()
    process.communicate(timeout=5)
    assert gone(worker, 2)


def test_a_pipe_behind_the_script_ends_with_it(tmp_path):
    line = shlex.join(command("--dataset", "digits", "--model", "mlp", "--rounds", "1"))
    done = subprocess.run(f"{line} | cat", shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert "final test accuracy" in done.stdout


def test_a_worker_killed_in_a_round_ends_the_run_with_one_line(tmp_path):
    process = start(tmp_path, *command(*LONG))
    worker = worker_of(process)
    wait_for_round(process)
    os.kill(worker.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and errors.count("\n") == 1 and "worker ended" in errors


def test_a_dead_proxy_does_not_stand_between(tmp_path):
    dead = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    assert run_script(tmp_path, "--dataset", "digits", "--model", "mlp", "--rounds", "1", **dead).returncode == 0
