"""A round over several hosts: TFF's own engine on each, the partial sums merged here, in the hosts'
order.

TFF's compiler splits a round into three: what each host does for its own clients up to the merge,
the merge of two partial results, and what the server does after it. (TFF's ready-made context for
this merges in the order of finishing, so that no run repeats, and splits clients by count, so that
nobody can say who trains where.)
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from harness import hosts, stopping
from harness.command_line import RunFailed, notice, say
from harness.fields import UserError
from harness.worker import ATTEMPTS, Compiler, Unreachable, Worker, WorkerLost, plain_sums

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
import tqdm

PAUSE = 2.0  # seconds before a host that is lost is tried again


class Hosts:
    """Workers on several hosts, and one here for what the server does: in the place of one Worker,
    and like it.

    Client k belongs to the host k % n of the n named. A host's part of a round is done again where
    its worker is lost; one that is gone for good is left out, and another takes its clients over,
    in the same place of the sums.
    """

    def __init__(
        self,
        options: Any,
        clients_at_once: int,
        log: str | Path,
        shards: Path,
        clients: int,
        rows_for: Callable,
    ):
        """`options` are the run's, `clients` all; rows_for(ids) int64[r] are the rows of memory
        that these need."""
        names = options.hosts
        patience = options.patience
        cache = options.workers_cache
        self.names = names
        self.cache = cache
        self.shards = shards
        self.clients = clients
        self.rows_for = rows_for
        self.home = Worker(1, log, patience)
        compiler = Compiler()
        each = -(-clients_at_once // len(names))
        folders = [shards.parent if name == hosts.HERE else cache for name in names]
        self.workers = [
            Worker(each, log, patience, name, folder, compiler)
            for name, folder in zip(names, folders, strict=True)
        ]
        self.doing = list(range(len(names)))  # the host that does each part
        # a host that has taken another's clients over does them after
        self.locks = [threading.Lock() for _ in names]
        self.gone: set[str] = set()  # hosts
        self.handing = threading.Lock()
        self.counted = [0, 0]
        self.form: tuple[Any, Form] | None = None
        self.over = False

    def __enter__(self) -> Hosts:
        others = sorted({name for name in self.names if name != hosts.HERE})
        self.pool = concurrent.futures.ThreadPoolExecutor(len(self.names))
        self.home.__enter__()
        try:
            list(self.pool.map(hosts.check, others, [self.cache] * len(others)))
            for name in others:
                parts = [part for part, owner in enumerate(self.names) if owner == name]
                self._send(name, parts)
            list(self.pool.map(Worker.open, self.workers))
        except Unreachable as error:
            self.__exit__(None, None, None)
            raise UserError(
                str(error)
            ) from error  # before anything trains it is for the user to mend
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        stopping.heard()
        self.over = True  # from now on no worker is started again
        for worker in self.workers:
            worker.end()
        self.pool.shutdown(cancel_futures=True)
        for worker in self.workers:  # one that was just about to be
            worker.end()
        self.home.__exit__(*error)

    def _send(self, name: str, parts: Sequence[int]) -> None:
        """Send TFF's worker and the shards of these parts' clients to another host, where they are
        not there yet."""
        own = [
            f"{self.shards.name}/{k}.bin"
            for k in range(self.clients)
            if k % len(self.names) in parts
        ]
        data = Path(tff.__file__).parent / "data"
        folder = self.shards.parent
        paths = [data / "worker_binary", *(folder / shard for shard in own)]
        with Sending(name, sum(path.stat().st_size for path in paths)) as progress:
            progress.follow(hosts.send(name, data, ["worker_binary"], self.cache))
            if own:
                progress.follow(hosts.send(name, folder, own, self.cache, checked=True))
        say(
            f"{name}: TFF's worker and {len(own):,} shards are there, {progress.sent / 1e6:,.1f} "
            "MB sent"
        )

    def share(self, clients: Sequence[int]) -> list[list[int]]:
        """Return the clients of each host."""
        return [
            [k for k in clients if k % len(self.names) == part] for part in range(len(self.names))
        ]

    def call(self, what: str, function: Callable, *arguments: Any) -> Any:
        """Return function(*arguments), a TFF computation of the server's alone."""
        return self.home.call(what, function, *arguments)

    def round(
        self, what: str, process: Any, state: Any, groups: Sequence[np.ndarray]
    ) -> tuple[Any, Any, Any]:
        """Return what the process's `next` does with these groups of clients, none of which spans
        two hosts."""
        form = self._split(process.next)
        parts: dict[int, list[np.ndarray]] = {}
        for group in groups:
            parts.setdefault(int(group[0]) % len(self.names) if len(group) else 0, []).append(group)
        futures = [
            self.pool.submit(
                self._part,
                part,
                what,
                form.up_to_merge,
                self._need(state, parts[part]),
                parts[part],
            )
            for part in sorted(parts)
        ]
        for done in concurrent.futures.as_completed(futures):
            done.result()  # an error does not wait for the slowest host
        partial_results = [future.result() for future in futures]

        def merge(first: Any, second: Any) -> Any:
            return self.home.call(what, form.merge, first, second)

        return self.home.call(what, form.after_merge, (state, []), reduce(merge, partial_results))

    def wire(self) -> dict[str, int]:
        """Return the bytes of all messages to and from the hosts since the last call, those of
        repeats too."""
        now = [sum(w.bytes_sent for w in self.workers), sum(w.bytes_received for w in self.workers)]
        before = self.counted
        self.counted = now
        return {"wire_down": now[0] - before[0], "wire_up": now[1] - before[1]}

    def _split(self, computation: Any) -> Form:
        """Return the form of a process's `next`, made once."""
        if self.form is None or self.form[0] is not computation:
            self.form = computation, split(computation)
        return self.form[1]

    def _need(self, state: Any, groups: Sequence[np.ndarray]) -> Need:
        """Return what these clients need of the server's state."""
        work = state.client_work
        clients = np.concatenate(groups)
        places = np.asarray(self.rows_for(clients) if len(work.memory) else [], np.int64)
        return Need(
            state.global_model_weights,
            work.round,
            places,
            np.asarray(work.memory)[places],
            state.aggregator,
        )

    def _part(
        self, part: int, what: str, function: Callable, need: Need, groups: Sequence[np.ndarray]
    ) -> Any:
        """Return the partial result of a host's clients, in a thread of its own.

        Raises RunFailed without any host.
        """
        lost = 0
        while True:
            place = self.doing[part]
            worker = self.workers[place]
            if worker.host in self.gone:
                self._hand_over(part, f"{what}: {worker.host} is gone")
                continue
            try:
                with self.locks[place]:
                    if worker.ended and not self.over:
                        if not lost:  # between two rounds
                            notice(
                                f"{what}: {worker.name} ended; see {worker.log}; starting a fresh "
                                "one"
                            )
                        worker.open()
                    return worker.invoke(what, function, need, groups)
            except (WorkerLost, Unreachable, UserError) as error:
                lost += 1
                if self.over:
                    raise
                if lost < ATTEMPTS:
                    notice(f"{what}: {error}; doing its part again")
                    time.sleep(PAUSE if isinstance(error, Unreachable) else 0)
                    continue
                self._hand_over(part, f"{what}: {error}; {ATTEMPTS} times in this round")
                lost = 0

    def _hand_over(self, part: int, why: str) -> None:
        """Give the part of a host that is gone for good to the next that is not.

        Raises RunFailed where none is.
        """
        with self.handing:
            self.gone.add(self.names[self.doing[part]])
            for step in range(1, len(self.names)):
                place = (part + step) % len(self.names)
                if self.names[place] in self.gone:
                    continue
                notice(f"{why}; {self.names[place]} gets its clients' shards, and takes them over")
                try:
                    if self.names[place] != hosts.HERE:
                        self._send(self.names[place], [part])
                except UserError as error:
                    self.gone.add(self.names[place])
                    why = str(error)
                    continue
                self.doing[part] = place
                return
        raise RunFailed(f"{why}; and no other host is left")


