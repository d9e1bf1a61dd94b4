"""A plain PyTorch loop: tensors in memory, sliced by a permutation, `torch.optim.SGD`; no framework, no DataLoader."""

import protocol
import torch


def network():
    return torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


def set_weights(model, weights):
    with torch.no_grad():
        for parameter, w in zip(model.parameters(), weights, strict=True):
            parameter.copy_(torch.as_tensor(w).T)


def get_weights(model):
    return [parameter.detach().numpy().T.copy() for parameter in model.parameters()]


def train(model, images, labels, batch, rate):
    """One local epoch in a new order."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    order = torch.randperm(len(labels))
    for chosen in order.split(batch):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()


def contend(work):
    torch.set_num_threads(1)  # faster here than two, for matrices of this size
    clients = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in work.clients]
    weights, model = work.weights, network()
    while True:
        results = []
        for images, labels in clients:
            set_weights(model, weights)
            train(model, images, labels, work.batch, work.rate)
            results.append((len(labels), get_weights(model)))
        weights = protocol.weighted_mean(results)
        yield weights


if __name__ == "__main__":
    protocol.serve(contend)
