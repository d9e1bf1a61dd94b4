"""Rounds over several hosts: TFF's engine on each, with the partial sums merged here, in order.

TFF's compiler splits a round into three: what each host does for its clients up to the merge, the
merge of two partial results, and what the server does after it. (TFF's ready-made context for this
merges in the order of finishing, so that no run repeats, and splits the clients by count, so that
nobody can say who trains where.)
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.command_line import RunFailed
from harness.cli.fields import UserError
from harness.cli.output import print_line, warn
from harness.engine import child, probe, ssh, stopping
from harness.engine.execution import Compiler, WorkerLost, plain_sums
from harness.engine.worker import ATTEMPTS, LocalWorker, RemoteWorker, Unreachable, Worker

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
import tqdm

PAUSE = 2.0  # seconds before a host that was lost is tried again, at first
LONGEST_PAUSE = 15.0
GIVEN_UP = 600.0  # seconds before a host that was given up is asked whether it is back


class MultiHost:
    """Workers on several hosts, and one here for the server, in place of a single Worker.

    Client k belongs to host k % n of n. A host's part of a round is retried if its worker is lost;
    if a host does not answer for `patience` seconds, another one takes over its part, in the same
    place of the sums, until the host is back.
    """

    def __init__(self, experiment: Any, clients_at_once: int, log: str | Path):
        """`experiment` has the configuration, the algorithm, the shards, and what is on hosts."""
        run = experiment.config.run
        self.names = run.hosts
        self.cache = run.workers_cache
        self.folders: dict[str, ssh.HostFolder] = experiment.host_folders
        self.patience = run.patience
        self.shards = experiment.shard_folder
        self.num_clients = experiment.config.partitioning.num_clients
        self.memory = experiment.parts.memory
        self.server_worker = LocalWorker(1, log, run.patience)
        clients_each = -(-clients_at_once // len(self.names))
        compiler = Compiler()
        self.workers: list[Worker] = []
        for name in self.names:
            arguments = (clients_each, log, run.patience, compiler)
            if name == ssh.HERE:
                self.workers.append(LocalWorker(*arguments, folder=self.shards.parent))
            else:
                self.workers.append(RemoteWorker(name, self.folders[name].path, *arguments))
        self.owner_of_part = list(range(len(self.names)))  # the worker that does each part
        # A host that has taken another's part over does one after the other.
        self.locks = [threading.Lock() for _ in self.names]
        self.handing_over = threading.Lock()
        self.dead_hosts: dict[str, float] = {}  # name -> the monotonic() at which it was given up
        self.bytes_before = (0, 0)  # sent and received up to the last call of measured_bytes
        self.split_round: tuple[Any, SplitRound] | None = None
        self.closing = False

    def __enter__(self) -> MultiHost:
        self.pool = concurrent.futures.ThreadPoolExecutor(len(self.names))
        self.request = stopping.ended_by_request(self.kill)
        self.request.__enter__()
        try:
            self.server_worker.__enter__()
            for name, folder in self.folders.items():
                parts = [part for part, owner in enumerate(self.names) if owner == name]
                self._send(name, parts, folder)
            list(self.pool.map(Worker.open, self.workers))
        except Unreachable as error:  # before anything trains, it is for the user to mend
            self.__exit__(None, None, None)
            raise UserError(str(error)) from error
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.closing = True  # from now on no worker is started again
        for worker in self.workers:
            worker.end()
        child.end_all()
        self.pool.shutdown(cancel_futures=True)
        for worker in self.workers:  # one that was just about to be started
            worker.end()
            worker.release()
        self.server_worker.__exit__(*error)
        self.request.__exit__(None, None, None)

    def kill(self) -> None:
        """End the hosts' workers at once."""
        for worker in self.workers:
            worker.kill()

    def _send(self, name: str, parts: Sequence[int], folder: ssh.HostFolder) -> None:
        """Send TFF's worker and the shards of these parts' clients to another host, into `folder`.

        What is there already stays.
        """
        clients = [k for k in range(self.num_clients) if k % len(self.names) in parts]
        shards = [f"{self.shards.name}/{client}.bin" for client in clients]
        data = Path(tff.__file__).parent / "data"
        to_send = {self.shards.parent: shards}
        if folder.binary != hash_worker(data):
            to_send[data] = [probe.BINARY]
        total = sum(
            (source / file).stat().st_size for source, files in to_send.items() for file in files
        )
        with SendProgress(name, total) as progress:
            for source, files in to_send.items():
                if files:
                    progress.follow(ssh.send(name, source, files, folder.path, self.patience))
        print_line(
            f"{name}: TFF's worker and {len(shards)} shards in place, "
            f"{progress.sent / 1e6:,.1f} MB sent"
        )

    def assign(self, clients: Sequence[int]) -> list[list[int]]:
        """Return the clients of each host."""
        num_hosts = len(self.names)
        return [[k for k in clients if k % num_hosts == part] for part in range(num_hosts)]

    def call(self, name: str, function: Callable, *arguments: Any) -> Any:
        """Return function(*arguments), a TFF computation of the server alone."""
        return self.server_worker.call(name, function, *arguments)

    def run_round(
        self, name: str, process: Any, state: Any, chunks: Sequence[np.ndarray]
    ) -> tuple[Any, Any, Any]:
        """Return process.next(state, chunks); no chunk spans two hosts."""
        self._take_back_hosts(name)
        stages = self._split(process.next)
        chunks_of_part: dict[int, list[np.ndarray]] = {}
        for chunk in chunks:
            part = int(chunk[0]) % len(self.names) if len(chunk) else 0
            chunks_of_part.setdefault(part, []).append(chunk)
        futures = []
        for part in sorted(chunks_of_part):
            own = chunks_of_part[part]
            host_input = self._host_input(state, own)
            futures.append(
                self.pool.submit(self._run_part, part, name, stages.up_to_merge, host_input, own)
            )
        for done in concurrent.futures.as_completed(futures):
            done.result()  # an error does not wait for the slowest host
        partial_results = [future.result() for future in futures]

        def merge(first: Any, second: Any) -> Any:
            return self.call(name, stages.merge, first, second)

        return self.call(
            name, stages.after_merge, (state, []), functools.reduce(merge, partial_results)
        )

    def measured_bytes(self) -> dict[str, int]:
        """Return the bytes of all messages to and from the hosts since the last call."""
        sent = sum(worker.bytes_sent for worker in self.workers)
        received = sum(worker.bytes_received for worker in self.workers)
        sent_before, received_before = self.bytes_before
        self.bytes_before = (sent, received)
        return {
            "measured_bytes_down": sent - sent_before,
            "measured_bytes_up": received - received_before,
        }

    def _split(self, next_round: Any) -> SplitRound:
        """Return a process's `next` in three stages, made once."""
        if self.split_round is None or self.split_round[0] is not next_round:
            self.split_round = next_round, split(next_round)
        return self.split_round[1]

    def _host_input(self, state: Any, chunks: Sequence[np.ndarray]) -> HostInput:
        """Return what a host needs of the server's state for these clients."""
        algorithm_state = state.client_work
        slots: Any = []
        if self.memory:
            slots = self.memory.slots_of(np.concatenate(chunks))
        slots = np.asarray(slots, np.int64)
        return HostInput(
            weights=state.global_model_weights,
            round=algorithm_state.round,
            slots=slots,
            memory=np.asarray(algorithm_state.memory)[slots],
            aggregator=state.aggregator,
        )

    def _run_part(
        self,
        part: int,
        name: str,
        up_to_merge: Callable,
        host_input: HostInput,
        chunks: Sequence[np.ndarray],
    ) -> Any:
        """Return the partial result of a host's clients, in a thread of its own.

        Raises RunFailed if no host is left.
        """
        losses = 0
        away_since = None
        while True:
            owner = self.owner_of_part[part]
            worker = self.workers[owner]
            if worker.host in self.dead_hosts:
                self._hand_over(part, f"{name}: {worker.host} is gone")
                continue
            try:
                with self.locks[owner]:
                    if self.closing or stopping.requested:
                        raise WorkerLost(f"{worker.name} is no longer needed")
                    if worker.ended:
                        if not losses:  # between two rounds
                            warn(
                                f"{name}: {worker.name} exited; see {worker.log}; starting a new "
                                "one"
                            )
                        worker.open()
                    return worker.invoke(name, up_to_merge, host_input, chunks)
            except (WorkerLost, Unreachable, UserError) as error:
                losses += 1
                if self.closing or stopping.requested:
                    raise
                now = time.monotonic()
                away_since = (away_since or now) if isinstance(error, Unreachable) else None
                if losses < ATTEMPTS or (away_since and now - away_since < self.patience):
                    if losses < ATTEMPTS:  # then it waits in silence
                        warn(f"{name}: {error}; retrying its part")
                    self._pause(min(PAUSE * losses, LONGEST_PAUSE) if away_since else 0)
                    continue
                self._hand_over(part, f"{name}: {error}; {losses} failures in this round")
                losses = 0
                away_since = None

    def _pause(self, seconds: float) -> None:
        """Wait, but not for longer than we are needed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (self.closing or stopping.requested):
            time.sleep(0.1)

    def _take_back_hosts(self, round_name: str) -> None:
        """Give hosts that are back the parts that are theirs."""
        for host, since in list(self.dead_hosts.items()):
            if time.monotonic() - since < GIVEN_UP or self.closing or stopping.requested:
                continue
            parts = [part for part, name in enumerate(self.names) if name == host]
            try:
                if host != ssh.HERE:
                    self._send(host, parts, ssh.check(host, self.cache))
            except UserError:
                self.dead_hosts[host] = time.monotonic()
                continue
            warn(f"{round_name}: {host} is back, and trains its clients again")
            del self.dead_hosts[host]
            for part in parts:
                self.owner_of_part[part] = part

    def _hand_over(self, part: int, why: str) -> None:
        """Give the part of a dead host to the next one. Raises RunFailed if none is left."""
        with self.handing_over:
            self.dead_hosts.setdefault(self.names[self.owner_of_part[part]], time.monotonic())
            for step in range(1, len(self.names)):
                owner = (part + step) % len(self.names)
                name = self.names[owner]
                if name in self.dead_hosts:
                    continue
                warn(f"{why}; {name} receives its clients' shards and takes over")
                try:
                    if name != ssh.HERE:
                        self._send(name, [part], ssh.check(name, self.cache, self.patience))
                except UserError as error:  # as where its disk is full: it may train its own part
                    if self.closing or stopping.requested:
                        raise
                    why = str(error)
                    continue
                self.owner_of_part[part] = owner
                return
        raise RunFailed(f"{why}; no other host is left")


hash_worker = functools.cache(probe.hash_binary)


class SendProgress:
    """A live display of the bytes sent to a host, on stderr, if that is a terminal."""

    def __init__(self, host: str, total: int):
        self.bar = tqdm.tqdm(
            desc=f"to {host}", total=total, unit="B", unit_scale=True, leave=False, disable=None
        )
        self.sent = 0

    def __enter__(self) -> SendProgress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def follow(self, transfer: Iterator[int]) -> None:
        """Show what one transfer has sent so far, on top of those before it."""
        before = 0
        for sent in transfer:
            self.bar.update(sent - before)
            before = sent
        self.sent += before


def start_workers(
    experiment: Any, clients_at_once: int, log: str | Path = os.devnull
) -> Worker | MultiHost:
    """Return the worker, or the hosts, that --workers names: a context manager."""
    run = experiment.config.run
    if run.single_worker:
        return LocalWorker(clients_at_once, log, run.patience)
    return MultiHost(experiment, clients_at_once, log)


def check_hosts(run: Any) -> dict[str, ssh.HostFolder]:
    """Return host -> its folder, of the other machines that --workers names.

    Raises UserError for one that cannot take part.
    """
    others = sorted({name for name in run.hosts if name != ssh.HERE})
    with concurrent.futures.ThreadPoolExecutor(max(len(others), 1)) as pool:
        check = functools.partial(ssh.check, cache=run.workers_cache, patience=run.patience)
        folders = pool.map(check, others)
        return dict(zip(others, folders, strict=True))


class HostInput(NamedTuple):
    """What a host gets of the server's state: of the algorithm's memory, its clients' slots."""

    weights: Any  # TFF's ModelWeights
    round: Any
    slots: Any  # int64[s]
    memory: Any  # float32[s,d]
    aggregator: Any


