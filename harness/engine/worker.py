"""TFF's worker: its C++ executor, a process that we start and end, here or on another machine.

A round, or a host's part of one, is retried if its worker is lost.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.cli.command_line import RunFailed
from harness.cli.fields import UserError
from harness.cli.output import warn
from harness.engine import ssh, stopping
from harness.engine.child import LONGEST_LINE, WORDS_KEPT, LineReader
from harness.engine.execution import (
    WATCH,
    Compiler,
    Executor,
    NotRetried,
    Stub,
    WorkerLost,
    build_context,
    replace_default_context,
    stop_context,
)
from harness.engine.supervisor import MARK
from harness.storage.files import briefly, io_errors_as_user_errors

import grpc
import numpy as np
import tensorflow_federated as tff

START_SECONDS = 30
ATTEMPTS = 3  # at a round, each on a fresh worker
MOST_LOGGED = 10_000_000  # bytes of what a host prints
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # else localhost is dialled through the user's proxy
    ("grpc.client_idle_timeout_ms", 2**31 - 1),
    # A later worker may have the address of an earlier one, whose connection is in its back-off.
    ("grpc.use_local_subchannel_pool", 1),
]
SUPERVISOR = Path(__file__).with_name("supervisor.py")


class NotIsolated(Exception):
    """This machine forbids the namespaces in which nobody else reaches the worker."""


class Unreachable(RunFailed):
    """A worker could not be started, here or on another machine."""


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """Make a folder that only this user can enter, and give it a path that is short and plain,
    wherever it is.

    A socket's path has at most 107 characters, and gRPC reads `%`, `?` and `#` in it as a URL's.
    """
    with io_errors_as_user_errors(Path(os.environ.get("TMPDIR", "/tmp"))):
        made = tempfile.TemporaryDirectory(prefix="fl-")
    with made as folder:
        descriptor = os.open(folder, os.O_PATH)
        try:
            yield f"/proc/{os.getpid()}/fd/{descriptor}"  # not self: ssh is given it too
        finally:
            os.close(descriptor)


def listen_at(path: str) -> socket.socket:
    """Return a Unix socket that listens at `path`. Raises Unreachable where there can be none."""
    try:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
    except OSError as error:
        raise Unreachable(
            f"cannot reach TFF's worker: Unix sockets cannot be created here ({briefly(error)}); "
            "allow them, or use another machine"
        ) from error
    return listener


def open_log(path: str | Path) -> Any:
    """Return the file that the worker prints to. Raises UserError if it cannot be written."""
    with io_errors_as_user_errors(Path(path)):
        return os.fdopen(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666), "ab"
        )


class Worker(grpc.UnaryUnaryClientInterceptor):
    """TFF's worker as a context manager: TFF computations that are called inside run in it.

    It never outlives us. `bytes_sent` and `bytes_received` count the messages to and from it. A
    worker that makes no progress with a request for `patience` seconds is ended. WorkerLost is
    raised if it ends before its time. A subclass says how it is started and ended.
    """

    name: str

    def __init__(
        self,
        clients_at_once: int,
        log: str | Path = os.devnull,
        patience: float = 60,
        compiler: Compiler | None = None,
    ):
        """`log` is where the worker prints to."""
        self.clients_at_once = clients_at_once
        self.log = log
        self.patience = patience
        self.compiler = compiler or Compiler()
        self.bytes_sent = 0
        self.bytes_received = 0
        self.process: subprocess.Popen | None = None  # the supervisor, or ssh to it
        self.pid = 0  # of the worker
        self.context: Any = None
        self._channel: grpc.Channel | None = None
        self._requests: set[object] = set()  # those that wait for an answer

    def spawn(self, folder: str, isolated: bool) -> None:
        """Start supervisor and worker, so that a connection to `folder`/socket leads to it."""
        raise NotImplementedError

    def kill(self) -> None:
        """End the worker, at once, from any thread or signal handler."""
        raise NotImplementedError

    def explain_start(self, line: str) -> Exception:
        """Return the error for a supervisor that printed `line` and not a process id."""
        raise NotImplementedError

    def __enter__(self) -> Worker:
        self._exit_stack = contextlib.ExitStack()
        self._exit_stack.enter_context(stopping.ended_by_request(self.kill))
        try:
            self.open()
            self._exit_stack.enter_context(tff.framework.get_context_stack().install(self.context))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        # The worker first: while it trains on, TFF's threads, and so our exit, would wait for it.
        self.end()
        self._exit_stack.close()
        self.release()

    def release(self) -> None:
        """Close the way to a worker that has ended: its event loop, thread and connection."""
        if self.context:
            stop_context(self.context)
            self.context = None
        if self._channel:
            self._channel.close()
            self._channel = None

    def open(self) -> None:
        """Start the worker. Raises RunFailed, or UserError for what the user must do elsewhere."""
        self._reason = "ended"
        self.release()
        replace_default_context()
        stub = Stub(self._connect())
        self.stub = stub
        self.context = build_context(
            lambda cardinalities: Executor(stub, cardinalities), self.compiler
        )
        arguments = (self.process, self.lines)
        threading.Thread(target=self._watch, args=arguments, daemon=True, name=WATCH).start()

    def assign(self, clients: Sequence[int]) -> list[Sequence[int]]:
        """Return the clients of each host, of which there is one."""
        return [clients]

    def run_round(
        self, name: str, process: Any, state: Any, chunks: Sequence[np.ndarray]
    ) -> tuple[Any, Any, Any]:
        """Return process.next(state, chunks)."""
        return self.call(name, process.next, state, chunks)

    def measured_bytes(self) -> dict[str, None]:
        """Return the bytes that went to other hosts: there is none."""
        return {"measured_bytes_down": None, "measured_bytes_up": None}

    def call(self, name: str, function: Callable, *arguments: Any) -> Any:
        """Return function(*arguments), a TFF computation, on a fresh worker if one is lost.

        It must be a pure function of its arguments, as a round is. Raises RunFailed, which names
        it, after three losses or if the worker itself cannot.
        """
        for attempt in range(1, ATTEMPTS + 1):
            stopping.raise_if_requested()
            try:
                return self.invoke(name, function, *arguments)
            except WorkerLost as lost:
                stopping.raise_if_requested()
                if attempt == ATTEMPTS:
                    raise RunFailed(f"{name}: {lost}; {ATTEMPTS} failures in this round") from lost
                warn(f"{name}: {lost}; retrying the round on a new one")
                self.end()
                self.open()
        raise AssertionError("unreachable")

    def invoke(self, name: str, function: Callable, *arguments: Any) -> Any:
        """Return function(*arguments), from any thread.

        Raises WorkerLost, or RunFailed for the worker's own error.
        """
        try:
            with tff.framework.get_context_stack().install(self.context):
                return function(*arguments)
        except (grpc.RpcError, NotRetried) as error:  # such as a shard file that it cannot read
            details = str(error) if isinstance(error, NotRetried) else error.details()
            reason = (details or "").partition("\n")[0]
            reason = reason.removeprefix("Failed to run computation: ")
            raise RunFailed(f"{name}: {self.name} cannot train: {reason}") from error

    def _connect(self, isolated: bool = True) -> grpc.Channel:
        """Start the worker and return an open channel to it."""
        self.pid = 0  # a lost worker's may be another process's by now
        with private_folder() as folder:
            self.spawn(folder, isolated)
            self.lines = LineReader(self.process.stdout)
            try:
                self.pid = self._wait_until_ready()
                channel = grpc.insecure_channel(f"unix:{folder}/socket", CHANNEL_OPTIONS)
                self._channel = channel
                self._wait_until_open(channel)
            except BaseException:
                self.process.kill()
                self.process.wait()
                self.release()
                raise
        # The folder is gone now: nobody else gets in.
        intercepted = grpc.intercept_channel(channel, self)
        # TFF's stub would have a thread of gRPC's look at the connection for ever, which prints an
        # error when the channel is closed. Whether the worker is there, the supervisor tells us.
        intercepted.subscribe = lambda callback, *_, **__: callback(grpc.ChannelConnectivity.READY)
        return intercepted

    def _wait_until_ready(self) -> int:
        """Return the worker's process id, which the supervisor prints once the worker answers."""
        deadline = time.monotonic() + self.start_seconds
        said = ""
        with contextlib.suppress(EOFError):
            while (left := deadline - time.monotonic()) > 0:
                line = self.lines.read(left) or b""
                said = line.decode(errors="replace").strip() or said
                if said.startswith(MARK):
                    said = said.removeprefix(MARK)
                    if re.fullmatch("[0-9]{1,9}", said):
                        return int(said)
                    break
        raise self.explain_start(said)

    def _wait_until_open(self, channel: grpc.Channel) -> None:
        """Return once gRPC has a connection. Raises RunFailed if there is none in time."""
        ready = grpc.channel_ready_future(channel)
        deadline = time.monotonic() + self.start_seconds
        while True:
            try:
                return ready.result(0.25)
            except grpc.FutureTimeoutError as error:
                self.check_connection()
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise Unreachable(
                        f"{self.name} did not answer in {self.start_seconds:g} s; see {self.log}"
                    ) from error

    @property
    def start_seconds(self) -> float:
        """How long its start may take; its file may come from a slow disk."""
        return max(START_SECONDS, self.patience)

    def check_connection(self) -> None:
        """Raise UserError if it is known already that no connection will come."""

    @property
    def ended(self) -> bool:
        """Whether the worker has ended, or was never started."""
        return self.process is None or self.process.poll() is not None

    def end(self) -> None:
        """End worker and supervisor, if they run, and wait for it."""
        if self.process is None:
            return
        if not self.ended:
            self.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)  # the supervisor ends with the worker
        self.process.kill()
        self.process.wait()

    def intercept_unary_unary(self, continuation: Callable, details: Any, request: Any) -> Any:
        """Count the bytes of every request, and end the wait for a worker that has ended."""
        process = self.process
        self.bytes_sent += request.ByteSize()
        self._requests.add(request_id := object())
        try:
            call = continuation(details, request)
        finally:
            self._requests.discard(request_id)
        if call.code() is not grpc.StatusCode.OK:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
                raise WorkerLost(f"{self.name} {self._reason}; see {self.log}")
            self._refuse_retries(call, process)
        else:
            self.bytes_received += call.result().ByteSize()
        return call

    def _refuse_retries(self, call: Any, process: subprocess.Popen) -> None:
        """Raise for the errors after which TFF would repeat a request without end.

        From a `process` of our own, which lives, they never mean "try again": WorkerLost if its
        connection is gone, NotRetried for an error of the computation.
        """
        if call.code() is grpc.StatusCode.UNAVAILABLE:
            if process is self.process:
                self.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            raise WorkerLost(f"{self.name} lost its connection; see {self.log}")
        if call.code() is grpc.StatusCode.FAILED_PRECONDITION:
            raise NotRetried(call.details() or "a precondition failed")

    def _watch(self, process: subprocess.Popen, lines: LineReader) -> None:
        """End a worker that spends no processor time on a request for `patience` seconds.

        The supervisor prints the time that it has spent. One that says nothing makes no progress.
        """
        spent = b""
        since = time.monotonic()
        with process.stdout, contextlib.suppress(EOFError):
            while process.poll() is None:
                spent_now = lines.read(0.5)
                if spent_now not in (None, spent) or not self._requests:
                    spent = spent_now or spent
                    since = time.monotonic()
                elif time.monotonic() - since > self.patience:
                    self._reason = f"hung for {self.patience:g} s and was ended"
                    if process is self.process:
                        self.kill()


