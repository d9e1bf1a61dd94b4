"""Whatever ssh, rsync or a host prints, or does not: one line in a limited time, and nothing is
left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from harness.cli.command_line import RunFailed
from harness.cli.fields import UserError
from harness.engine import multi_host, probe, ssh, stopping
from harness.engine.child import LONGEST_LINE, Child, LineReader
from harness.engine.supervisor import MARK
from harness.engine.worker import RemoteWorker, Unreachable

import psutil
import pytest
from machines import tool

# A login that greets, and then does here what is asked of the host.
LOGIN = """while :; do
case "$1" in --) shift; break;; -L) shift 2;; -*) shift;; *) break;; esac
done
shift
exec sh -c "$*"
"""
# A host without it is refused, and here the host is this machine.
needs_rsync = pytest.mark.skipif(tool("rsync") is None, reason="rsync is not installed")
GREETING = f'echo "Welcome! 12 packages can be updated."\n{LOGIN}'


@pytest.fixture
def program(tmp_path, monkeypatch):
    """program(name, text) puts a shell script of this name before all others in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name, text):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    return make


def has_ended(pid):
    """Whether this process ends within two seconds; one that nobody has waited for counts."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def test_lines_are_read_with_a_limit_of_time_and_of_length():
    read, write = os.pipe()
    with open(read, "rb", buffering=0) as stream, open(write, "wb", buffering=0) as other:
        lines = LineReader(stream)
        other.write(b"one\n12%\rhalf")
        assert lines.read(1) == b"one"
        assert lines.read(1) == b"12%"
        began = time.monotonic()
        assert lines.read(0.2) is None and 0.2 <= time.monotonic() - began < 1
        other.write(b" a line\n" + b"x" * 9000 + b"y\n")
        assert lines.read(1) == b"half a line"
        assert len(lines.read(1)) < 2 * LONGEST_LINE
        other.close()
        with pytest.raises(EOFError):
            lines.read(1)


def test_a_child_ends_with_what_it_has_started_and_its_words_block_nobody():
    code = "sleep 1000 & echo $!; head -c 300000 /dev/zero >&2; echo last words >&2; exec sleep 999"
    with Child(["sh", "-c", code], b"x" * 300_000) as child:  # standard input that nobody reads
        started = int(next(child.read_lines(5)))
        deadline = time.monotonic() + 5
        while b"last words" not in child.words and time.monotonic() < deadline:
            time.sleep(0.01)
        assert child.words.endswith(b"last words\n") and len(child.words) <= 2000
        with pytest.raises(TimeoutError):
            next(child.read_lines(0.1))
        with pytest.raises(TimeoutError):
            child.wait(0.1)
    assert child.process.returncode == -9
    assert has_ended(started)


RUBBISH = {
    "not UTF-8": r"printf '\377\376\n'",
    "a list": f"echo '{MARK}[1, 2]'",
    "another kind": f"""echo '{MARK}{{"wrong": {{"a": 1}}, "binary": ""}}'""",
    "a number": f"echo '{MARK}7'",
    "deep": f"printf '{MARK}'; head -c 4000 /dev/zero | tr '\\0' '['",
    "a long line": "head -c 3000000 /dev/zero",
    "nothing": ":",
}


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_rubbish_from_a_host_is_one_line(program, rubbish):
    program("ssh", RUBBISH[rubbish])
    with pytest.raises(UserError, match="^hostA: python3 answered .*check that `ssh hostA pyth"):
        ssh.check("hostA", "cache")


@pytest.mark.parametrize("text", ["yes", "cat /dev/zero", "sleep 1000", "printf half; sleep 1000"])
def test_a_host_that_answers_without_end_or_not_at_all_is_given_up(program, monkeypatch, text):
    program("ssh", text)
    monkeypatch.setattr(ssh, "CONNECT_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(UserError, match="^hostA: it does not answer"):
        ssh.check("hostA", "cache")
    assert time.monotonic() - began < 4
    assert [p for p in psutil.Process().children() if p.name() in ("ssh", "yes")] == []


@pytest.mark.parametrize("answer", ["²", "1" * 5000, "-1", "12 34"])
def test_what_is_no_process_id_is_one_line(program, tmp_path, answer):
    program("ssh", f"echo '{MARK}{answer}'; exec sleep 1000")
    worker = RemoteWorker("hostA", "cache", 1, tmp_path / "log")
    with pytest.raises(Unreachable, match="^hostA: unexpected output "):
        worker.open()
    assert worker.process.poll() is not None


def test_a_file_that_is_no_program_there_gets_the_right_remedy(program, tmp_path):
    (tmp_path / "worker_binary").write_bytes(bytes(4096))
    (tmp_path / "worker_binary").chmod(0o700)
    program("ssh", GREETING)
    worker = RemoteWorker("hostA", str(tmp_path), 1, tmp_path / "log")
    with pytest.raises(Unreachable, match=r"Exec format error\); it may be damaged: remove it"):
        worker.open()


@needs_rsync
def test_a_greeting_counts_for_nothing(program, tmp_path):
    program("ssh", GREETING)
    assert ssh.check("hostA", str(tmp_path / "cache")) == (str(tmp_path / "cache"), "")
    (tmp_path / "cache" / "worker_binary").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert ssh.check("hostA", str(tmp_path / "cache")).binary == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


@pytest.mark.parametrize("text", ["sleep 1000", "kill -STOP $$", "echo '  1,000  1%'; sleep 1000"])
def test_an_rsync_that_is_silent_or_stopped_is_given_up(program, tmp_path, text):
    program("rsync", text)
    began = time.monotonic()
    with pytest.raises(UserError, match="^hostA: rsync made no progress for 0.5 s; .* --patience$"):
        list(ssh.send("hostA", tmp_path, ["a"] * 50_000, "there", patience=0.5))
    assert time.monotonic() - began < 4


def test_an_rsync_that_complains_at_length_is_heard(program, tmp_path):
    program("rsync", "head -c 300000 /dev/zero >&2; echo >&2; echo 'No space left' >&2; exit 11")
    with pytest.raises(UserError, match="^hostA: No space left; check that there has free space"):
        list(ssh.send("hostA", tmp_path, ["a"], "there", patience=5))


@needs_rsync
def test_what_is_sent_is_ours_alone_and_what_is_damaged_is_sent_again(program, tmp_path):
    program("ssh", LOGIN)
    source = tmp_path / "here"
    (source / "shards-1").mkdir(parents=True)
    (source / "shards-1" / "0.bin").write_bytes(b"images")
    (source / "worker_binary").write_bytes(b"program")
    (source / "worker_binary").chmod(0o755)
    there = tmp_path / "there"
    (there / "shards-1").mkdir(parents=True, mode=0o755)
    there.chmod(0o755)
    damaged = there / "worker_binary"
    damaged.write_bytes(bytes(7))  # as long
    own = (source / "worker_binary").stat()
    os.utime(damaged, (own.st_atime, own.st_mtime))
    assert ssh.check("hostA", str(there)).binary != probe.hash_binary(source)
    for names in (["worker_binary"], ["shards-1/0.bin"]):
        list(ssh.send("hostA", source, names, str(there), patience=20))
    assert damaged.read_bytes() == b"program"
    modes = {path.name: path.stat().st_mode & 0o777 for path in [there, *there.rglob("*")]}
    assert modes == {"there": 0o700, "shards-1": 0o700, "0.bin": 0o600, "worker_binary": 0o700}
    assert ssh.check("hostA", str(there)).binary == probe.hash_binary(source)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")


@needs_root
@pytest.mark.parametrize("whose", ["the folder", "a parent", "a link", "a file in it"])
def test_a_folder_of_another_user_is_refused(tmp_path, whose):
    parent = tmp_path / "parent"
    folder = parent / "cache"
    folder.mkdir(parents=True)
    (folder / "worker_binary").touch()
    (tmp_path / "link").symlink_to(folder)
    place = {"the folder": folder, "a parent": parent, "a link": tmp_path / "link"}
    path = place.get(whose, folder / "worker_binary")
    os.chown(path, 65534, 65534, follow_symlinks=False)
    named = tmp_path / "link" if whose == "a link" else folder
    assert probe.make_folder(str(named)).startswith(f"{path} belongs to another user (uid 65534)")


def test_a_folder_that_others_may_write_is_refused_and_one_that_they_read_is_closed(tmp_path):
    folder = tmp_path / "parent" / "cache"
    umask = os.umask(0o002)
    try:
        assert probe.make_folder(str(folder)) == ""
    finally:
        os.umask(umask)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    for place in (folder, folder.parent):
        place.chmod(0o770)
        assert probe.make_folder(str(folder)).startswith(
            f"others may write {place} (mode 770); run"
        )
        place.chmod(0o755)
        assert probe.make_folder(str(folder)) == ""
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.parent.chmod(0o1777)  # as /tmp: what is in it belongs to its owner
    assert probe.make_folder(str(folder)) == ""


def test_a_folder_that_holds_other_things_keeps_its_mode(tmp_path):
    """Such as /opt, or a home: who closed it would lock others out."""
    (tmp_path / "other").touch()
    tmp_path.chmod(0o755)
    said = f"{tmp_path} contains other files, and others may read it (mode 755); run `chmod"
    assert probe.make_folder(str(tmp_path)).startswith(said)
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    tmp_path.chmod(0o700)
    assert probe.make_folder(str(tmp_path)) == ""


@needs_rsync
def test_what_is_checked_is_what_is_used(program, tmp_path):
    """link/../cache is not beside the link, but beside what it leads to; and so is the answer."""
    open_to_all = tmp_path / "open"
    (open_to_all / "inner").mkdir(parents=True)
    open_to_all.chmod(0o777)
    (tmp_path / "link").symlink_to(open_to_all / "inner")
    named = f"{tmp_path}/link/../cache"
    assert probe.make_folder(named).startswith(f"others may write {open_to_all} (mode 777)")
    open_to_all.chmod(0o755)
    program("ssh", LOGIN)
    assert ssh.check("hostA", named).path == str(open_to_all / "cache")


@pytest.mark.parametrize("folder", ["/a b", "/a;b", "/$HOME", "-x"])
def test_a_folder_whose_name_a_shell_may_read_otherwise_is_refused(program, folder):
    answer = json.dumps({"wrong": "", "folder": folder, "binary": ""})
    program("ssh", f"cat <<'END'\n{MARK}{answer}\nEND")
    with pytest.raises(UserError, match="^hostA: workers_cache=.* is not a plain path"):
        ssh.check("hostA", "cache")


def test_ctrl_c_ends_what_was_started(tmp_path):
    """Before there is anything to save: rsync, and what it has started, end with the process."""
    code = (
        "from harness.engine import stopping\n"
        "from harness.engine.child import Child\n"
        "stopping.listen()\n"
        "with Child(['sh', '-c', 'sleep 1000 & echo $!; wait']) as child:\n"
        "    print(next(child.read_lines(5)).decode(), flush=True)\n"
        "    child.wait(60)\n"
    )
    root = Path(probe.__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE)
    started = int(process.stdout.readline())
    process.terminate()
    assert process.wait(5) == 143
    assert has_ended(started)


def test_a_host_that_is_back_gets_its_clients_again(monkeypatch, capsys):
    """Asked some time after it was given up; as long as it does not answer, the others have its
    part."""
    answers = iter([UserError("hostB: no route to it"), ssh.HostFolder("/cache", "")])
    sent = []

    def check(host, cache):
        answer = next(answers)
        if isinstance(answer, UserError):
            raise answer
        return answer

    monkeypatch.setattr(ssh, "check", check)
    monkeypatch.setattr(multi_host, "GIVEN_UP", 0.0)
    hosts = multi_host.MultiHost.__new__(multi_host.MultiHost)
    vars(hosts).update(names=("hostA", "hostB", "hostB"), cache="cache", patience=1.0)
    vars(hosts).update(dead_hosts={"hostB": 0.0}, owner_of_part=[0, 0, 0], closing=False)
    hosts._send = lambda host, parts, folder: sent.append((host, parts, folder.path))
    hosts._take_back_hosts("round 3")
    assert hosts.owner_of_part == [0, 0, 0] and hosts.dead_hosts.keys() == {"hostB"}
    hosts._take_back_hosts("round 4")
    assert hosts.owner_of_part == [0, 1, 2] and not hosts.dead_hosts
    assert sent == [("hostB", [1, 2], "/cache")]
    assert "round 4: hostB is back, and trains its clients again" in capsys.readouterr().err


def test_two_signals_of_one_cause_count_once(monkeypatch):
    """SIGHUP and SIGTERM as a terminal is closed; the same one twice is the user's."""
    ended = []
    monkeypatch.setattr(stopping, "exit_at_once", lambda number, frame: ended.append(number))
    monkeypatch.setattr(stopping, "requested", 0)
    stopping.note_request(signal.SIGHUP, None)
    stopping.note_request(signal.SIGTERM, None)
    assert stopping.requested == signal.SIGHUP and ended == []
    stopping.note_request(signal.SIGHUP, None)
    monkeypatch.setattr(stopping, "_requested_at", time.monotonic() - 2)
    stopping.note_request(signal.SIGTERM, None)
    assert ended == [signal.SIGHUP, signal.SIGTERM]


