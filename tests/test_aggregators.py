"""Each row of AGGREGATORS against NumPy on the clients' own updates, or against TFF's FedAvg with
the same part."""

from unittest import mock

import federated_learning as fl
from harness.cli.fields import UserError
from harness.engine.execution import plain_sums
from variants import aggregators

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from reference import alone, largest_difference, minus, times, weighted_mean, weights_of
from runs import configure
from tensorflow_model_optimization.python.core.internal import tensor_encoding as te

CLIENTS = 7


@pytest.fixture(scope="module")
def updates(federation_of_module):
    """(initial weights, each client's w - w_k as lists of arrays, n_k), from a mean over that
    client alone."""
    experiment = federation_of_module(num_clients=CLIENTS)
    partition = experiment.partition
    process = experiment.process
    state = process.initialize()
    initial = weights_of(state)
    trained = [weights_of(process.next(state, alone([k]))[0]) for k in range(CLIENTS)]
    return (
        initial,
        [[a - b for a, b in zip(initial, w, strict=True)] for w in trained],
        partition.sizes.tolist(),
    )


def aggregated(federation, groups=None, **flags):
    """What a round's mean update is: the global weights before it less those after it."""
    process = federation(num_clients=CLIENTS, **flags).process
    state = process.initialize()
    new, _, _ = process.next(state, groups or alone(range(CLIENTS)))
    return [a - b for a, b in zip(weights_of(state), weights_of(new), strict=True)]


def flat(update):
    return np.concatenate([x.ravel() for x in update]).astype(float)


def numpy_krum(rows, attackers, chosen):
    """Blanchard et al. 2017, section 4: the sum of squared distances to the m - f - 2 nearest
    others."""
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
    ours = aggregated(
        federation, groups and [np.array(g) for g in groups], aggregator=rule, **flags
    )
    assert np.abs(flat(ours) - numpy_rule([flat(u) for u in updates[1]])).max() < 1e-6


def test_a_robust_rule_leaves_out_a_client_that_diverged(federation, updates):
    rows = np.stack([flat(u) for u in updates[1]]).astype(np.float32)
    rows[2] = 1e9
    weights = np.array([5, 5, 0, 5, 5, 5, 5], np.float32)
    for rule in (
        aggregators.median,
        lambda r: aggregators.trimmed_mean(r, 0.2),
        lambda r: aggregators.krum(r, 1),
    ):
        process = aggregators.StackedRule(rule).create(
            tff.TensorType(np.float32, [None, rows.shape[1]]), tff.TensorType(np.float32, [None])
        )
        left = process.next(process.initialize(), [rows], [weights]).result
        others = process.next(
            process.initialize(), [np.delete(rows, 2, axis=0)], [np.full(6, 5, np.float32)]
        ).result
        nobody = process.next(process.initialize(), [rows], [np.zeros(7, np.float32)]).result
        assert np.array_equal(left, others) and not nobody.any()


def quantile(estimate, share_below, target, rate):
    """Andrew et al. 2021, the geometric update of Algorithm 1: C <- C exp(-rate (b - target))."""
    return estimate * np.exp(-rate * (share_below - target))


def numpy_clipping(updates, sizes, norm):
    """(mean of the updates cut to the norm, the next norm): its target is the quantile 0.8, its
    rate 0.2."""
    lengths = [np.linalg.norm(flat(u)) for u in updates]
    cut = [times(min(1, norm / length), u) for u, length in zip(updates, lengths, strict=True)]
    return weighted_mean(cut, sizes), quantile(norm, np.mean(np.array(lengths) <= norm), 0.8, 0.2)


def numpy_zeroing(updates, sizes, norm):
    """The same of updates that are 0 where their largest number is above 2 norm + 1; quantile 0.98,
    rate log 10."""
    largest = np.array([np.abs(flat(u)).max() for u in updates])
    kept = [times(float(top <= 2 * norm + 1), u) for u, top in zip(updates, largest, strict=True)]
    return weighted_mean(kept, sizes), quantile(norm, np.mean(largest <= norm), 0.98, np.log(10))


