"""Rounds over several hosts: machines with their own sshd, links that are cut, and what a host that
refuses is told."""

import contextlib
import json
import os
import re
import socket
import subprocess
import time
from pathlib import Path

from harness.cli.fields import UserError
from harness.engine.supervisor import open_listener, remove_path
from harness.engine.worker import private_folder

import numpy as np
import psutil
import pytest
from machines import machines, tool, why_not
from runs import (
    MLP_ON_DIGITS,
    NO_FIGURES,
    SECONDS,
    call_script,
    configure,
    gone,
    read_metrics,
    start,
    wait_for_round,
)

RUN = (*MLP_ON_DIGITS, *NO_FIGURES, "--rounds", "20", "--num-clients", "6", "--local-epochs", "15")
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
    done = call_script(folder, *RUN, "--workers", "localhost,localhost")
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
        if not any(
            machine.processes(name) for machine in pair[0] for name in ("worker_binary", "python3")
        ):
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


def test_two_hosts_train_what_two_workers_here_do_and_hold_their_own_shards_alone(
    tmp_path, pair, undisturbed
):
    done = call_script(tmp_path, *RUN, *over(pair), **pair[1])
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert outcome(tmp_path)["weights_sha256"] == undisturbed["weights_sha256"]
    assert "hostA: TFF's worker and 3 shards in place" in done.stdout
    assert [machine.shards() for machine in pair[0]] == [
        ["0.bin", "2.bin", "4.bin"],
        ["1.bin", "3.bin", "5.bin"],
    ]
    assert none_left(pair, 2)


@pytest.mark.thorough
def test_the_bytes_in_the_table_are_those_of_the_links(tmp_path, pair):
    """Worker and shards are there already; what ssh, rsync and TCP add is a few per cent."""
    finish(begin(tmp_path, pair, *RUN, "--rounds", "1", "--name", "sent"))
    before = [machine.link_bytes() for machine in pair[0]]
    code, _, errors = finish(begin(tmp_path, pair, *RUN, "--name", "counted"))
    assert code == 0, errors
    links = np.sum([machine.link_bytes() for machine in pair[0]], axis=0) - np.sum(before, axis=0)
    rounds = read_metrics(tmp_path / "runs" / "counted")["rounds"]
    told = np.sum(
        [(record["measured_bytes_down"], record["measured_bytes_up"]) for record in rounds], axis=0
    )
    assert (told > 5_000_000).all() and (links > told).all() and (links < 1.05 * told).all(), (
        links,
        told,
    )


@pytest.mark.thorough
@needs_machines
def test_a_users_own_configuration_and_a_banner_change_nothing(tmp_path, pair, undisturbed, again):
    """Both workers' ssh would forward one port, of which only one can."""
    banner = tmp_path / "banner"
    banner.write_text("Authorized users only.\n" * 5000)
    again(f"Banner {banner}")
    code, _, errors = finish(begin(tmp_path, pair, hosts="personal,personal"))
    assert code == 0 and errors == [], errors
    assert outcome(tmp_path)["weights_sha256"] == undisturbed["weights_sha256"]
    assert none_left(pair, 2)


@pytest.mark.thorough
@needs_machines
def test_a_login_that_prints_is_named_as_the_cause(tmp_path, pair, again):
    again('ForceCommand echo Hello; exec sh -c "$SSH_ORIGINAL_COMMAND"')
    assert "hostA: the login shell on that host prints text" in refuse(tmp_path, pair, "hostA")


@pytest.mark.thorough
@needs_machines
def test_ctrl_c_while_files_are_sent_leaves_nothing(tmp_path, pair):
    for path in pair[0][1].own.rglob("worker_binary"):
        path.unlink()  # so that it is sent
    process = begin(tmp_path, pair)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ended between two questions
            sending = [child for child in children(process) if child.name() == "rsync"]
            if sending:
                break
        time.sleep(0.01)
    process.send_signal(2)
    code, _, errors = finish(process, 10)
    assert sending and code == 130, errors
    assert all(gone(child, 2) for child in sending)
    deadline = time.monotonic() + 5
    while pair[0][1].processes("rsync") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pair[0][1].processes("rsync") == []


def kill_ssh(process, machine):
    (ssh,) = [
        child
        for child in children(process)
        if child.name() == "ssh" and machine.name in child.cmdline()
    ]
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
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (kill_worker, "ended|exited"),  # in a round, or between two
        pytest.param(kill_ssh, "ended|exited", marks=pytest.mark.thorough),
        pytest.param(stop_worker, "hung for 3 s", marks=pytest.mark.thorough),
        pytest.param(cut_for_five_seconds, "", marks=pytest.mark.thorough),
    ],
    ids=["worker", "ssh", "hung", "cut"],
)
def test_what_is_lost_is_done_again_and_the_end_is_the_same(
    tmp_path, pair, undisturbed, harm, said
):
    process = begin(tmp_path, pair, *RUN, "--patience", "3" if harm is stop_worker else "60")
    wait_for_round(process)
    harm(process, pair[0][1])
    assert process.poll() is None  # it was in the middle
    code, _, errors = finish(process)
    assert code == 0, errors
    assert len(errors) == bool(said), errors
    assert all(re.search(said, line) and "hostB" in line for line in errors), errors
    assert outcome(tmp_path)["weights_sha256"] == undisturbed["weights_sha256"]
    assert none_left(pair, 2)


