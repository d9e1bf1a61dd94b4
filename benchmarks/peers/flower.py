"""Flower's simulation engine (Ray), PyTorch clients: FedAvg with its own strategy, one core a
client."""

import functools
import queue
import sys
import threading

import protocol
import torch_loop
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation


class Client(NumPyClient):
    def __init__(self, path, number):
        self.work = protocol.work_of(path)
        self.number = number

    def fit(self, parameters, config):
        torch_loop.torch.set_num_threads(1)
        images, labels = map(torch_loop.torch.from_numpy, self.work.clients[self.number])
        model = torch_loop.network(self.work)
        torch_loop.set_weights(model, parameters)
        torch_loop.train(model, images, labels, self.work)
        return torch_loop.get_weights(model), len(labels), {}


def contend(work):
    path = sys.argv[1]
    go = queue.Queue()
    done = queue.Queue()

    def between_rounds(server_round, weights, config):
        """Flower calls it before the first round and after each: hands the weights over, waits to
        be asked again."""
        if server_round:
            done.put(weights)
        go.get()
        return 0.0, {}

    strategy = FedAvg(
        fraction_fit=work.cohort / len(work.clients),
        fraction_evaluate=0.0,
        min_available_clients=len(work.clients),
        evaluate_fn=between_rounds,
        accept_failures=False,
        initial_parameters=ndarrays_to_parameters(work.weights),
    )
    components = ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=10**6))
    client_app = ClientApp(
        client_fn=lambda context: Client(path, int(context.node_config["partition-id"])).to_client()
    )
    simulation = functools.partial(
        run_simulation,
        server_app=ServerApp(server_fn=lambda context: components),
        client_app=client_app,
        num_supernodes=len(work.clients),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    threading.Thread(target=simulation, daemon=True).start()
    while True:
        go.put(None)
        weights = done.get()
        yield weights if isinstance(weights, list) else parameters_to_ndarrays(weights)


protocol.serve(contend, torch_loop.build_predict)