@pytest.mark.parametrize(
    ("name", "rule", "first_norm", "flags"),
    [
        ("clipping", numpy_clipping, 1.0, {"client_lr": 0.05}),
        ("clipping", numpy_clipping, 1.0, {"client_lr": 0.3}),
        (
            "zeroing",
            numpy_zeroing,
            10.0,
            {"byzantine": 2, "attack": "scaled", "attack_scale": 1e3, "client_lr": 0.05},
        ),
    ],
)
def test_adaptive_clipping_and_zeroing_equal_numpys(federation, name, rule, first_norm, flags):
    """Three rounds, so that the norm that adapts is the one that cuts."""
    experiment = federation(num_clients=CLIENTS, **flags)
    partition = experiment.partition
    plain = experiment.process
    process = federation(num_clients=CLIENTS, aggregator=name, **flags).process
    state = process.initialize()
    alone_state = plain.initialize()
    norm = first_norm
    for _ in range(3):
        before = weights_of(state)
        alone_state = alone_state._replace(
            global_model_weights=state.global_model_weights, client_work=state.client_work
        )
        trained = [weights_of(plain.next(alone_state, alone([k]))[0]) for k in range(CLIENTS)]
        mean, norm = rule([minus(before, w) for w in trained], partition.sizes.tolist(), norm)
        state, _, _ = process.next(state, alone(range(CLIENTS)))
        assert largest_difference(weights_of(state), minus(before, mean)) < 2e-5
    assert abs(norm - first_norm) > 0.05 * first_norm  # it has moved


@pytest.mark.parametrize("aggregator", ["clipping", "zeroing"])
def test_a_client_that_is_left_out_is_left_out_of_the_adaptive_norm_too(
    federation, worker, aggregator
):
    experiment = federation(aggregator=aggregator, num_clients=5, byzantine=1, attack="nan")
    before = experiment.process.initialize()
    after, reports, _ = experiment.parts.train_cohort(worker, experiment, before, range(5))
    good = [report["client"] for report in reports if report["finite"]]
    expected, _, _ = experiment.process.next(before, alone(good))
    assert len(reports) == 5 and len(good) == 4
    for ours, theirs in zip(tf.nest.flatten(after), tf.nest.flatten(expected), strict=True):
        assert np.array_equal(ours, theirs)


def test_secure_sums_give_the_mean(federation, updates):
    _, each, sizes = updates
    assert (
        largest_difference(aggregated(federation, aggregator="secure"), weighted_mean(each, sizes))
        < 1e-6
    )


def test_compression_is_within_half_a_step_of_its_255(federation):
    """Each client's tensor is rounded to the nearest of 256 values from its lowest to its
    highest."""
    flags = {"num_clients": CLIENTS, "model": "mlp"}
    experiment = federation(**flags)
    partition = experiment.partition
    process = experiment.process
    state = process.initialize()
    initial = weights_of(state)
    sizes = partition.sizes
    each = [minus(initial, weights_of(process.next(state, alone([k]))[0])) for k in range(CLIENTS)]
    exact = weighted_mean(each, sizes.tolist())
    ours = aggregated(federation, aggregator="compressed", model="mlp")
    kernel, *small = [np.abs(a - b).max() for a, b in zip(exact, ours, strict=True)]
    bound = np.average([np.ptp(update[0]) / 255 / 2 for update in each], weights=sizes)
    # with 6 bits it would be four times the bound
    assert 0.2 * bound < kernel < 1.01 * bound and max(small) < 1e-6


def test_compression_starts_above_20_000_numbers_and_packs_as_counted(worker, digits):
    """What TFF's own encoder makes of a tensor: its int32 and float32, by their bytes."""
    config = configure(dataset="digits", aggregator="compressed", model="mlp")
    factory = fl.build_experiment(config, digits).parts.aggregator
    for size in (20_000, 20_001, 100_352):
        kind = tff.to_type([tff.TensorType(np.float32, [size])])
        mean = factory.create(kind, tff.TensorType(np.float32))
        values = [np.linspace(-1, 1, size, dtype=np.float32) ** 3]
        result = mean.next(mean.initialize(), [values], [1.0]).result
        assert (np.abs(result[0] - values[0]).max() > 1e-4) == (size > 20_000)
        encoder = te.encoders.as_gather_encoder(
            te.encoders.uniform_quantization(8, stochastic=False), tf.TensorSpec([size])
        )
        encode_params, _, _ = encoder.get_params(encoder.initial_state())
        packed = encoder.encode(tf.constant(values[0]), encode_params)[0]
        sent = sum(np.asarray(part).nbytes for part in tf.nest.flatten(packed))
        assert aggregators.compressed_bytes([size]) == (sent if size > 20_000 else 4 * size)


