"""What fields may hold: a wrong value is refused in one line that names field, value and remedy."""

import federated_learning as fl
from harness.fields import UserError

import pytest
from runs import configure

WRONG = [(field, value) for field, values in {
    "num_clients": [0, -1, 60_001, 2.5, "10", None, True, float("nan")],
    "clients_per_round": [-1, 11, 1.0],
    "rounds": [0, 100_001, "five"],
    "local_epochs": [0, 1001],
    "batch_size": [-1, 60_001, 16.5],
    "client_lr": [-0.1, float("nan"), float("inf"), "fast"],
    "alpha": [0, -1, float("nan"), 1e7],
    "shards_per_client": [0, 1001],
    "compare": ["fedavg,median", "fedavg,fedavg", "fedavg,", 3],
    "seeds": [0, 1001],
    "sampling": ["with replacement"],
    "delta": [0, 1],
    "epsilon_budget": [-1],
    "dropout": [-0.1, 1.1],
    "stragglers": [2, "half"],
    "byzantine": [-1, 11],
    "attack": ["ddos"],
    "attack_scale": [-1],
    "trim": [-0.1, 0.5],
    "tolerated": [-1],
    "noise_multiplier": [0],
    "client_schedule": ["linear"],
    "server_schedule": [""],
    "server_lr": [-1],
    "lr_decay": [1.1],
    "lr_horizon": [0],
    "server_momentum": [1],
    "min_images": [-1, 1.5],
    "data_name": [3, "a\0b"],
    "transpose": ["yes", 1],
    "public_cohorts": [None],
    "dyn_alpha": [0, -1, "x"],
    "prox_mu": [-1, float("inf")],
    "labels_per_client": [0, 101],
    "size_exponent": [-1, 11],
    "rotation": [-1, 181, float("nan")],
    "noise": [-1, 256],
    "partition_file": [7, "a\0b"],
    "seed": [-1, 2**31, 0.5],
    "holdout": [-1, 50_001],
    "patience": [0, float("nan")],
    "dataset": ["cifar10", "", "MNIST", 3],
    "partition": ["sorted", "", "file"],
    "model": ["resnet"],
    "algorithm": ["sgd"],
    "aggregator": ["krumm"],
    "client_optimizer": ["sgdm"],
    "client_momentum": [1, -0.1],
    "weight_decay": [-1, "0"],
    "preset": ["mcmahan", ""],
    "baselines": ["yes", 1],
    "workers": ["", "a b", "-x,localhost", "a,,b", 2],
    "workers_cache": ["", "a b", "-x", 1],
    "target_accuracy": [1.1, 97],
    "data": [7, "a\0b"],
    "name": ["a/b", ".", "..", "a\0b", "x" * 201, "ü" * 101],
    "runs": ["\0"],
    "cache": [None],
    "tensorboard": ["yes", 1],
}.items() for value in values]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_is_refused_with_field_value_and_cure(field, value):
    with pytest.raises(UserError) as error:
        configure(**{field: value})
    message = str(error.value)
    assert message.startswith(f"{field}={value!r:.40}"[:40]) and "\n" not in message and len(message) < 350
    assert any(cure in message for cure in ("choose", "give", "drop")), message


def test_there_are_more_than_forty_wrong_values():
    assert len(WRONG) > 40 and {field for field, _ in WRONG} == fl.Config().flat().keys() - {"resume"}
