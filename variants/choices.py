"""The choices of each flag that has a table: one line each, with all that belongs to it.

A choice has its line of help, the function that it stands for, the fields that it uses and others
do not, and what must be known of it before TensorFlow is imported. `function` is written as
"module:name", of variants/, and imported when it is used; without one the choice is FedAvg's own,
in the script.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Function = str | Callable  # "module:name", or a function of a notebook's own


class DatasetChoice(NamedTuple):
    """A data set that needs no file of the user's: function() -> Dataset."""

    help: str
    function: Function = ""
    fields: tuple[str, ...] = ()
    highest_default_lr: float = math.inf  # clients' default rates above it become it


class PartitionChoice(NamedTuple):
    """A split: function(labels uint8[N], num_clients, rng, **fields) -> K index arrays."""

    help: str
    title: str  # in plots, with fields in braces
    function: Function = ""
    fields: tuple[str, ...] = ()
    needs_dataset: bool = False  # function also gets dataset=, the Dataset with images and owners
    # change_images(images uint8[n,H,W,channels], client, num_clients, seed, **fields) -> images as
    # the client has them. With it the fields are its, and function gets none.
    change_images: Function = ""


class ModelChoice(NamedTuple):
    """A network: function() -> new Keras layers, those before the logits."""

    help: str
    function: Function = ""
    fields: tuple[str, ...] = ()
    highest_default_lr: float = math.inf  # clients' default rates above it become it


class AlgorithmChoice(NamedTuple):
    """An algorithm: function(parts, experiment) -> parts."""

    help: str
    function: Function = ""
    fields: tuple[str, ...] = ()
    client_lr: float = 0.2  # if the user names none
    server_lr: float = 1.0
    client_optimizers: tuple[str, ...] = ()  # those that its rule holds for; empty: all
    required: dict[str, int] = {}  # fields whose values define it


class OptimizerChoice(NamedTuple):
    """A client optimizer: function(learning_rate, optimization) -> a TFF optimizer."""

    help: str
    function: Function = ""
    fields: tuple[str, ...] = ()
    client_lr: float | None = None  # if the user names none; None: the algorithm's


class AggregatorChoice(NamedTuple):
    """An aggregator: function(parts, experiment) -> parts.

    `kind` is "weighted" if it is a mean weighted by examples, "robust" if all clients count the
    same, so that attackers have no more power, and "private" if each round costs epsilon.
    """

    help: str
    function: Function = ""
    fields: tuple[str, ...] = ()
    kind: str = "weighted"
    # Attackers in a cohort of m that it withstands: withstands(field -> value, m).
    withstands: Callable[[dict[str, Any], int], int] | None = None


class AttackChoice(NamedTuple):
    """An attack: what an attacker trains on, and what it sends; without one as an honest client.

    shard(shard, key, attackers) -> Shard, and update(update, key, scale) -> update.
    """

    help: str
    fields: tuple[str, ...] = ()
    shard: Function = ""
    update: Function = ""


class ScheduleChoice(NamedTuple):
    """What multiplies a learning rate: function(t, optimization), t = 1, 2, ... a float32 round.

    One within the round multiplies it in each local step: see `optimizers.warm_up`.
    """

    help: str
    function: Function = ""
    fields: tuple[str, ...] = ()
    title: str = ""  # behind the rate in plots, with fields in braces
    is_within_round: bool = False


DATASETS = {
    "mnist": DatasetChoice("data/mnist.npz beside the script"),
    # At 0.2 the test accuracy of 1,437 training images goes up and down by ten points.
    "digits": DatasetChoice(
        "scikit-learn's 1,797 digits of 8x8, enlarged to 28x28: a run of seconds",
        "datasets:load_digits",
        highest_default_lr=0.05,
    ),
}

