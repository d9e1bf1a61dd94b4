"""TFF's worker, its C++ executor: a process whose life is ours, here or on another machine.

A round, or a host's part of one, is done again where its worker is lost.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import select
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

from harness import hosts, stopping
from harness.command_line import RunFailed, notice
from harness.fields import UserError
from harness.files import writing

import grpc
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

START_SECONDS = 30
ATTEMPTS = 3  # at a round, each on a fresh worker
WATCH = "watch over TFF's worker"  # a thread's name
NOT_INLINED = "_noinline"  # TensorFlow's attribute of a function that keeps its graph to itself
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # else localhost is dialled through the user's proxy
    ("grpc.client_idle_timeout_ms", 2**31 - 1),
]
# now: the file may be edited while a run goes on
GUARD = Path(__file__).with_name("guard.py").read_text("utf-8")


class WorkerLost(Exception):
    """TFF's worker ended, or hung and was ended, while it was needed. (TFF itself would ask it
    again, without end.)"""


class Unreachable(RunFailed):
    """A worker could not be started, here or on another machine."""


def serialize(computation: Any) -> bytes:
    """Return a computation as TFF writes it."""
    return tff.framework.serialize_computation(computation).SerializeToString()


def plain_sums(computation: Any) -> Any:
    """Return the computation with plain sums for secure ones, as TFF has no cryptography of its own
    to run them."""
    if b"federated_secure_sum" not in serialize(computation):
        return computation
    plain = tff.backends.test.replace_secure_intrinsics_with_bodies(computation)
    return tff.framework.ConcreteComputation.with_type(plain, computation.type_signature)


def compile_for_worker(computation: Any) -> Any:
    """Return TFF's native form of a computation.

    TFF's own way inlines every function, those NOT_INLINED too.
    """
    content = serialize(computation)
    computation = plain_sums(computation)
    if NOT_INLINED.encode() not in content:
        return tff.backends.native.desugar_and_transform_to_native(computation)
    backend = "tensorflow_federated.python.core.environments.tensorflow_backend"
    transformations = importlib.import_module(f"{backend}.tensorflow_tree_transformations")
    block, _ = transformations.replace_intrinsics_with_bodies(computation.to_building_block())
    grappler = tf.compat.v1.ConfigProto()
    options = grappler.graph_options.rewrite_options
    options.memory_optimization = options.constant_folding = options.AGGRESSIVE
    options.arithmetic_optimization = options.loop_optimization = options.AGGRESSIVE
    options.function_optimization = options.OFF
    plain = tff.framework.ConcreteComputation(
        computation_proto=block.proto, context_stack=tff.framework.get_context_stack()
    )
    return tff.backends.native.transform_to_native_form(plain, grappler_config=grappler)


class Stub(tff.framework.RemoteExecutorGrpcStub):
    """TFF's way to a worker. What is disposed of in one that has ended is gone already: no error,
    and no traceback.

    TFF disposes of values in finalizers, which run in whichever thread collects garbage. A thread
    that watches must not wait for the worker, which may be the one that hangs: what it finds stays
    there until the worker's end.
    """

    def dispose(self, request: Any) -> None:
        """Free values in the worker."""
        if threading.current_thread().name != WATCH:
            with contextlib.suppress(WorkerLost):
                super().dispose(request)

    def dispose_executor(self, request: Any) -> None:
        """Free all values of an executor in the worker."""
        if threading.current_thread().name != WATCH:
            with contextlib.suppress(WorkerLost):
                super().dispose_executor(request)


class Executor(tff.framework.RemoteExecutor):
    """Sends a computation once, where TFF sends it again for each call of it: 5 ms and 130 kB a
    round."""

    def __init__(self, stub: Stub, cardinalities: dict[Any, int]):
        super().__init__(stub)
        self.sent: dict[int, tuple[Any, Any]] = {}
        self.set_cardinalities({tff.CLIENTS: 0, **cardinalities})

    async def create_value(self, value: Any, type_spec: Any = None) -> Any:
        """Return the value in the worker."""
        if not isinstance(type_spec, tff.FunctionType):
            return await super().create_value(value, type_spec)
        if id(value) not in self.sent:
            self.sent[id(value)] = value, await super().create_value(value, type_spec)
        return self.sent[id(value)][1]


class Compiler:
    """compile_for_worker, once for each computation, whichever of several workers, or fresh ones,
    it is for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done: dict[
            int, tuple[Any, Any]
        ] = {}  # a computation stays, so that its id is no other's

    def __call__(self, computation: Any) -> Any:
        with self.lock:
            if id(computation) not in self.done:
                self.done[id(computation)] = computation, compile_for_worker(computation)
            return self.done[id(computation)][1]


