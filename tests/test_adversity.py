"""Dropout, stragglers, attackers and what a round costs, against arithmetic on the same shards."""

from types import SimpleNamespace

import federated_learning as fl
from harness.cli.fields import UserError
from harness.config.tables import num_unseen
from harness.training.records import communication_cost, read_record
from harness.training.shards import Shard
from variants import choices, evaluations
from variants.adversity import (
    Attackers,
    choose_attackers,
    cut_work,
    stamp_trigger,
    trigger_mask,
    unseen_clients,
)
from variants.sampling import draw_cohort, drop_out

import numpy as np
import pytest
import tensorflow as tf
from reference import (
    alone,
    batches_of,
    largest_difference,
    named,
    numpy_sgd_step,
    replace_choice,
    tanh_layers,
    weighted_mean,
    weights_of,
)
from runs import configure


def rounds(federation, **flags):
    """The (state, record) pairs of run_rounds on digits."""
    return [(state, record) for state, record, _ in fl.run_rounds(federation(**flags))]


def test_dropouts_are_a_function_of_seed_round_and_client():
    config = configure(num_clients=100, clients_per_round=20, dropout=0.3)
    parts = SimpleNamespace(find_reporting=fl.everyone, _replace=SimpleNamespace)
    report = drop_out(parts, SimpleNamespace(config=config)).find_reporting
    reported = total = 0
    for round_num in range(1, 201):
        drawn = fl.sample_clients(config, round_num)
        left = report(drawn, round_num)
        everyone = set(report(range(100), round_num))
        assert left == [k for k in drawn if k in everyone]  # whoever else is drawn
        reported = reported + len(left)
        total = total + len(drawn)
    assert abs(reported / total - 0.7) < 0.022  # 3 standard deviations of 4,000 draws


def test_poisson_cohorts_have_their_mean():
    config = configure(num_clients=1000, clients_per_round=50, sampling="poisson")
    sizes = [len(draw_cohort(config, round_num, None)) for round_num in range(1, 201)]
    # 50 * 0.95 = 47.5, as independent draws have it
    assert abs(np.mean(sizes) - 50) < 1.5 and 36 < np.var(sizes) < 62
    assert draw_cohort(config, 3, None) == draw_cohort(config, 3, None)


@pytest.mark.slow
def test_dropped_clients_are_as_if_not_drawn_and_an_empty_round_is_survived(federation):
    # of 3 clients: nobody reports with probability 0.34
    flags = {
        "dropout": 0.7,
        "rounds": 8,
        "seed": 2,
    }
    experiment = federation(**flags)
    process = experiment.process
    state = process.initialize()
    empty = 0
    for new, record in rounds(federation, **flags):
        left = experiment.parts.find_reporting([0, 1, 2], record.round)
        assert record.dropped == 3 - len(left) and [row["client"] for row in record.clients] == left
        if left:
            state, _, _ = process.next(state, alone(left))
        else:
            empty += 1
            state = state._replace(
                client_work=state.client_work._replace(round=np.int64(record.round))
            )
            assert np.isnan(record.train["loss"]) and "no client reported" in record.trouble(
                [], 0.1, False
            )
        assert largest_difference(weights_of(new), weights_of(state)) == 0
        assert int(new.client_work.round) == record.round
    assert 0 < empty < 8


