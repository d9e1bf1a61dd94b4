"""The simulated clock, and FedBuff's asynchronous rounds on it."""

import math

import federated_learning as fl
from harness.cli.fields import UserError
from harness.comparing.outcomes import format_times
from harness.comparing.summary import Rates, summarize
from harness.training.histories import seconds_to_target
from variants import choices
from variants.clock import Closed, close_round, draw_speeds
from variants.given_splits import fields_of_indices

import numpy as np
import pytest
from reference import (
    largest_difference,
    minus,
    numpy_local,
    replace_choice,
    tanh_layers,
    weights_of,
)
from runs import MLP_ON_DIGITS, NO_FIGURES, ON_DIGITS, configure, make_record

TIMES = [(1.0, 4), (2.0, 0), (3.0, 2), (9.0, 1)]  # (seconds, client)


@pytest.mark.parametrize(
    ("wanted", "deadline", "closed"),
    [
        (4, 0, Closed([0, 1, 2, 4], 9.0)),
        (2, 0, Closed([0, 4], 2.0)),
        (4, 3.5, Closed([0, 2, 4], 3.5)),
        (3, 3.5, Closed([0, 2, 4], 3.0)),
        (5, 0, Closed([0, 1, 2, 4], 9.0)),  # one of five dropped out, and the server knows
        (5, 20, Closed([0, 1, 2, 4], 20)),  # the same, but it waits for all until the deadline
        (4, 0.5, Closed([], 0.5)),
    ],
)
def test_a_round_is_closed_by_the_last_report_or_the_deadline(wanted, deadline, closed):
    assert close_round(TIMES, wanted, deadline) == closed


def test_without_reports_a_round_takes_no_time():
    assert close_round([], 3, 0) == Closed([], 0.0)


def test_speeds_are_lognormal_and_correlate_with_size():
    sizes = np.random.default_rng(0).integers(1, 1000, 20_000)
    clock = configure(device_speed="lognormal:0.5", examples_per_second=200).clock
    logs = np.log(draw_speeds(clock, sizes, 3))
    assert np.median(logs) == pytest.approx(math.log(200), abs=0.02)
    assert logs.std() == pytest.approx(0.5, abs=0.02)
    assert np.corrcoef(logs, np.log(sizes))[0, 1] == pytest.approx(0, abs=0.02)
    correlated = configure(device_speed="lognormal:0.5", speed_by_size=-0.7).clock
    logs = np.log(draw_speeds(correlated, sizes, 3))
    assert np.corrcoef(logs, np.log(sizes))[0, 1] == pytest.approx(-0.7, abs=0.02)
    assert np.array_equal(draw_speeds(clock, sizes, 3), draw_speeds(clock, sizes, 3))
    constant = configure(device_speed="constant").clock
    assert set(draw_speeds(constant, sizes, 3)) == {1000.0}


SMALL = {"dataset": "digits", "model": "2nn", "client_lr": 0.05, "rounds": 3}


@pytest.fixture
def build(monkeypatch, tmp_path, digits):
    """build(sizes, **flags) -> the experiment on clients of these sizes."""
    replace_choice(monkeypatch, choices.MODELS, "2nn", tanh_layers)

    def make(sizes, **flags):
        cuts = np.cumsum([0, *sizes])
        parts = [np.arange(*ends) for ends in zip(cuts[:-1], cuts[1:], strict=True)]
        fields = fields_of_indices(parts, str(tmp_path))
        config = configure(**SMALL | flags | {"num_clients": len(sizes)}, cache=str(tmp_path))
        return fl.build_experiment(config.replace(**fields), digits)

    return make


def test_a_round_takes_as_long_as_its_slowest_client(build):
    """200 images, 2 epochs, at 100 a second: 4 s; the messages: 2 * 0.25 s, and bytes / 1e6."""
    experiment = build(
        [100, 200],
        local_epochs=2,
        device_speed="constant",
        examples_per_second=100,
        latency=0.25,
        bandwidth=1e6,
    )
    records = [outcome.record for outcome in fl.run_rounds(experiment)]
    messages = (records[0].bytes_down + records[0].bytes_up) / 2 / 1e6
    for record in records:
        assert record.simulated_seconds == pytest.approx(4 + 0.5 + messages)
    assert len(records) == 3


