"""What fields may hold: a wrong value is refused in one line that names field, value and remedy."""

import federated_learning as fl
from harness.fields import UserError
from harness.run_options import identity
from variants.options import unused_notices

import pytest
from runs import configure


def notices_of(config):
    """The notices on flags without effect."""
    return unused_notices(config.to_dict(), fl.Config.defaults())


WRONG = [
    (field, value)
    for field, values in {
        "num_clients": [0, -1, 60_001, 2.5, "10", None, True, float("nan")],
        "clients_per_round": [-1, 11, 1.0],
        "rounds": [0, 100_001, "five"],
        "local_epochs": [0, 1001],
        "local_steps": [-1, 1.5],
        "initial_model": [3, "a\0b"],
        "owner_choice": ["smallest"],
        "unseen_clients": [-0.1, 0.95],
        "backdoor_target": [-1, 65_536],
        "backdoor_share": [1.1],
        "stop_after": [-1],
        "save_every": [-1],
        "save_clients": ["yes"],
        "evaluate": [3, "\0"],
        "size_spread": [-1, 11],
        "client_weighting": ["equal"],
        "drop_stragglers": ["yes"],
        "target_epsilon": [-1],
        "batch_size": [-1, 60_001, 16.5],
        "client_lr": [-0.1, float("nan"), float("inf"), "fast", True],
        "alpha": [0, -1, float("nan"), 1e7],
        "shards_per_client": [0, 1001],
        "compare": ["fedavg,median", "fedavg,fedavg", "fedavg,", "seed=1,2", 3],
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
        "warmup_steps": [0, 1.5],
        "lr_horizon": [0],
        "server_momentum": [1],
        "min_images": [-1, 1.5],
        "data_name": [3, "a\0b"],
        "transpose": ["yes", 1],
        "validation": ["yes", 1],
        "config": ["\0", 3],
        "version": ["yes"],
        "figures": ["jpg", ""],
        "caption": ["no", 0],
        "public_cohorts": [None],
        "dyn_alpha": [0, -1, "x"],
        "prox_mu": [-1, float("inf")],
        "server_epsilon": [-1, 0, "x"],
        "accept_changes": ["yes", None],
        "labels_per_client": [0, 65_537],
        "size_exponent": [-1, 11],
        "rotation": [-1, 181, float("nan")],
        "noise": [-1, 256],
        "partition_file": [7, "a\0b"],
        "seed": [-1, 2**31, 0.5],
        "holdout": [-1, 50_001],
        "patience": [0, float("nan")],
        "dataset": ["cifar10", "", "MNIST", 3],
        "partition": ["sorted", "", "file"],
        "model": ["resnet", "net.py", "net.py:", ":build", 3],
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
        "list": ["\0", 3, None],
        "cache": [None],
        "tensorboard": ["yes", 1],
    }.items()
    for value in values
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_is_refused_with_field_value_and_cure(field, value):
    with pytest.raises(UserError) as error:
        configure(**{field: value})
    message = str(error.value)
    assert (
        message.startswith(f"{field}={value!r:.40}"[:40])
        and "\n" not in message
        and len(message) < 350
    )
    assert any(cure in message for cure in ("choose", "give", "drop")), message


def test_there_are_more_than_forty_wrong_values():
    assert len(WRONG) > 40 and {field for field, _ in WRONG} == fl.Config().to_dict().keys() - {
        "resume"
    }


UNUSED = {  # a field that has an effect in the second configuration, and none in the first
    "alpha": ({"partition": "iid"}, {"partition": "client-dirichlet"}),
    "shards_per_client": ({}, {"partition": "shards"}),
    "labels_per_client": ({}, {"partition": "random-labels"}),
    "size_exponent": ({"partition": "dirichlet-quantity"}, {"partition": "quantity"}),
    "noise": ({}, {"partition": "feature"}),
    "rotation": ({"partition": "shards"}, {"partition": "feature"}),
    "prox_mu": ({"algorithm": "feddyn"}, {"algorithm": "fedprox"}),
    "dyn_alpha": ({}, {"algorithm": "feddyn"}),
    "server_momentum": ({"algorithm": "fedadam"}, {"algorithm": "mimelite"}),
    "client_momentum": ({"client_optimizer": "adam"}, {"client_optimizer": "momentum"}),
    "warmup_steps": ({"client_schedule": "cosine"}, {"client_schedule": "warm-up"}),
    "lr_decay": ({"client_schedule": "cosine"}, {"server_schedule": "exponential"}),
    "lr_horizon": ({"client_schedule": "exponential"}, {"client_schedule": "cosine"}),
    "trim": ({"aggregator": "median"}, {"aggregator": "trimmed-mean"}),
    "tolerated": ({}, {"aggregator": "krum"}),
    "attack": ({}, {"byzantine": 1}),
    "attack_scale": ({"byzantine": 1}, {"byzantine": 1, "attack": "gaussian"}),
}
VALUES = {
    "warmup_steps": 7,
    "attack": "nan",
    "shards_per_client": 3,
    "labels_per_client": 3,
    "lr_horizon": 3,
    "tolerated": 2,
}


@pytest.mark.parametrize("field", UNUSED)
def test_a_flag_without_effect_is_told_and_is_no_part_of_what_a_run_is(field):
    without, used = (configure(**flags) for flags in UNUSED[field])
    value = VALUES.get(field, 0.25)
    assert identity(without.replace(**{field: value})) == identity(without)
    assert identity(used.replace(**{field: value})) != identity(used)
    (notice,) = notices_of(without.replace(**{field: value}))
    assert notice.startswith(f"{field}={value} has no effect here: it needs --")
    assert notices_of(used.replace(**{field: value})) == []


def test_a_flag_that_one_of_the_rows_compared_uses_has_an_effect():
    config = configure(compare="fedavg,fedprox", prox_mu=0.1)
    assert notices_of(config) == []
    plain, own = (config.effective(algorithm=name, compare="") for name in ("fedavg", "fedprox"))
    assert identity(plain) == identity(configure()) and own.optimization.prox_mu == 0.1
    private = configure(compare="mean,dp", noise_multiplier=0.3)
    assert private.effective(aggregator="mean", compare="") == configure().effective()
    assert private.effective(aggregator="dp", compare="").privacy.noise_multiplier == 0.3
    assert identity(configure(algorithm="fedsgd", local_epochs=1)) == identity(
        configure(algorithm="fedsgd")
    )


@pytest.mark.parametrize("field", ["noise_multiplier", "delta", "epsilon_budget", "public_cohorts"])
def test_a_flag_of_privacy_without_dp_is_refused(field):
    value = True if field == "public_cohorts" else 0.25
    with pytest.raises(
        UserError,
        match=f"^{field}={value} has no effect without --aggregator dp, .* not be private",
    ):
        configure(**{field: value})
    configure(**{field: value}, aggregator="dp")
