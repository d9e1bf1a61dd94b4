"""Other machines over ssh and rsync: requests, transfers, and error messages.

A host needs sshd, a python3, rsync, and Linux on x86-64; nothing is installed there by hand. It
gets TFF's worker, once, and the shards of its own clients. OpenSSH brings authentication,
encryption and the end of what it started. The way to the worker is a Unix socket on both sides, so
no port is open to a network.
"""

from __future__ import annotations

import collections
import json
import math
import re
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.cli.fields import UserError
from harness.engine.child import Child
from harness.engine.supervisor import MARK

HERE = "localhost"
HEARTBEAT = 5.0  # seconds between two bytes to a supervisor; after four times that we are gone
SSH = [
    "ssh",
    "-T",
    "-oBatchMode=yes",
    "-oConnectTimeout=10",
    "-oControlPath=none",
    "-oControlMaster=no",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
    "-oForwardAgent=no",
    "-oForwardX11=no",
    # What the user's own configuration may say of these would hide errors, or take our command's
    # place. An older ssh does not know the last three.
    "-oLogLevel=INFO",
    "-oRemoteCommand=none",
    "-oIgnoreUnknown=ForkAfterAuthentication,SessionType,StdinNull",
    "-oForkAfterAuthentication=no",
    "-oSessionType=default",
    "-oStdinNull=no",
]
ALONE = "-oClearAllForwardings=yes"  # those of the user's own configuration
CONNECT_SECONDS = 30
LINES_KEPT = 100  # of what a host answers
OLDEST_GLIBC = (2, 29)
PROBE = Path(__file__).with_name("probe.py")
REFUSALS = {  # words of ssh's or rsync's, and the cure; the first that is found counts
    "is your shell clean": (
        "the login shell on that host prints text, which corrupts rsync's protocol; make "
        "~/.bashrc there print in interactive shells only (`ssh {host} true` must print nothing)"
    ),
    "Could not resolve hostname": (
        "its name does not resolve; check the name, or add an address to ~/.ssh/config"
    ),
    "Connection refused": (
        "no sshd is listening (connection refused); start it, or set its port in ~/.ssh/config"
    ),
    "REMOTE HOST IDENTIFICATION HAS CHANGED": (
        "its host key has changed; check that it is the right machine, then run `ssh-keygen -R "
        "{host}`"
    ),
    "Host key verification failed": (
        "its host key is unknown; run `ssh {host}` once by hand and compare it"
    ),
    "Permission denied": (
        "it refuses the login (permission denied), and passwords are never asked for; run "
        "`ssh-copy-id {host}`, or load the key into ssh-agent"
    ),
    "timed out": (
        "it does not answer (timed out); check that it is up and that no firewall blocks ssh"
    ),
    "No route to host": "there is no route to it (no route to host); check that it is up",
    "open failed": (
        "its sshd does not forward Unix sockets; set AllowStreamLocalForwarding yes in its "
        "sshd_config"
    ),
}


def read_hosts(names: str) -> tuple[str, ...]:
    """Return the host names in `workers`, commas between.

    Raises UserError for one that is not plain.
    """
    hosts = tuple(name.strip() for name in names.split(","))
    for host in hosts:
        if not re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*", host):
            raise UserError(
                f"workers={names!r:.60}: {host!r:.40} is not a valid host name; give names as ssh "
                "knows them, such as localhost,hostA,me@hostB (set ports and the like in "
                "~/.ssh/config)"
            )
    return hosts


def check_folder(path: str) -> str:
    """Return the folder on the hosts.

    Raises UserError if a shell there might read it as something else.
    """
    if not re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*", path):
        raise UserError(
            f"workers_cache={path!r:.60} is not a plain path; use letters, digits, and . _ - / (a "
            "relative path starts at the home folder on the host)"
        )
    return path


def explain(host: str, words: str) -> str:
    """Return what ssh said, as one line that names the host and the cure."""
    for said, cure in REFUSALS.items():
        if said in words:
            return f"{host}: {cure.format(host=host)}"
    lines = [
        line
        for line in words.splitlines()
        if line.strip() and not line.startswith("Warning: Permanently added")
    ]
    return f"{host}: {lines[-1].strip()}" if lines else ""


def explain_supervisor(host: str, line: str) -> str:
    """Return what the supervisor on a host could not do, with the cure."""
    if line.startswith("cannot isolate"):
        return f"{host}: {line}; allow network namespaces there, or remove the host"
    if line.startswith("cannot start") and "format" in line:
        return f"{host}: {line}; it may be damaged: remove it there, and it is sent again"
    if line.startswith("cannot start"):
        return f"{host}: {line}; choose a --workers-cache on a file system that allows executables"
    if line.startswith("cannot keep"):
        return f"{host}: {line}; it may be damaged: remove it there, and it is sent again"
    if line.startswith("cannot"):
        return f"{host}: {line}"
    return f"{host}: unexpected output {line!r:.80}; check that `ssh {host} python3` works"


