"""TFF's side of a worker: how computations are compiled for it, sent and run."""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import importlib
import threading
from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

# A private module: TensorFlow's public functions switch AutoGraph off inside, but not on again.
from tensorflow.python.autograph.core import ag_ctx

STOP_SECONDS = 5
WATCH = "watch over TFF's worker"  # a thread's name
NOT_INLINED = "_noinline"  # TensorFlow's attribute of a function that keeps its graph to itself


class WorkerLost(Exception):
    """TFF's worker ended, or hung and was ended, while it was needed.

    TFF itself would ask it again, without end.
    """


class NotRetried(Exception):
    """An error of the worker after which TFF would repeat the request without end."""


def serialize(computation: Any) -> bytes:
    """Return a computation as TFF writes it."""
    return tff.framework.serialize_computation(computation).SerializeToString()


def without_autograph(optimizer: tff.learning.optimizers.Optimizer) -> Any:
    """Return a TFF optimizer whose next() AutoGraph leaves as it is, which saves 0.2 s."""
    unconverted = copy.copy(optimizer)
    unconverted.next = tf.autograph.experimental.do_not_convert(optimizer.next)
    return unconverted


def usual_autograph() -> Any:
    """Return a context in which AutoGraph is as outside functions that are not to be converted."""
    return ag_ctx.ControlStatusCtx(ag_ctx.Status.UNSPECIFIED, None)


def convert(method: Any) -> Any:
    """Return the method, converted by AutoGraph: an `if` on a tensor works in it everywhere.

    What AutoGraph cannot convert runs as it is, such as a method of `python -c`, which has no text.
    """
    enabled = ag_ctx.ControlStatusCtx(ag_ctx.Status.ENABLED)
    return tf.__internal__.autograph.tf_convert(method, enabled)


def with_autograph(optimizer: tff.learning.optimizers.Optimizer) -> Any:
    """Return a TFF optimizer whose next() is converted, though a step that calls it is not."""
    converted = copy.copy(optimizer)
    converted.next = convert(optimizer.next)
    return converted


def plain_sums(computation: Any) -> Any:
    """Return the computation with plain sums for secure ones, as TFF has no cryptography of its own
    to run them."""
    if b"federated_secure_sum" not in serialize(computation):
        return computation
    plain = tff.backends.test.replace_secure_intrinsics_with_bodies(computation)
    return tff.framework.ConcreteComputation.with_type(plain, computation.type_signature)


def compile_for_worker(computation: Any) -> Any:
    """Return TFF's native form of a computation.

    TFF's own desugar_and_transform_to_native inlines every function, those NOT_INLINED too, and
    lets Grappler optimize the graph twice, which takes 0.1 s more and gains nothing here. It also
    saves memory by computing cheap tensors again, of which Grappler makes graphs that cannot run
    where a layer has a loop, such as an LSTM.
    """
    backend = "tensorflow_federated.python.core.environments.tensorflow_backend"
    transformations = importlib.import_module(f"{backend}.tensorflow_tree_transformations")
    block, _ = transformations.replace_intrinsics_with_bodies(
        plain_sums(computation).to_building_block()
    )
    grappler = tf.compat.v1.ConfigProto()
    options = grappler.graph_options.rewrite_options
    options.memory_optimization = options.NO_MEM_OPT
    options.constant_folding = options.AGGRESSIVE
    options.arithmetic_optimization = options.loop_optimization = options.AGGRESSIVE
    has_functions = NOT_INLINED.encode() in serialize(computation)
    options.function_optimization = options.OFF if has_functions else options.AGGRESSIVE
    options.meta_optimizer_iterations = options.ONE
    plain = tff.framework.ConcreteComputation(
        computation_proto=block.proto, context_stack=tff.framework.get_context_stack()
    )
    return tff.backends.native.transform_to_native_form(plain, grappler_config=grappler)


class Stub(tff.framework.RemoteExecutorGrpcStub):
    """TFF's stub for a worker. Disposing of a value never fails, even if the worker has ended.

    TFF disposes of values in finalizers, which run in whichever thread collects garbage. A thread
    that watches must not wait for the worker, which may be the one that hangs: what it finds stays
    there until the worker's end.
    """

    def dispose(self, request: Any) -> None:
        """Free values in the worker."""
        if threading.current_thread().name != WATCH:
            with contextlib.suppress(WorkerLost, NotRetried):
                super().dispose(request)

    def dispose_executor(self, request: Any) -> None:
        """Free all values of an executor in the worker."""
        if threading.current_thread().name != WATCH:
            with contextlib.suppress(WorkerLost, NotRetried):
                super().dispose_executor(request)


class Executor(tff.framework.RemoteExecutor):
    """Sends a computation once. TFF sends it again for each call of it: 5 ms and 130 kB a round."""

    def __init__(self, stub: Stub, cardinalities: dict[Any, int]):
        super().__init__(stub)
        # By the id of a computation, which stays here so that its id is no other's.
        self.values: dict[int, tuple[Any, Any]] = {}
        self.set_cardinalities({tff.CLIENTS: 0, **cardinalities})

    async def create_value(self, value: Any, type_spec: Any = None) -> Any:
        """Return the value in the worker."""
        if not isinstance(type_spec, tff.FunctionType):
            return await super().create_value(value, type_spec)
        if id(value) not in self.values:
            self.values[id(value)] = value, await super().create_value(value, type_spec)
        return self.values[id(value)][1]


class Compiler:
    """compile_for_worker, once for each computation, whichever of several workers needs it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.compiled: dict[int, tuple[Any, Any]] = {}  # by id, as in Executor

    def __call__(self, computation: Any) -> Any:
        with self.lock:
            if id(computation) not in self.compiled:
                self.compiled[id(computation)] = computation, compile_for_worker(computation)
            return self.compiled[id(computation)][1]


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


def stop_context(context: Any) -> None:
    """End the thread and close the event loop of a context of ours; TFF never does."""
    runner = context._async_runner
    runner._event_loop.call_soon_threadsafe(runner._event_loop.stop)
    runner._thread.join(STOP_SECONDS)
    if not runner._thread.is_alive():
        runner._event_loop.close()
        runner._finalizer = lambda *_: None  # it would wake the loop that is closed


@functools.cache
def refusing_context() -> Any:
    """Return a context in which nothing can be run; one for this process, as it has a thread."""
    return build_context(nowhere)


def replace_default_context() -> None:
    """Put a context that refuses in the place of TFF's own, which would start a worker that
    outlives us.

    TFF's also prints a traceback from its finalizer where it is still there when Python takes its
    modules apart.
    """
    tff.framework.set_default_context(refusing_context())


atexit.register(replace_default_context)
