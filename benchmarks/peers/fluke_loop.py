"""fluke: its FedAVG, server and clients, on one process, PyTorch model."""

import queue
import threading

import fluke
import protocol
import torch
import torch_loop
from fluke.algorithms.fedavg import FedAVG
from fluke.data import FastDataLoader
from fluke.utils import FederationObserver


class Split:
    """What fluke asks a DataSplitter: the loaders of the clients, and of the server's test set."""

    def __init__(self, work):
        self.work = work

    def assign(self, n_clients, batch_size):
        """Returns ((training loaders, test loaders), server's loader)."""
        loaders = [
            FastDataLoader(
                torch.from_numpy(images),
                torch.from_numpy(labels),
                num_labels=10,
                batch_size=batch_size,
                shuffle=True,
                skip_singleton=False,
            )
            for images, labels in self.work.clients
        ]
        return (loaders, [None] * n_clients), None


class BetweenRounds(FederationObserver):
    """Hands the weights over after each round and waits to be asked again."""

    def __init__(self, server, go, done):
        self.server = server
        self.go = go
        self.done = done

    def end_round(self, round):
        self.done.put(torch_loop.get_weights(self.server.model))
        self.go.get()


def contend(work):
    torch_loop.set_threads(work)
    fluke.FlukeENV().set_seed(work.seed)
    fluke.FlukeENV().set_eval_cfg(pre_fit=False, post_fit=False, server=False)
    model = torch_loop.network(work)
    torch_loop.set_weights(model, work.weights)
    settings = fluke.DDict(
        model=model,
        client=fluke.DDict(
            batch_size=work.batch,
            local_epochs=work.epochs,
            loss="CrossEntropyLoss",
            optimizer=fluke.DDict(name="SGD", lr=work.rate),
            scheduler=fluke.DDict(name="StepLR", gamma=1, step_size=1),
        ),
        server=fluke.DDict(weighted=True),
    )
    algorithm = FedAVG(len(work.clients), Split(work), settings)
    go = queue.Queue()
    done = queue.Queue()
    algorithm.set_callbacks(BetweenRounds(algorithm.server, go, done))

    def simulate():
        go.get()
        algorithm.run(10**6, work.cohort / len(work.clients))

    threading.Thread(target=simulate, daemon=True).start()
    while True:
        go.put(None)
        yield done.get()


protocol.serve(contend, torch_loop.build_predict)
