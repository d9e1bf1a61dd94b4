"""Personal models: each algorithm against NumPy, who has which model, and what travels."""

import math
from dataclasses import replace

import federated_learning as fl
from harness.cli.fields import UserError
from harness.comparing.outcomes import format_own_models
from harness.comparing.summary import Rates, summarize
from variants import choices
from variants.personal import HEAD_KEY, OwnTensors

import numpy as np
import pytest
from reference import (
    COHORTS,
    NUMPY,
    alone,
    batches_of,
    largest_difference,
    minus,
    numpy_gradients,
    numpy_local,
    plus,
    times,
    weighted_mean,
    weights_of,
)
from runs import MLP_ON_DIGITS, NO_FIGURES, check_saved, configure, make_record, read_csv

RATE = 0.05
HEAD = 2  # the tensors of the last layer, of four
SMALL = {"client_lr": RATE, "local_epochs": 2, "client_test": 0.2, "head_epochs": 3}
PERSONAL = ("fedper", "fedrep", "ditto", "apfl")


def mean_of(local, cohort, sizes):
    """FedAvg's mean of the clients' weights."""
    return weighted_mean([local[k] for k in cohort], [sizes[k] for k in cohort])


def numpy_fedper(config, shards, sizes, weights):
    """Arivazhagan et al. 2019, Algorithms 1 and 2: base layers travel, the head stays."""
    heads = [weights[-HEAD:]] * len(sizes)
    for round_num, cohort in enumerate(COHORTS, 1):
        local = {}
        for k in cohort:
            begun = [*weights[:-HEAD], *heads[k]]
            local[k] = numpy_local(config, shards, k, round_num, begun)[0]
            heads[k] = local[k][-HEAD:]
        weights = mean_of(local, cohort, sizes)
        yield weights, [[*weights[:-HEAD], *head] for head in heads]


def numpy_fedrep(config, shards, sizes, weights):
    """Collins et al. 2021, Algorithm 1: the head's steps, then those of the representation."""
    heads = [weights[-HEAD:]] * len(sizes)
    on_head = config.replace(local_epochs=config.optimization.head_epochs)

    def head_only(g, w):
        return [*times(0, g[:-HEAD]), *g[-HEAD:]]

    def body_only(g, w):
        return [*g[:-HEAD], *times(0, g[-HEAD:])]

    for round_num, cohort in enumerate(COHORTS, 1):
        local = {}
        for k in cohort:
            begun = [*weights[:-HEAD], *heads[k]]
            between, _ = numpy_local(
                on_head, shards, k, round_num, begun, correct=head_only, second=HEAD_KEY
            )
            local[k], _ = numpy_local(config, shards, k, round_num, between, correct=body_only)
            heads[k] = local[k][-HEAD:]
        weights = mean_of(local, cohort, sizes)
        yield weights, [[*weights[:-HEAD], *head] for head in heads]


def numpy_ditto(config, shards, sizes, weights):
    """Li et al. 2021, Algorithm 1: FedAvg, and v <- v - rate (g + lambda (v - w))."""
    own = [weights] * len(sizes)
    for round_num, cohort in enumerate(COHORTS, 1):

        def pull(g, v, w=weights):
            return plus(g, times(config.optimization.ditto_lambda, minus(v, w)))

        for k in cohort:
            own[k], _ = numpy_local(
                config, shards, k, round_num, own[k], correct=pull, second=HEAD_KEY
            )
        local = {k: numpy_local(config, shards, k, round_num, weights)[0] for k in cohort}
        weights = mean_of(local, cohort, sizes)
        yield weights, list(own)


def numpy_apfl(config, shards, sizes, weights):
    """Deng et al. 2020, Algorithm 1: steps of w, and of v at the mixture of both."""
    alpha = config.optimization.apfl_alpha
    own = [weights] * len(sizes)
    for round_num, cohort in enumerate(COHORTS, 1):
        local = {}
        for k in cohort:
            w = weights
            for images, labels in batches_of(config, shards, k, round_num):
                mixed = plus(times(alpha, own[k]), times(1 - alpha, w))
                step = times(-RATE * alpha, numpy_gradients(mixed, images, labels))
                w = plus(w, times(-RATE, numpy_gradients(w, images, labels)))
                own[k] = plus(own[k], step)
            local[k] = w
        weights = mean_of(local, cohort, sizes)
        yield weights, [plus(times(alpha, v), times(1 - alpha, weights)) for v in own]


