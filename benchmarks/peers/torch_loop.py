"""A plain PyTorch loop: tensors in memory, sliced by a permutation, `torch.optim.SGD`; no
framework, no DataLoader."""

import protocol
import torch


class ToPixels(torch.nn.Module):
    def forward(self, x):
        return x.reshape(-1, 1, 28, 28)


class ChannelsLast(torch.nn.Module):
    """Flattened as the others do, so that the same weights mean the same."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


def network(work):
    """The layers that the weights' shapes tell, with values of their own."""
    kernels = work.weights[::2]
    layers = [ToPixels()] if kernels[0].ndim == 4 else []
    for position, kernel in enumerate(kernels):
        if kernel.ndim == 4:
            padding = work.paddings[position]
            layers += [
                torch.nn.Conv2d(*kernel.shape[2:], kernel.shape[0], padding=padding),
                torch.nn.ReLU(),
                torch.nn.MaxPool2d(2),
            ]
            layers += [ChannelsLast()] if kernels[position + 1].ndim == 2 else []
        else:
            layers += [torch.nn.Linear(*kernel.shape), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])  # logits have no ReLU


def turned(w):
    """Kernels between Keras's order and PyTorch's: out comes first here."""
    return w.permute(3, 2, 0, 1) if w.ndim == 4 else w.T


def set_weights(model, weights):
    with torch.no_grad():
        for parameter, w in zip(model.parameters(), weights, strict=True):
            parameter.copy_(turned(torch.tensor(w)) if w.ndim > 1 else torch.tensor(w))


def get_weights(model):
    back = [
        p.detach().permute(2, 3, 1, 0)
        if p.ndim == 4
        else p.detach().T
        if p.ndim == 2
        else p.detach()
        for p in model.parameters()
    ]
    return [w.numpy().copy(order="C") for w in back]


def build_predict(work):
    model = network(work)

    def predict(weights, images):
        set_weights(model, weights)
        with torch.no_grad():
            chunks = torch.from_numpy(images).split(1000)
            return torch.cat([model(chunk) for chunk in chunks]).numpy()

    return predict


def train(model, images, labels, work):
    """The local epochs, each in a new order."""
    optimizer = torch.optim.SGD(model.parameters(), work.rate)
    for _ in range(work.epochs):
        for chosen in torch.randperm(len(labels)).split(work.batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()


def set_threads(work):
    """One is faster here than two for matrices of this size, two for convolutions."""
    torch.set_num_threads(2 if work.weights[0].ndim == 4 else 1)


def contend(work):
    torch.manual_seed(work.seed)
    set_threads(work)
    clients = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in work.clients]
    weights = work.weights
    model = network(work)
    for cohort in work.cohorts():
        results = []
        for images, labels in (clients[client] for client in cohort):
            set_weights(model, weights)
            train(model, images, labels, work)
            results.append((len(labels), get_weights(model)))
        weights = protocol.weighted_mean(results)
        yield weights


if __name__ == "__main__":
    protocol.serve(contend, build_predict)