def test_dp_without_noise_is_the_mean_of_clipped_updates(federation, updates):
    """TFF's first clipping norm is 0.1, its noise z' * 0.1 / m a number, z' = (z**-2 - (0.1
    m)**-2)**-0.5."""
    clipped = [flat(u) * min(1, 0.1 / np.linalg.norm(flat(u))) for u in updates[1]]
    ours = flat(aggregated(federation, aggregator="dp", noise_multiplier=0.02))
    sigma = 0.1 * (0.02**-2 - (0.1 * CLIENTS) ** -2) ** -0.5 / CLIENTS
    noise = ours - np.mean(clipped, axis=0)
    assert np.std(noise) == pytest.approx(sigma, rel=0.05) and np.abs(noise).max() < 6 * sigma


def test_dps_norm_adapts(federation):
    """Andrew et al. 2021: C <- C exp(-0.2 (b - 0.5)), b the share of norms below C with noise of
    0.05 m on its count.

    All updates are longer than the first norms, 0.1 and what follows, so b is 0 but for the noise;
    and what is cut is cut to the norm of its round.
    """
    flags = {"aggregator": "dp", "num_clients": 20, "noise_multiplier": 0.02, "client_lr": 0.3}
    process = federation(**flags).process
    state = process.initialize()
    norms = []
    for _ in range(4):
        norms.append(float(state.aggregator.query_state.numerator_state.sum_state.l2_norm_clip))
        before = weights_of(state)
        state, _, _ = process.next(state, alone(range(20)))
        moved = np.linalg.norm(flat(minus(before, weights_of(state))))
        # a mean of 20 updates of that length, and a little noise
        assert 0.1 * norms[-1] < moved < 1.3 * norms[-1]
    steps = np.diff(np.log(norms))
    assert norms[0] == pytest.approx(0.1) and np.abs(steps - 0.2 * 0.5).max() < 0.2 * 4 / 20
    assert norms[3] > 1.2 * norms[0]


def test_medians_and_krums_neighbours_by_hand():
    """Of an even number the mean of the middle two; of m rows the m - f - 2 nearest others of each,
    not one more."""
    rows = np.array([[1.0, 10], [2, 30], [4, 20], [9, 90]], np.float32)
    assert aggregators.median(rows).numpy().tolist() == [3.0, 25.0]
    rng = np.random.default_rng(0)
    differ = 0
    for _ in range(50):
        rows = rng.normal(size=(8, 3)).astype(np.float32)
        expected = numpy_krum(rows.astype(float), 2, 1)
        assert np.allclose(aggregators.krum(rows, 2), expected)
        # one neighbour more
        differ += not np.allclose(numpy_krum(rows.astype(float), 1, 1), expected)
    assert differ > 10


def test_secure_sums_of_clients_that_count_the_same_are_as_fine(federation, updates):
    """Steps of 32 / 2 ** 32 where weights are 1: they had been as wide as for 60,000 examples."""
    _, each, _ = updates
    flags = {"aggregator": "secure", "client_weighting": "uniform"}
    mean = [np.mean(layers, axis=0) for layers in zip(*each, strict=True)]
    assert largest_difference(aggregated(federation, **flags), mean) < 1e-7


def test_secure_sums_are_not_cut_for_large_clients(worker):
    """A client of 120,000 images: bounds of 1e5 on n_k made 1.2 times the update of it, in
    silence."""
    factory = aggregators.secure_mean(120_000, is_uniform=False)
    kind = tff.to_type([tff.TensorType(np.float32, [3])])
    plain = plain_sums(factory.create(kind, tff.TensorType(np.float32)).next)
    process = factory.create(kind, tff.TensorType(np.float32))
    updates = [[np.float32([0.5, -2, 3])], [np.float32([1, 4, -3])]]
    sizes = [120_000.0, 60_000.0]
    mean = plain(process.initialize(), updates, sizes).result
    expected = (np.multiply(120_000, updates[0][0]) + np.multiply(60_000, updates[1][0])) / 180_000
    assert np.abs(mean[0] - expected).max() < 1e-4


