"""Apple's pfl-research: its simulated backend and its FederatedAveraging, PyTorch model."""

import asyncio
import queue
import threading

import protocol
import torch
import torch_loop
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel


class Network(torch.nn.Module):
    def __init__(self, work):
        super().__init__()
        self.layers = torch_loop.network(work)

    def loss(self, x, y, eval=False):
        return torch.nn.functional.cross_entropy(self.layers(x), y)

    def metrics(self, x, y):
        return {"loss": Weighted(0.0, 1)}


class BetweenRounds(TrainingProcessCallback):
    """Hands the weights over after each round and waits to be asked again."""

    def __init__(self, go, done):
        self.go = go
        self.done = done

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.done.put(torch_loop.get_weights(model.pytorch_model.layers))
        self.go.get()
        return False, Metrics()


def contend(work):
    torch.manual_seed(work.seed)
    torch_loop.set_threads(work)
    go = queue.Queue()
    done = queue.Queue()
    network = Network(work)
    torch_loop.set_weights(network.layers, work.weights)
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))

    def make_dataset(user):
        images, labels = (torch.from_numpy(array) for array in work.clients[user])
        order = torch.randperm(len(labels))
        return Dataset(raw_data=[images[order], labels[order]], user_id=user)

    users = list(range(len(work.clients)))
    dataset = FederatedDataset(make_dataset, get_user_sampler("minimize_reuse", users))
    backend = SimulatedBackend(training_data=dataset, val_data=None)
    training = NNTrainHyperParams(
        local_num_epochs=work.epochs, local_learning_rate=work.rate, local_batch_size=work.batch
    )
    rounds = NNAlgorithmParams(
        central_num_iterations=10**6,
        evaluation_frequency=10**6,
        train_cohort_size=work.cohort,
        val_cohort_size=0,
    )

    def simulate():
        asyncio.set_event_loop(asyncio.new_event_loop())  # pfl takes the thread's
        go.get()
        FederatedAveraging().run(
            algorithm_params=rounds,
            backend=backend,
            model=model,
            model_train_params=training,
            model_eval_params=None,
            callbacks=[BetweenRounds(go, done)],
        )

    threading.Thread(target=simulate, daemon=True).start()
    while True:
        go.put(None)
        yield done.get()


protocol.serve(contend, torch_loop.build_predict)
