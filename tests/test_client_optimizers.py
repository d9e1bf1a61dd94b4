"""Each client optimizer against NumPy over two rounds, and what algorithms make of it."""

from harness.cli.fields import UserError
from variants import choices

import numpy as np
import pytest
from reference import (
    alone,
    batches_of,
    largest_difference,
    numpy_gradients,
    weighted_mean,
    weights_of,
)
from runs import configure


def momentum(rate, g, kept, step):
    """v <- 0.9 v + g"""
    kept["v"] = 0.9 * kept.get("v", 0) + g
    return rate * kept["v"]


def adagrad(rate, g, kept, step):
    """Duchi et al. 2011, the sum of squares from 0.1 on"""
    kept["s"] = kept.get("s", 0.1) + g**2
    return rate * g / np.sqrt(kept["s"] + 1e-7)


def rmsprop(rate, g, kept, step):
    """Hinton 2012"""
    kept["s"] = 0.9 * kept.get("s", 0) + 0.1 * g**2
    return rate * g / (np.sqrt(kept["s"]) + 1e-7)


def adam(rate, g, kept, step):
    """Kingma and Ba 2015, section 2's form of the bias correction"""
    kept["m"] = 0.9 * kept.get("m", 0) + 0.1 * g
    kept["v"] = 0.999 * kept.get("v", 0) + 0.001 * g**2
    return (
        rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step) * kept["m"] / (np.sqrt(kept["v"]) + 1e-7)
    )


def yogi(rate, g, kept, step):
    """Zaheer et al. 2018, the second moment from 1e-6 on"""
    kept["m"] = 0.9 * kept.get("m", 0) + 0.1 * g
    v = kept.get("v", 1e-6)
    kept["v"] = v + 0.001 * np.sign(g**2 - v) * g**2
    return (
        rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step) * kept["m"] / (np.sqrt(kept["v"]) + 1e-3)
    )


def sgd(rate, g, kept, step):
    return rate * g


RULES = {rule.__name__: rule for rule in (sgd, momentum, adagrad, rmsprop, adam, yogi)}


def local(config, shards, client, round_num, weights):
    """(the client's weights after its local steps, their number)"""
    rate = config.training.client_lr
    decay = config.optimization.weight_decay
    # new in every round
    kept = [{} for _ in weights]
    step = 0
    for step, (images, labels) in enumerate(batches_of(config, shards, client, round_num), 1):
        gradients = [
            g + decay * w
            for g, w in zip(numpy_gradients(weights, images, labels), weights, strict=True)
        ]
        rule = RULES[config.optimization.client_optimizer]
        moves = [rule(rate, g, own, step) for g, own in zip(gradients, kept, strict=True)]
        weights = [w - move for w, move in zip(weights, moves, strict=True)]
    return weights, step


@pytest.mark.parametrize("weight_decay", [0.01, pytest.param(0, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", choices.CLIENT_OPTIMIZERS)
def test_local_steps_equal_numpys(federation, name, weight_decay):
    flags = {
        "client_optimizer": name,
        "weight_decay": weight_decay,
        "batch_size": 64,
        "local_epochs": 2,
    }
    experiment = federation(**flags)
    config = experiment.config
    partition = experiment.partition
    shards = experiment.shard_folder
    process = experiment.process
    state = process.initialize()
    expected = [w.astype(float) for w in weights_of(state)]
    for round_num in (1, 2):
        trained = [local(config, shards, k, round_num, expected)[0] for k in range(3)]
        expected = weighted_mean(trained, partition.sizes.tolist())
        state, _, _ = process.next(state, alone([0, 1, 2]))
        assert largest_difference(weights_of(state), expected) < 1e-4


def test_fednova_divides_by_what_momentum_makes_of_the_steps(federation):
    """Wang et al. 2020, section 3.1: the weight of the gradient i steps before the last is 1 + m +
    ... + m ** i."""
    flags = {"algorithm": "fednova", "client_optimizer": "momentum", "partition": "quantity"}
    experiment = federation(**flags, batch_size=64, local_epochs=1)
    config = experiment.config
    partition = experiment.partition
    shards = experiment.shard_folder
    process = experiment.process
    state = process.initialize()
    initial = [w.astype(float) for w in weights_of(state)]
    sizes = partition.sizes.tolist()
    updates = []
    norms = []
    for client in range(3):
        trained, steps = local(config, shards, client, 1, initial)
        norms.append(sum(0.9**j for i in range(steps) for j in range(i + 1)))
        updates.append([(a - b) / norms[-1] for a, b in zip(initial, trained, strict=True)])
    worth = np.average(norms, weights=sizes)
    expected = [w - worth * u for w, u in zip(initial, weighted_mean(updates, sizes), strict=True)]
    state, _, _ = process.next(state, alone([0, 1, 2]))
    assert len(set(norms)) > 1 and largest_difference(weights_of(state), expected) < 1e-4


@pytest.mark.parametrize("algorithm", ["scaffold", "mimelite", "feddyn", "fednova"])
def test_rules_for_plain_sgd_refuse_another_optimizer(algorithm):
    with pytest.raises(
        UserError, match=f"algorithm='{algorithm}' supports only client_optimizer .*, not 'adam'"
    ):
        configure(algorithm=algorithm, client_optimizer="adam")
    with pytest.raises(
        UserError, match="weight_decay=0.1 cannot be combined with algorithm='mimelite'"
    ):
        configure(algorithm="mimelite", weight_decay=0.1)