class SplitRound(NamedTuple):
    """A round in three TFF computations."""

    up_to_merge: Any  # (HostInput, chunks) -> partial result, on each host
    merge: Any  # (partial result, partial result) -> partial result
    after_merge: Any  # ((state, []), partial result) -> what `next` returns


def zeros(kind: Any) -> Any:
    """Return zeros of a TFF type, in a graph."""
    if isinstance(kind, tff.TensorType):
        return tf.zeros(kind.shape, kind.dtype)
    parts = [(name, zeros(inner)) for name, inner in tff.structure.iter_elements(kind)]
    return OrderedDict(parts) if parts and parts[0][0] else tuple(part for _, part in parts)


def split(next_round: Any) -> SplitRound:
    """Return a process's `next` in three stages; the first makes its state of a HostInput."""
    stages = tff.backends.native.compile_to_mergeable_comp_form(plain_sums(next_round))
    state_type, chunks_type = stages.up_to_merge.type_signature.parameter
    member = state_type.member
    algorithm_type = member.client_work
    memory_type = algorithm_type.memory
    num_slots, slot_size = memory_type.shape
    input_type = tff.to_type(
        HostInput(
            weights=member.global_model_weights,
            round=algorithm_type.round,
            slots=tff.TensorType(np.int64, [None]),
            memory=tff.TensorType(memory_type.dtype, [None, slot_size]),
            aggregator=member.aggregator,
        )
    )

    @tff.tensorflow.computation(input_type)
    def rebuild_state(host_input):
        memory = host_input.memory
        if num_slots:
            places = host_input.slots[:, tf.newaxis]
            memory = tf.scatter_nd(places, host_input.memory, memory_type.shape)
        memory = tf.ensure_shape(memory, memory_type.shape)
        return OrderedDict(
            global_model_weights=host_input.weights,
            distributor=(),
            client_work=OrderedDict(round=host_input.round, memory=memory),
            aggregator=host_input.aggregator,
            finalizer=zeros(member.finalizer),
        )

    @tff.federated_computation(tff.FederatedType(input_type, tff.SERVER), chunks_type)
    def up_to_merge(host_input, chunks):
        return stages.up_to_merge(tff.federated_map(rebuild_state, host_input), chunks)

    return SplitRound(up_to_merge, stages.merge, stages.after_merge)
