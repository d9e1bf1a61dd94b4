"""Models that are kept, begun from, and evaluated on other data."""

import shutil
import subprocess
import sys

import federated_learning as fl
from harness.cli.fields import UserError
from harness.reporting import captions
from harness.reporting.results import weights_sha256
from harness.training import layers
from harness.training.histories import stops_early
from variants import adversity

import numpy as np
import pytest
import tensorflow as tf
from reference import largest_difference, weights_of
from runs import SECONDS, configure, make_record, read_csv, read_metrics

FLAGS = {
    "dataset": "digits",
    "model": "logreg",
    "num_clients": 4,
    "alpha": 0.05,
    "local_epochs": 1,
    "figures": "none",
}


def saved_weights(path):
    return tf.keras.models.load_model(path, compile=False).get_weights()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run of five rounds whose best is not the last, with the weights after each round."""
    folder = tmp_path_factory.mktemp("kept")
    config = configure(**FLAGS, rounds=5, client_lr=0.5, runs=str(folder), name="run", save_every=2)
    experiment = fl.build_experiment(config)
    weights = [weights_of(state) for state, _, _ in fl.run_rounds(experiment)]
    return fl.run(config), weights, config


def test_the_best_and_each_nth_model_are_kept(kept):
    end, weights, _ = kept
    accuracies = [record.test_accuracy for record in end.records]
    best = int(np.argmax(accuracies))
    metrics = read_metrics(end.folder)
    assert metrics["best_round"] == best + 1 and metrics["best_accuracy"] == max(accuracies)
    assert metrics["best_chosen_on"] == "the test set"
    assert weights_sha256(saved_weights(end.folder / "best_model.keras")) == weights_sha256(
        weights[best]
    )
    names = sorted(path.name for path in (end.folder / "models").iterdir())
    assert names == ["round-000002.keras", "round-000004.keras"]
    for name, round_num in zip(names, (2, 4), strict=True):
        ours = saved_weights(end.folder / "models" / name)
        assert weights_sha256(ours) == weights_sha256(weights[round_num - 1])


@pytest.mark.parametrize("lost", ["best.npz", "round-000005.npz"])
def test_the_best_model_is_the_same_after_a_resume(kept, tmp_path, lost):
    """Stopped after round 3 and resumed; the best weights, or the last checkpoint, were lost."""
    end, weights, config = kept
    shutil.copytree(end.folder, tmp_path / "run")
    for round_num in (4, 5):
        (tmp_path / "run" / "checkpoints" / f"round-{round_num:06d}.npz").unlink()
    (tmp_path / "run" / "checkpoints" / "best.npz").unlink()
    again = fl.run(config.replace(resume=str(tmp_path / "run"), name=""))
    accuracies = [record.test_accuracy for record in end.records]
    best = int(np.argmax(accuracies))
    assert [record.test_accuracy for record in again.records] == accuracies
    path = tmp_path / "run" / "best_model.keras"
    if best >= 2:  # it is per round that was done again, or that the state was of
        assert weights_sha256(saved_weights(path)) == weights_sha256(weights[best])


def test_a_run_ends_when_it_has_not_become_better_for_long_enough():
    def over(accuracies, stop_after, target=0.0):
        records = [make_record(value, number) for number, value in enumerate(accuracies, 1)]
        return stops_early(records, configure(stop_after=stop_after, target_accuracy=target).run)

    assert not over([0.5, 0.4, 0.5], 0) and not over([], 1)
    assert over([0.5, 0.4, 0.5], 2) and not over([0.5, 0.4], 2)  # an equal one is not better
    assert not over([0.5, 0.4, 0.6], 2) and over([0.5, 0.7], 5, target=0.6)


def test_a_model_that_was_saved_is_begun_from(kept, tmp_path, monkeypatch, digits):
    end, weights, config = kept
    monkeypatch.chdir(tmp_path)
    path = end.folder / "global_model.keras"
    begun = fl.build_experiment(configure(**FLAGS, initial_model=str(path)), digits)
    assert weights_sha256(begun.initial_weights) == weights_sha256(weights[-1])
    assert "from global_model.keras" in captions.caption(begun)
    plain = fl.build_experiment(configure(**FLAGS), digits)
    assert begun.choice_hashes != plain.choice_hashes  # another file is another run
    assert not any("initial_model" in notice for notice in begun.notices)
    arrays = {"x": digits.train.images, "y": digits.train.labels.astype(int) + 5}
    shifted = fl.build_dataset(arrays["x"], arrays["y"], arrays["x"][:50], arrays["y"][:50])
    other = fl.build_experiment(configure(**FLAGS, initial_model=str(path)), shifted)
    assert any("was trained on the labels [0, 1" in notice for notice in other.notices)
    (tmp_path / "text.keras").write_text("no model")
    for name, flags, message in [
        (path, {"model": "2nn"}, "has weights of shapes"),
        (tmp_path / "text.keras", {}, "cannot be read as a Keras model"),
        (tmp_path / "none.keras", {}, "none.keras' cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            fl.build_experiment(configure(**FLAGS | flags, initial_model=str(name)), digits)


def test_images_of_clients_never_drawn_were_not_trained_on(tmp_path, monkeypatch, digits, capsys):
    monkeypatch.chdir(tmp_path)
    config = configure(**FLAGS | {"alpha": 1.0}, rounds=1, unseen_clients=0.5, name="run")
    end = fl.run(config)
    partition = fl.load(end.folder).partition
    unseen = adversity.unseen_clients(config)
    for client, said in [
        (unseen[0], "trained on other images of these data"),
        (None, "trained on"),
    ]:
        clients = set(range(4)) - set(unseen.tolist())
        own = partition[client] if client is not None else partition[clients.pop()]
        tests = {"x_test": digits.train.images[own], "y_test": digits.train.labels[own]}
        np.savez("own.npz", x_train=digits.train.images, y_train=digits.train.labels, **tests)
        fl.main(fl.parse("--evaluate runs/run --data own.npz --figures none"))
        printed = capsys.readouterr().out
        assert f"the model of run, {said}" in printed
        assert (f"{len(own)} of these {len(own)} images" in printed) == (client is None)


def test_a_model_is_evaluated_on_other_data(kept, tmp_path, monkeypatch, digits, capsys):
    """Half of the test images, upside down: as plain Keras sees them."""
    end, _, _ = kept
    monkeypatch.chdir(tmp_path)
    other = digits.test.images[::2, ::-1]
    labels = digits.test.labels[::2]
    arrays = {"x_train": digits.train.images, "y_train": digits.train.labels}
    np.savez(tmp_path / "other.npz", **arrays, x_test=other, y_test=labels)
    fl.main(fl.parse(f"--evaluate {end.folder} --data other.npz --data-name turned --name ev"))
    model = tf.keras.models.load_model(end.folder / "global_model.keras", compile=False)
    predicted = model(other.astype(np.float32)).numpy().argmax(axis=1)
    metrics = read_metrics(tmp_path / "runs" / "ev")
    assert metrics["test_accuracy"] == np.mean(predicted == labels)
    assert metrics["dataset"] == "turned" and metrics["test_images"] == len(labels)
    said = capsys.readouterr().out
    assert "turned \u00b7 the model of run, trained on other images of these data" in said
    np.savez(tmp_path / "new.npz", x_train=other, y_train=labels, x_test=other, y_test=labels)
    fl.main(fl.parse(f"--evaluate {end.folder} --data new.npz --figures none"))
    assert "new \u00b7 the model of run, trained on other data" in capsys.readouterr().out
    fl.main(fl.parse(f"--evaluate {end.folder} --dataset digits --holdout 100 --figures none"))
    said = capsys.readouterr()
    assert "the model of run, trained on 100 of these 100 images" in said.out
    assert "trained on 100 of the 100 images, so its accuracy on them does not" in said.err
    fl.main(fl.parse(f"--evaluate {end.folder} --rounds 9 --algorithm scaffold --figures none"))
    assert "--rounds, --algorithm have no effect with --evaluate" in capsys.readouterr().err
    fl.main(fl.parse(f"--evaluate {end.folder} --name own"))  # without data: the run's own
    own = read_metrics(tmp_path / "runs" / "own")
    assert own["test_accuracy"] == end.records[-1].test_accuracy
    assert "the model of run, on its own test set" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "runs" / "ev").iterdir()} == {
        "metrics.json",
        "confusion_matrix.png",
        "misclassified.png",
    }
    few = {key: array[np.isin(arrays["y_train"], (0, 1))] for key, array in arrays.items()}
    np.savez(tmp_path / "few.npz", **few, x_test=other[labels < 2], y_test=labels[labels < 2])
    with pytest.raises(UserError, match="was trained on the labels"):
        fl.main(fl.parse(f"--evaluate {end.folder} --data few.npz"))
    with pytest.raises(UserError, match="cannot read none"):
        fl.main(fl.parse("--evaluate none"))


@pytest.mark.parametrize("algorithm", ["fedavg", "fednova", "scaffold"])
def test_what_each_client_sent_is_kept(tmp_path, monkeypatch, algorithm):
    """Their mean, weighted by n_k, is the global model after the last round, which is the second;
    FedNova's weights come from steps of different numbers, so only the clients' number is held."""
    monkeypatch.chdir(tmp_path)
    config = configure(**FLAGS | {"alpha": 1.0}, rounds=2, algorithm=algorithm, save_clients=True)
    end = fl.run(config.replace(client_lr=0.1))
    paths = sorted((end.folder / "clients").iterdir())
    assert [path.name for path in paths] == [f"client-{k:06d}.keras" for k in range(4)]
    sizes = [report["examples"] for report in end.records[-1].clients]
    kept = [saved_weights(path) for path in paths]
    mean = [np.average(layer, axis=0, weights=sizes) for layer in zip(*kept, strict=True)]
    if algorithm != "fednova":
        assert largest_difference(mean, weights_of(end.state)) < 1e-5
    assert largest_difference(kept[0], kept[1]) > 1e-3
    for flags in ("--aggregator dp", "--workers localhost,localhost"):
        with pytest.raises(UserError, match="save_clients=True cannot be combined with"):
            fl.parse(f"--save-clients {flags}")


def test_weights_are_read_as_they_were_written(kept):
    end, weights, config = kept
    model = fl.build_model(fl.build_experiment(config).network, seed=1)
    read = layers.read_weights(str(end.folder / "global_model.keras"), model)
    assert weights_sha256(read) == weights_sha256(weights[-1])


def test_a_model_chosen_on_images_held_out_is_evaluated_on_the_test_set(
    tmp_path, monkeypatch, digits
):
    """Trained with --holdout, and evaluated by default on the images held out; the test set is
    named by --holdout 0, or by the data set."""
    monkeypatch.chdir(tmp_path)
    end = fl.run(configure(**FLAGS, rounds=1, holdout=100, name="chosen"))
    model = tf.keras.models.load_model(end.folder / "global_model.keras", compile=False)
    predicted = model(digits.test.images.astype(np.float32)).numpy().argmax(axis=1)
    accuracy = np.mean(predicted == digits.test.labels)
    for flags, images, wanted in [
        ("", 100, end.records[-1].test_accuracy),
        ("--holdout 0", 360, accuracy),
        ("--dataset digits", 360, accuracy),
        ("--dataset digits --holdout 0", 360, accuracy),
    ]:
        words = f"--evaluate runs/chosen --figures none {flags}"
        fl.main(fl.parse(f"{words} --name ev{len(flags)}"))
        metrics = read_metrics(tmp_path / "runs" / f"ev{len(flags)}")
        assert (metrics["test_images"], metrics["test_accuracy"]) == (images, wanted)


def test_no_model_is_saved_that_no_client_sent(tmp_path, monkeypatch):
    """A client whose update was not finite sent nothing; a run that is resumed with no round left
    keeps its clients' models; a later last round has its own."""
    monkeypatch.chdir(tmp_path)
    flags = FLAGS | {"alpha": 1.0, "rounds": 2, "client_lr": 0.1, "clients_per_round": 3}
    flags |= {"byzantine": 2, "attack": "nan", "seed": 2, "save_clients": True}
    end = fl.run(configure(**flags, name="run"))

    def kept():
        return {path.name: path.read_bytes() for path in (end.folder / "clients").iterdir()}

    def sent(record):
        return {f"client-{r['client']:06d}.keras" for r in record.clients if r["finite"]}

    first = kept()
    assert set(first) == sent(end.records[-1]) and len(first) < len(end.records[-1].clients)
    fl.run(configure(**flags, resume=str(end.folder)))
    assert kept() == first
    rounds = next(t for t in range(3, 20) if drawn(flags, t) != drawn(flags, 2))
    more = fl.run(configure(**flags | {"rounds": rounds}, resume=str(end.folder)))
    assert set(kept()) == sent(more.records[-1])