@pytest.mark.parametrize(
    ("fields", "examples"),
    [
        ({}, 2 * 200),
        ({"local_steps": 3}, 3 * 16),
        ({"algorithm": "ditto", "client_test": 0.2}, 2 * 2 * 160),
        ({"algorithm": "fedrep", "head_epochs": 5, "client_test": 0.2}, (2 + 5) * 160),
        ({"algorithm": "mimelite", "local_steps": 3}, 3 * 16 + 200),
    ],
    ids=str,
)
def test_time_follows_from_the_work(build, fields, examples):
    """Of 200 images, 2 epochs in batches of 16, at 100 a second."""
    clock = {"device_speed": "constant", "examples_per_second": 100.0}
    experiment = build([200, 200], local_epochs=2, **clock, **fields)
    assert experiment.parts.simulate_seconds([0], 1) == pytest.approx(examples / 100)


def test_time_to_target_is_read_between_the_ends_of_rounds():
    records = [make_record(accuracy, number) for number, accuracy in enumerate([0.5, 0.7, 0.9], 1)]
    assert seconds_to_target(records, 0.8) is None
    timed = [fl.replace(record, simulated_seconds=10.0 * record.round) for record in records]
    assert seconds_to_target(timed, 0.8) == pytest.approx(10 + 20 + 15)
    assert seconds_to_target(timed, 0.4) == 10 and seconds_to_target(timed, 0.95) is None


def test_a_comparison_has_the_times_to_the_target():
    """Rounds of 10 s and of 5 s that gain 0.2 each from 0.5 on: 0.8 is crossed in round 2.5."""
    records_of = {
        name: [
            [
                fl.replace(make_record(0.3 + 0.2 * number, number), simulated_seconds=seconds)
                for number in (1, 2, 3)
            ]
        ]
        for name, seconds in (("fedavg", 10.0), ("fedbuff", 5.0))
    }
    rates = dict.fromkeys(records_of, Rates(0.1, 1.0, 16))
    rows = summarize(records_of, rates, "fedavg", 0.8)
    assert [row["seconds_to_target"] for row in rows] == pytest.approx([25, 12.5])
    rows = summarize(records_of, rates, "fedavg", 0)
    assert [row["simulated_seconds"] for row in rows] == pytest.approx([30, 15])
    texts = format_times(records_of, 0.8, "fedavg")
    assert texts == {
        "": "simulated seconds to 80.00%:",
        "fedavg": "25.0",
        "fedbuff": "12.5",
    }
    assert format_times(records_of, 0.95, "fedavg")["fedbuff"] == "not reached"


@pytest.mark.slow
def test_who_is_late_is_left_out_and_more_are_drawn(build):
    """Of 1, 2 and 4 s the deadline leaves the first two; over-selection takes the first."""
    sizes = [100, 200, 400]
    fields = {"device_speed": "constant", "examples_per_second": 100, "local_epochs": 1}
    late = build(sizes, deadline=3, **fields)
    for outcome in fl.run_rounds(late):
        record = outcome.record
        assert [report["client"] for report in record.clients] == [0, 1]
        assert (record.dropped, record.simulated_seconds) == (1, 3.0)
    more = build(sizes, clients_per_round=1, over_select=3, **fields)
    for outcome in fl.run_rounds(more):
        record = outcome.record
        assert [report["client"] for report in record.clients] == [0]
        assert (record.dropped, record.simulated_seconds) == (2, 1.0)
        down, up = fl.records.client_traffic(more.parts, more.num_parameters)
        assert (record.bytes_down, record.bytes_up) == (3 * down, up)


