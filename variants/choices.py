"""Choices of the flags that have a table: one entry each, complete.

A choice has its line of help, the function that it stands for, the fields that it uses and not all
choices do, and what must be known of it before TensorFlow is imported. `function` is written as
"module:name", of variants/, and imported when it is used; without one the choice needs none, as
FedAvg's own, which is in the script.
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
    title: str = ""  # the Dataset's name, which the data need not be read for


class PartitionChoice(NamedTuple):
    """A split: function(labels [N], num_clients, rng, **fields) -> K index arrays."""

    help: str
    title: str = ""  # in plots, with fields in braces
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
    sends_loss_gradients: bool = False  # without weight decay
    needs_clock: bool = False  # its rounds end by the simulated clock
    weights_steps: bool = False  # takes a mean of step counts weighted by examples
    paper_name: str = ""  # in LaTeX tables


class OptimizerChoice(NamedTuple):
    """A client optimizer: function(learning_rate, optimization) -> a TFF optimizer."""

    help: str
    function: Function = ""
    fields: tuple[str, ...] = ()
    client_lr: float | None = None  # if the user names none; None: the algorithm's
    title: str = ""  # in plots, with fields in braces


class AggregatorChoice(NamedTuple):
    """An aggregator: function(parts, experiment) -> parts.

    `kind` is "weighted" if it is a mean weighted by examples, "unweighted" if all clients count the
    same, so that attackers have no more power, and "private" if each round costs epsilon.
    """

    help: str
    function: Function = ""
    fields: tuple[str, ...] = ()
    kind: str = "weighted"
    shows_updates: bool = True  # whether the server sees the update of a single client
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
        title="scikit-learn digits (not MNIST)",
    ),
}

PARTITIONS = {
    "iid": PartitionChoice("shuffled, then divided evenly", "IID", "partitions:split_iid"),
    "shards": PartitionChoice(
        "sorted by label and cut into shards_per_client pieces per client [McMahan et al. 2017]",
        "{shards_per_client} shards a client",
        "partitions:split_shards",
        ("shards_per_client",),
    ),
    "dirichlet": PartitionChoice(
        "each label divided in proportions drawn from Dirichlet(alpha) [Yurochkin et al. 2019]",
        "Dirichlet({alpha:g})",
        fields=("alpha",),
    ),
    "capped-dirichlet": PartitionChoice(
        "like dirichlet, but a client that has N / K images gets no more, as in NIID-Bench's "
        "code [Li et al. 2022, there with --min-images 10]",
        "Dirichlet({alpha:g}), sizes capped",
        "partitions:split_by_capped_dirichlet",
        ("alpha",),
    ),
    "client-dirichlet": PartitionChoice(
        "each client draws its own label mix, and all clients have the same size [Hsu et al. "
        '2019, whose alpha is C times this one for C labels; "balanced" in FedDyn]',
        "Dirichlet({alpha:g}) by client, equal sizes",
        "partitions:split_by_client_dirichlet",
        ("alpha",),
    ),
    "labels-per-client": PartitionChoice(
        "exactly labels_per_client labels per client, every label held by as nearly the same "
        "number of clients as possible",
        "{labels_per_client} labels a client",
        "partitions:split_by_label",
        ("labels_per_client",),
    ),
    "random-labels": PartitionChoice(
        'client i holds label i mod C and random others, "#C = k" in NIID-Bench [Li et al. 2022]',
        "{labels_per_client} labels a client, at random",
        "partitions:split_by_random_labels",
        ("labels_per_client",),
    ),
    "lognormal-labels": PartitionChoice(
        "client i holds the labels i mod C to i + k - 1 mod C, with lognormal sizes [Li et al. "
        "2020: FedProx's MNIST, with --num-clients 1000]",
        "{labels_per_client} labels a client, sizes lognormal({size_spread:g})",
        "partitions:split_by_lognormal_labels",
        ("labels_per_client", "size_spread"),
    ),
    "quantity": PartitionChoice(
        "sizes follow a power law, labels IID",
        "sizes by power law ({size_exponent:g})",
        "partitions:split_by_size",
        ("size_exponent",),
    ),
    "dirichlet-quantity": PartitionChoice(
        "sizes drawn from Dirichlet(alpha), labels IID [Li et al. 2022, whose code redraws until "
        "every client has 10 images: --min-images 10]",
        "sizes by Dirichlet({alpha:g})",
        "partitions:split_by_dirichlet_size",
        ("alpha",),
    ),
    "feature": PartitionChoice(
        "IID, but each client's images are rotated, and with noise made noisy, in their own way "
        "[Li et al. 2022 with --rotation 0 and noise]; the test images stay as they are",
        "IID, rotated by ±{rotation:g}°, noise to {noise:g}",
        "partitions:split_iid",
        ("rotation", "noise"),
        change_images="partitions:rotate_and_add_noise",
    ),
    "natural": PartitionChoice(
        "one client per owner, given by the array client_train of the data or by a file for each",
        "natural, by owner",
        "partitions:split_by_owner",
        ("owner_choice",),
        needs_dataset=True,
    ),
    "file": PartitionChoice(
        "read from partition_file",
        "split of a file",
        "given_splits:read_split",
        ("partition_file",),
        needs_dataset=True,
    ),
}

MODELS = {
    "logreg": ModelChoice("softmax regression, no hidden layer", "models:build_logreg"),
    "mlp": ModelChoice("one hidden layer of 128 units", "models:build_mlp"),
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
    "fedavg": AlgorithmChoice(
        "the weighted mean of the clients' weights [McMahan et al. 2017]",
        paper_name="FedAvg",
    ),
    "fedsgd": AlgorithmChoice(
        "FedAvg with a single step on the client's whole shard [McMahan et al. 2017]",
        "algorithms:fedsgd",
        required={"local_epochs": 1, "batch_size": 0},
        paper_name="FedSGD",
    ),
    "fedprox": AlgorithmChoice(
        "a proximal term keeps local weights close to the global model [Li et al. 2020]",
        "algorithms:fedprox",
        ("prox_mu",),
        paper_name="FedProx",
    ),
    "fedavgm": AlgorithmChoice(
        "server momentum [Hsu et al. 2019]",
        "algorithms:fedavgm",
        ("server_momentum",),
        server_lr=0.3,
        paper_name="FedAvgM",
    ),
    "fedadagrad": AlgorithmChoice(
        "Adagrad on the server [Reddi et al. 2021]",
        "algorithms:fedadagrad",
        ("server_epsilon",),
        server_lr=0.03,
        paper_name="FedAdagrad",
    ),
    "fedadam": AlgorithmChoice(
        "Adam on the server [Reddi et al. 2021]",
        "algorithms:fedadam",
        ("server_epsilon",),
        server_lr=0.1,
        paper_name="FedAdam",
    ),
    "fedyogi": AlgorithmChoice(
        "Yogi on the server [Reddi et al. 2021]",
        "algorithms:fedyogi",
        ("server_epsilon",),
        server_lr=0.1,
        paper_name="FedYogi",
    ),
    "fednova": AlgorithmChoice(
        "updates normalized by the number of local steps [Wang et al. 2020]",
        "algorithms:fednova",
        client_optimizers=("sgd", "momentum"),
        weights_steps=True,
        paper_name="FedNova",
    ),
    # MimeLite holds its momentum still through a round: that suits few local steps, not the 1,100
    # of the default, which need a rate as small as this.
    "mimelite": AlgorithmChoice(
        "the server's momentum applied in the clients' steps [Karimireddy et al. 2021]",
        "stateful:mimelite",
        ("server_momentum",),
        sends_loss_gradients=True,
        client_lr=0.0005,
        client_optimizers=("sgd",),
        paper_name="MimeLite",
    ),
    "scaffold": AlgorithmChoice(
        "control variates that correct client drift [Karimireddy et al. 2020]",
        "stateful:scaffold",
        client_lr=0.1,
        client_optimizers=("sgd",),
        paper_name="SCAFFOLD",
    ),
    "feddyn": AlgorithmChoice(
        "dynamic regularization [Acar et al. 2021]",
        "stateful:feddyn",
        ("dyn_alpha",),
        client_optimizers=("sgd",),
        paper_name="FedDyn",
    ),
}

ALGORITHMS["fedbuff"] = AlgorithmChoice(
    "asynchronous: the server makes a step whenever buffer_size of the clients at work have "
    "reported [Nguyen et al. 2022]; needs a clock, such as --device-speed lognormal:0.5",
    "algorithms:fedbuff",
    ("buffer_size",),
    needs_clock=True,
    paper_name="FedBuff",
)
# A client has a model, or layers, of its own.
ALGORITHMS |= {
    "fedper": AlgorithmChoice(
        "the last personal_layers layers stay at the client [Arivazhagan et al. 2019]",
        "personal:fedper",
        ("personal_layers",),
        paper_name="FedPer",
    ),
    "fedrep": AlgorithmChoice(
        "like fedper, but clients first train their own layers for head_epochs, then the others "
        "[Collins et al. 2021]",
        "personal:fedrep",
        ("personal_layers", "head_epochs"),
        paper_name="FedRep",
    ),
    "ditto": AlgorithmChoice(
        "fedavg, and for each client a model of its own close to the global one [Li et al. 2021b]",
        "personal:ditto",
        ("ditto_lambda",),
        paper_name="Ditto",
    ),
    "apfl": AlgorithmChoice(
        "each client's model is a mixture of its own and the global one [Deng et al. 2020]",
        "personal:apfl",
        ("apfl_alpha",),
        paper_name="APFL",
    ),
}

CLIENT_OPTIMIZERS = {
    "sgd": OptimizerChoice("w <- w - client_lr * gradient"),
    "momentum": OptimizerChoice(
        "SGD with client_momentum; default rate 0.02",
        "optimizers:momentum",
        ("client_momentum",),
        0.02,
        "client momentum {client_momentum:g}",
    ),
    "adagrad": OptimizerChoice(
        "default rate 0.02", "optimizers:adagrad", client_lr=0.02, title="client adagrad"
    ),
    "rmsprop": OptimizerChoice(
        "default rate 0.001", "optimizers:rmsprop", client_lr=0.001, title="client rmsprop"
    ),
    "adam": OptimizerChoice(
        "default rate 0.001", "optimizers:adam", client_lr=0.001, title="client adam"
    ),
    "yogi": OptimizerChoice(
        "default rate 0.002", "optimizers:yogi", client_lr=0.002, title="client yogi"
    ),
}

AGGREGATORS = {
    "mean": AggregatorChoice("weighted by the clients' numbers of examples"),
    "clipping": AggregatorChoice(
        "mean of updates clipped to an adaptive norm [Andrew et al. 2021]",
        "aggregators:clipping",
    ),
    "zeroing": AggregatorChoice(
        "mean in which very large updates count as zeros; adaptive threshold [Andrew et al. 2021]",
        "aggregators:zeroing",
    ),
    "median": AggregatorChoice(
        "coordinate-wise, unweighted, robust to attackers [Yin et al. 2018]",
        "aggregators:coordinate_median",
        kind="unweighted",
        withstands=lambda chosen, cohort: (cohort - 1) // 2,
    ),
    "trimmed-mean": AggregatorChoice(
        "coordinate-wise without both tails, unweighted [Yin et al. 2018]",
        "aggregators:coordinate_trimmed_mean",
        ("trim",),
        kind="unweighted",
        withstands=lambda chosen, cohort: math.floor(chosen["trim"] * cohort + 1e-9),
    ),
    "krum": AggregatorChoice(
        "the update closest to its neighbours [Blanchard et al. 2017]",
        "aggregators:nearest_update",
        ("tolerated",),
        kind="unweighted",
        withstands=lambda chosen, cohort: chosen["tolerated"],
    ),
    "multi-krum": AggregatorChoice(
        "the mean of all updates except the outliers by Krum's score [Blanchard et al. 2017]",
        "aggregators:mean_of_nearest",
        ("tolerated",),
        kind="unweighted",
        withstands=lambda chosen, cohort: chosen["tolerated"],
    ),
    "compressed": AggregatorChoice(
        "weighted mean of updates quantized to 8 bits [Suresh et al. 2017]",
        "aggregators:compressed",
    ),
    "secure": AggregatorChoice(
        "arithmetic of secure aggregation, without the cryptography [Bonawitz et al. 2017]",
        "aggregators:secure",
        shows_updates=False,
    ),
    "dp": AggregatorChoice(
        "unweighted mean of clipped updates plus Gaussian noise [McMahan et al. 2018]",
        "privacy:private_mean",
        ("noise_multiplier", "delta", "epsilon_budget", "target_epsilon", "public_cohorts"),
        kind="private",
    ),
}

ATTACKS = {
    "label-flip": AttackChoice(
        "train on label C - 1 - l instead of l", shard="adversity:flip_labels"
    ),
    "sign-flip": AttackChoice(
        "send the update with its sign flipped", update="adversity:flip_sign"
    ),
    "scaled": AttackChoice(
        "send the update multiplied by attack_scale", ("attack_scale",), update="adversity:scale_up"
    ),
    "gaussian": AttackChoice(
        "send noise attack_scale times as large as the update",
        ("attack_scale",),
        update="adversity:gaussian",
    ),
    "nan": AttackChoice("send NaN", update="adversity:not_a_number"),
    "backdoor": AttackChoice(
        "stamp a white square on a share of the training images, label them backdoor_target, and "
        "send the update multiplied by attack_scale; a column reports the attack's success rate "
        "[Bagdasaryan et al. 2020]",
        ("attack_scale", "backdoor_target", "backdoor_share"),
        shard="adversity:stamp_trigger",
        update="adversity:scale_up",
    ),
}

SCHEDULES = {
    "constant": ScheduleChoice("unchanged"),
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
        "within each round: times (i + 1) / warmup_steps at local step i",
        fields=("warmup_steps",),
        title=", warm-up over {warmup_steps} steps",
        is_within_round=True,
    ),
    "cosine": ScheduleChoice(
        "decays from 1 to 0 times the rate, over lr_horizon rounds",
        "optimizers:cosine",
        ("lr_horizon",),
        title=" cosine over {lr_horizon} rounds",
    ),
}
# The server makes one step a round: a schedule within the round is the clients' alone.
SERVER_SCHEDULES = {name: made for name, made in SCHEDULES.items() if not made.is_within_round}

# By the field that makes the choice.
TABLES: dict[str, dict[str, Any]] = {
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
# Of these the user may name FILE.py:FUNCTION instead: the choice with that function alone.
KINDS = {
    "partition": PartitionChoice,
    "model": ModelChoice,
    "algorithm": AlgorithmChoice,
    "aggregator": AggregatorChoice,
}