def test_stragglers_do_a_share_of_their_steps(federation):
    flags = {"num_clients": 20, "local_epochs": 4, "rounds": 5}
    experiment = federation(**flags)
    config = experiment.config
    partition = experiment.partition
    late = seen = 0
    for _, record in rounds(federation, stragglers=0.4, **flags):
        for row in record.clients:
            full = 4 * -(-partition.sizes[row["client"]] // config.training.batch_size)
            assert 1 <= row["steps"] <= full
            late = late + (row["steps"] < full)
            seen = seen + 1
    # 40 expected, less the few whose share is nearly all; 3 standard deviations
    assert seen == 100 and 22 <= late <= 54


def test_a_stragglers_share_is_uniform():
    """600 shares of 10,000 examples: a uniform one's mean is 1 / 2, its square's 1 / 3."""
    keys = [tf.constant([seed, 7], tf.int64) for seed in range(600)]
    shares = np.array([int(cut_work(tf.constant(10_000), key, 1.0)) / 10_000 for key in keys])
    assert shares.mean() == pytest.approx(1 / 2, abs=0.05) and (shares**2).mean() == pytest.approx(
        1 / 3, abs=0.05
    )


def test_a_stragglers_weights_are_those_of_its_first_steps(federation):
    experiment = federation(stragglers=1.0, local_epochs=1)
    config = experiment.config
    partition = experiment.partition
    shards = experiment.shard_folder
    process = experiment.process
    state = process.initialize()
    for client in range(3):
        new, _, reports = process.next(state, alone([client]))
        steps = int(named(alone([client]), reports)[0]["steps"])
        weights = [w.astype(float) for w in weights_of(state)]
        batches = list(batches_of(config, shards, client, 1))[:steps]
        assert 0 < steps < -(-partition.sizes[client] // config.training.batch_size)
        for images, labels in batches[:-1]:
            weights = numpy_sgd_step(weights, images, labels, config.training.client_lr)
        images, labels = batches[-1]  # of which it does the first few
        rate = config.training.client_lr
        options = [
            numpy_sgd_step(weights, images[:n], labels[:n], rate) for n in range(1, len(labels) + 1)
        ]
        assert min(largest_difference(weights_of(new), option) for option in options) < 1e-5


@pytest.mark.parametrize("attack", choices.ATTACKS)
def test_attackers_send_what_the_attack_says(federation, attack):
    flags = {
        "num_clients": 5,
        "byzantine": 2,
        "attack": attack,
        "local_epochs": 1,
        "client_lr": 0.05,
        "backdoor_share": 1,
        "backdoor_target": 3,
    }
    experiment = federation(**flags)
    config = experiment.config
    partition = experiment.partition
    shards = experiment.shard_folder
    process = experiment.process
    honest = federation(**{**flags, "byzantine": 0}).process
    state = process.initialize()
    bad = choose_attackers(config.adversity, 5, config.seed).tolist()
    assert len(set(bad)) == 2 and bad == sorted(bad)
    initial = weights_of(state)
    updates = []
    for k in range(5):
        update = [
            a - b
            for a, b in zip(initial, weights_of(honest.next(state, alone([k]))[0]), strict=True)
        ]
        if k in bad and attack == "sign-flip":
            update = [-u for u in update]
        if k in bad and attack == "scaled":
            update = [10 * u for u in update]
        if k in bad and attack == "label-flip":
            weights = [w.astype(float) for w in initial]
            for images, labels in batches_of(config, shards, k, 1):
                weights = numpy_sgd_step(weights, images, 9 - labels, config.training.client_lr)
            update = [a - b for a, b in zip(initial, weights, strict=True)]
        if k in bad and attack == "backdoor":  # all images stamped, and ten times the update
            weights = [w.astype(float) for w in initial]
            for images, labels in batches_of(config, shards, k, 1):
                stamped = np.where(trigger_mask((28, 28, 1)), 1, images)
                target = np.full_like(labels, 3)
                weights = numpy_sgd_step(weights, stamped, target, config.training.client_lr)
            update = [10 * (a - b) for a, b in zip(initial, weights, strict=True)]
        updates.append(update)
    sizes = partition.sizes.tolist()
    new, _, reports = process.next(state, alone(range(5)))
    ours = [a - b for a, b in zip(initial, weights_of(new), strict=True)]
    if attack == "nan":  # left out
        sizes = [0 if k in bad else n for k, n in enumerate(sizes)]
        assert [
            row["client"] for row in named(alone(range(5)), reports) if not row["finite"]
        ] == bad
    if attack == "gaussian":
        for k in bad:
            sent, _, _ = process.next(state, alone([k]))
            noise = np.concatenate(
                [(a - b).ravel() for a, b in zip(initial, weights_of(sent), strict=True)]
            )
            own = np.concatenate([u.ravel() for u in updates[k]])
            assert noise.std() == pytest.approx(10 * np.sqrt((own**2).mean()), rel=0.03)
            updates[k] = [a - b for a, b in zip(initial, weights_of(sent), strict=True)]
    assert largest_difference(ours, weighted_mean(updates, sizes)) < 1e-5


MODEL = 785 * 16 + 170  # parameters of the test's network
COMPRESSED = 114_696 + 4 * (128 + 1280 + 10)  # of mlp
BYTES = [  # flags, bytes down and up of a client
    ({}, 4 * MODEL + 8, 4 * MODEL + 20),
    ({"algorithm": "scaffold"}, 8 * MODEL + 8, 8 * MODEL + 20),
    # the momentum down, the shard's gradient up
    ({"algorithm": "mimelite"}, 8 * MODEL + 8, 8 * MODEL + 20),
    # a device keeps its gradient, the server h
    ({"algorithm": "feddyn"}, 4 * MODEL + 8, 4 * MODEL + 20),
    # a norm down, whether the update was below it up
    ({"aggregator": "clipping"}, 4 * MODEL + 12, 4 * MODEL + 24),
    ({"aggregator": "zeroing"}, 4 * MODEL + 12, 4 * MODEL + 24),
    ({"model": "mlp", "aggregator": "compressed"}, 4 * 101_770 + 8, COMPRESSED + 20),
]


@pytest.mark.parametrize(("flags", "down", "up"), BYTES)
def test_a_rounds_bytes(digits, monkeypatch, flags, down, up):
    """Of a round in which six clients get the weights and four report."""
    replace_choice(monkeypatch, choices.MODELS, "2nn", tanh_layers)
    config = configure(**{"dataset": "digits", "model": "2nn", **flags})
    experiment = fl.build_experiment(config, digits)
    cost = communication_cost(experiment, 6, 4)
    assert cost == {"bytes_down": 6 * down, "bytes_up": 4 * up}


def test_bytes_are_of_those_who_get_the_weights_and_report(federation):
    flags = {"num_clients": 10, "clients_per_round": 6, "dropout": 0.4, "rounds": 1}
    ((_, record),) = rounds(federation, **flags)
    assert 0 < record.dropped < 6
    assert record.bytes_down == 6 * (4 * MODEL + 8)
    assert record.bytes_up == (6 - record.dropped) * (4 * MODEL + 20)


def test_stragglers_that_are_dropped_are_those_that_would_have_been_late(federation):
    """Late clients, by the steps that they report, are those that do not report if dropped."""
    flags = {"num_clients": 12, "stragglers": 0.5, "seed": 3}
    late = federation(**flags)
    process = late.process
    _, _, metrics = process.next(process.initialize(), alone(range(12)))
    rows = named(alone(range(12)), metrics)
    sizes = late.partition.sizes
    whole = [3 * -(-int(size) // 16) for size in sizes]
    punctual = [row["client"] for row in rows if row["steps"] == whole[row["client"]]]
    everyone = list(range(12))
    dropped = federation(**flags, drop_stragglers=True)
    assert dropped.parts.find_reporting(everyone, 1) == punctual and 0 < len(punctual) < 12
    assert late.parts.find_reporting(everyone, 1) == everyone


def test_a_backdoor_is_a_white_square_and_its_success_is_counted(federation, digits):
    """The square is 4 of 28 pixels wide, one off the corner; without a share, or with all, of the
    images stamped; success by the model's own predictions on test images of other labels."""
    mask = trigger_mask((28, 28, 1))
    assert np.array_equal(np.argwhere(mask[..., 0])[[0, -1]], [[23, 23], [26, 26]])
    assert mask.sum() == 16 and trigger_mask((2, 2, 3)).sum() == 1
    images = digits.train.images[:50]
    labels = digits.train.labels[:50].astype(np.int32)
    key = tf.constant([1, 2], tf.int64)
    for share, low, high in [(0, 0, 0), (0.5, 10, 40), (1, 50, 50)]:
        config = configure(byzantine=1, attack="backdoor", backdoor_share=share, backdoor_target=3)
        stamped = stamp_trigger(Shard(images, labels), key, Attackers(config, 10))
        marked = (np.asarray(stamped.images)[:, mask[..., 0]] == 255).all(axis=(1, 2))
        assert low <= marked.sum() <= high
        assert np.array_equal(stamped.labels, np.where(marked, 3, labels))
        untouched = np.where(mask, 0, stamped.images) == np.where(mask, 0, images)
        assert untouched.all()
    flags = {"byzantine": 2, "attack": "backdoor", "backdoor_target": 3, "attack_scale": 2}
    experiment = federation(**flags)
    (state, record, evaluation), *_ = fl.run_rounds(experiment)
    others = digits.test.images[digits.test.labels != 3]
    model = fl.build_model(experiment.network, 0)
    model.set_weights(weights_of(state))
    predicted = model(np.where(mask, 255, others) / np.float32(255)).numpy().argmax(axis=1)
    assert (
        record.extra_accuracies
        == {"attack_success": np.mean(predicted == 3)}
        == evaluation.extra_accuracies
    )
    assert f"backdoor success {record.extra_accuracies['attack_success']:7.2%}" in record.line(5)
    assert read_record(record.to_json()) == record
    with pytest.raises(
        UserError, match="backdoor_target=12 is not a label of these data; choose 0 to 9"
    ):
        federation(**flags | {"backdoor_target": 12})


def test_clients_that_are_never_drawn_are_evaluated_on(federation, digits):
    experiment = federation(num_clients=10, unseen_clients=0.3, clients_per_round=4)
    config = experiment.config
    unseen = unseen_clients(config)
    assert len(unseen) == config.num_unseen == 3
    for sampling in ("fixed", "poisson", "by-size"):
        drawn = [
            draw_cohort(config.replace(sampling=sampling), t, experiment.partition.sizes)
            for t in range(1, 60)
        ]
        assert set(np.concatenate(drawn)) == set(range(10)) - set(unseen)
    assert config.replace(clients_per_round=0).cohort_size == 7
    (state, record, _), *_ = fl.run_rounds(experiment)
    model = fl.build_model(experiment.network, 0)
    model.set_weights(weights_of(state))
    for name, clients in [
        ("unseen_accuracy", unseen),
        ("seen_accuracy", sorted(set(range(10)) - set(unseen))),
    ]:
        own = np.concatenate([experiment.partition.indices[client] for client in clients])
        predicted = model(digits.train.images[own] / np.float32(255)).numpy().argmax(axis=1)
        assert record.extra_accuracies[name] == pytest.approx(
            np.mean(predicted == digits.train.labels[own])
        )
    assert choose_attackers(configure(byzantine=3).adversity, [1, 2, 3], 0).tolist() == [1, 2, 3]
    for flags, message in [
        ("--unseen-clients 0.5 --clients-per-round 6", "5 of them never drawn; choose 1 to 5"),
        ("--unseen-clients 0.5 --baselines", "cannot be combined with unseen_clients=0.5"),
        ("--unseen-clients 0.5 --aggregator dp", "reports nothing about the clients' own images"),
        ("--unseen-clients 0.9 --num-clients 1", "choose"),
    ]:
        with pytest.raises(UserError, match=message):
            fl.parse(flags)


def test_poisson_cohorts_leave_out_the_unseen_and_keep_their_mean():
    """40 of 100 clients are never drawn, so each of the other 60 is drawn with 15 / 60."""
    config = configure(
        num_clients=100, clients_per_round=15, sampling="poisson", unseen_clients=0.4
    )
    sizes = [len(draw_cohort(config, t, None)) for t in range(1, 801)]
    assert np.mean(sizes) == pytest.approx(15, abs=4 * np.sqrt(15 * 0.75 / 800))


def test_a_share_of_unseen_clients_is_rounded():
    shares = [(0, 10), (0.28, 10), (0.21, 10), (0.01, 10), (0.07, 100)]
    assert [num_unseen(share, clients) for share, clients in shares] == [0, 3, 2, 1, 7]


def evaluations_of(experiment):
    return {name: find() for name, find in experiment.parts.extra_evaluations.items()}


def test_images_beside_the_test_set_are_those_that_are_named(federation, digits, monkeypatch):
    """The backdoor's are the test images of other labels, and of many images some at random."""
    attack = {"byzantine": 1, "attack": "backdoor", "backdoor_target": 3}
    splits = evaluations_of(federation(**attack, num_clients=10, unseen_clients=0.5))
    others = digits.test.labels != 3
    backdoor = splits["attack_success"]
    assert len(backdoor.images) == others.sum() and set(backdoor.labels) == {3}
    mask = trigger_mask((28, 28, 1))
    expected = np.where(mask, 255, digits.test.images[others])
    assert np.array_equal(backdoor.images, expected)
    monkeypatch.setattr(evaluations, "MOST_IMAGES", 100)
    experiment = federation(num_clients=10, unseen_clients=0.5)
    few = evaluations_of(experiment)["unseen_accuracy"]
    own = np.concatenate(
        [experiment.partition.indices[client] for client in unseen_clients(experiment.config)]
    )
    place_of = {digits.train.images[index].tobytes(): index for index in own}
    found = np.array([place_of[image.tobytes()] for image in few.images])
    assert len(found) == 100 and len(own) > 300
    # Of images at random some are among the last third of the data; the first 100 are not.
    assert 10 < (found > np.sort(own)[len(own) * 2 // 3]).sum() < 60