def test_the_server_waits_for_nobody_who_was_not_drawn(build):
    """Of 3 clients, 1.5 on average; the deadline is only for those that are on their way."""
    fields = {"device_speed": "constant", "examples_per_second": 100, "local_epochs": 1}
    more = {"sampling": "poisson", "clients_per_round": 2, "over_select": 1.4, "deadline": 60}
    parts = build([100, 200, 400], **fields, **more).parts
    assert parts.simulate_seconds([1], 1) == 2.0
    assert parts.simulate_seconds([0, 1, 2], 1) == 2.0  # two are enough
    assert parts.simulate_seconds([], 1) == 0.0


# Clients of 100, 200 and 400 images at 100 a second: 1, 2 and 4 s. The server makes a step with
# each report. (client, version it began with, seconds since the step before), by hand:
BY_HAND = [(0, 0, 1), (0, 1, 1), (1, 0, 0), (0, 3, 1), (0, 4, 1), (1, 3, 0), (2, 0, 0)]


@pytest.mark.slow
def test_fedbuff_equals_numpys(build):
    """w <- w - (w_v - local(w_v)) / sqrt(1 + staleness), with a buffer of one."""
    fields = {"device_speed": "constant", "examples_per_second": 100, "local_epochs": 1}
    experiment = fl.prepare(
        build(
            [100, 200, 400],
            algorithm="fedbuff",
            buffer_size=1,
            **fields | {"rounds": len(BY_HAND)},
        )
    )
    config = experiment.config
    models = [[w.astype(float) for w in experiment.initial_weights]]
    outcomes = fl.run_rounds(experiment)
    for (client, version, seconds), outcome in zip(BY_HAND, outcomes, strict=True):
        begun = models[version]
        local, _ = numpy_local(config, experiment.shard_folder, client, version + 1, begun)
        staleness = len(models) - 1 - version
        steps = [u / math.sqrt(1 + staleness) for u in minus(begun, local)]
        models.append(minus(models[-1], steps))
        assert largest_difference(weights_of(outcome.state), models[-1]) < 2e-5
        [report] = outcome.record.clients
        assert (report["client"], report["staleness"]) == (client, staleness)
        assert outcome.record.simulated_seconds == pytest.approx(seconds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"clients_per_round": 4},
        {"clients_per_round": 4, "partition": "iid", "unseen_clients": 0.2},
        {"aggregator": "median"},
        {"aggregator": "secure", "clients_per_round": 3},
    ],
    ids=str,
)
def test_with_equal_times_and_a_full_buffer_fedbuff_is_fedavg(tmp_path, monkeypatch, fields):
    monkeypatch.chdir(tmp_path)
    common = {"dataset": "digits", "model": "logreg", "latency": 1.0, "figures": "none", **fields}
    fedavg = fl.run(configure(**common, name="fedavg"))
    config = configure(**common, name="fedbuff", algorithm="fedbuff")
    fedbuff = fl.run(config.replace(buffer_size=config.cohort_size))
    assert largest_difference(weights_of(fedavg.state), weights_of(fedbuff.state)) == 0
    for one, other in zip(fedavg.records, fedbuff.records, strict=True):
        assert one.test_accuracy == other.test_accuracy
        assert (one.simulated_seconds, other.simulated_seconds) == (2.0, pytest.approx(2.0))
        assert [r["client"] for r in one.clients] == [r["client"] for r in other.clients]


FEDBUFF = ["--algorithm", "fedbuff", "--device-speed", "lognormal:0.8", "--buffer-size", "3"]
NEIGHBOURS = [
    FEDBUFF,
    [*FEDBUFF, "--dropout", "0.3", "--stragglers", "0.5", "--clients-per-round", "4"],
    [*FEDBUFF, "--aggregator", "krum", "--tolerated", "0", "--byzantine", "1"],
    [*FEDBUFF, "--client-schedule", "exponential", "--client-optimizer", "adam"],
    [*FEDBUFF, "--fine-tune-epochs", "1", "--client-test", "0.2", "--unseen-clients", "0.2"],
    ["--algorithm", "scaffold", "--device-speed", "lognormal:1", "--deadline", "0.5"],
    ["--algorithm", "fedrep", "--client-test", "0.2", "--bandwidth", "1e6", "--over-select", "1.3"]
    + ["--clients-per-round", "5"],
    ["--sampling", "poisson", "--clients-per-round", "4", "--latency", "1", "--over-select", "1.5"],
    ["--sampling", "by-size", "--clients-per-round", "4", "--device-speed", "constant"],
]