class FakeWorker:
    """What a host's part of a round needs of a worker, which cannot be started a few times."""

    log = "worker.log"
    ended = True

    def __init__(self, host, num_failures):
        self.host = self.name = host
        self.num_failures = num_failures

    def open(self):
        self.num_failures -= 1
        if self.num_failures >= 0:
            raise Unreachable(f"{self.host}: there is no route to it")

    def invoke(self, name, up_to_merge, host_input, chunks):
        return self.host


@pytest.mark.parametrize(
    ("num_failures", "patience", "full", "trains", "given_up"),
    [
        (6, 60.0, (), "hostA", set()),  # away for a while
        (100, 0.0, (), "hostB", {"hostA"}),
        (100, 0.0, ("hostB",), "hostC", {"hostA"}),  # whose disk is full: it trains its own part
        (100, 0.0, ("hostB", "hostC"), None, {"hostA"}),
    ],
)
def test_a_hosts_part_is_done(monkeypatch, num_failures, patience, full, trains, given_up):
    monkeypatch.setattr(multi_host, "PAUSE", 0.001)
    monkeypatch.setattr(ssh, "check", lambda *_: None)

    def send(host, parts, folder):
        if host in full:
            raise UserError(f"{host}: no space left")

    names = ("hostA", "hostB", "hostC")
    failures = {"hostA": num_failures, "hostB": 0, "hostC": 0}
    hosts = multi_host.MultiHost.__new__(multi_host.MultiHost)
    vars(hosts).update(
        names=names,
        workers=[FakeWorker(name, failures[name]) for name in names],
        locks=[threading.Lock() for _ in names],
        handing_over=threading.Lock(),
        owner_of_part=[0, 1, 2],
        dead_hosts={},
        patience=patience,
        closing=False,
        cache="cache",
        _send=send,
    )
    if trains:
        assert hosts._run_part(0, "round 3", None, None, []) == trains
    else:
        with pytest.raises(RunFailed, match="hostC: no space left; no other host is left"):
            hosts._run_part(0, "round 3", None, None, [])
    assert hosts.dead_hosts.keys() == given_up
    assert hosts._run_part(1, "round 3", None, None, []) == "hostB"