class LocalWorker(Worker):
    """A worker on this machine, whose paths begin at `folder`."""

    name = "TFF's worker"
    host = ssh.HERE

    def __init__(self, *arguments: Any, folder: str | Path = "/", **options: Any):
        super().__init__(*arguments, **options)
        self.folder = folder

    def spawn(self, folder: str, isolated: bool) -> None:
        """Start the supervisor from its file, with a listening socket that it inherits."""
        binary = Path(tff.__file__).parent / "data" / "worker_binary"
        with listen_at(f"{folder}/socket") as listener, open_log(self.log) as log:
            words = [os.getpid(), listener.fileno(), binary, "yes" if isolated else ""]
            words += [self.clients_at_once, self.folder]
            self.process = subprocess.Popen(
                [sys.executable, "-IS", str(SUPERVISOR), *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # the terminal's Ctrl-C comes to us alone
            )

    def _connect(self, isolated: bool = True) -> grpc.Channel:
        try:
            return super()._connect(isolated)
        except NotIsolated as error:
            warn(
                f"{error}: other users of this machine's network can reach TFF's worker during "
                "the run"
            )
            return super()._connect(isolated=False)

    def explain_start(self, line: str) -> Exception:
        """Return NotIsolated if the machine forbids namespaces, else Unreachable."""
        if line.startswith("cannot isolate"):
            return NotIsolated(line)
        reason = f": {line}" if line else ""
        return Unreachable(f"{self.name} did not start{reason}; see {self.log}")

    def kill(self) -> None:
        """Kill the worker's own process and its supervisor, each of which would end with the other,
        unless it is stopped."""
        if self.ended:
            return
        for pid in filter(None, (self.pid, self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class RemoteWorker(Worker):
    """A worker on another machine, over ssh, in `folder` there.

    Worker and shards have been sent there.
    """

    def __init__(self, host: str, folder: str, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.host = host
        self.folder = folder
        self.name = f"TFF's worker on {host}"
        self._ssh_words = b""  # the last that ssh and the worker there have printed

    def spawn(self, folder: str, isolated: bool) -> None:
        """Start ssh; the supervisor's text, and then a sign of life, go to its standard input."""
        text = SUPERVISOR.read_text("utf-8")
        command = ssh.supervisor_command(
            self.host, f"{folder}/socket", len(text.encode()), self.clients_at_once, self.folder
        )
        self._ssh_words = b""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        keep_alive = threading.Thread(
            target=self._keep_alive, args=(self.process, text), daemon=True, name=WATCH
        )
        self._copier = threading.Thread(
            target=self._copy_words, args=(self.process,), daemon=True, name=WATCH
        )
        keep_alive.start()
        self._copier.start()

    def explain_start(self, line: str) -> Exception:
        """Return Unreachable with the reason and the cure, as far as ssh or the supervisor said."""
        self._copier.join(1)  # what ssh says may be on its way
        if line:
            reason = ssh.explain_supervisor(self.host, line)
        else:
            reason = ssh.explain(self.host, self._ssh_words.decode(errors="replace"))
        return Unreachable(reason or f"{self.name} did not start; see {self.log}")

    def check_connection(self) -> None:
        """Raise UserError if ssh says that it forwards nothing."""
        words = self._ssh_words.decode(errors="replace")
        if "open failed" in words:
            raise UserError(ssh.explain(self.host, words))

    def kill(self) -> None:
        """End ssh: the supervisor there loses its standard input, and ends the worker."""
        if not self.ended:
            self.process.kill()

    def end(self) -> None:
        """Close the supervisor's standard input, wait until it has ended the worker, end ssh."""
        if not self.ended:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        super().end()

    def _keep_alive(self, process: subprocess.Popen, text: str) -> None:
        """Send the supervisor its text, and then again and again that we are there."""
        with contextlib.suppress(OSError, ValueError):  # it has ended, or we have
            process.stdin.write(text.encode())
            while process.poll() is None:
                process.stdin.write(b".")
                process.stdin.flush()
                time.sleep(ssh.HEARTBEAT)

    def _copy_words(self, process: subprocess.Popen) -> None:
        """Copy to the log what ssh and the worker there print, to a limit, and keep the last."""
        copied = 0
        with contextlib.suppress(OSError, ValueError), process.stderr, open_log(self.log) as log:
            while part := os.read(process.stderr.fileno(), LONGEST_LINE):
                self._ssh_words = (self._ssh_words + part)[-WORDS_KEPT:]
                if copied < MOST_LOGGED:
                    log.write(part)
                    log.flush()
                copied += len(part)