def build_context(connect: Callable, compiler: Callable = compile_for_worker) -> Any:
    """Return TFF's native execution context with the executor that connect(cardinalities)
    returns."""
    return tff.framework.SyncExecutionContext(
        executor_fn=tff.framework.ResourceManagingExecutorFactory(connect),
        compiler_fn=compiler,
        transform_args=tff.tensorflow.transform_args,
        transform_result=tff.tensorflow.transform_result,
    )


def nowhere(cardinalities: dict[Any, int]) -> Any:
    """Refuse to run a TFF computation outside a worker of ours."""
    raise RuntimeError("TFF computations run inside `with Worker(...)`")


def replace_default_context() -> None:
    """Put a context that refuses in the place of TFF's own, which would start a worker that
    outlives us.

    TFF's also prints a traceback from its finalizer where it is still there when Python takes its
    modules apart.
    """
    tff.framework.set_default_context(build_context(nowhere))


atexit.register(replace_default_context)


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """Make a folder that only this user can enter, and give it a path that is short and plain,
    wherever it is.

    A socket's path has at most 107 characters, and gRPC reads `%`, `?` and `#` in it as a URL's.
    """
    with writing(Path(os.environ.get("TMPDIR", "/tmp"))):
        made = tempfile.TemporaryDirectory(prefix="fl-")
    with made as folder:
        descriptor = os.open(folder, os.O_PATH)
        try:
            yield f"/proc/{os.getpid()}/fd/{descriptor}"  # not self: ssh is given it too
        finally:
            os.close(descriptor)


def open_log(path: str | Path) -> Any:
    """Return the file that the worker prints to. Raise UserError where it cannot be written."""
    with writing(Path(path)):
        return os.fdopen(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666), "ab"
        )