PARTITIONS = {
    "iid": PartitionChoice("shuffled, then dealt out evenly", "IID", "partitions:split_iid"),
    "shards": PartitionChoice(
        "sorted by label and cut, shards_per_client pieces a client [McMahan et al. 2017]",
        "{shards_per_client} shards a client",
        "partitions:split_shards",
        ("shards_per_client",),
    ),
    "dirichlet": PartitionChoice(
        "each label in shares drawn from Dirichlet(alpha) [Yurochkin et al. 2019]",
        "Dirichlet({alpha:g})",
        fields=("alpha",),
    ),
    "capped-dirichlet": PartitionChoice(
        "the same, but a client with N / K images gets no more, as in NIID-Bench's program "
        "[Li et al. 2022, there with --min-images 10]",
        "Dirichlet({alpha:g}), sizes capped",
        "partitions:split_by_capped_dirichlet",
        ("alpha",),
    ),
    "client-dirichlet": PartitionChoice(
        "each client draws its label mix, and all have one size [Hsu et al. 2019; FedDyn's "
        '"balanced"]',
        "Dirichlet({alpha:g}) by client, equal sizes",
        "partitions:split_by_client_dirichlet",
        ("alpha",),
    ),
    "labels-per-client": PartitionChoice(
        "exactly labels_per_client labels each, every label with as many holders",
        "{labels_per_client} labels a client",
        "partitions:split_by_label",
        ("labels_per_client",),
    ),
    "random-labels": PartitionChoice(
        'client i holds label i mod C and others at random, NIID-Bench\'s "#C = k" '
        "[Li et al. 2022]",
        "{labels_per_client} labels a client, at random",
        "partitions:split_by_random_labels",
        ("labels_per_client",),
    ),
    "lognormal-labels": PartitionChoice(
        "client i holds the labels i mod C to i + k - 1 mod C, in sizes drawn from a lognormal "
        "distribution [Li et al. 2020: FedProx's MNIST, with --num-clients 1000]",
        "{labels_per_client} labels a client, sizes lognormal({size_spread:g})",
        "partitions:split_by_lognormal_labels",
        ("labels_per_client", "size_spread"),
    ),
    "quantity": PartitionChoice(
        "sizes by a power law, labels IID",
        "sizes by power law ({size_exponent:g})",
        "partitions:split_by_size",
        ("size_exponent",),
    ),
    "dirichlet-quantity": PartitionChoice(
        "sizes drawn from Dirichlet(alpha), labels IID [Li et al. 2022, whose program draws again "
        "until every client has 10 images: --min-images 10]",
        "sizes by Dirichlet({alpha:g})",
        "partitions:split_by_dirichlet_size",
        ("alpha",),
    ),
    "feature": PartitionChoice(
        "IID, but each client's images are rotated and made noisy in its own way [Li et al. 2022 "
        "with --rotation 0 and noise]",
        "IID, rotated by ±{rotation:g}°, noise to {noise:g}",
        "partitions:split_iid",
        ("rotation", "noise"),
        change_images="partitions:rotate_and_add_noise",
    ),
    "natural": PartitionChoice(
        "by the data's own array client_train, an owner a client",
        "natural, by owner",
        "partitions:split_by_owner",
        ("owner_choice",),
        needs_dataset=True,
    ),
    "file": PartitionChoice(
        "as partition_file says",
        "split of a file",
        "partitions:read_split",
        ("partition_file",),
        needs_dataset=True,
    ),
}

OWN_MODEL = r".+\.py:\w+"  # in place of a name: a file, and a function in it
MODELS = {
    "logreg": ModelChoice("softmax regression: no hidden layer", "models:build_logreg"),
    "mlp": ModelChoice("a hidden layer of 128 units", "models:build_mlp"),
    "2nn": ModelChoice("two hidden layers of 200 units [McMahan et al. 2017]", "models:build_2nn"),
    "cnn": ModelChoice(
        "5x5 convolutions of 32 and 64 filters, 512 units [McMahan et al. 2017]", "models:build_cnn"
    ),
    # At 0.4, twice the rate of the others, one seed of three falls to chance; at 0.3 none of five.
    "lean-cnn": ModelChoice(
        "a 5x5 convolution of 16 filters and a 3x3 one of 32, 128 units", highest_default_lr=0.15
    ),
    "small-cnn": ModelChoice(
        "5x5 convolutions of 16 and 32 filters, 128 units", "models:build_small_cnn"
    ),
    "lenet": ModelChoice(
        "5x5 convolutions of 6 and 16 filters, 120 and 84 units [Li et al. 2022]",
        "models:build_lenet",
    ),
}