@pytest.mark.thorough
@needs_machines
def test_a_host_gone_for_good_is_taken_over_and_the_end_is_the_same(tmp_path, pair, undisturbed):
    """The link to hostB is cut in the middle and never mended."""
    process = begin(tmp_path, pair)
    try:
        wait_for_round(process)
        pair[0][1].cut()
        code, said, errors = finish(process)
    finally:
        pair[0][1].mend()
    assert code == 0 and "round 20/20" in said, errors
    assert "hostA receives its clients' shards and takes over" in errors[-1], errors
    assert outcome(tmp_path)["weights_sha256"] == undisturbed["weights_sha256"]
    assert "1.bin" in pair[0][0].shards()
    assert none_left(pair)


@pytest.mark.thorough
@needs_machines
def test_without_any_host_left_the_run_ends_with_one_line_and_goes_on_with_as_many_others(
    tmp_path, pair, undisturbed
):
    process = begin(tmp_path, pair, hosts="hostA,hostA")
    wait_for_round(process)
    pair[0][0].stop()
    try:
        code, _, errors = finish(process)
    finally:
        pair[0][0].start()
    assert (
        code == 1 and "no other host is left" in errors[-1] and "Traceback" not in "".join(errors)
    ), errors
    (run,) = (tmp_path / "runs").iterdir()
    resumed = ("--resume", str(run))
    code, _, errors = finish(begin(tmp_path, pair, *resumed, hosts="hostB"))
    assert code == 2 and "workers=1 differs from 2" in errors[0], errors
    code, _, errors = finish(begin(tmp_path, pair, *resumed, hosts="hostB,localhost"))
    assert code == 0 and outcome(tmp_path)["weights_sha256"] == undisturbed["weights_sha256"], (
        errors
    )


@pytest.mark.thorough  # test_nobody_else_gets_in kills one, too
@needs_machines
@pytest.mark.parametrize("cut", [False, True])
def test_a_killed_coordinator_leaves_nothing_on_any_host(tmp_path, pair, cut):
    process = begin(tmp_path, pair, *RUN, "--rounds", "100000")
    wait_for_round(process)
    try:
        if cut:
            pair[0][1].cut()
        process.kill()
        process.communicate()
        assert none_left(pair, 25)
    finally:
        pair[0][1].mend()


@pytest.mark.thorough
@needs_machines
def test_ctrl_c_keeps_the_rounds_done_and_leaves_nothing(tmp_path, pair):
    process = begin(tmp_path, pair, *RUN, "--rounds", "100000")
    wait_for_round(process)
    process.send_signal(2)
    code, _, errors = finish(process, 30)
    assert code == 130 and len(errors) == 1 and "--resume" in errors[0], errors
    assert none_left(pair, 2)


@needs_machines
def test_nobody_else_gets_in(tmp_path, pair):
    """While rounds go on no host listens at another port than sshd's, and the sockets' folders are
    this user's."""
    doors = "fl-" + 16 * "?"  # those of hosts
    before = set(Path("/tmp").glob(doors))
    process = begin(tmp_path, pair, *RUN, "--rounds", "100000")
    wait_for_round(process)
    try:
        for machine in pair[0]:
            inside = [tool("ip"), "netns", "exec", machine.space]
            told = subprocess.run(
                [*inside, tool("ss"), "-Hltn"], capture_output=True, text=True, check=True
            )
            assert [line.split()[3] for line in told.stdout.splitlines()] == [
                f"{machine.address}:22"
            ]
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((machine.address, 8000), timeout=2)
            worker = wait_for_worker(machine)
            assert os.readlink(f"/proc/{worker.pid}/ns/net") != os.readlink(
                f"/proc/{machine.sshd.pid}/ns/net"
            )
        assert set(Path("/tmp").glob(doors)) <= before  # closed behind us
    finally:
        process.kill()
        process.communicate()
    assert none_left(pair)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may act as another user")
def test_another_user_does_not_come_to_the_door(tmp_path):
    """While the way in is open, here and on a host: the folder is this user's alone."""
    with private_folder() as here:
        there = Path(here).resolve()
        (there / "door").touch()
        assert there.stat().st_mode & 0o777 == 0o700
        done = subprocess.run(
            ["cat", str(there / "door")], user=65534, capture_output=True, text=True
        )
        assert "Permission denied" in done.stderr
    listener, path = open_listener(str(tmp_path / "fl-0" / "door"))
    assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    listener.close()
    remove_path(path)
    assert not Path(path).parent.exists()