def drawn(flags, round_num):
    return fl.sample_clients(configure(**flags), round_num)


TFLITE = """
import tensorflow as tf

model = tf.keras.models.load_model("{path}", compile=False)
converter = tf.lite.TFLiteConverter.from_keras_model(model)
open("model.tflite", "wb").write(converter.convert())
"""


@pytest.mark.thorough
def test_a_model_goes_to_tflite_with_the_same_predictions(kept, tmp_path, digits):
    """README's three lines, in a process of their own; then TFLite's interpreter."""
    end, _, _ = kept
    code = TFLITE.format(path=end.folder / "global_model.keras")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    interpreter = tf.lite.Interpreter(str(tmp_path / "model.tflite"))
    interpreter.allocate_tensors()
    inputs = interpreter.get_input_details()[0]["index"]
    outputs = interpreter.get_output_details()[0]["index"]
    predicted = []
    for image in digits.test.images:
        interpreter.set_tensor(inputs, image[np.newaxis].astype(np.float32))
        interpreter.invoke()
        predicted.append(interpreter.get_tensor(outputs).argmax())
    accuracy = np.mean(np.array(predicted) == digits.test.labels)
    rows = read_csv(end.folder / "metrics.csv")
    assert accuracy == pytest.approx(float(rows[-1]["test_accuracy"]), abs=1 / 360 + 1e-9)