ALGORITHMS = {
    "fedper": numpy_fedper,
    "fedrep": numpy_fedrep,
    "ditto": numpy_ditto,
    "apfl": numpy_apfl,
}


def test_each_algorithm_has_its_reference():
    in_test_clock = {"fedbuff"}
    assert {*NUMPY, *ALGORITHMS} | in_test_clock == set(choices.ALGORITHMS)


@pytest.mark.parametrize("algorithm", PERSONAL)
def test_three_rounds_equal_numpys(federation, algorithm):
    """The global model, each client's own, and the two columns made of them."""
    experiment = federation(algorithm=algorithm, ditto_lambda=0.5, apfl_alpha=0.3, **SMALL)
    config = experiment.config
    state = experiment.process.initialize()
    sizes = experiment.partition.sizes.tolist()
    first = [w.astype(float) for w in weights_of(state)]
    expected = ALGORITHMS[algorithm](config, experiment.shard_folder, sizes, first)
    judge = fl.build_predictor(experiment.network)
    train = experiment.dataset.train
    trained = set()
    for cohort, (weights, models) in zip(COHORTS, expected, strict=True):
        state, _, _ = experiment.process.next(state, alone(cohort))
        trained |= {*cohort}
        assert largest_difference(weights_of(state), weights) < 2e-5
        evaluation = experiment.evaluate_state(state)
        accuracies = []
        for client, tests in enumerate(experiment.partition.test_indices):
            own = experiment.parts.extend_evaluation.model_of(state, client)
            if client in trained:
                assert largest_difference(own, models[client]) < 2e-5
            weights_of_client = fl.tff.learning.models.ModelWeights(list(own), [])
            found, _ = judge(weights_of_client, train.images[tests], train.labels[tests])
            accuracies.append(np.mean(found == train.labels[tests]))
        columns = evaluation.extra_accuracies
        assert columns["personal_accuracy"] == pytest.approx(np.mean(accuracies))
        assert columns["personal_worst10"] == pytest.approx(min(accuracies))


def test_who_has_not_trained_uses_the_global_model(federation):
    experiment = federation(algorithm="fedper", **SMALL)
    state = experiment.process.initialize()
    state, _, _ = experiment.process.next(state, alone([0, 1]))
    evaluate = experiment.parts.extend_evaluation
    assert largest_difference(evaluate.model_of(state, 2), weights_of(state)) == 0
    assert largest_difference(evaluate.model_of(state, 0), weights_of(state)) > 1e-3


@pytest.mark.parametrize("fields", [{}, {"weight_decay": 0.1}], ids=str)
def test_fine_tuning_is_local_training_from_the_global_model(federation, fields):
    experiment = federation(fine_tune_epochs=1, **SMALL, **fields)
    plain = federation(**SMALL, **fields)
    state = experiment.process.initialize()
    state, _, _ = experiment.process.next(state, alone([0, 1, 2]))
    same, _, _ = plain.process.next(plain.process.initialize(), alone([0, 1, 2]))
    assert largest_difference(weights_of(state), weights_of(same)) == 0  # nothing else changes
    decay = experiment.config.optimization.weight_decay
    once = experiment.config.replace(local_epochs=1)
    begun = [w.astype(float) for w in weights_of(state)]
    for client in range(3):
        own = experiment.parts.extend_evaluation.model_of(state, client)
        expected, _ = numpy_local(
            once,
            experiment.shard_folder,
            client,
            -1,
            begun,
            rate=RATE,
            correct=lambda g, w: plus(g, times(decay, w)),
        )
        assert largest_difference(own, expected) < 2e-5


def test_models_that_diverge_are_wrong_not_global_ones(federation, capsys):
    """Ditto's w is FedAvg's whatever lambda does; fine-tuning from w diverges by its rate."""
    ditto = federation(algorithm="ditto", ditto_lambda=1000, **SMALL)
    state = ditto.process.initialize()
    for _ in range(3):
        state, _, reports = ditto.process.next(state, alone([0, 1]))
    assert all(np.isfinite(w).all() for w in weights_of(state))
    assert (np.asarray(reports)[:, fl.ClientMetrics._fields.index("finite")] == 1).all()
    columns = ditto.evaluate_state(state).extra_accuracies
    ditto.evaluate_state(state)
    # The third client has not trained, and uses the global model.
    third = ditto.parts.extend_evaluation.model_of(state, 2)
    assert largest_difference(third, weights_of(state)) == 0
    assert columns["personal_worst10"] == 0 < columns["client_accuracy"]
    assert 0 < columns["personal_accuracy"] <= 1 / 3
    said = capsys.readouterr().err
    assert said.count("round 3: the models that 2 clients would use have weights that are not") == 1

    tuned = federation(fine_tune_epochs=3, **SMALL | {"client_lr": 1000.0}, weight_decay=1.0)
    columns = tuned.evaluate_state(tuned.process.initialize()).extra_accuracies
    assert columns["personal_accuracy"] == 0 < columns["client_accuracy"]


