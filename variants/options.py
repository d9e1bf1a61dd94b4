"""Fields of the configuration by subject, with their texts in --help. No TensorFlow here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from harness.cli.fields import (
    ConfigGroup,
    Count,
    CountOrZero,
    Name,
    Path,
    Probability,
    Rate,
    Scale,
    UserError,
    choice,
    float_range,
    int_range,
    optional_float,
    optional_int,
    text,
)
from harness.cli.own_files import OWN
from variants.choices import (
    AGGREGATORS,
    ALGORITHMS,
    ATTACKS,
    CLIENT_OPTIMIZERS,
    SCHEDULES,
    SERVER_SCHEDULES,
)


@dataclass(frozen=True)
class MoreData(ConfigGroup):
    """Settings of the group Data for custom data."""

    data: Path = ""
    """Custom images instead of MNIST, of any size, grey or colour: an .npz with the arrays x_train,
    y_train, x_test and y_test, such as CIFAR-10's, or train_images and so on, such as MedMNIST's; a
    folder with four IDX files, such as Fashion-MNIST's; a folder of folders with pictures, a class
    each; a .csv or .parquet file; or a folder of .npz files, a client each. The environment
    variable FL_DATA does the same, but for a run that is resumed or evaluated."""
    test_share: float_range(0, 0.9) = 0.0
    """Fraction of the images of --data that become the test set, with the labels in the same
    proportions, for data without a test set."""
    image_size: text("HxW") = ""
    """Height and width to which the pictures of --data are resized, such as 32x32; needed if they
    have several sizes."""
    data_name: Name = ""
    """Name of the data of --data in plots and output, such as Fashion-MNIST."""
    transpose: bool = False
    """Swap rows and columns of the images of --data, as EMNIST's files require."""
    validation: bool = False
    """Evaluate on the validation images in the file of --data, such as MedMNIST's, instead of its
    test set, for choosing hyperparameters."""

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """The size that pictures get, None for their own. Raises UserError for another text."""
        if not self.image_size:
            return None
        found = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", self.image_size)
        if not found:
            raise UserError(
                f"image_size={self.image_size!r:.40} is not a size; give height and width in "
                "pixels, such as 32x32"
            )
        return int(found[1]), int(found[2] or found[1])


@dataclass(frozen=True)
class MorePartitioning(ConfigGroup):
    """Settings of the group Partitioning that the default split does not use."""

    min_images: CountOrZero = 0
    """Minimum number of images per client, before --client-test holds some out; the split is
    redrawn until every client has that many. 0: a client without images receives one from the
    largest client."""
    shards_per_client: Count = 2
    """Label-sorted pieces per client. Used by shards."""
    labels_per_client: int_range(1, 65_536) = 2
    """Labels per client, k. Used by labels-per-client, random-labels and lognormal-labels."""
    size_spread: float_range(0, 10) = 2.0
    """Standard deviation of the logarithm of the sizes. Used by lognormal-labels."""
    size_exponent: float_range(0, 10) = 1.0
    """The client of size rank r gets a share of the images proportional to r ** -size_exponent; 0:
    all equal. Used by quantity."""
    rotation: float_range(0, 180) = 45.0
    """Degrees by which the first client's images are rotated one way, and the last client's the
    other way. Used by feature."""
    noise: float_range(0, 255) = 0.0
    """Standard deviation, in grey levels, of the noise on the last client's images; the first
    client has none. Used by feature."""
    owner_choice: Literal["largest", "random"] = "largest"
    """Which owners are clients if --num-clients is smaller than their number: those with the most
    images, or a random choice. Used by natural."""
    unseen_clients: float_range(0, 0.9) = 0.0
    """Fraction of clients that are never drawn. Each round reports the accuracy on their images,
    and on the images that the other clients train on (10,000 of them at random if there are more).
    The latter are training images, so the gap between the two is not due to new clients alone."""
    client_test: float_range(0, 0.9) = 0.0
    """Fraction of each client's images that it does not train on. Each round reports the mean
    accuracy of the clients on them, and that of the worst 10 %; clients.csv has each client's."""
    partition_file: Path = ""
    """A partition.json, of a run or another program, that defines the split. Implies `--partition
    file`."""