def ask(host: str, code: str, *words: str, patience: float = 0.0) -> list[str]:
    """Return the last lines that Python `code` prints on the host.

    Raises UserError, in one line, where it cannot be run there, within CONNECT_SECONDS or
    `patience` if that is longer.
    """
    limit = max(CONNECT_SECONDS, patience)
    python = ["python3", "-ISc", 'exec(__import__("sys").stdin.read())', *words]
    deadline = time.monotonic() + limit
    lines: collections.deque[str] = collections.deque(maxlen=LINES_KEPT)
    try:
        with Child([*SSH, ALONE, "--", host, shlex.join(python)], code.encode()) as child:
            for line in child.read_lines(limit):
                lines.append(line.decode(errors="replace"))
                if time.monotonic() > deadline:
                    raise TimeoutError
            status = child.wait(max(deadline - time.monotonic(), 1))
    except FileNotFoundError as error:
        raise UserError(
            "--workers needs ssh, which is not installed on this machine; install openssh-client"
        ) from error
    except TimeoutError as error:
        raise UserError(f"{host}: {REFUSALS['timed out']}") from error
    words_said = child.words.decode(errors="replace")
    if status == 127 or "python3: not found" in words_said:
        raise UserError(f"{host}: python3 is not installed; install any version there")
    if status:
        raise UserError(explain(host, words_said) or f"{host}: ssh exited with status {status}")
    return list(lines)


class HostFolder(NamedTuple):
    """The folder for worker and shards on a host."""

    path: str  # absolute, without links
    binary: str  # the SHA-256 of the worker that is there, or an empty text


def check(host: str, cache: str, patience: float = 0.0) -> HostFolder:
    """Make the folder `cache` on the host, and return what is there.

    Raises UserError, in one line that names the host and the cure, where it cannot run TFF's
    worker. Its file is read there, which a slow disk may take longer for than CONNECT_SECONDS: then
    `patience` seconds count.
    """
    oldest = ".".join(map(str, OLDEST_GLIBC))
    lines = ask(host, PROBE.read_text("utf-8"), MARK, cache, oldest, patience=patience)
    # What else a login prints there does not count.
    marked = [line for line in lines if line.startswith(MARK)]
    try:
        answer = json.loads(marked[-1].removeprefix(MARK))
        wrong = answer["wrong"]
        folder = HostFolder(answer["folder"], answer["binary"])
        if not all(isinstance(text, str) for text in (wrong, *folder)):
            raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        said = " ".join(" ".join(lines).split())[:80]
        raise UserError(
            f"{host}: python3 answered {said!r}; check that `ssh {host} python3` works"
        ) from error
    if wrong:
        raise UserError(
            f"{host} {wrong}"
            if wrong.startswith(("is ", "has ", "does ", "forbids "))
            else f"{host}: {wrong}"
        )
    try:
        check_folder(folder.path)
    except UserError as error:
        raise UserError(f"{host}: {error}") from error
    return folder


def send(
    host: str, source: Path, names: Sequence[str], target: str, patience: float
) -> Iterator[int]:
    """Copy the files `names` of the folder `source` into `target` on the host; yield the bytes of
    those done so far.

    A file whose content is there already stays. On the host only we may read them. Raise UserError
    where it fails, or nothing comes for `patience` seconds.
    """
    command = [
        "rsync",
        "-rptWcs",
        "--chmod=D0700,Fgo-rwx",
        f"--timeout={math.ceil(patience)}",
        "--files-from=-",
        "--info=progress2",
        "--outbuf=N",
        "--no-inc-recursive",
        "-e",
        shlex.join([*SSH, ALONE]),
        "--",
        f"{source}/",
        f"{host}:{target}/",
    ]
    try:
        with Child(command, "\n".join(names).encode() + b"\n") as child:
            for line in child.read_lines(patience):
                if found := re.match(rb"\s*([\d,]+)\s+\d+%", line):
                    yield int(found[1].replace(b",", b""))
            status = child.wait(patience)
    except FileNotFoundError as error:
        raise UserError(
            "--workers needs rsync, which is not installed on this machine; install it"
        ) from error
    except TimeoutError as error:
        raise UserError(
            f"{host}: rsync made no progress for {patience:g} s; check that the host is up and "
            f"that {target} is writable there, or raise --patience"
        ) from error
    if status:
        words = child.words.decode(errors="replace")
        if "Permission denied (13)" in words and "[sender]" not in words:  # a file's there
            raise UserError(
                f"{host}: cannot write into {target} (permission denied); make it yours and "
                "writable there, or choose another --workers-cache"
            )
        said = explain(host, words) or f"{host}: rsync exited with status {status}"
        raise UserError(
            f"{said}; check that {target} has free space there" if "No space" in words else said
        )


def supervisor_command(
    host: str, socket: str, text_bytes: int, clients_at_once: int, cache: str
) -> list[str]:
    """Return the command that starts TFF's worker and its supervisor on the host.

    The Unix socket `socket` here leads to the worker. The supervisor reads its own source, of a
    given length, from standard input, and then a byte now and then.
    """
    socket_there = f"/tmp/fl-{secrets.token_hex(8)}/socket"
    code = f'exec(__import__("sys").stdin.buffer.read({text_bytes}))'
    words = ["0", socket_there, "./worker_binary", "yes", str(clients_at_once), cache]
    return [
        *SSH,
        "-oClearAllForwardings=no",
        # The user's own forwards may fail, as where another ssh has them; ours is waited for.
        "-oExitOnForwardFailure=no",
        "-oStreamLocalBindMask=0177",
        "-L",
        f"{socket}:{socket_there}",
        "--",
        host,
        "exec " + shlex.join(["python3", "-ISc", code, *words]),
    ]
