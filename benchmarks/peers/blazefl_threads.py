"""BlazeFL's thread-pool trainer, the mode that it recommends; PyTorch clients, two threads.

It wants a free-threading Python. With an ordinary one, threads share the interpreter, not PyTorch's
operations.
"""

import threading

import protocol
import torch
import torch_loop
from blazefl.core import ThreadPoolClientTrainer


class Trainer(ThreadPoolClientTrainer):
    def __init__(self, work):
        self.num_parallels = 2
        self.device = "cpu"
        self.device_count = 0
        self.cache = []
        self.stop_event = threading.Event()
        self.work = work
        self.clients = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in work.clients]

    def worker(self, cid, device, payload, stop_event):
        images, labels = self.clients[cid]
        model = torch_loop.network(self.work)
        torch_loop.set_weights(model, payload)
        torch_loop.train(model, images, labels, self.work)
        return len(labels), torch_loop.get_weights(model)

    def uplink_package(self):
        packages = self.cache
        self.cache = []
        return packages


def contend(work):
    torch.manual_seed(work.seed)
    torch.set_num_threads(1)
    trainer = Trainer(work)
    weights = work.weights
    for cohort in work.cohorts():
        trainer.local_process(weights, list(cohort))
        weights = protocol.weighted_mean(trainer.uplink_package())
        yield weights


protocol.serve(contend, torch_loop.build_predict)
