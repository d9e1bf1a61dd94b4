"""Other machines, by ssh and rsync: what is asked of them and sent there, and what goes wrong.

A host needs sshd, a python3, rsync, and Linux on x86-64; nothing is installed there by hand. It
gets TFF's worker, once, and the shards of its own clients. OpenSSH brings authentication,
encryption and the end of what it started. The way to the worker is a Unix socket on both sides, so
no port is open to a network.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.fields import UserError

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
]
ALONE = "-oClearAllForwardings=yes"  # those of the user's own configuration
CONNECT_SECONDS = 30
OLDEST_GLIBC = (2, 29)
# What is asked of a host, in its own Python; it answers with a line of JSON: what is wrong, or
# nothing.
PROBE = """
import ctypes, json, os, platform, shutil, sys
folder, oldest, wrong = sys.argv[1], tuple(map(int, sys.argv[2].split("."))), ""
try:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        wrong = "cannot write %s; choose another --workers-cache" % os.path.abspath(folder)
except OSError as error:
    wrong = "cannot make %s (%s); choose another --workers-cache"
    wrong = wrong % (os.path.abspath(folder), error.strerror)
name, version = platform.libc_ver()
if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    wrong = "is %s on %s; TFF's worker needs Linux on x86-64" % (sys.platform, platform.machine())
elif name != "glibc" or tuple(map(int, version.split(".")[:2])) < oldest:
    wrong = "has %s %s; TFF's worker needs glibc %s or later"
    wrong = wrong % (name or "no glibc", version, sys.argv[2])
elif shutil.which("rsync") is None:
    wrong = "has no rsync; install it there"
elif ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x40000000):
    wrong = ("forbids network namespaces, without which others there could reach TFF's worker; "
             "allow them (sysctl kernel.unprivileged_userns_clone=1 or user.max_user_namespaces), "
             "or leave the host out")
