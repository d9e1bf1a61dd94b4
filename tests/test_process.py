"""The federated process against arithmetic: TFF's own FedAvg, NumPy, single SGD steps, weighted
means."""

from typing import Any, NamedTuple

import federated_learning as fl
from harness.engine.supervisor import worker_environment
from harness.training import streams
from harness.training.dataset import make_dataset
from harness.training.records import Evaluation, make_record
from variants import choices
from variants.adversity import choose_attackers, unseen_clients
from variants.optimizers import count_examples
from variants.sampling import draw_cohort

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from reference import (
    alone,
    batches_of,
    correcting,
    functional_model,
    largest_difference,
    named,
    network,
    numpy_sgd_step,
    replace_choice,
    weighted_mean,
    weights_of,
)
from runs import configure


def record_of(reports, evaluation):
    """The record of a round with these reports."""
    figures = {"dropped": 0, "bytes_down": 0, "bytes_up": 0, "seconds": 1.0}
    return make_record(1, reports, evaluation, fl.ClientMetrics._fields, **figures)


def numpy_fedavg_round(config, shards, sizes, weights, round_num):
    """McMahan et al. 2017, Algorithm 1: w <- sum_k (n_k / n) w_k."""
    trained = []
    for client in range(config.partitioning.num_clients):
        local = weights
        for images, labels in batches_of(config, shards, client, round_num):
            local = numpy_sgd_step(local, images, labels, config.training.client_lr)
        trained.append(local)
    return weighted_mean(trained, sizes)


def test_rounds_equal_a_numpy_fedavg(federation):
    experiment = federation(local_epochs=2)
    config = experiment.config
    partition = experiment.partition
    shards = experiment.shard_folder
    process = experiment.process
    state = process.initialize()
    expected = [w.astype(np.float64) for w in weights_of(state)]
    assert len(set(partition.sizes.tolist())) == 3  # unequal, so the weighting shows
    for round_num in (1, 2):
        expected = numpy_fedavg_round(config, shards, partition.sizes.tolist(), expected, round_num)
        state, _, _ = process.next(state, alone([0, 1, 2]))
        assert largest_difference(weights_of(state), expected) < 1e-5


# After a last-bit difference max-pooling picks another pixel; at 0.1 that grows to 0.02 in a round,
# at 0.01 it dies.
@pytest.mark.parametrize(
    ("model", "rate"), [("mlp", 0.1), ("small-cnn", 0.01), ("lean-cnn", 0.001), ("lenet", 0.01)]
)
def test_rounds_equal_tffs_own_fedavg_on_the_same_batches(federation, model, rate):
    experiment = federation(model=model, local_epochs=1, batch_size=20, client_lr=rate)
    config = experiment.config
    shards = experiment.shard_folder
    process = experiment.process
    stock = tff.learning.algorithms.build_weighted_fed_avg(
        functional_model(experiment),
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(config.training.client_lr),
        server_optimizer_fn=tff.learning.optimizers.build_sgdm(1.0),
    )
    ours = process.initialize()
    theirs = stock.initialize()
    for round_num in (1, 2):
        data = [list(batches_of(config, shards, client, round_num)) for client in range(3)]
        theirs = stock.next(theirs, data).state
        ours, _, _ = process.next(ours, alone([0, 1, 2]))
        assert largest_difference(weights_of(ours), weights_of(theirs)) < 1e-5


def test_one_client_with_its_whole_shard_as_batch_is_one_sgd_step(federation):
    experiment = federation(num_clients=1, partition="iid", batch_size=0, local_epochs=1)
    config = experiment.config
    process = experiment.process
    state = process.initialize()
    ((images, labels),) = batches_of(config, experiment.shard_folder, 0, 1)
    rate = config.training.client_lr
    expected = numpy_sgd_step(
        [w.astype(np.float64) for w in weights_of(state)], images, labels, rate
    )
    state, _, reports = process.next(state, alone([0]))
    assert largest_difference(weights_of(state), expected) < 1e-6
    assert named(alone([0]), reports)[0]["examples"] == 1437 == len(labels)


