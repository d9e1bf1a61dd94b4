"""The epsilon ledger against dp-accounting called by hand, a published figure, and TFF's own float32 event."""

import json
import math

import federated_learning as fl

import dp_accounting
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from runs import configure, run_script

POISSON = configure(
    aggregator="dp", num_clients=1000, clients_per_round=10, sampling="poisson", noise_multiplier=0.8, delta=1e-5
)


def test_epsilon_is_dp_accountings():
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(0.8)), 1000)
    assert fl.ledger(POISSON).epsilon(1000) == accountant.get_epsilon(1e-5) == pytest.approx(3.695, abs=1e-3)
    fixed = POISSON.but(sampling="fixed")
    replace_one = dp_accounting.NeighboringRelation.REPLACE_ONE
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=replace_one)
    accountant.compose(dp_accounting.SampledWithoutReplacementDpEvent(1000, 10, dp_accounting.GaussianDpEvent(0.4)), 7)
    assert fl.ledger(fixed).epsilon(7) == accountant.get_epsilon(1e-5) > fl.ledger(POISSON).epsilon(7)
    assert fl.ledger(POISSON).epsilon(0) == 0


def renyi(alpha, q, sigma):
    """Renyi divergence of order alpha of a Poisson-sampled Gaussian (Mironov et al. 2019, equation 9)."""
    terms = [
        math.comb(alpha, k) * (1 - q) ** (alpha - k) * q**k * math.exp((k * k - k) / (2 * sigma**2))
        for k in range(alpha + 1)
    ]
    return math.log(sum(terms)) / (alpha - 1)


def test_a_published_figure():
    """Abadi et al. 2016, section 3.2: q = 0.01, sigma = 4, delta = 1e-5, T = 10,000 steps give epsilon = 1.26.

    Theirs is the bound T * renyi + log(1 / delta) / (alpha - 1); ours, of the same divergences, the tighter one of
    Canonne et al. 2020, proposition 12.
    """
    orders, log = range(2, 65), math.log
    spent = {a: 10_000 * renyi(a, 0.01, 4) for a in orders}
    assert min(spent[a] + log(1e5) / (a - 1) for a in orders) == pytest.approx(1.26, abs=0.005)
    tighter = min(spent[a] + log((a - 1) / a) + (log(1e5) - log(a)) / (a - 1) for a in orders)
    config = POISSON.but(clients_per_round=100, num_clients=10_000, noise_multiplier=4.0, rounds=10_000)
    assert fl.ledger(config).epsilon(10_000) == pytest.approx(tighter, rel=0.01)
    assert tighter < 1.26


def test_tffs_event_has_the_same_epsilon_but_only_in_python_floats(federation):
    """TFF's event holds float32, with which dp-accounting 0.4.3 silently counts the first Gaussian alone."""
    flags = {"num_clients": 20, "clients_per_round": 20, "noise_multiplier": 0.8, "aggregator": "dp"}
    process = federation(**flags)[1].process
    state, _, _ = process.next(process.initialize(), [np.array([k]) for k in range(20)])
    event = tff.aggregators.differential_privacy.extract_dp_event_from_state(state.aggregator)
    gaussians = event.events
    assert all(not isinstance(g.noise_multiplier, float) for g in gaussians) and len(gaussians) == 2
    as_floats = dp_accounting.ComposedDpEvent(
        [dp_accounting.GaussianDpEvent(float(g.noise_multiplier)) for g in gaussians]
    )

    def epsilon(event):
        sampled = dp_accounting.PoissonSampledDpEvent(0.01, event)
        return dp_accounting.rdp.RdpAccountant().compose(sampled, 1000).get_epsilon(1e-5)

    assert epsilon(as_floats) == pytest.approx(fl.ledger(POISSON).epsilon(1000), rel=1e-3)
    assert epsilon(event) < 0.8 * epsilon(as_floats)  # if it is no longer, the trap is gone, and this may go


