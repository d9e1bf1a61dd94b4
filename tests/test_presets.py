"""Presets are flags: each parses, those beside it win, and a resumed run keeps its own."""

import federated_learning as fl
from variants.presets import ROWS, expand, published

import pytest


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_is_its_flags(name):
    assert fl.parse(f"--preset {name}").flat() == fl.parse(ROWS[name].flags).flat() | {"preset": name}
    assert fl.parse(f"--rounds 7 --preset={name}").training.rounds == 7
    assert fl.Config().but(preset=name) == fl.parse(f"--preset {name}")
    assert fl.Config().but(seed=3).but(preset=name, rounds=7) == fl.parse(f"--preset {name} --rounds 7 --seed 3")


def test_a_run_says_where_its_experiment_stands():
    """And what is not as there: flags beside the preset, or all of them where the constructor got its name alone."""
    there = "preset mcmahan-2nn-iid: McMahan et al. 2017, table 1: 87 rounds"
    assert published(fl.Config()) == []
    assert published(fl.parse("--preset mcmahan-2nn-iid --seed 4 --name a")) == [there]
    changed = fl.parse("--preset mcmahan-2nn-iid --rounds 5 --algorithm scaffold")
    assert published(changed) == [f"{there}; not as there: rounds 5 for 1500, algorithm scaffold for fedavg"]
    (remark,) = published(fl.Config(preset="mcmahan-2nn-iid"))
    assert "num_clients 10 for 100" in remark and "client_lr 0.0 for 0.2" in remark


def test_the_papers_cells():
    """McMahan et al. 2017, section 3 and table 1: 100 clients of 600 images, two label-sorted shards of 300 each."""
    two, cnn = (fl.parse(f"--preset mcmahan-{name}-noniid") for name in ("2nn", "cnn"))
    for config, epochs, target in ((two, 1, 0.97), (cnn, 5, 0.99)):
        assert (config.partitioning.num_clients, config.cohort, config.partition) == (100, 10, "shards")
        assert (config.training.local_epochs, config.training.batch_size) == (epochs, 10)
        assert config.run.target_accuracy == target


@pytest.mark.parametrize("split", ["iid", "dirichlet", "two-labels", "one-label"])
def test_niid_bench_is_flowers(split):
    """Its README's table of hyperparameters, and Li et al. 2022, section V: two convolutions of 6 and 16 channels."""
    config = fl.parse(f"--preset niid-bench-{split}")
    training = config.training
    assert (config.partitioning.num_clients, config.cohort) == (10, 10) and training.model == "lenet"
    assert (training.rounds, training.local_epochs, training.batch_size) == (50, 10, 64)
    assert config.optimization.client_optimizer == "momentum" and fl.own_values(config).client_lr == 0.01


def test_flags_of_a_resumed_run_are_its_own():
    words = ["--resume", "runs/a", "--preset", "seed-readme"]
    assert expand(words) == words and expand(["--preset", "nothing"]) == ["--preset", "nothing"] and expand([]) == []
    assert expand(["--preset", "seed-readme", "--seed", "1"])[:2] == ["--model", "mlp"]