print(json.dumps(wrong))
"""
REFUSALS = {  # words of ssh's, and the cure; the first that is found counts
    "Could not resolve hostname": (
        "its name does not resolve; check it, or give it an address in ~/.ssh/config"
    ),
    "Connection refused": (
        "no sshd answers there (connection refused); start it, or name its port in ~/.ssh/config"
    ),
    "REMOTE HOST IDENTIFICATION HAS CHANGED": (
        "its host key has changed; see that it is the right machine, then `ssh-keygen -R {host}`"
    ),
    "Host key verification failed": (
        "its host key is not known here; run `ssh {host}` once by hand and compare it"
    ),
    "Permission denied": (
        "it does not let us in (permission denied), and no password is ever asked for; "
        "`ssh-copy-id {host}`, or load the key into ssh-agent"
    ),
    "timed out": (
        "it does not answer (timed out); see that it is up, and that no firewall stands between"
    ),
    "No route to host": "there is no way to it (no route to host); see that it is up",
    "open failed": (
        "its sshd forwards no Unix sockets; set AllowStreamLocalForwarding yes in its sshd_config"
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
                f"workers={names!r:.60}: {host!r:.40} is no host's name; give names as ssh knows "
                "them, such as localhost,hostA,me@hostB (ports and the like stand in "
                "~/.ssh/config)"
            )
    return hosts


def check_folder(path: str) -> str:
    """Return the folder on the hosts.

    Raises UserError if a shell there might read it as something else.
    """
    if not re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*", path):
        raise UserError(
            f"workers_cache={path!r:.60} is not a plain path; choose letters, digits, and . _ - / "
            "(a relative one begins at the home folder there)"
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
        return f"{host}: {line}; allow network namespaces there, or leave the host out"
    if line.startswith("cannot start"):
        return f"{host}: {line}; choose a --workers-cache from which programs may run"
    if line.startswith("cannot keep"):
        return f"{host}: {line}; remove it there, in case it is damaged, and it is sent again"
    return f"{host}: {line}"


def ask(host: str, code: str, *words: str) -> str:
    """Return what Python `code` prints on the host.

    Raises UserError, in one line, where it cannot be run there.
    """
    command = [
        *SSH,
        ALONE,
        "--",
        host,
        shlex.join(["python3", "-ISc", 'exec(__import__("sys").stdin.read())', *words]),
    ]
    try:
        done = subprocess.run(
            command, input=code, capture_output=True, text=True, timeout=CONNECT_SECONDS
        )
    except FileNotFoundError as error:
        raise UserError(
            "workers needs ssh, which is not installed here; install openssh-client"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{host}: {REFUSALS['timed out']}") from error
    if done.returncode == 127 or "python3: not found" in done.stderr:
        raise UserError(f"{host}: it has no python3; install one there, any version will do")
    if done.returncode:
        raise UserError(
            explain(host, done.stderr) or f"{host}: ssh ended with status {done.returncode}"
        )
    return done.stdout


def check(host: str, cache: str) -> None:
    """Raise UserError, in one line that names the host and the cure, where it cannot run TFF's
    worker."""
    answer = ask(host, PROBE, cache, ".".join(map(str, OLDEST_GLIBC))).strip().splitlines()
    try:
        wrong = json.loads(answer[-1])
    except (ValueError, IndexError) as error:
        said = " ".join(answer)[:80]
        raise UserError(
            f"{host}: its python3 answered {said!r}; see that `ssh {host} python3` works"
        ) from error
    if wrong:
        raise UserError(
            f"{host} {wrong}"
            if wrong.startswith(("is ", "has ", "forbids "))
            else f"{host}: {wrong}"
        )


def send(
    host: str, source: Path, names: Sequence[str], target: str, checked: bool = False
) -> Iterator[int]:
    """Copy the files `names` of the folder `source` into `target` on the host; yield the bytes of
    those done so far.

    What is there already stays; `checked` compares contents, not only sizes and times. Raise
    UserError where it fails.
    """
    ssh = shlex.join([*SSH, ALONE])
    flags = [
        "-rptW",
        "-s",
        "--files-from=-",
        "--info=progress2",
        "--outbuf=N",
        "--no-inc-recursive",
    ]
    command = [
        "rsync",
        *flags,
        *(["-c"] if checked else []),
        "-e",
        ssh,
        "--",
        f"{source}/",
        f"{host}:{target}/",
    ]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise UserError("workers needs rsync, which is not installed here; install it") from error
    try:
        # where it has ended, its own words say why
        with (
            contextlib.suppress(BrokenPipeError),
            process.stdin as pipe,
        ):
            pipe.write("\n".join(names).encode() + b"\n")
        text = b""
        while part := process.stdout.read1(4096):
            text = (text + part)[-200:]
            if found := re.findall(rb"([\d,]+)\s+\d+%", text):
                yield int(found[-1].replace(b",", b""))
        words = process.stderr.read().decode(errors="replace")
        if process.wait():
            said = explain(host, words) or f"{host}: rsync ended with status {process.returncode}"
            raise UserError(
                f"{said}; see that there is room in {target} there" if "No space" in words else said
            )
    finally:
        process.kill()
        process.wait()


def supervisor_command(
    host: str, socket: str, text_bytes: int, clients_at_once: int, cache: str
) -> list[str]:
    """Return the words that start TFF's worker and its supervisor on the host.

    The Unix socket `socket` here leads there. The supervisor's text, of so many bytes, and then a
    byte now and then, are read from standard input.
    """
    socket_there = f"/tmp/fl-{secrets.token_hex(8)}/socket"
    code = f'exec(__import__("sys").stdin.buffer.read({text_bytes}))'
    words = ["0", socket_there, "./worker_binary", "yes", str(clients_at_once), cache]
    return [
        *SSH,
        "-oClearAllForwardings=no",
        "-oExitOnForwardFailure=yes",
        "-oStreamLocalBindMask=0177",
        "-L",
        f"{socket}:{socket_there}",
        "--",
        host,
        "exec " + shlex.join(["python3", "-ISc", code, *words]),
    ]