def refuse(tmp_path, pair, host, **environment):
    """What a run over `host` says, in its one line; it ends with exit code 2 before anything
    trains."""
    done = call_script(tmp_path, *RUN, *over(pair, f"{host},localhost"), **pair[1], **environment)
    assert done.returncode == 2 and "round" not in done.stdout.replace("a round", ""), done
    last = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and last.startswith("federated_learning.py: "), done
    return last


@needs_machines
@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("{0.address}", "its host key is unknown; run `ssh {0.address}` once by hand"),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in [
                (
                    "changed",
                    "changed: its host key has changed; check that it is the right machine",
                ),
                ("nowhere.invalid", "nowhere.invalid: its name does not resolve"),
                ("closed", "closed: no sshd is listening (connection refused)"),
                ("nobody@hostA", "nobody@hostA: it refuses the login (permission denied)"),
            ]
        ),
    ],
)
def test_a_host_that_ssh_does_not_reach_is_refused_in_one_line(tmp_path, pair, host, said):
    assert said.format(pair[0][0]) in refuse(tmp_path, pair, host.format(pair[0][0]))


@pytest.fixture
def again(pair):
    """again(*settings, **options) starts hostA's sshd new with these; after the test it is as it
    was."""

    def restart(*settings, **options):
        pair[0][0].stop()
        pair[0][0].start(*settings, **options)

    yield restart
    restart()


FEW = "echo 0 > /proc/sys/user/max_net_namespaces"
NO_NAMESPACES = f"ForceCommand exec unshare -Ur sh -c '{FEW}; exec sh -c \"$SSH_ORIGINAL_COMMAND\"'"
NO_SOCKETS = "hostA: its sshd does not forward Unix sockets; set AllowStreamLocalForwarding yes"


@needs_machines
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["AllowStreamLocalForwarding no"], NO_SOCKETS),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in [
                (["DisableForwarding yes"], NO_SOCKETS),
                (["AllowUsers nobody"], "hostA: it refuses the login (permission denied)"),
                ([NO_NAMESPACES], "hostA does not allow network namespaces"),
            ]
        ),
    ],
)
def test_what_an_sshd_forbids_is_told_with_the_remedy(tmp_path, pair, again, settings, said):
    again(*settings)
    assert said in refuse(tmp_path, pair, "hostA")


@pytest.mark.thorough
@needs_machines
def test_a_host_without_python_or_rsync_is_told(tmp_path, pair, again):
    empty = tmp_path / "path"
    empty.mkdir()
    bare = (
        f'ForceCommand exec /usr/bin/env -i PATH={empty} HOME=/ /bin/sh -c "$SSH_ORIGINAL_COMMAND"'
    )
    again(bare)
    assert "hostA: python3 is not installed; install any version there" in refuse(
        tmp_path, pair, "hostA"
    )
    (empty / "python3").symlink_to("/usr/bin/python3")
    assert "hostA has no rsync; install it there" in refuse(tmp_path, pair, "hostA")


@pytest.mark.thorough
@needs_machines
def test_a_cache_that_cannot_be_made_or_run_in_is_told(tmp_path, pair, again):
    process = start(
        tmp_path,
        *RUN,
        "--workers",
        "hostA,localhost",
        "--workers-cache",
        "/proc/no",
        env={**os.environ, **pair[1]},
    )
    code, _, errors = finish(process, 60)
    assert (
        code == 2
        and "hostA: cannot make /proc/no" in errors[-1]
        and "--workers-cache" in errors[-1]
    ), errors
    again(noexec=True)
    said = refuse(tmp_path, pair, "hostA")
    assert (
        "hostA: cannot start ./worker_binary (Permission denied)" in said
        and "--workers-cache" in said
    )


@pytest.mark.thorough
@needs_machines
def test_a_host_that_does_not_answer_is_told(tmp_path, pair):
    pair[0][0].cut()
    try:
        said = refuse(tmp_path, pair, "hostA")
        assert "hostA: it does not answer (timed out)" in said or "no route to host" in said
    finally:
        pair[0][0].mend()


def test_names_of_hosts_are_plain(tmp_path):
    for names in (
        "-oProxyCommand=x,localhost",
        "host A",
        "",
        "a,,b",
        "a;b",
        "a:b",
        "me@-x",
        "$(x)",
    ):
        with pytest.raises(UserError, match="workers=.* is not a valid host name"):
            configure(workers=names)
    for folder in ("a b", "-x", "$HOME", "", "a;b", "~/x"):
        with pytest.raises(UserError, match="workers_cache=.* is not a plain path"):
            configure(workers_cache=folder)
    assert configure(workers="localhost, me@host-b.example").run.hosts == (
        "localhost",
        "me@host-b.example",
    )
