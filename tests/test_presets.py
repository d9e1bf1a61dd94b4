"""Presets are flags: each parses, those beside it win, and a resumed run keeps its own."""

import federated_learning as fl
from harness.config.preset_flags import insert_preset_flags, preset_notices
from variants.presets import PRESETS

import pytest


def notices_of(config):
    return preset_notices(config, fl.Config())


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"none"}))
def test_a_preset_is_its_flags(name):
    preset = fl.parse(f"--preset {name}")
    assert preset.to_dict() == fl.parse(PRESETS[name].flags).to_dict() | {"preset": name}
    assert fl.Config().replace(preset=name) == preset
    shorter = fl.parse(f"--rounds 7 --preset={name} --seed 3")
    assert shorter == preset.replace(rounds=7, seed=3)
    assert shorter == fl.Config().replace(seed=3).replace(preset=name, rounds=7)


def test_a_run_says_where_its_experiment_stands():
    """And what is not as there: flags beside the preset, or all of them where the constructor got
    its name alone."""
    there = "preset mcmahan-2nn-iid: McMahan et al. 2017, table 1: 87 rounds"
    assert notices_of(fl.Config()) == []
    assert notices_of(fl.parse("--preset mcmahan-2nn-iid --seed 4 --name a")) == [there]
    changed = fl.parse("--preset mcmahan-2nn-iid --rounds 5 --algorithm scaffold")
    assert notices_of(changed) == [
        f"{there}. Changed from the preset: rounds 5 (preset 1500), algorithm scaffold (preset "
        "fedavg)"
    ]
    (notice,) = notices_of(fl.Config(preset="mcmahan-2nn-iid"))
    assert "num_clients 10 (preset 100)" in notice and "local_epochs 3 (preset 1)" in notice


# section 3: K = 100, C = 0.1, B = 10
MCMAHAN = {
    "num_clients": 100,
    "clients_per_round": 10,
    "batch_size": 10,
}
# table 1: E = 1
TWO_NN = {
    **MCMAHAN,
    "model": "2nn",
    "local_epochs": 1,
    "target_accuracy": 0.97,
    "client_lr": 0.2,
}
CNN = {**MCMAHAN, "model": "cnn", "local_epochs": 5, "target_accuracy": 0.99}  # table 1: E = 5
# Flower's niid_bench, conf/fedavg_base.yaml and its README's table of hyperparameters: 10 of 10
# clients.
NIID = {
    "model": "lenet",
    "rounds": 50,
    "local_epochs": 10,
    "batch_size": 64,
    "client_lr": 0.01,
    "weight_decay": 1e-5,
}
NIID |= {"client_optimizer": "momentum"}  # of 0.9, the flag's own
# google-research/federated, optimization/docs/hyperparameters.md: 10 clients a round, B = 20, E =
# 1, powers of ten.
REDDI = {
    "num_clients": 100,
    "clients_per_round": 10,
    "batch_size": 20,
    "local_epochs": 1,
    "model": "cnn",
}
REDDI |= {"partition": "shards", "rounds": 100}
FAST = {
    "client_optimizer": "adam",
    "client_lr": 0.003,
    "client_schedule": "inverse-sqrt",
    "local_epochs": 2,
}
PUBLISHED = {
    "fast": {**FAST, "batch_size": 32},
    "mcmahan-2nn-iid": {**TWO_NN, "partition": "iid", "rounds": 1500},
    "mcmahan-2nn-noniid": {**TWO_NN, "partition": "shards", "rounds": 2000},
    "mcmahan-cnn-iid": {**CNN, "partition": "iid", "client_lr": 0.2, "rounds": 400},
    "mcmahan-cnn-noniid": {**CNN, "partition": "shards", "client_lr": 0.1, "rounds": 1200},
    "niid-bench-iid": {**NIID, "partition": "iid"},
    "niid-bench-dirichlet": {
        **NIID,
        "partition": "capped-dirichlet",
        "min_images": 10,
    },  # of 0.5, the flag's own
    "niid-bench-two-labels": {**NIID, "partition": "random-labels"},  # two, the flag's own
    "niid-bench-one-label": {**NIID, "partition": "random-labels", "labels_per_client": 1},
    "reddi-fedavg": {**REDDI, "client_lr": 0.1, "server_lr": 1.0},
    "reddi-fedavgm": {
        **REDDI,
        "algorithm": "fedavgm",
        "client_lr": 0.0316,
        "server_lr": 0.316,
    },  # momentum 0.9
    "reddi-fedadagrad": {**REDDI, "algorithm": "fedadagrad", "client_lr": 0.0316, "server_lr": 0.1},
    "reddi-fedadam": {**REDDI, "algorithm": "fedadam", "client_lr": 0.0316, "server_lr": 0.00316},
    "reddi-fedyogi": {**REDDI, "algorithm": "fedyogi", "client_lr": 0.0316, "server_lr": 0.00316},
    "original-script": {"model": "mlp"},
    # section 5.1 and appendix C.1: 1,000 devices, 10 a round, 20 epochs of SGD on batches of 10
    "fedprox-mnist": {
        "model": "logreg",
        "partition": "lognormal-labels",
        "num_clients": 1000,
        "clients_per_round": 10,
        "local_epochs": 20,
        "batch_size": 10,
        "client_lr": 0.03,
        "rounds": 200,
        "stragglers": 0.9,
        "algorithm": "fedprox",
        "prox_mu": 1.0,
    },
}
PUBLISHED["reddi-fedadagrad"]["server_epsilon"] = 0.01
PUBLISHED["reddi-fedadam"]["server_epsilon"] = PUBLISHED["reddi-fedyogi"]["server_epsilon"] = 1e-4


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"none"}))
def test_a_preset_is_what_its_source_says(name):
    """All that differs from the default, written out: a rate ten times too high, or another split,
    is noticed."""
    assert fl.Config().replace(preset=name).changed() == PUBLISHED[name] | {"preset": name}


def test_reddis_presets_say_how_they_differ():
    (notice,) = notices_of(fl.parse("--preset reddi-fedadam"))
    assert "1,500 rounds" in notice and "correct the bias" in notice


def test_flags_of_a_resumed_run_are_its_own():
    words = ["--resume", "runs/a", "--preset", "original-script"]
    assert (
        insert_preset_flags(words, PRESETS) == words
        and insert_preset_flags(["--preset", "nothing"], PRESETS) == ["--preset", "nothing"]
        and insert_preset_flags([], PRESETS) == []
    )
    assert insert_preset_flags(["--preset", "original-script", "--seed", "1"], PRESETS)[:2] == [
        "--model",
        "mlp",
    ]