def test_what_clients_keep_does_not_travel(federation):
    """Of 784-16-10: 12,560 parameters travel, and 170 stay."""
    cost = {}
    for algorithm in ("fedavg", *PERSONAL):
        experiment = federation(algorithm=algorithm, **SMALL)
        cost[algorithm] = fl.records.communication_cost(experiment, 3, 2)
    assert cost["fedavg"]["bytes_down"] == 3 * (4 * 12_730 + 8)
    assert cost["ditto"] == cost["apfl"] == cost["fedavg"]
    assert cost["fedper"] == cost["fedrep"]
    assert cost["fedper"]["bytes_down"] == 3 * (4 * 12_560 + 8)
    difference = cost["fedavg"]["bytes_up"] - cost["fedper"]["bytes_up"]
    assert difference == 2 * 4 * 170


def test_compressed_updates_leave_out_what_clients_keep(federation):
    """No tensor of 784-16-10 has more than 20,000 elements, so none is sent in 8 bits."""
    plain = federation(algorithm="fedper", **SMALL)
    compressed = federation(algorithm="fedper", aggregator="compressed", **SMALL)
    assert plain.parts.update_bytes == 4 * 12_560
    assert compressed.parts.update_bytes == 4 * 12_560
    wide = configure(dataset="digits", model="mlp", algorithm="fedper", aggregator="compressed")
    parts = fl.build_experiment(wide.replace(client_test=0.2)).parts
    assert parts.update_bytes == 4 * math.ceil(8 * 784 * 128 / 28) + 8 + 4 * 128


def test_a_resumed_run_keeps_its_lambda(tmp_path):
    base = [*MLP_ON_DIGITS, *NO_FIGURES, "--client-test", "0.2", "--runs", str(tmp_path)]
    flags = ["--algorithm", "ditto", "--ditto-lambda", "1", "--rounds", "1", "--name", "a"]
    folder = fl.run(fl.parse([*base, *flags])).folder
    before = (folder / "config.json").read_text()
    changes = {
        "--ditto-lambda 0.1": "ditto_lambda=0.1 differs from 1.0",
        "--fine-tune-epochs 1": "fine_tune_epochs=1 differs from 0",
        "--latency 1": "latency=1.0 differs from 0.0",
    }
    for words, said in changes.items():
        with pytest.raises(UserError, match=said):
            fl.parse(["--resume", str(folder), "--rounds", "2", *words.split()])
    assert (folder / "config.json").read_text() == before


def test_a_row_gives_back_the_tensors_of_a_client(federation):
    memory = OwnTensors(federation(**SMALL), [2, 3])
    own = tuple(np.random.default_rng(0).normal(size=w.shape) for w in memory.initial)
    row = memory.make_row(tuple(w.astype(np.float32) for w in own))
    assert row.shape == (memory.shape[1],) and row[-1] == 1
    assert largest_difference(memory.own_tensors(row), own) < 1e-6


FLAGS = [*MLP_ON_DIGITS, *NO_FIGURES, "--client-test", "0.2", "--clients-per-round", "4"]
NEIGHBOURS = [
    ["--algorithm", "fedper", "--fine-tune-epochs", "2", "--unseen-clients", "0.3"],
    ["--fine-tune-epochs", "1", "--unseen-clients", "0.2"],
    ["--algorithm", "fedper", "--aggregator", "median"],
    ["--algorithm", "fedrep", "--head-epochs", "2", "--stragglers", "0.5"],
    ["--algorithm", "ditto", "--client-optimizer", "adam", "--byzantine", "1"],
    ["--algorithm", "apfl", "--sampling", "poisson", "--weight-decay", "0.01"],
    ["--algorithm", "ditto", "--aggregator", "compressed", "--client-schedule", "exponential"],
    ["--algorithm", "fedrep", "--personal-layers", "1", "--aggregator", "secure"],
]