def test_with_one_step_a_round_the_split_is_nothing_to_the_weights(federation):
    """sum_k (n_k / n) g_k is the gradient of all images: what benchmarks/README.md says of one
    label a client."""
    ends = []
    for split in ({"partition": "iid"}, {"partition": "labels-per-client", "labels_per_client": 1}):
        flags = {
            "num_clients": 10,
            "algorithm": "fedadam",
            "client_lr": 1.0,
            "batch_size": 0,
            "local_epochs": 1,
        }
        experiment = federation(**flags, **split)
        partition = experiment.partition
        process = experiment.process
        state = process.initialize()
        for _ in range(3):
            state, _, _ = process.next(state, alone(range(10)))
        ends.append((weights_of(state), int((partition.counts > 0).sum(axis=1).max())))
    (one, all_labels), (other, one_label) = ends
    assert (all_labels, one_label) == (10, 1) and largest_difference(one, other) < 1e-4
    assert largest_difference(one, weights_of(process.initialize())) > 0.05


def test_clients_are_weighted_by_their_numbers_of_examples(federation):
    experiment = federation()
    partition = experiment.partition
    process = experiment.process
    state = process.initialize()
    each = [weights_of(process.next(state, alone([client]))[0]) for client in range(3)]
    together = weights_of(process.next(state, alone([0, 1, 2]))[0])
    shares = partition.sizes / partition.sizes.sum()
    expected = [
        sum(s * w for s, w in zip(shares, layer, strict=True)) for layer in zip(*each, strict=True)
    ]
    assert largest_difference(together, expected) < 1e-6


def test_a_client_that_diverges_is_left_out_and_counted(worker, digits, tmp_path, monkeypatch):
    black = np.array(digits.train.images)
    config = configure(dataset="digits", model="mlp", num_clients=3, cache=str(tmp_path))
    partition = fl.make_partition(digits, config)
    # client 1's first-layer gradient is exactly 0, by which the row below knows it
    black[partition.indices[1]] = 0

    def poison(gradients, weights):
        bad = tf.equal(tf.reduce_sum(tf.abs(gradients[0])), 0)
        return tuple(tf.where(bad, np.nan, g) for g in gradients)

    replace_choice(monkeypatch, choices.ALGORITHMS, "fedprox", correcting(poison))
    config = config.replace(algorithm="fedprox")
    dataset = make_dataset(
        "black",
        {
            "x_train": black,
            "y_train": digits.train.labels,
            "x_test": digits.test.images,
            "y_test": digits.test.labels,
        },
    )
    process = fl.build_prepared(config, dataset).process
    state, _, reports = process.next(process.initialize(), alone([0, 1, 2]))
    rows = named(alone([0, 1, 2]), reports)
    assert [row["finite"] for row in rows] == [True, False, True]
    others, _, _ = process.next(process.initialize(), alone([0, 2]))
    assert largest_difference(weights_of(state), weights_of(others)) < 1e-7
    evaluation = Evaluation(0.5, 0.5, np.zeros(0), np.zeros(0), 10)
    record = record_of(rows, evaluation)
    assert record.num_nonfinite == 1 and np.isfinite(record.train["loss"])
    assert "left out" in record.line(5)
    nobody, _, _ = process.next(state, alone([1]))
    assert largest_difference(weights_of(nobody), weights_of(state)) == 0


def test_a_reports_columns_go_by_name(federation, monkeypatch):
    """One more column, in the last place and 1 for all, and a client that diverged still counts as
    such."""

    class MoreMetrics(NamedTuple):
        examples: Any
        loss: Any
        accuracy: Any
        steps: Any
        finite: Any
        weight_norm: Any = 1.0

    diverge = correcting(lambda gradients, weights: tuple(g * np.nan for g in gradients))
    monkeypatch.setattr(fl, "ClientMetrics", MoreMetrics)
    replace_choice(monkeypatch, choices.ALGORITHMS, "fedprox", diverge)
    process = federation(algorithm="fedprox").process
    _, _, reports = process.next(process.initialize(), alone([0, 1, 2]))
    rows = named(alone([0, 1, 2]), reports)
    assert [row["finite"] for row in rows] == [False] * 3 and [
        row["weight_norm"] for row in rows
    ] == [1.0] * 3