ALGORITHMS = {
    "fedavg": AlgorithmChoice("the weighted mean of the clients' weights [McMahan et al. 2017]"),
    "fedsgd": AlgorithmChoice(
        "FedAvg with one step on the client's whole shard [McMahan et al. 2017]",
        "algorithms:fedsgd",
        required={"local_epochs": 1, "batch_size": 0},
    ),
    "fedprox": AlgorithmChoice(
        "a pull back to the round's first weights [Li et al. 2020]",
        "algorithms:fedprox",
        ("prox_mu",),
    ),
    "fedavgm": AlgorithmChoice(
        "momentum on the server [Hsu et al. 2019]",
        "algorithms:fedavgm",
        ("server_momentum",),
        server_lr=0.3,
    ),
    "fedadagrad": AlgorithmChoice(
        "Adagrad on the server [Reddi et al. 2021]",
        "algorithms:fedadagrad",
        ("server_epsilon",),
        server_lr=0.03,
    ),
    "fedadam": AlgorithmChoice(
        "Adam on the server [Reddi et al. 2021]",
        "algorithms:fedadam",
        ("server_epsilon",),
        server_lr=0.1,
    ),
    "fedyogi": AlgorithmChoice(
        "Yogi on the server [Reddi et al. 2021]",
        "algorithms:fedyogi",
        ("server_epsilon",),
        server_lr=0.1,
    ),
    "fednova": AlgorithmChoice(
        "updates divided by their numbers of steps [Wang et al. 2020]",
        "algorithms:fednova",
        client_optimizers=("sgd", "momentum"),
    ),
    # MimeLite holds its momentum still through a round: that suits few local steps, not the 1,100
    # of the default, which need a rate as small as this.
    "mimelite": AlgorithmChoice(
        "the server's momentum in the clients' steps [Karimireddy et al. 2021]",
        "stateful:mimelite",
        ("server_momentum",),
        client_lr=0.0005,
        client_optimizers=("sgd",),
    ),
    "scaffold": AlgorithmChoice(
        "control variates against client drift [Karimireddy et al. 2020]",
        "stateful:scaffold",
        client_lr=0.1,
        client_optimizers=("sgd",),
    ),
    "feddyn": AlgorithmChoice(
        "dynamic regularization [Acar et al. 2021]",
        "stateful:feddyn",
        ("dyn_alpha",),
        client_optimizers=("sgd",),
    ),
}

CLIENT_OPTIMIZERS = {
    "sgd": OptimizerChoice("w <- w - client_lr * gradient"),
    "momentum": OptimizerChoice(
        "SGD with client_momentum", "optimizers:momentum", ("client_momentum",), 0.02
    ),
    "adagrad": OptimizerChoice("rate 0.02 by default", "optimizers:adagrad", client_lr=0.02),
    "rmsprop": OptimizerChoice("rate 0.001 by default", "optimizers:rmsprop", client_lr=0.001),
    "adam": OptimizerChoice("rate 0.001 by default", "optimizers:adam", client_lr=0.001),
    "yogi": OptimizerChoice("rate 0.002 by default", "optimizers:yogi", client_lr=0.002),
}

