"""fl.load: a finished run, read from its folder."""

import json

import federated_learning as fl
from harness.cli.fields import UserError
from harness.storage import saved_run

import numpy as np
import pytest
from runs import NO_FIGURES, ON_DIGITS, configure


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The result of a run of two rounds."""
    folder = tmp_path_factory.mktemp("loaded")
    flags = [*ON_DIGITS, *NO_FIGURES, "--rounds", "2", "--runs", str(folder), "--name", "a"]
    return fl.run(fl.parse(flags))


@pytest.mark.slow
def test_a_run_is_what_its_files_say(made):
    run = fl.load(made.folder)
    assert run.config.optimization.algorithm == "fedavg" and run.config.training.rounds == 2
    accuracies = [record.test_accuracy for record in made.records]
    assert np.array(run.history["test_accuracy"]) == pytest.approx(accuracies)
    assert list(run.history["round"]) == [1, 2]
    ours = made.state.global_model_weights.trainable
    for own, saved in zip(ours, run.weights, strict=True):
        np.testing.assert_array_equal(own, saved)
    clients = run.clients()
    assert list(clients["client"]) == [*range(10), *range(10)]
    assert [len(indices) for indices in run.partition] == list(clients["examples"][:10])
    assert run.evaluate().accuracy == accuracies[-1]
    images = run.dataset.test.images
    predicted = np.argmax(run.model().predict(images, verbose=0), axis=1)
    assert np.mean(predicted == run.dataset.test.labels) == accuracies[-1]
    test = run.dataset.test
    half = fl.build_dataset(test.images, test.labels, test.images[::2], test.labels[::2], "half")
    assert run.evaluate(half).accuracy == np.mean((predicted == test.labels)[::2])


@pytest.mark.slow
def test_its_partition_is_of_the_images_that_were_not_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure(dataset="digits", model="mlp", rounds=1, local_epochs=1, holdout=300)
    run = fl.load(fl.run(config.replace(figures="none")).folder)
    parts = fl.build_experiment(config).partition.indices
    assert all(map(np.array_equal, run.partition, parts)) and len(run.partition) == 10
    assert sum(map(len, run.partition)) == len(run.dataset.train.labels) == 1437 - 300


def test_what_is_not_there_is_a_mistake(made, tmp_path):
    with pytest.raises(UserError, match="give the folder of a run"):
        fl.load(tmp_path)
    for name in ("config.json", "program.json"):
        (tmp_path / name).write_bytes((made.folder / name).read_bytes())
    run = fl.load(str(tmp_path))
    with pytest.raises(UserError, match="is not finished; continue it with --resume"):
        run.records  # noqa: B018
    (tmp_path / "partition.json").write_text(json.dumps({"dataset": "x"}))
    with pytest.raises(UserError, match="is private, and keeps no partition"):
        run.partition  # noqa: B018


def test_without_pandas_a_table_is_arrays(monkeypatch):
    monkeypatch.setattr(saved_run, "pandas", None)
    table = saved_run.to_table([{"a": 1, "b": 0.5}, {"a": 2}])
    assert table["a"].tolist() == [1, 2] and np.isnan(table["b"][1])


def test_a_run_on_arrays_is_loaded_with_them(tmp_path, monkeypatch, digits, capsys):
    monkeypatch.chdir(tmp_path)
    config = configure(dataset="digits", model="mlp", rounds=1, local_epochs=1, figures="none")
    half = fl.build_dataset(digits.train.images[:500], digits.train.labels[:500], *digits.test)
    result = fl.run(config, dataset=half)
    assert "dataset='digits' sets the default of client_lr only" in capsys.readouterr().err
    with pytest.raises(UserError, match="was trained on other data than"):
        fl.load(result.folder).evaluate()
    assert fl.load(result.folder, dataset=half).evaluate().accuracy == result.evaluation.accuracy