def test_a_clients_report_is_its_own_loss_and_accuracy(federation):
    experiment = federation(batch_size=0, local_epochs=1)
    config = experiment.config
    partition = experiment.partition
    shards = experiment.shard_folder
    process = experiment.process
    state = process.initialize()
    model = fl.build_model(experiment.network, config.seed)
    cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    _, _, reports = process.next(state, alone([0, 2]))
    for report in named(alone([0, 2]), reports):
        client = report["client"]
        ((images, labels),) = batches_of(config, shards, client, 1)
        logits = model(images)
        assert report["examples"] == partition.sizes[client]
        assert report["loss"] == pytest.approx(float(cross_entropy(labels, logits)), rel=1e-5)
        assert report["accuracy"] == pytest.approx(
            np.mean(np.argmax(logits, axis=1) == labels), abs=1e-6
        )


def test_bytes_to_the_worker_do_not_grow_with_the_images(federation, worker):
    sent = {}
    for clients in (100, 10):  # clients 0, 1, 2 hold 14 images each, then 144
        experiment = federation(num_clients=clients, partition="iid")
        partition = experiment.partition
        process = experiment.process
        state, _, _ = process.next(process.initialize(), alone([0, 1, 2]))
        before = worker.bytes_sent
        process.next(state, alone([0, 1, 2]))
        sent[int(partition.sizes[0])] = worker.bytes_sent - before
    assert set(sent) == {15, 144}
    assert abs(sent[15] - sent[144]) < 500  # three clients' images differ by 304,000 bytes
    weights = sum(w.nbytes for w in weights_of(state))
    assert weights < sent[15] < weights + 1200  # the weights, and next to nothing else


def test_clients_in_chunks_give_the_weights_of_clients_alone(federation, worker):
    experiment = federation(num_clients=100, alpha=0.3)
    sizes = experiment.partition.sizes
    process = experiment.process
    clients = list(range(0, 100, 2))
    chunks = fl.make_chunks(clients, sizes, fl.NUM_CHUNKS)
    assert len(chunks) == fl.NUM_CHUNKS
    assert sorted(np.concatenate(chunks).tolist()) == clients
    fullness = [sizes[chunk].sum() for chunk in chunks]
    assert max(fullness) - min(fullness) <= sizes[clients].max()  # balanced to within one client
    singles = fl.make_chunks(clients, sizes, None)
    assert [chunk.tolist() for chunk in singles] == [[k] for k in clients]
    chunked, _, in_chunks = process.next(process.initialize(), chunks)
    apart, _, each = process.next(process.initialize(), alone(clients))
    assert largest_difference(weights_of(chunked), weights_of(apart)) < 1e-6
    assert named(chunks, in_chunks) == named(alone(clients), each)


def test_parameters_are_those_of_the_papers():
    def parameters(model):
        return fl.build_model(network(model), 0).count_params()

    assert parameters("mlp") == 784 * 128 + 128 + 128 * 10 + 10
    assert parameters("2nn") == 199_210  # McMahan et al. 2017, section 3
    assert parameters("cnn") == 1_663_370  # the same
    assert parameters("lenet") == 44_426  # Li et al. 2022, section V
    assert parameters("lean-cnn") == 16 * 26 + 32 * (9 * 16 + 1) + 128 * (36 * 32 + 1) + 10 * 129
    assert parameters("small-cnn") == 16 * 26 + 32 * (25 * 16 + 1) + 128 * (49 * 32 + 1) + 10 * 129


def test_initial_weights_are_a_function_of_the_seed():
    first, again, other = (
        fl.build_model(network("lean-cnn"), seed).get_weights() for seed in (0, 0, 1)
    )
    assert largest_difference(first, again) == 0 < largest_difference(first, other)
    kernel = first[4]  # dense, Glorot uniform: within sqrt(6 / (inputs + outputs)), and close to it
    assert 0.99 < np.abs(kernel).max() / np.sqrt(6 / sum(kernel.shape)) <= 1 and not first[5].any()


def test_cohorts_are_a_function_of_seed_and_round():
    config = configure(num_clients=100, clients_per_round=10)
    drawn = [fl.sample_clients(config, round_num) for round_num in range(1, 101)]
    assert drawn == [fl.sample_clients(config, round_num) for round_num in range(1, 101)]
    assert all(len(set(clients)) == 10 and clients == sorted(clients) for clients in drawn)
    assert len({tuple(clients) for clients in drawn}) == 100
    # a client stays away 100 times with probability 0.9^100 = 3e-5
    assert set().union(*drawn) == set(range(100))
    assert fl.sample_clients(fl.Config(), 7) == list(range(10))