class Sending:
    """A live display of the bytes that go to a host, on stderr; nothing where that is no
    terminal."""

    def __init__(self, host: str, most: int):
        self.bar = tqdm.tqdm(
            desc=f"to {host}", total=most, unit="B", unit_scale=True, leave=False, disable=None
        )
        self.sent = 0

    def __enter__(self) -> Sending:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def follow(self, sending: Iterator[int]) -> None:
        """Show what one transfer has sent so far, after those before it."""
        before = done = 0
        for done in sending:
            self.bar.update(done - before)
            before = done
        self.sent += done


def start_workers(
    options: Any,
    clients_at_once: int,
    clients: int,
    rows_for: Callable,
    log: str | Path = os.devnull,
    shards: Path | None = None,
) -> Worker | Hosts:
    """Return the worker, or the hosts, that the options `workers` name, a context manager; they
    write to `log`.

    Hosts are sent those of the `shards` that are their clients'; rows_for(ids) says what of the
    memory these need.
    """
    if options.alone:
        return Worker(clients_at_once, log, options.patience)
    if shards is None:
        raise UserError(f"workers={options.workers!r:.60} need the folder of the clients' shards")
    return Hosts(options, clients_at_once, log, shards, clients, rows_for)


class Need(NamedTuple):
    """What a host gets of the state: not the server's moments, and of the algorithm's memory its
    clients' rows."""

    weights: Any  # TFF's ModelWeights
    round: Any
    places: Any  # int64[r] of the rows
    rows: Any  # float32[r,d]
    aggregator: Any


