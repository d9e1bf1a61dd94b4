"""Each row of AGGREGATORS against NumPy on the clients' own updates, or against TFF's FedAvg with the same part."""

import federated_learning as fl
from harness.fields import UserError
from variants import aggregators

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from reference import alone, batches_of, functional_model, largest_difference, weighted_mean, weights_of
from runs import configure

CLIENTS = 7


@pytest.fixture
def updates(federation):
    """(initial weights, each client's w - w_k as lists of arrays, n_k), from a mean over that client alone."""
    _, (_, partition, _, process, _) = federation(num_clients=CLIENTS)
    state = process.initialize()
    initial = weights_of(state)
    trained = [weights_of(process.next(state, alone([k]))[0]) for k in range(CLIENTS)]
    return initial, [[a - b for a, b in zip(initial, w, strict=True)] for w in trained], partition.sizes.tolist()


def aggregated(federation, groups=None, **flags):
    """What a round's mean update is: the global weights before it less those after it."""
    process = federation(num_clients=CLIENTS, **flags)[1].process
    state = process.initialize()
    new, _, _ = process.next(state, groups or alone(range(CLIENTS)))
    return [a - b for a, b in zip(weights_of(state), weights_of(new), strict=True)]


def flat(update):
    return np.concatenate([x.ravel() for x in update]).astype(float)


def numpy_krum(rows, attackers, chosen):
    """Blanchard et al. 2017, section 4: the sum of squared distances to the m - f - 2 nearest others."""
    scores = []
    for i, row in enumerate(rows):
        others = sorted(((row - other) ** 2).sum() for j, other in enumerate(rows) if j != i)
        scores.append(sum(others[: len(rows) - attackers - 2]))
    return np.mean([rows[i] for i in np.argsort(scores, kind="stable")[:chosen]], axis=0)