def test_the_workers_environment_is_the_same_on_every_machine(monkeypatch):
    """A thread within an op, two of a client alone, whatever the cores; nothing of the user's that
    kernels follow."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setenv("TF_DETERMINISTIC_OPS", "1")
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    threads = [
        int(worker_environment(clients)["TF_NUM_INTRAOP_THREADS"]) for clients in (1, 2, 3, 100)
    ]
    assert threads == [2, 1, 1, 1]
    ours = {
        name: value
        for name, value in worker_environment(3).items()
        if name.startswith(("TF_", "ONEDNN_"))
    }
    assert ours == {
        "TF_ENABLE_ONEDNN_OPTS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def test_images_in_colours_are_trained_and_evaluated_on(worker, tmp_path):
    """One step on the whole shard: w - rate * gradient, by Keras' own model on the arrays
    themselves, weighted by n_k. Labels above 255 among them."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (600, 5, 4, 3)).astype(np.uint8)
    labels = np.arange(600) % 300
    dataset = fl.build_dataset(images, labels, images[:90], labels[:90])
    flags = {"model": "mlp", "num_clients": 2, "algorithm": "fedsgd", "client_lr": 0.5}
    experiment = fl.build_prepared(configure(**flags, cache=str(tmp_path)), dataset)
    state, _, _ = experiment.process.next(experiment.process.initialize(), alone([0, 1]))
    model = fl.build_model(experiment.network, 0)
    start = model.get_weights()
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    expected = [np.zeros_like(weight) for weight in start]
    for indices in experiment.partition.indices:
        with tf.GradientTape() as tape:
            value = loss(labels[indices], model(images[indices] / np.float32(255)))
        for total, weight, gradient in zip(
            expected, start, tape.gradient(value, model.weights), strict=True
        ):
            total += len(indices) / 600 * (weight - 0.5 * gradient.numpy())
    assert largest_difference(weights_of(state), expected) < 1e-6
    model.set_weights(weights_of(state))
    predicted = model(images[:90] / np.float32(255)).numpy().argmax(axis=1)
    evaluation = experiment.evaluate(state.global_model_weights)
    assert np.array_equal(evaluation.predictions, predicted)
    assert evaluation.accuracy == np.mean(predicted == labels[:90])
    assert evaluation.confusion.shape == (300, 300)


@pytest.mark.parametrize(("steps", "batch_size"), [(7, 50), (1, 16), (11, 0)])
def test_local_steps_are_as_many_as_said(federation, steps, batch_size):
    """Whole epochs, and the rest of one: clients with few images make as many as those with
    many."""
    process = federation(local_steps=steps, batch_size=batch_size).process
    _, _, metrics = process.next(process.initialize(), alone([0, 1, 2]))
    rows = named(alone([0, 1, 2]), metrics)
    assert [row["steps"] for row in rows] == [steps] * 3


def test_local_steps_of_an_epochs_length_are_an_epoch(federation):
    one = federation(local_steps=2, batch_size=0)
    two = federation(local_epochs=2, batch_size=0)
    ends = [e.process.next(e.process.initialize(), alone([0, 1, 2]))[0] for e in (one, two)]
    assert largest_difference(*map(weights_of, ends)) == 0


def test_clients_may_count_the_same(federation):
    """With uniform weights the mean of w_k, by three processes of one client each."""
    both = federation(client_weighting="uniform")
    start = both.process.initialize()
    together = weights_of(both.process.next(start, alone([0, 1, 2]))[0])
    ends = [weights_of(both.process.next(start, alone([client]))[0]) for client in range(3)]
    expected = [np.mean(layer, axis=0) for layer in zip(*ends, strict=True)]
    assert largest_difference(together, expected) < 1e-6
    by_size = federation(sampling="by-size")
    assert by_size.config.aggregation.client_weighting == "uniform"
    # a client that is drawn twice counts twice
    twice = weights_of(both.process.next(start, alone([0, 0, 1]))[0])
    expected = [(2 * one + other) / 3 for one, other in zip(ends[0], ends[1], strict=True)]
    assert largest_difference(twice, expected) < 1e-6


