"""Rounds over several hosts: machines with their own sshd, links that are cut, and what a host that refuses is told."""

import json
import os
import subprocess
import time

import pytest
from machines import machines, tool, why_not
from runs import SECONDS, command, start, wait_for_round

RUN = ("--dataset", "digits", "--model", "mlp", "--rounds", "12", "--num-clients", "6", "--local-epochs", "20")
REASON = why_not()
needs_machines = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two machines, hostA and hostB, and the environment in which ssh reaches them."""
    if REASON:
        pytest.skip(REASON)
    with machines(tmp_path_factory.mktemp("hosts"), "hostA", "hostB") as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """metrics.json of RUN on two workers here."""
    folder = tmp_path_factory.mktemp("here")
    done = subprocess.run(
        command(*RUN, "--workers", "localhost,localhost"), cwd=folder, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    return outcome(folder)


def outcome(folder):
    (path,) = folder.glob("runs/*/metrics.json")
    return json.loads(path.read_text())


def over(pair, hosts="hostA,hostB"):
    """The flags of a run over these hosts."""
    return ("--workers", hosts, "--workers-cache", str(pair[0][0].folder / "there"))


def begin(folder, pair, *flags, hosts="hostA,hostB"):
    return start(folder, *(flags or RUN), *over(pair, hosts), env={**os.environ, **pair[1]})


def finish(process, seconds=SECONDS):
    """(exit code, what it said, the lines on standard error)"""
    said, errors = process.communicate(timeout=seconds)
    return process.returncode, said, errors.splitlines()


def none_left(pair, seconds=25):
    """Whether nothing of ours runs on any machine, within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(machine.processes(name) for machine in pair[0] for name in ("worker_binary", "python3")):
            return True
        time.sleep(0.1)
    return False


def wait_for_worker(machine):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := machine.processes("worker_binary --port"):
            return found[-1]
        time.sleep(0.02)
    raise AssertionError("no worker appeared")


def test_two_hosts_train_what_two_workers_here_do_and_hold_their_own_shards_alone(tmp_path, pair, undisturbed):
    code, said, errors = finish(begin(tmp_path, pair))
    assert code == 0 and errors == [], errors
    assert outcome(tmp_path)["weights_sha256"] == undisturbed["weights_sha256"]
    assert "hostA: TFF's worker and 3 shards are there" in said
    assert [machine.shards() for machine in pair[0]] == [["0.bin", "2.bin", "4.bin"], ["1.bin", "3.bin", "5.bin"]]
    assert none_left(pair, 2)


def kill_ssh(process, machine):
    (ssh,) = [child for child in children(process) if child.name() == "ssh" and machine.name in child.cmdline()]
    ssh.kill()


def kill_worker(process, machine):
    wait_for_worker(machine).kill()


def stop_worker(process, machine):
    wait_for_worker(machine).suspend()


def cut_for_five_seconds(process, machine):
    machine.cut()
    time.sleep(5)
    machine.mend()


def children(process):
    import psutil

    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("harm", "said"),
    [(kill_ssh, "ended"), (kill_worker, "ended"), (stop_worker, "hung for 3 s"), (cut_for_five_seconds, "")],
)
def test_what_is_lost_is_done_again_and_the_end_is_the_same(tmp_path, pair, undisturbed, harm, said):
    process = begin(tmp_path, pair, *RUN, "--patience", "3" if harm is stop_worker else "60")
    wait_for_round(process)
    harm(process, pair[0][1])
    code, _, errors = finish(process)
    assert code == 0, errors
    assert len(errors) == bool(said) and all(said in line and "hostB" in line for line in errors), errors
    assert outcome(tmp_path)["weights_sha256"] == undisturbed["weights_sha256"]
    assert none_left(pair, 2)