class Worker(grpc.UnaryUnaryClientInterceptor):
    """TFF's worker as a context manager: TFF computations called inside run in it, and it never
    outlives us.

    `bytes_sent` and `bytes_received` count the messages to and from it. A worker that does nothing
    about a request for `patience` seconds of wall time is ended. WorkerLost is raised where it ends
    before its time. On another machine, `host`, it runs in `folder` there, to which worker and
    shards were sent; without one in `folder` here.
    """

    def __init__(
        self,
        clients_at_once: int,
        log: str | Path = os.devnull,
        patience: float = 60,
        host: str = hosts.HERE,
        folder: str | Path = "/",
        compiler: Compiler | None = None,
    ):
        self.clients_at_once = clients_at_once
        self.log = log
        self.patience = patience
        self.host = host
        self.folder = folder
        self.compiler = compiler or Compiler()
        self.bytes_sent = self.bytes_received = 0
        self.here = host == hosts.HERE
        self.name = "TFF's worker" if self.here else f"TFF's worker on {host}"
        self.process: subprocess.Popen | None = None
        self._requests: set[object] = set()  # those that wait for an answer

    def __enter__(self) -> Worker:
        self.open()
        self._installed = tff.framework.get_context_stack().install(self.context)
        self._installed.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        stopping.heard()
        # first: a worker still training after Ctrl-C would keep TFF's threads, and so our exit,
        # waiting
        self.end()
        self._installed.__exit__(*error)

    def open(self) -> None:
        """Start worker and guard.

        Raises RunFailed, or UserError for what the user must do on another machine.
        """
        self._reason = "ended"
        self._last_words = ""
        replace_default_context()
        try:
            channel = self._start(isolated=True)
        except PermissionError as error:
            notice(
                f"{error}: others on this machine's network can reach TFF's worker while it runs"
            )
            channel = self._start(isolated=False)
        self.stub = stub = Stub(channel)
        self.context = build_context(
            lambda cardinalities: Executor(stub, cardinalities), self.compiler
        )
        threading.Thread(
            target=self._watch, args=(self.process, self.pid), daemon=True, name=WATCH
        ).start()

    def round(
        self, what: str, process: Any, state: Any, groups: Sequence[np.ndarray]
    ) -> tuple[Any, Any, Any]:
        """Return what the process's `next` does with these groups of clients: a round."""
        return self.call(what, process.next, state, groups)

    def share(self, clients: Sequence[int]) -> list[Sequence[int]]:
        """Return the clients of each host, of which there is one."""
        return [clients]

    def wire(self) -> dict[str, None]:
        """Return the bytes that went to other hosts: there is none."""
        return {"wire_down": None, "wire_up": None}

    def call(self, what: str, function: Callable, *arguments: Any) -> Any:
        """Return function(*arguments), a TFF computation, done again on a fresh worker where that
        is lost.

        A round is a pure function of state and clients. Raises RunFailed, which names `what`, after
        three losses, or where the worker itself cannot.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self.invoke(what, function, *arguments)
            except WorkerLost as lost:
                if attempt == ATTEMPTS:
                    raise RunFailed(f"{what}: {lost}; {ATTEMPTS} times in this round") from lost
                notice(f"{what}: {lost}; doing the round again on a fresh one")
                self.end()
                self.open()
        raise AssertionError("unreachable")

    def invoke(self, what: str, function: Callable, *arguments: Any) -> Any:
        """Return function(*arguments), from any thread.

        Raises WorkerLost, or RunFailed for the worker's own error.
        """
        try:
            with tff.framework.get_context_stack().install(self.context):
                return function(*arguments)
        except (
            grpc.RpcError
        ) as error:  # the worker's own error, such as a shard file that it cannot read
            reason = error.details().partition("\n")[0].removeprefix("Failed to run computation: ")
            raise RunFailed(f"{what}: {self.name} cannot train: {reason}") from error

    def _start(self, isolated: bool) -> grpc.Channel:
        """Start guard and worker, and return a channel to them that is open."""
        with private_folder() as folder, socket.socket(socket.AF_UNIX) as door:
            if self.here:
                door.bind(f"{folder}/door")
                door.listen()
                binary = Path(tff.__file__).parent / "data" / "worker_binary"
                words = [
                    str(os.getpid()),
                    str(door.fileno()),
                    str(binary),
                    "yes" if isolated else "",
                ]
                command = [
                    sys.executable,
                    "-ISc",
                    GUARD,
                    *words,
                    str(self.clients_at_once),
                    str(self.folder),
                ]
            else:
                command = hosts.guard_command(
                    self.host, f"{folder}/door", GUARD, self.clients_at_once, self.folder
                )
            with open_log(self.log) as log:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL if self.here else subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log if self.here else subprocess.PIPE,
                    pass_fds=[door.fileno()],
                    start_new_session=True,  # the terminal's Ctrl-C comes to us alone
                )
            try:
                if not self.here:
                    threading.Thread(
                        target=self._keep_alive, args=(self.process,), daemon=True, name=WATCH
                    ).start()
                    self._words = threading.Thread(
                        target=self._keep_words, args=(self.process,), daemon=True, name=WATCH
                    )
                    self._words.start()
                self.pid = self._wait_until_ready()
                channel = grpc.insecure_channel(f"unix:{folder}/door", CHANNEL_OPTIONS)
                self._wait_until_open(channel)
            except BaseException:
                self.process.kill()
                self.process.wait()
                raise
        # The folder is gone now: nobody else gets in. The channel is never closed: TFF's stub
        # subscribes to it, and closing prints an error from gRPC's thread.
        return grpc.intercept_channel(channel, self)

    def _wait_until_ready(self) -> int:
        """Return the worker's process id, as the guard tells it once the worker answers."""
        poll = select.poll()  # unlike select, it takes any file descriptor
        poll.register(self.process.stdout, select.POLLIN)
        line = (
            self.process.stdout.readline().decode().strip()
            if poll.poll(1000 * START_SECONDS)
            else ""
        )
        if line.startswith("cannot isolate") and self.here:
            raise PermissionError(line)
        if not line.isdigit():
            if not self.here:
                self._words.join(1)  # they may be on their way
                said = (
                    hosts.explain_guard(self.host, line)
                    if line
                    else hosts.explain(self.host, self._last_words)
                )
                if said:
                    raise Unreachable(said)
            raise Unreachable(f"{self.name} did not start{line and f': {line}'}; see {self.log}")
        return int(line)

    def _wait_until_open(self, channel: grpc.Channel) -> None:
        """Return once gRPC has a connection.

        Raises RunFailed, at once where ssh says that it forwards nothing.
        """
        ready = grpc.channel_ready_future(channel)
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                return ready.result(0.25)
            except grpc.FutureTimeoutError as error:
                if "open failed" in self._last_words:
                    raise UserError(hosts.explain(self.host, self._last_words)) from error
                if time.monotonic() > end or self.process.poll() is not None:
                    raise Unreachable(
                        f"{self.name} did not answer in {START_SECONDS} s; see {self.log}"
                    ) from error

    @property
    def ended(self) -> bool:
        """Whether there is no worker now."""
        return self.process is None or self.process.poll() is not None

    def end(self) -> None:
        """End worker and guard, if they run."""
        if self.process is None:
            return
        if not self.ended:
            with contextlib.suppress(OSError):
                if self.here:
                    os.kill(self.pid, signal.SIGKILL)
                else:
                    # the guard ends the worker, and ssh ends with the guard
                    self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)  # the guard ends with the worker
        self.process.kill()
        self.process.wait()

    def intercept_unary_unary(self, continuation: Callable, details: Any, request: Any) -> Any:
        """See every request to the worker: count its bytes, and end the wait for a worker that has
        ended."""
        self.bytes_sent += request.ByteSize()
        self._requests.add(request_id := object())
        try:
            call = continuation(details, request)
        finally:
            self._requests.discard(request_id)
        if call.code() is not grpc.StatusCode.OK:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
                raise WorkerLost(f"{self.name} {self._reason}; see {self.log}")
        else:
            self.bytes_received += call.result().ByteSize()
        return call

    def _watch(self, process: subprocess.Popen, pid: int) -> None:
        """End a worker that spends no processor time on a request for `patience` seconds."""
        spent = b""
        since = time.monotonic()
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while process.poll() is None:
            # a guard that says nothing makes no headway
            ticks = process.stdout.readline() if poll.poll(500) else spent
            if not ticks:
                return
            if ticks != spent or not self._requests:
                spent = ticks
                since = time.monotonic()
            elif time.monotonic() - since > self.patience:
                self._reason = f"hung for {self.patience:g} s and was ended"
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid if self.here else process.pid, signal.SIGKILL)

    def _keep_alive(self, process: subprocess.Popen) -> None:
        """Tell a guard on another machine, again and again, that we are there."""
        with contextlib.suppress(OSError, ValueError):  # it has ended, or we have
            process.stdin.write(GUARD.encode())
            while process.poll() is None:
                process.stdin.write(b".")
                process.stdin.flush()
                time.sleep(hosts.HEARTBEAT)

    def _keep_words(self, process: subprocess.Popen) -> None:
        """Copy to the log what ssh and the worker on the other machine say, and keep the last
        lines."""
        with contextlib.suppress(OSError), open_log(self.log) as log:
            for line in process.stderr:
                log.write(line)
                log.flush()
                self._last_words = (self._last_words + line.decode(errors="replace"))[-2000:]