CASES = [  # one in `make test`
    NEIGHBOURS[0],
    *(pytest.param(more, marks=pytest.mark.thorough) for more in NEIGHBOURS[1:]),
]


@pytest.mark.slow
@pytest.mark.parametrize("more", CASES, ids=" ".join)
def test_with_its_neighbours_a_run_resumes_bit_for_bit(tmp_path, more):
    base = [*FLAGS, *more, "--runs", str(tmp_path)]
    whole = fl.run(fl.parse([*base, "--rounds", "4", "--name", "whole"]))
    half = fl.run(fl.parse([*base, "--rounds", "2", "--name", "half"]))
    resumed = fl.run(fl.parse(["--resume", str(half.folder), "--rounds", "4"]))
    assert largest_difference(weights_of(whole.state), weights_of(resumed.state)) == 0
    last = whole.records[-1].extra_accuracies
    assert last == resumed.records[-1].extra_accuracies
    assert 0 < last["personal_accuracy"] <= 1
    assert ("unseen_personal_accuracy" in last) == ("--unseen-clients" in more)
    check_saved(resumed)
    rows = read_csv(resumed.folder / "clients.csv")
    own = [float(row["personal_accuracy"]) for row in rows if row["personal_accuracy"]]
    if "unseen_personal_accuracy" not in last:
        measured = [value for value in own if not math.isnan(value)]
        assert np.mean(measured) == pytest.approx(last["personal_accuracy"])


def test_own_models_are_compared_as_the_global_one_is():
    """By two seeds the global model has 0.7 and 0.8, own models have 0.9 and 0.8."""
    records_of = {}
    for row, personal in (("fedavg", None), ("ditto", (0.9, 0.8))):
        runs = []
        for seed, common in enumerate((0.7, 0.8)):
            found = {"client_accuracy": common, "client_worst10": common - 0.1}
            if personal:
                own = personal[seed]
                found |= {"personal_accuracy": own, "personal_worst10": own - 0.2}
            runs.append([replace(make_record(0.5), extra_accuracies=found)])
        records_of[row] = runs
    rates = dict.fromkeys(records_of, Rates(0.1, 1.0, 16))
    fedavg, ditto = summarize(records_of, rates, "fedavg", 0)
    assert fedavg["own_images"] == ditto["own_images"] == pytest.approx(75)
    assert fedavg["personal"] is None and ditto["personal"] == pytest.approx(85)
    assert ditto["personal_sd"] == pytest.approx(10 / math.sqrt(2))
    assert ditto["personal_worst10"] == pytest.approx(65)
    assert ditto["personal_difference"] == pytest.approx(10)  # 85 - 75
    # Differences of 20 and 0: t = 10 / (10 * sqrt(2) / sqrt(2)) = 1, and p = 0.5 of one degree.
    assert ditto["personal_p"] == pytest.approx(0.5)
    texts = format_own_models(records_of, "fedavg")
    assert texts["ditto"].startswith(
        "85.00 ± 7.07 %, worst 10 % 65.00 % (own models); +10.00 points"
    )
    assert texts["fedavg"].startswith("75.00 ± 7.07 %, worst 10 % 65.00 % (global model)")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"client_test": 0.0}, "algorithm='fedper' gives each client a model .* --client-test 0.2"),
        ({"personal_layers": 2}, "personal_layers=2 leaves no layer to share: .* choose 1 to 1"),
        ({"client_test": 0.0, "algorithm": "fedavg", "fine_tune_epochs": 1}, "fine_tune_epochs=1"),
        ({"baselines": True}, "algorithm='fedper' cannot be combined with 'baselines'"),
        ({"sampling": "by-size", "clients_per_round": 2}, "may draw a client twice"),
        ({"algorithm": "fedrep", "local_steps": 5}, "local_steps=5 cannot be combined"),
        ({"client_test": 0.0, "aggregator": "dp"}, "to which aggregator='dp' adds no noise"),
        ({"model": "logreg"}, "has one layer with weights, so none is left"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(fields, said):
    flags = {"dataset": "digits", "model": "mlp", "algorithm": "fedper", "client_test": 0.2}
    with pytest.raises(UserError, match=said):
        fl.build_experiment(configure(**flags | {"num_clients": 10} | fields))