AGGREGATORS = {
    "mean": AggregatorChoice("weighted by the clients' numbers of examples"),
    "clipping": AggregatorChoice(
        "the same, large updates cut to an adaptive norm [Andrew et al. 2021]",
        "aggregators:clipping",
    ),
    "zeroing": AggregatorChoice(
        "the same, very large updates dropped, adaptively [Andrew et al. 2021]",
        "aggregators:zeroing",
    ),
    "median": AggregatorChoice(
        "of each coordinate, unweighted, against attackers [Yin et al. 2018]",
        "aggregators:coordinate_median",
        kind="robust",
        withstands=lambda chosen, cohort: (cohort - 1) // 2,
    ),
    "trimmed-mean": AggregatorChoice(
        "of each coordinate without both ends, unweighted [Yin et al. 2018]",
        "aggregators:coordinate_trimmed_mean",
        ("trim",),
        kind="robust",
        withstands=lambda chosen, cohort: math.floor(chosen["trim"] * cohort + 1e-9),
    ),
    "krum": AggregatorChoice(
        "the update nearest to its neighbours [Blanchard et al. 2017]",
        "aggregators:nearest_update",
        ("tolerated",),
        kind="robust",
        withstands=lambda chosen, cohort: chosen["tolerated"],
    ),
    "multi-krum": AggregatorChoice(
        "the mean of several such [Blanchard et al. 2017]",
        "aggregators:mean_of_nearest",
        ("tolerated",),
        kind="robust",
        withstands=lambda chosen, cohort: chosen["tolerated"],
    ),
    "compressed": AggregatorChoice(
        "the weighted mean of updates in 8 bits [Suresh et al. 2017]", "aggregators:compressed"
    ),
    "secure": AggregatorChoice(
        "the sums of secure aggregation, their arithmetic without the cryptography [Bonawitz et "
        "al. 2017]",
        "aggregators:secure",
    ),
    "dp": AggregatorChoice(
        "the unweighted mean of clipped updates, with noise [McMahan et al. 2018]",
        "privacy:private_mean",
        ("noise_multiplier", "delta", "epsilon_budget", "target_epsilon", "public_cohorts"),
        kind="private",
    ),
}

ATTACKS = {
    "label-flip": AttackChoice(
        "train on label C - 1 - l in place of l", shard="adversity:flip_labels"
    ),
    "sign-flip": AttackChoice(
        "send the update with the opposite sign", update="adversity:flip_sign"
    ),
    "scaled": AttackChoice(
        "send the update times attack_scale", ("attack_scale",), update="adversity:scale_up"
    ),
    "gaussian": AttackChoice(
        "send noise, attack_scale times as large as the update",
        ("attack_scale",),
        update="adversity:gaussian",
    ),
    "nan": AttackChoice("send NaN", update="adversity:not_a_number"),
    "backdoor": AttackChoice(
        "train a share of the images with a white square as backdoor_target, and send the update "
        "times attack_scale; a column says how often the square works [Bagdasaryan et al. 2020]",
        ("attack_scale", "backdoor_target", "backdoor_share"),
        shard="adversity:stamp_trigger",
        update="adversity:scale_up",
    ),
}

SCHEDULES = {
    "constant": ScheduleChoice("as it is"),
    "exponential": ScheduleChoice(
        "times lr_decay ** (t - 1)",
        "optimizers:exponential",
        ("lr_decay",),
        title=" × {lr_decay:g} a round",
    ),
    "inverse-sqrt": ScheduleChoice(
        "times t ** -0.5", "optimizers:inverse_sqrt", title=" inverse-sqrt"
    ),
    "warm-up": ScheduleChoice(
        "within each round: times (i + 1) / warmup_steps in its local step i",
        fields=("warmup_steps",),
        title=", warm-up over {warmup_steps} steps",
        is_within_round=True,
    ),
    "cosine": ScheduleChoice(
        "from 1 times to 0 times it, over lr_horizon rounds",
        "optimizers:cosine",
        ("lr_horizon",),
        title=" cosine over {lr_horizon} rounds",
    ),
}
# The server makes one step a round: a schedule within the round is the clients' alone.
SERVER_SCHEDULES = {name: made for name, made in SCHEDULES.items() if not made.is_within_round}

# By the field that makes the choice.
TABLES = {
    "dataset": DATASETS,
    "partition": PARTITIONS,
    "model": MODELS,
    "algorithm": ALGORITHMS,
    "client_optimizer": CLIENT_OPTIMIZERS,
    "client_schedule": SCHEDULES,
    "server_schedule": SERVER_SCHEDULES,
    "aggregator": AGGREGATORS,
    "attack": ATTACKS,
}