class Form(NamedTuple):
    """A round in three: up_to_merge(Need, groups) on each host, then merge(a, b) and
    after_merge((state, []), all)."""

    up_to_merge: Any
    merge: Any
    after_merge: Any


def zeros(kind: Any) -> Any:
    """Return zeros of a TFF type, in a graph."""
    if isinstance(kind, tff.TensorType):
        return tf.zeros(kind.shape, kind.dtype)
    parts = [(name, zeros(inner)) for name, inner in tff.structure.iter_elements(kind)]
    return OrderedDict(parts) if parts and parts[0][0] else tuple(part for _, part in parts)


def split(computation: Any) -> Form:
    """Return a process's `next` in TFF's mergeable form; the state that its first part sees is made
    of a Need."""
    form = tff.backends.native.compile_to_mergeable_comp_form(plain_sums(computation))
    state_type, groups_type = form.up_to_merge.type_signature.parameter
    member = state_type.member
    memory = member.client_work.memory
    work = member.client_work
    any_rows = tff.TensorType(memory.dtype, [None, memory.shape[1]])
    places = tff.TensorType(np.int64, [None])
    needed = tff.to_type(
        Need(member.global_model_weights, work.round, places, any_rows, member.aggregator)
    )

    @tff.tensorflow.computation(needed)
    def rebuild(need):
        rows = (
            tf.scatter_nd(need.places[:, tf.newaxis], need.rows, memory.shape)
            if memory.shape[0]
            else need.rows
        )
        clients = OrderedDict(round=need.round, memory=tf.ensure_shape(rows, memory.shape))
        return OrderedDict(
            global_model_weights=need.weights,
            distributor=(),
            client_work=clients,
            aggregator=need.aggregator,
            finalizer=zeros(member.finalizer),
        )

    @tff.federated_computation(tff.FederatedType(needed, tff.SERVER), groups_type)
    def up_to_merge(need, groups):
        return form.up_to_merge(tff.federated_map(rebuild, need), groups)

    return Form(up_to_merge, form.merge, form.after_merge)