def test_the_budget_ends_the_run_before_the_round_that_would_pass_it(federation, digits, capsys):
    flags = {"num_clients": 30, "clients_per_round": 10, "aggregator": "dp", "rounds": 5, "sampling": "poisson"}
    config, (_, partition, _, process, _) = federation(**flags)
    spent = [fl.ledger(config).epsilon(t) for t in range(1, 6)]
    config = config.but(epsilon_budget=(spent[1] + spent[2]) / 2)
    evaluate = fl.build_evaluator(config, digits)
    records = [record for _, record, _ in fl.run_rounds(config, partition.sizes, process, evaluate)]
    assert [record.epsilon for record in records] == spent[:2] and f"ε {spent[1]:.2f}" in records[1].line(5)
    assert f"round 3 would bring ε to {spent[2]:.2f}" in capsys.readouterr().err
    assert not tf.math.is_nan(records[1].test_loss)


def test_public_cohorts_are_counted_without_amplification():
    config = POISSON.but(public_cohorts=True, num_clients=20, clients_per_round=10, noise_multiplier=0.5)
    drawn = np.concatenate([fl.sample_clients(config, t) for t in range(1, 8)])
    times = int(np.bincount(drawn).max())
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(0.5), times)
    assert fl.ledger(config).epsilon(7) == accountant.get_epsilon(1e-5)
    assert fl.ledger(config).epsilon(7) > fl.ledger(config.but(public_cohorts=False)).epsilon(7)
    assert "public cohorts" in fl.ledger(config).assumption()


def test_secret_cohorts_do_not_follow_from_the_seed():
    config = POISSON.but(clients_per_round=100)
    assert len({tuple(fl.sample_clients(config, 1)) for _ in range(5)}) == 5
    assert len({tuple(fl.sample_clients(config.but(public_cohorts=True), 1)) for _ in range(5)}) == 1


def test_an_empty_cohort_gets_its_noise(federation):
    config, (_, partition, _, process, _) = federation(aggregator="dp", num_clients=20, noise_multiplier=0.5)
    row = fl.AGGREGATORS["dp"]
    state = process.initialize()
    with fl.Worker(1) as worker:
        new, told = fl.train_cohort(worker, process, state, [], partition.sizes, row)
    moved = np.concatenate([np.ravel(a) for a in new.global_model_weights.trainable])
    moved -= np.concatenate([np.ravel(a) for a in state.global_model_weights.trainable])
    sigma = 0.1 * (0.5**-2 - (0.1 * 20) ** -2) ** -0.5 / 20  # as in test_aggregators: the first norm is 0.1
    assert told == [] and moved.std() == pytest.approx(sigma, rel=0.05)


def test_what_attackers_send_is_clipped_as_all_is(federation):
    """So that epsilon holds with them: updates 1e6 times as large move the mean of 7 by no more than the norm, 0.1."""
    flags = {"num_clients": 7, "noise_multiplier": 0.02, "byzantine": 7, "attack": "scaled", "attack_scale": 1e6}
    process = federation(aggregator="dp", **flags)[1].process
    state = process.initialize()
    new, _, _ = process.next(state, [np.array([client]) for client in range(7)])
    moved = np.concatenate([np.ravel(a) for a in new.global_model_weights.trainable])
    moved -= np.concatenate([np.ravel(a) for a in state.global_model_weights.trainable])
    noise = 0.1 * (0.02**-2 - (0.1 * 7) ** -2) ** -0.5 / 7 * math.sqrt(moved.size)  # the expected norm, as above
    assert noise < np.linalg.norm(moved) < 0.1 + 1.1 * noise


def test_a_private_run_leaves_nothing_about_single_clients(tmp_path):
    flags = ("--dataset", "digits", "--model", "mlp", "--rounds", "2", "--num-clients", "20", "--aggregator", "dp")
    done = run_script(tmp_path, *flags, "--name", "run")
    assert done.returncode == 0 and "train loss" not in done.stdout, done.stderr
    run = tmp_path / "runs" / "run"
    text = done.stdout + "".join(
        path.read_text() for path in run.iterdir() if path.suffix in (".json", ".jsonl", ".csv")
    )
    for word in ("indices", "label_counts", "skew", '"examples"', '"client"'):
        assert word not in text, word
    assert not (run / "client_partition.png").exists()
    for record in json.loads((run / "metrics.json").read_text())["rounds"]:
        assert record["clients"] == [] and record["train_loss"] is record["left_out"] is record["dropped"] is None