@dataclass(frozen=True)
class MoreTraining(ConfigGroup):
    """Settings of the group Training that a default run does not use."""

    initial_model: Path = ""
    """A .keras file of the same network, such as a run's global_model.keras, with the initial
    weights. Default: initialized from the seed."""
    batch_norm: Literal["refuse", "average", "local"] = "refuse"
    """What becomes of BatchNormalization layers. average: their moving means and variances travel
    with the weights and are averaged. local: each client keeps these layers for itself, FedBN [Li
    et al. 2021], and its own model is evaluated on its --client-test images. refuse: such layers
    are an error, since skewed labels harm both; GroupNormalization has no statistics [Hsieh et al.
    2020]."""
    label_smoothing: float_range(0, 0.99) = 0.0
    """Share of each label that is spread over all labels in the clients' loss [Szegedy et al.
    2016]."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a label's images count in the clients' loss in inverse proportion to their number,
    over all clients, so that each label counts the same."""
    loss: choice({"cross-entropy": "of logits and labels"}, OWN, "FILE.py:FUNCTION") = (
        "cross-entropy"
    )
    """The clients' loss. FILE.py:FUNCTION is a custom one: function(labels int32[n], logits
    float32[n,C]) returns float32[n]. The test loss remains the cross-entropy."""
    sampling: Literal["fixed", "poisson", "by-size"] = "fixed"
    """fixed: clients_per_round of them, without replacement. poisson: each client independently,
    clients_per_round on average. by-size: clients_per_round draws with replacement, in proportion
    to the clients' images, followed by a plain mean [Li et al. 2020]."""
    local_steps: CountOrZero = 0
    """Number of local steps each client takes per round, instead of local_epochs; 0: as many as
    local_epochs take."""


@dataclass(frozen=True)
class Optimization(ConfigGroup):
    """Algorithm, client optimizer and schedules, with the settings of each.

    Settings of every algorithm are in the group Training.
    """

    algorithm: choice(ALGORITHMS, OWN, "FILE.py:FUNCTION") = "fedavg"
    """The federated algorithm: what clients and server do with gradients and updates.
    FILE.py:FUNCTION is a custom one: change(parts, experiment) -> parts."""
    client_optimizer: choice(CLIENT_OPTIMIZERS) = "sgd"
    """TFF optimizer of the clients' local steps. Its state is reset every round."""
    client_momentum: float_range(0, 0.9999) = 0.9
    """Momentum of --client-optimizer momentum."""
    weight_decay: Rate = 0.0
    """Weight decay: adds weight_decay * w, the gradient of weight_decay / 2 * |w| ** 2, to each
    local gradient."""
    server_momentum: float_range(0, 0.9999) = 0.9
    """Momentum, beta, of fedavgm and mimelite."""
    server_epsilon: optional_float(1e-12, 1000) = None
    """Tau of fedadagrad, fedadam and fedyogi, added to the root of the second moment; fedadagrad
    adds its square inside the root. Default: 1e-3."""
    prox_mu: Rate = 0.001
    """Weight, mu, of fedprox's proximal term; 0 is fedavg."""
    dyn_alpha: float_range(0.0001, 1000) = 0.001
    """Weight, alpha, of feddyn's quadratic penalty around the global model. The server's correction
    is weighted by 1 / alpha."""
    buffer_size: Count = 5
    """Clients whose reports fedbuff's server waits for before it makes a step. clients_per_round of
    them are at work at any time."""
    personal_layers: Count = 1
    """Layers with weights, from the last one back, that stay at each client. Used by fedper and
    fedrep."""
    head_epochs: Count = 10
    """Epochs that fedrep's clients train their own layers for, before local_epochs on the
    others."""
    ditto_lambda: Rate = 0.1
    """Weight, lambda, of the term that keeps ditto's own models close to the global one."""
    apfl_alpha: Probability = 0.5
    """Share, alpha, of a client's own model in apfl's mixture; 0 is fedavg."""
    fine_tune_epochs: CountOrZero = 0
    """After each round, also evaluate every client by the global model fine-tuned for this many
    epochs on the client's images [Cheng et al. 2021]. Needs --client-test; changes nothing in the
    federation. Clients that a personal algorithm has not trained yet are fine-tuned too."""
    client_schedule: choice(SCHEDULES) = "constant"
    """Schedule of the clients' learning rate over the rounds t."""
    server_schedule: choice(SERVER_SCHEDULES) = "constant"
    """Schedule of the server's learning rate over its steps t, which are the rounds; one from which
    no update can be used makes no step."""
    warmup_steps: int_range(1, 1_000_000) = 20
    """Local steps of each round until a warm-up schedule reaches the full rate."""
    lr_decay: Probability = 0.99
    """Factor per round of an exponential schedule."""
    lr_horizon: optional_int(1, 100_000) = None
    """Rounds until a cosine schedule reaches 0. Default: all rounds of the run; extending the run
    later does not change it."""


