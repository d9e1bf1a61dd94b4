"""Other machines for tests: network namespaces of this one, each with its own sshd, folder, and
link to us."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import tensorflow_federated as tff

NEEDED = ("ssh", "sshd", "ssh-keygen", "rsync", "ip", "unshare")
# What a user's own configuration may ask for.
PERSONAL = """LocalForward 127.0.0.1:47113 127.0.0.1:22
RemoteForward 127.0.0.1:47113 127.0.0.1:22
LogLevel QUIET
RemoteCommand echo instead
RequestTTY force
ForwardX11 yes
StdinNull yes
ForkAfterAuthentication yes
"""
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def why_not() -> str:
    """Why there can be no other machines here; nothing where there can."""
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.getuid() != 0:
        return "network namespaces with links between them are made by root alone"
    done = subprocess.run(
        [tool("ip"), "netns", "add", f"fl-try-{os.getpid()}"], capture_output=True, text=True
    )
    if done.returncode:
        return f"no network namespaces here: {done.stderr.strip()}"
    subprocess.run([tool("ip"), "netns", "delete", f"fl-try-{os.getpid()}"], check=True)
    return ""


def tool(name: str) -> str:
    return shutil.which(name, path=PATH)


def ip(*words: str) -> None:
    subprocess.run([tool("ip"), *words], check=True)


class Machine:
    """A network namespace with an sshd, where `there` is a folder of its own and Python's
    environment is hidden."""

    def __init__(self, folder: Path, name: str, number: int):
        self.folder = folder
        self.name = name
        self.number = number
        self.space = f"fl{os.getpid()}-{number}"
        self.link = f"fl{os.getpid() % 100000}v{number}"
        # another run has another
        net = f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 60 * 4 + number}"
        self.gateway = f"{net}.1"
        self.address = f"{net}.2"
        self.own = folder / f"on-{name}"  # what the machine sees as `there`
        self.own.mkdir()

    def make(self) -> None:
        """The namespace and its link."""
        ip("netns", "add", self.space)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        ip("addr", "add", f"{self.gateway}/24", "dev", self.link)
        ip("link", "set", self.link, "up")
        ip("-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.space, "link", "set", "eth0", "up")
        ip("-n", self.space, "link", "set", "lo", "up")

    def start(self, *settings: str, noexec: bool = False) -> None:
        """Start its sshd, with more lines of sshd_config; Python's environment is hidden there."""
        lines = [
            f"ListenAddress {self.address}",
            "Port 22",
            f"HostKey {self.folder}/host_key",
            "PidFile none",
            f"AuthorizedKeysFile {self.folder}/user_key.pub",
            "StrictModes no",
            "UsePAM no",
            f"SetEnv PATH={PATH}",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "MaxStartups 100",
            *settings,
        ]
        config = self.folder / f"sshd_config_{self.name}"
        config.write_text("\n".join(lines) + "\n")
        Path("/run/sshd").mkdir(exist_ok=True)
        hidden = {sys.prefix, str(Path(tff.__file__).parent)}
        mounts = "".join(
            f"mount -t tmpfs none {path}; " for path in sorted(hidden, key=len, reverse=True)
        )
        there = self.folder / "there"
        bind = f"mount --bind {self.own} {there}; mount -o remount,bind,{'no' * noexec}exec {there}"
        script = f"set -e; {mounts} {bind}; exec {tool('sshd')} -D -e -f {config}"
        self.log = (self.folder / f"sshd_{self.name}.log").open("ab")
        apart = [
            tool("ip"),
            "netns",
            "exec",
            self.space,
            tool("unshare"),
            "-m",
            "--propagation",
            "private",
        ]
        self.sshd = subprocess.Popen(
            [*apart, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        wait_for_port(self)

    def stop(self) -> None:
        """End its sshd, and whatever runs there."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.sshd.kill()
        self.sshd.wait()
        self.log.close()

    def remove(self) -> None:
        ip("netns", "delete", self.space)

    def link_bytes(self) -> tuple[int, int]:
        """Bytes that its link has taken from us, and brought, so far."""
        statistics = Path("/sys/class/net") / self.link / "statistics"
        return tuple(int((statistics / f"{way}_bytes").read_text()) for way in ("tx", "rx"))

    def cut(self) -> None:
        ip("link", "set", self.link, "down")

    def mend(self) -> None:
        ip("link", "set", self.link, "up")

    def processes(self, name: str = "") -> list[psutil.Process]:
        """The processes below its sshd, those whose command names `name`."""
        found = []
        for process in psutil.Process(self.sshd.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def shards(self) -> list[str]:
        """The names of the shard files that it holds."""
        return sorted(path.name for path in self.own.rglob("*.bin"))


def wait_for_port(machine: Machine) -> None:
    """Returns once the machine's sshd answers."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            return socket.create_connection((machine.address, 22), 1).close()
        except OSError:
            time.sleep(0.05)
    raise AssertionError(Path(machine.log.name).read_text())


@contextlib.contextmanager
def machines(folder: Path, *names: str) -> Iterator[tuple[list[Machine], dict[str, str]]]:
    """Yields machines of these names and the environment in which `ssh NAME` reaches them; ends and
    removes them."""
    for key in ("host_key", "user_key"):
        subprocess.run(
            [tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)],
            check=True,
        )
    (folder / "there").mkdir()
    made = [Machine(folder, name, number) for number, name in enumerate(names, 1)]
    public = (folder / "host_key.pub").read_text().rpartition(" ")[0]
    (folder / "known_hosts").write_text(
        "".join(f"{machine.address} {public}\n" for machine in made)
    )
    common = f"User {getpass.getuser()}\nIdentityFile {folder}/user_key\nIdentitiesOnly yes\n"
    common += (
        f"UserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile "
        "none\nStrictHostKeyChecking yes\n"
    )
    text = "".join(f"Host {machine.name}\nHostName {machine.address}\n{common}" for machine in made)
    text += f"Host closed\nHostName {made[0].address}\nPort 9\n{common}"
    other = (folder / "user_key.pub").read_text().rpartition(" ")[0]  # not the machine's
    (folder / "other_hosts").write_text(f"{made[0].address} {other}\n")
    changed = common.replace("/known_hosts", "/other_hosts")
    text += f"Host changed\nHostName {made[0].address}\n{changed}"
    text += f"Host personal\nHostName {made[0].address}\n{common}{PERSONAL}"
    (folder / "ssh_config").write_text(text)
    (folder / "bin").mkdir()
    # ssh reads the configuration of the account's home, wherever HOME points
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {tool("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    up = []
    try:
        for machine in made:
            up.append(machine)
            machine.make()
            machine.start()
        yield made, {"PATH": f"{folder}/bin:{PATH}"}
    finally:
        for machine in up:
            with contextlib.suppress(Exception):
                machine.stop()
            with contextlib.suppress(Exception):
                machine.remove()