RULES = {
    "median": ({}, lambda rows: np.median(rows, axis=0)),
    "trimmed-mean": ({"trim": 0.3}, lambda rows: np.sort(rows, axis=0)[2:-2].mean(axis=0)),
    "krum": ({"tolerated": 2}, lambda rows: numpy_krum(rows, 2, 1)),
    "multi-krum": ({"tolerated": 2}, lambda rows: numpy_krum(rows, 2, CLIENTS - 2)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", [None, [[0, 1, 4], [2, 3], [5, 6]]])
def test_robust_rules_equal_numpys(federation, updates, rule, groups):
    flags, numpy_rule = RULES[rule]
    ours = aggregated(federation, groups and [np.array(g) for g in groups], aggregator=rule, **flags)
    assert np.abs(flat(ours) - numpy_rule([flat(u) for u in updates[1]])).max() < 1e-6


def test_a_robust_rule_leaves_out_a_client_that_diverged(federation, updates):
    rows = np.stack([flat(u) for u in updates[1]]).astype(np.float32)
    rows[2] = 1e9
    weights = np.array([5, 5, 0, 5, 5, 5, 5], np.float32)
    for rule in (aggregators.median, lambda r: aggregators.trimmed_mean(r, 0.2), lambda r: aggregators.krum(r, 1)):
        process = aggregators.RowRule(rule).create(
            tff.TensorType(np.float32, [None, rows.shape[1]]), tff.TensorType(np.float32, [None])
        )
        left = process.next(process.initialize(), [rows], [weights]).result
        others = process.next(process.initialize(), [np.delete(rows, 2, axis=0)], [np.full(6, 5, np.float32)]).result
        nobody = process.next(process.initialize(), [rows], [np.zeros(7, np.float32)]).result
        assert np.array_equal(left, others) and not nobody.any()


@pytest.mark.parametrize(("name", "part"), [("clipping", {"zeroing": False}), ("zeroing", {"clipping": False})])
def test_adaptive_clipping_and_zeroing_are_tffs(federation, name, part):
    config, (_, _, shards, process, _) = federation(aggregator=name, local_epochs=1, client_lr=0.05)
    stock = tff.learning.algorithms.build_weighted_fed_avg(
        functional_model(config), tff.learning.optimizers.build_sgdm(0.05), tff.learning.optimizers.build_sgdm(1.0),
        model_aggregator=tff.learning.robust_aggregator(**part),
    )  # fmt: skip
    ours, theirs = process.initialize(), stock.initialize()
    for round_num in (1, 2):
        theirs = stock.next(theirs, [list(batches_of(config, shards, k, round_num)) for k in range(3)]).state
        ours, _, _ = process.next(ours, alone([0, 1, 2]))
        assert largest_difference(weights_of(ours), weights_of(theirs)) < 1e-5


@pytest.mark.parametrize("aggregator", ["clipping", "zeroing"])
def test_a_client_that_is_left_out_is_left_out_of_the_adaptive_norm_too(federation, worker, aggregator):
    config, (_, partition, _, process, _) = federation(aggregator=aggregator, num_clients=5, byzantine=1, attack="nan")
    before, row = process.initialize(), fl.AGGREGATORS[aggregator]
    after, told = fl.train_cohort(worker, process, before, range(5), partition.sizes, row)
    good = [report["client"] for report in told if report["finite"]]
    expected, _, _ = process.next(before, alone(good))
    assert len(told) == 5 and len(good) == 4
    for ours, theirs in zip(tf.nest.flatten(after), tf.nest.flatten(expected), strict=True):
        assert np.array_equal(ours, theirs)


def test_secure_sums_give_the_mean(federation, updates):
    _, each, sizes = updates
    assert largest_difference(aggregated(federation, aggregator="secure"), weighted_mean(each, sizes)) < 1e-6


def test_compression_is_within_a_step_of_its_255(federation):
    exact, ours = (aggregated(federation, aggregator=name, model="mlp") for name in ("mean", "compressed"))
    kernel, bias, small, last = [np.abs(a - b).max() for a, b in zip(exact, ours, strict=True)]
    span = np.ptp(exact[0])
    assert 0 < kernel < 4 * span / 255  # the clients' own spans are some times that of their mean
    assert max(bias, small, last) < 1e-6  # tensors of less than 20,000 numbers are sent as they are


def test_dp_without_noise_is_the_mean_of_clipped_updates(federation, updates):
    """TFF's first clipping norm is 0.1, its noise z' * 0.1 / m a number, z' = (z**-2 - (0.1 m)**-2)**-0.5."""
    clipped = [flat(u) * min(1, 0.1 / np.linalg.norm(flat(u))) for u in updates[1]]
    ours = flat(aggregated(federation, aggregator="dp", noise_multiplier=0.02))
    sigma = 0.1 * (0.02**-2 - (0.1 * CLIENTS) ** -2) ** -0.5 / CLIENTS
    noise = ours - np.mean(clipped, axis=0)
    assert np.std(noise) == pytest.approx(sigma, rel=0.05) and np.abs(noise).max() < 6 * sigma


def test_what_cannot_be_aggregated_is_refused():
    for flags, message in [
        ({"aggregator": "krum", "num_clients": 8}, "tolerated=3 of 8 clients .* choose at most 2"),
        ({"aggregator": "dp", "noise_multiplier": 1}, "noise_multiplier=1.0 is too high .* less than 1"),
        ({"aggregator": "median", "algorithm": "fednova"}, "aggregator='median' does not go with"),
    ]:
        with pytest.raises(UserError, match=message):
            configure(**flags)


@pytest.mark.parametrize("size", [1e4, 1e6, 1e20])
def test_krum_chooses_as_float64_does_whatever_attackers_send(size):
    """Six honest rows near each other, three of `size`: rounding in float32 must not choose among the honest."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        honest, attacks = rng.normal(0, 1e-2, (6, 500)), rng.normal(0, 1, (3, 500)) * size
        rows = np.concatenate([honest, attacks]).astype(np.float32)
        expected = numpy_krum(rows.astype(np.float64), 3, 1)
        assert np.array_equal(aggregators.krum(rows, 3).numpy(), expected.astype(np.float32)), seed


def test_trimmed_mean_drops_as_many_as_the_decimal_share_says():
    for hundredths in range(50):
        for count in range(1, 60):
            rows = np.arange(count, dtype=np.float32)[:, None] ** 2
            cut = hundredths * count // 100
            expected = rows[cut : count - cut].mean(dtype=np.float64)
            got = float(aggregators.trimmed_mean(rows, hundredths / 100)[0])
            assert got == pytest.approx(expected, rel=1e-5), (hundredths, count)