def test_what_cannot_be_aggregated_is_refused():
    for flags, message in [
        (
            {"aggregator": "krum", "num_clients": 8},
            "tolerated=3 attackers among 8 clients .* choose at most 2",
        ),
        (
            {"aggregator": "dp", "noise_multiplier": 1},
            "noise_multiplier=1.0 is too high .* less than 1",
        ),
        (
            {"aggregator": "median", "algorithm": "fednova"},
            "aggregator='median' cannot be combined with",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            configure(**flags)


@pytest.mark.parametrize("size", [1e4, 1e6, 1e20])
def test_krum_chooses_as_float64_does_whatever_attackers_send(size):
    """Six honest rows near each other, three of `size`: rounding in float32 must not choose among
    the honest."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        honest = rng.normal(0, 1e-2, (6, 500))
        attacks = rng.normal(0, 1, (3, 500)) * size
        rows = np.concatenate([honest, attacks]).astype(np.float32)
        expected = numpy_krum(rows.astype(np.float64), 3, 1)
        assert np.array_equal(aggregators.krum(rows, 3).numpy(), expected.astype(np.float32)), seed


@pytest.mark.slow
@pytest.mark.parametrize(
    "counts",
    [
        (1, 3, 10, 20, 25, 50, 99, 100),  # 0.29 * 100 is 28.999...
        pytest.param(range(1, 60), marks=pytest.mark.thorough),
    ],
    ids=["few", "all"],
)
def test_trimmed_mean_drops_as_many_as_the_decimal_share_says(counts):
    for hundredths in range(50):
        for count in counts:
            rows = np.arange(count, dtype=np.float32)[:, None] ** 2
            cut = hundredths * count // 100
            expected = rows[cut : count - cut].mean(dtype=np.float64)
            got = float(aggregators.trimmed_mean(rows, hundredths / 100)[0])
            assert got == pytest.approx(expected, rel=1e-5), (hundredths, count)


@pytest.mark.parametrize("aggregator", ["krum", "median", "multi-krum", "trimmed-mean"])
def test_a_client_drawn_twice_counts_once_where_all_updates_are_looked_at(
    federation, worker, aggregator
):
    """Drawn by size: two equal updates at distance 0 would be Krum's choice for ever."""
    experiment = federation(aggregator=aggregator, num_clients=6, sampling="by-size", tolerated=1)
    state = experiment.process.initialize()
    once, reports, _ = experiment.parts.train_cohort(worker, experiment, state, [0, 1, 2, 3, 5])
    twice, again, _ = experiment.parts.train_cohort(
        worker, experiment, state, [0, 1, 1, 1, 2, 3, 3, 5]
    )
    assert largest_difference(weights_of(once), weights_of(twice)) == 0 and reports == again


@pytest.mark.parametrize("aggregator", ["compressed", "secure", "mean"])
def test_a_round_is_done_once_where_no_norm_is_looked_at(federation, worker, aggregator):
    """A NaN client has weight 0, so that only an adaptive norm needs the round without it."""
    flags = {"aggregator": aggregator, "byzantine": 1, "attack": "nan"}
    experiment = federation(**flags)
    state = experiment.process.initialize()
    with mock.patch.object(worker, "run_round", wraps=worker.run_round) as rounds:
        _, reports, _ = experiment.parts.train_cohort(worker, experiment, state, [0, 1, 2])
    assert rounds.call_count == 1 and sum(report["finite"] for report in reports) == 2


@pytest.mark.parametrize("aggregator", ["dp", "clipping", "mean"])
def test_an_adaptive_norm_is_a_column(federation, aggregator):
    """TFF's, of which a private run publishes its own: that is made of noisy counts."""
    flags = {"aggregator": aggregator, "num_clients": 3, "rounds": 1}
    if aggregator == "dp":
        flags["noise_multiplier"] = 0.01
    ((_, record, _),) = fl.run_rounds(federation(**flags))
    found = record.public().clip_norm
    if aggregator == "mean":
        assert found is None and record.clip_norm is None
    else:
        assert found == record.clip_norm == record.figures()["clip_norm"] > 0


def test_an_adaptive_norm_travels_beside_an_algorithms_messages(digits):
    """Scaffold's are d numbers of four bytes each, the norm is one."""
    flags = {"dataset": "digits", "model": "logreg"}
    scaffold = fl.build_experiment(configure(**flags, algorithm="scaffold"), digits)
    both = fl.build_experiment(
        configure(**flags, algorithm="scaffold", aggregator="clipping"), digits
    )
    assert scaffold.parts.message_bytes == 4 * scaffold.num_parameters
    assert both.parts.message_bytes == scaffold.parts.message_bytes + 4


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ({"aggregator": "krum", "byzantine": 10}, 3),
        ({"aggregator": "multi-krum", "byzantine": 2, "tolerated": 1}, 1),
        ({"aggregator": "median", "byzantine": 5}, 4),
        ({"aggregator": "trimmed-mean", "byzantine": 4}, 3),
    ],
)
def test_more_attackers_than_a_rule_withstands_are_told(flags, most):
    """Of ten clients: the tolerated, fewer than a half, the share that is trimmed at each end."""

    def told(**changed):
        config = configure(**flags | changed)
        return config.unused_notices()

    (notice,) = told()
    assert f"exceed the {most} per round that" in notice
    assert told(byzantine=most) == [] and told(aggregator="mean", tolerated=3) == []
