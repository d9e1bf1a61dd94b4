"""A round over several hosts: TFF's own engine on each, the partial sums merged here, in the hosts' order.

TFF's compiler splits a round into three: what each host does for its own clients up to the merge, the merge of two
partial results, and what the server does after it. (TFF's ready-made context for this merges in the order of finishing,
so that no run repeats, and splits clients by count, so that nobody can say who trains where.)
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from harness import hosts
from harness.command_line import RunFailed, notice
from harness.fields import UserError
from harness.worker import ATTEMPTS, Worker, WorkerLost, plain_sums

import numpy as np
import tensorflow_federated as tff


class Hosts:
    """Workers on several hosts, and one here for what the server does: in the place of one Worker, and like it.

    Client k belongs to the host k % n of the n named. A host's part of a round is done again where its worker is lost;
    one that is gone for good is left out, and another takes its clients over, in the same place of the sums.
    """

    def __init__(
        self, names: Sequence[str], cache: str, clients_at_once: int, log: str | Path, patience: float, shards: Path,
        clients: int,
    ):  # fmt: skip
        self.names, self.cache, self.shards, self.clients = names, cache, shards, clients
        self.home = Worker(1, log, patience)
        each = -(-clients_at_once // len(names))
        folders = [shards.parent if name == hosts.HERE else cache for name in names]
        self.workers = [Worker(each, log, patience, name, folder) for name, folder in zip(names, folders, strict=True)]
        self.doing = list(range(len(names)))  # the host that does each part
        self.locks = [threading.Lock() for _ in names]  # a host that has taken another's clients over does them after
        self.over = False

    def __enter__(self) -> Hosts:
        self.home.__enter__()
        self.pool = concurrent.futures.ThreadPoolExecutor(len(self.names))
        try:
            for worker in self.workers:
                worker.open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.over = True
        for worker in self.workers:
            if hasattr(worker, "process"):
                worker.end()
        self.pool.shutdown()
        self.home.__exit__(*error)

    def share(self, clients: Sequence[int]) -> list[list[int]]:
        """Return the clients of each host."""
        return [[k for k in clients if k % len(self.names) == part] for part in range(len(self.names))]

    def call(self, what: str, function: Callable, *arguments: Any) -> Any:
        """Return function(*arguments), a TFF computation of the server's alone."""
        return self.home.call(what, function, *arguments)

    def round(self, what: str, process: Any, state: Any, groups: Sequence[np.ndarray]) -> tuple[Any, Any, Any]:
        """Return what the process's `next` does with these groups of clients, none of which spans two hosts."""
        form = split(process.next)
        parts: dict[int, list[np.ndarray]] = {}
        for group in groups:
            parts.setdefault(int(group[0]) % len(self.names) if len(group) else 0, []).append(group)
        futures = [
            self.pool.submit(self._part, part, what, form.up_to_merge, state, parts[part]) for part in sorted(parts)
        ]
        for done in concurrent.futures.as_completed(futures):
            done.result()  # an error does not wait for the slowest host
        partial_results = [future.result() for future in futures]

        def merge(first: Any, second: Any) -> Any:
            return self.home.call(what, form.merge, first, second)

        return self.home.call(what, form.after_merge, (state, []), reduce(merge, partial_results))

    def _part(self, part: int, what: str, function: Callable, state: Any, groups: Sequence[np.ndarray]) -> Any:
        """Return the partial result of a host's clients, in a thread of its own."""
        place = self.doing[part]
        with self.locks[place]:
            return self.workers[place].invoke(what, function, state, groups)


def start_workers(options: Any, clients_at_once: int, log: str | Path, shards: Path | None, clients: int) -> Worker | Hosts:
    """Return the worker, or the hosts, that the options `workers` name, a context manager; they write to `log`."""
    if options.alone:
        return Worker(clients_at_once, log, options.patience)
    if shards is None:
        raise UserError(f"workers={options.workers!r:.60} need the folder of the clients' shards")
    return Hosts(options.hosts, options.workers_cache, clients_at_once, log, options.patience, shards, clients)


FORMS: dict[int, tuple[Any, Any]] = {}


def split(computation: Any) -> Any:
    """Return TFF's mergeable form of a computation."""
    if id(computation) not in FORMS:
        plain = plain_sums(computation)
        FORMS[id(computation)] = computation, tff.backends.native.compile_to_mergeable_comp_form(plain)
    return FORMS[id(computation)][1]