# one of each kind in `make test`
CASES = [
    NEIGHBOURS[0],
    NEIGHBOURS[2],
    *(pytest.param(more, marks=pytest.mark.thorough) for more in (NEIGHBOURS[1], *NEIGHBOURS[3:])),
]


@pytest.mark.slow
@pytest.mark.parametrize("more", CASES, ids=" ".join)
def test_with_its_neighbours_a_run_resumes_bit_for_bit(tmp_path, more):
    base = [*MLP_ON_DIGITS, *NO_FIGURES, *more, "--runs", str(tmp_path)]
    whole = fl.run(fl.parse([*base, "--rounds", "6", "--name", "whole"]))
    half = fl.run(fl.parse([*base, "--rounds", "3", "--name", "half"]))
    resumed = fl.run(fl.parse(["--resume", str(half.folder), "--rounds", "6"]))
    assert largest_difference(weights_of(whole.state), weights_of(resumed.state)) == 0
    assert fl.load(whole.folder).records  # which checks their ranges
    if more == FEDBUFF:  # nobody drops out
        assert [record.dropped for record in whole.records] == [0] * 6
    for one, other in zip(whole.records, resumed.records, strict=True):
        assert one.simulated_seconds == other.simulated_seconds
        assert one.figures() | {"seconds": 0} == other.figures() | {"seconds": 0}


@pytest.mark.slow
def test_two_hosts_train_fedbuffs_clients(tmp_path):
    base = [*ON_DIGITS, *NO_FIGURES, *FEDBUFF, "--runs", str(tmp_path)]
    one = fl.run(fl.parse([*base, "--name", "one"]))
    two = fl.run(fl.parse([*base, "--name", "two", "--workers", "localhost,localhost"]))
    assert largest_difference(weights_of(one.state), weights_of(two.state)) < 1e-5
    assert [r.simulated_seconds for r in one.records] == [r.simulated_seconds for r in two.records]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"device_speed": "normal:1"}, "device_speed='normal:1' is not a distribution of speeds"),
        ({"device_speed": "lognormal:11"}, "standard deviation of at most 10"),
        ({"algorithm": "fedbuff"}, "algorithm='fedbuff' needs a clock"),
        ({"latency": 1, "aggregator": "dp"}, "latency=1.* cannot be combined with aggregator='dp'"),
        ({"latency": 1, "over_select": 1.3}, "over_select=1.3 draws 13 clients for a round of 10"),
        ({"latency": 1, "algorithm": "fedbuff", "dropout": 1.0}, "dropout=1: no client reports"),
        ({"latency": 1, "algorithm": "fedbuff", "deadline": 2}, "deadline=2.* cannot be combined"),
        (
            {"latency": 1, "algorithm": "fedbuff", "sampling": "poisson"},
            "sampling=poisson cannot be combined with algorithm='fedbuff'",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(fields, said):
    with pytest.raises(UserError, match=said):
        configure(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"buffer_size": 11}, "buffer_size=11 exceeds the 10 clients"),
    ],
    ids=str,
)
def test_what_the_clients_cannot_do_is_one_line(digits, fields, said):
    flags = {"dataset": "digits", "latency": 1.0, "algorithm": "fedbuff"}
    with pytest.raises(UserError, match=said):
        experiment = fl.build_experiment(configure(**flags | fields), digits)
        experiment.parts.sample_clients(1)


def test_a_clock_field_without_a_clock_is_noticed():
    notices = configure(deadline=2.0, examples_per_second=5.0).unused_notices()
    assert any("deadline=2.0 has no effect without --device-speed or" in n for n in notices)
    assert any("examples_per_second=5.0 has no effect" in n for n in notices)
