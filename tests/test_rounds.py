"""Rounds over two workers here against those of one: every algorithm and aggregator, what travels,
in which order."""

import dataclasses

import federated_learning as fl
from variants import choices
from variants.adversity import choose_attackers

import numpy as np
import pytest
import tensorflow as tf
from reference import largest_difference, weights_of
from runs import configure, with_needs

SMALL = {"dataset": "digits", "model": "mlp", "rounds": 2, "num_clients": 6, "local_epochs": 2}
PAIR = "localhost,localhost"
TOLERANCES = {"compressed": 1e-3}  # what is rounded to 8 bits may fall to the next of 255 steps


def rounds_of(digits, folder, **flags):
    """The weights after the rounds, and the records."""
    config = configure(**{**SMALL, "cache": str(folder), **flags})
    experiment = fl.build_experiment(config, digits)
    done = list(fl.run_rounds(experiment))
    return weights_of(done[-1][0]), [record for _, record, _ in done]


# Of the others each is a kind: a memory, moments, each client by itself, all updates at once.
KINDS = {"scaffold", "fedadam", "clipping", "median"}
ROWS = [{"algorithm": name} for name in choices.ALGORITHMS if name != "fedsgd"]
ROWS += [
    {"aggregator": name}
    for name in choices.AGGREGATORS
    if name not in ("mean", "dp", "krum", "multi-krum")
]
ROWS += [{"aggregator": name, "tolerated": 1} for name in ("krum", "multi-krum")]
ROWS += [{"algorithm": "fedsgd", "local_epochs": 1}]
ROWS = [
    row if KINDS & set(row.values()) else pytest.param(row, marks=pytest.mark.thorough)
    for row in ROWS
]
ROWS += [{"algorithm": "scaffold", "clients_per_round": 3}, {"server_schedule": "cosine"}]
ROWS += [{"client_optimizer": "adam", "dropout": 0.5, "byzantine": 1, "attack": "nan"}]


def name_of(row):
    return "-".join(map(str, row.values()))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_two_workers_train_what_one_does(digits, tmp_path, row):
    flags = SMALL | with_needs(row)
    alone, records = rounds_of(digits, tmp_path, **flags)
    together, others = rounds_of(digits, tmp_path, **flags, workers=PAIR)
    assert largest_difference(alone, together) <= TOLERANCES.get(flags.get("aggregator"), 1e-6)
    for record, other in zip(records, others, strict=True):
        assert [told["client"] for told in record.clients] == [
            told["client"] for told in other.clients
        ]
        assert [told["examples"] for told in record.clients] == [
            told["examples"] for told in other.clients
        ]
    assert records[0].measured_bytes_down is None and others[0].measured_bytes_down > 0


def test_three_workers_repeat_to_the_bit_where_a_cohort_leaves_one_out(digits, tmp_path):
    """Sums follow the hosts' order, not that in which they are done; a host without a client of the
    round is idle."""
    flags = {"clients_per_round": 2, "workers": f"{PAIR},localhost", "algorithm": "scaffold"}
    first, again = (rounds_of(digits, tmp_path, **flags)[0] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("algorithm", "copies"), [("fedavg", 1), ("fedadam", 1), ("scaffold", 5), ("feddyn", 4)]
)
def test_only_what_clients_need_travels(digits, tmp_path, algorithm, copies):
    """Down go the weights to each of two hosts, of scaffold's rows those of 3 clients and c, and
    not Adam's moments."""
    weights, (_, record) = rounds_of(digits, tmp_path, algorithm=algorithm, workers=PAIR)
    size = 4 * sum(w.size for w in weights)
    assert 2 * copies * size < record.measured_bytes_down < 2 * copies * size + 50_000
    client_message = 6 if copies > 1 else 0  # a row a client
    assert (
        (2 + client_message) * size
        < record.measured_bytes_up
        < (2 + client_message) * size + 50_000
    )


@pytest.mark.thorough
def test_privacy_is_accounted_for_alike(digits, tmp_path):
    """Noise is never the same, so weights are not compared; they move by the clipped mean and the
    noise of dp."""
    first, _ = rounds_of(
        digits, tmp_path, aggregator="mean", rounds=1, client_lr=1e-9, workers=PAIR
    )
    weights, records = rounds_of(digits, tmp_path, aggregator="dp", workers=PAIR)
    alone = rounds_of(digits, tmp_path, aggregator="dp")[1]
    assert [record.epsilon for record in records] == [record.epsilon for record in alone]
    assert 1e-3 < largest_difference(weights, first) < 1 and records[0].clients == []
    # they would tell how many clients were drawn
    assert records[0].measured_bytes_down is records[0].measured_bytes_up is None


@pytest.mark.parametrize(
    "flags",
    [
        {"algorithm": "fednova"},
        {"aggregator": "secure"},
        {"aggregator": "compressed"},
        {"algorithm": "feddyn", "aggregator": "median"},
        {"algorithm": "fedavgm"},
    ],
    ids=lambda flags: "-".join(flags.values()),
)
def test_a_round_without_a_finite_update_changes_nothing(digits, tmp_path, flags):
    """As one from which no client reports: not by momentum either."""
    small = {**SMALL, "num_clients": 3, "rounds": 3, "byzantine": 1, "attack": "nan"}
    config = configure(**small | flags, cache=str(tmp_path))
    experiment = fl.build_experiment(config, digits)
    attacker = next(iter(choose_attackers(experiment.config.adversity, np.arange(3), 0)))
    cohorts = [[], [0, 1, 2], [int(attacker)], [0, 1, 2]]
    parts = experiment.parts._replace(sample_clients=lambda round_num: cohorts[round_num])
    first, second, third = fl.run_rounds(dataclasses.replace(experiment, parts=parts))
    before = tf.nest.flatten(first.state._replace(client_work=()))
    after = tf.nest.flatten(second.state._replace(client_work=()))
    assert all(map(np.array_equal, before, after)) and second.state.client_work.round == 2
    assert second.record.num_nonfinite == 1 and "no client's update was finite" in (
        second.record.trouble([], 0.1, False)
    )
    assert np.isfinite(third.record.test_loss)
    assert largest_difference(weights_of(third.state), weights_of(second.state)) > 1e-4
