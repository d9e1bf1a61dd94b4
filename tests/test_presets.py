"""Presets are flags: each parses, those beside it win, and a resumed run keeps its own."""

import federated_learning as fl
from variants.presets import ROWS, expand

import pytest


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_is_its_flags(name):
    assert fl.parse(f"--preset {name}").flat() == fl.parse(ROWS[name].flags).flat() | {"preset": name}
    assert fl.parse(f"--rounds 7 --preset={name}").training.rounds == 7


def test_the_papers_cells():
    """McMahan et al. 2017, section 3 and table 1: 100 clients of 600 images, two label-sorted shards of 300 each."""
    two, cnn = (fl.parse(f"--preset mcmahan-{name}-noniid") for name in ("2nn", "cnn"))
    for config, epochs, target in ((two, 1, 0.97), (cnn, 5, 0.99)):
        assert (config.partitioning.num_clients, config.cohort, config.partition) == (100, 10, "shards")
        assert (config.training.local_epochs, config.training.batch_size) == (epochs, 10)
        assert config.run.target_accuracy == target


def test_flags_of_a_resumed_run_are_its_own():
    words = ["--resume", "runs/a", "--preset", "seed-readme"]
    assert expand(words) == words and expand(["--preset", "nothing"]) == ["--preset", "nothing"] and expand([]) == []
    assert expand(["--preset", "seed-readme", "--seed", "1"])[:2] == ["--model", "mlp"]