def test_clients_drawn_by_size_come_in_proportion_to_it():
    """Over 2,000 rounds of two draws from sizes 1, 2, 7: means within four standard errors."""
    config = configure(num_clients=3, clients_per_round=2, sampling="by-size")
    sizes = np.array([1, 2, 7])
    draws = [draw_cohort(config, round_num, sizes) for round_num in range(1, 2001)]
    assert draws[4] == draw_cohort(config, 5, sizes) and any(a == b for a, b in draws)
    for client, share in enumerate(sizes / 10):
        mean = np.mean(np.array(draws) == client)
        assert mean == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 4000))


def test_evaluation_is_over_every_test_image(digits, monkeypatch):
    """360 images in batches of 100: loss and accuracy of all, by NumPy on the model's own
    logits."""
    monkeypatch.setattr(fl, "EVALUATION_BATCH", 100)
    model = fl.build_model(network("mlp"), 5)
    evaluation = fl.build_evaluator(network("mlp"), digits)(
        tff.learning.models.ModelWeights(tuple(model.get_weights()), ())
    )
    logits = model(digits.test.images[..., None] / np.float32(255)).numpy().astype(float)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    labels = digits.test.labels.astype(int)
    assert evaluation.confusion.sum() == len(evaluation.predictions) == 360
    assert evaluation.loss == pytest.approx(-logs[np.arange(360), labels].mean(), rel=1e-5)
    assert evaluation.accuracy == np.mean(logits.argmax(axis=1) == labels)


def test_training_figures_are_weighted_by_examples():
    """100 examples with a loss of 1 and 300 with 2, and one that is left out: 700 / 400."""
    rows = [
        {
            "client": 0,
            "examples": 100.0,
            "loss": 1.0,
            "accuracy": 0.2,
            "steps": 1.0,
            "finite": True,
        },
        {
            "client": 1,
            "examples": 300.0,
            "loss": 2.0,
            "accuracy": 0.6,
            "steps": 1.0,
            "finite": True,
        },
        {
            "client": 2,
            "examples": 900.0,
            "loss": 9.0,
            "accuracy": 0.0,
            "steps": 1.0,
            "finite": False,
        },
    ]
    evaluation = Evaluation(0.5, 0.5, np.zeros(0), np.zeros(0), 10)
    record = record_of(rows, evaluation)
    assert record.train == pytest.approx({"loss": 1.75, "accuracy": 0.5, "steps": 1.0})


def test_local_steps_are_examples_by_hand():
    """50 images in batches of 16 are four steps an epoch, the last of two images."""
    for steps, examples in [(1, 16), (3, 48), (4, 50), (5, 66), (7, 98), (8, 100), (9, 116)]:
        assert count_examples(steps, 16, 50) == examples
    assert count_examples(3, 0, 50) == 150


def test_what_is_drawn_never_changes():
    """A saved run goes on by any later version: these values may not become others."""
    drawn = {name: int(streams.open_stream(name, 3, 2).integers(1000)) for name in streams.NUMBERS}
    assert drawn == {
        "dropouts": 616,
        "attackers": 491,
        "split again": 765,
        "unseen clients": 417,
        "extra evaluations": 999,
        "device speeds": 482,
        "arrivals": 860,
        "client tests": 646,
    }
    config = configure(num_clients=100, clients_per_round=5, seed=3)
    assert fl.sample_clients(config, 2) == [2, 24, 55, 73, 81]
    assert streams.client_key(3, np.int64(7), 2).numpy().tolist() == [-7312828553220789254, 2]
    some = config.replace(unseen_clients=0.03, byzantine=2)
    assert unseen_clients(some).tolist() == [61, 71, 72]
    assert choose_attackers(some.adversity, np.arange(100), 3).tolist() == [58, 97]
    assert draw_cohort(some, 2, np.ones(100)) == [2, 23, 53, 74, 81]
    poisson = draw_cohort(some.replace(sampling="poisson"), 2, np.ones(100))
    assert poisson == [0, 4, 5, 8, 10, 19, 44, 46]