@dataclass(frozen=True)
class Aggregation(ConfigGroup):
    """How the server combines the clients' updates."""

    aggregator: choice(AGGREGATORS, OWN, "FILE.py:FUNCTION") = "mean"
    """How the server combines the clients' updates."""
    client_weighting: Literal["examples", "uniform"] = "examples"
    """examples: weight clients by their number of examples. uniform: weight all clients equally."""
    trim: float_range(0, 0.49) = 0.3
    """Fraction of the clients that trimmed-mean drops at each end of every coordinate."""
    tolerated: int_range(0, 30_000) = 3
    """Attackers per round, f, that krum and multi-krum must tolerate; they need at least 2 f + 3
    clients."""


@dataclass(frozen=True)
class Privacy(ConfigGroup):
    """Differential privacy, used by --aggregator dp."""

    noise_multiplier: float_range(0.01, 1000) = 0.5
    """Noise multiplier, z, of all that a round releases: the update, and the count from which the
    clipping norm adapts. It must be less than z0 = 0.1 times clients_per_round: the noise of the
    summed updates has standard deviation z / sqrt(1 - (z / z0) ** 2) times the norm."""
    delta: float_range(1e-15, 0.5) = 1e-5
    """The delta at which epsilon is reported after each round."""
    epsilon_budget: Scale = 0.0
    """Stop before the round that would exceed this epsilon; 0: no limit."""
    target_epsilon: Scale = 0.0
    """Epsilon of the whole run: finds, reports and uses the smallest noise_multiplier that keeps
    it. 0: use --noise-multiplier."""
    public_cohorts: bool = False
    """Draw the cohorts from the seed, so that they are reproducible. Anyone who knows the seed
    knows them, so epsilon is computed without amplification by sampling. Default: drawn from the
    operating system's entropy."""


@dataclass(frozen=True)
class Adversity(ConfigGroup):
    """Unreliable and malicious clients."""

    dropout: Probability = 0.0
    """Probability that a client of a round fails to report after receiving the weights."""
    stragglers: Probability = 0.0
    """Probability that a client of a round completes only a random fraction of its local work."""
    drop_stragglers: bool = False
    """Drop the clients of --stragglers, as FedAvg does, instead of using the steps they completed,
    as FedProx does [Li et al. 2020]."""
    byzantine: CountOrZero = 0
    """Number of clients that attack whenever they are drawn."""
    attack: choice(ATTACKS) = "sign-flip"
    """What the attackers do."""
    attack_scale: Scale = 10.0
    """Strength of the attacks scaled, gaussian and backdoor."""
    backdoor_target: int_range(0, 65_535) = 0
    """Target label of the backdoor, 0 to C - 1."""
    backdoor_share: Probability = 0.5
    """Fraction of a backdoor attacker's images that carry the trigger."""


@dataclass(frozen=True)
class Clock(ConfigGroup):
    """A simulated clock: how long rounds would take on clients of given speed and connection.

    One of device_speed, bandwidth and latency turns it on.
    """

    device_speed: text("SPEEDS") = ""
    """Speeds at which clients train. lognormal:0.5: examples_per_second times a lognormal factor
    with this standard deviation of its logarithm, drawn for each client by the seed. constant: the
    same speed for all. Default: training takes no time."""
    examples_per_second: float_range(0.001, 1e9) = 1000.0
    """Median speed of a client, in training examples per second. Used by --device-speed."""
    speed_by_size: float_range(-1, 1) = 0.0
    """Correlation of the logarithm of a client's speed with that of its number of images. Used by
    --device-speed."""
    bandwidth: float_range(0, 1e12) = 0.0
    """Bytes per second of each client's connection, down and up; 0: messages take no time."""
    latency: float_range(0, 86_400) = 0.0
    """Seconds that a message takes in addition, whatever its size."""
    deadline: float_range(0, 1e9) = 0.0
    """Simulated seconds after which the server closes a round, without the clients that are late;
    0: it waits for all."""
    over_select: float_range(1, 10) = 1.0
    """Draw this many times clients_per_round, and take the first clients_per_round that report
    [Bonawitz et al. 2019]."""

    @property
    def speed_spread(self) -> float:
        """Standard deviation of the logarithm of the speeds. Raises UserError for another text."""
        found = re.fullmatch(r"constant|lognormal:(\d+\.?\d*|\.\d+)", self.device_speed)
        if not found or float(found[1] or 0) > 10:
            raise UserError(
                f"device_speed={self.device_speed!r:.40} is not a distribution of speeds; give "
                "constant, or lognormal with a standard deviation of at most 10, such as "
                "lognormal:0.5"
            )
        return float(found[1] or 0)
