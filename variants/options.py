"""Configuration fields by subject, and their dependencies. No TensorFlow here.

A field that no selected choice uses has no effect, and triggers a notice.
"""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from harness.cli import command_line, saved_config, trust, usage
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
from harness.cli.flags import split_off, to_flag
from harness.cli.own_files import OWN, OWN_FIELDS, is_own, own_fields, short_name
from harness.comparing.sweep import check_comparison, join_compared, overlaid_folders
from harness.engine.ssh import HERE
from harness.storage.files import briefly, expand_path
from variants import presets
from variants.choices import (
    AGGREGATORS,
    ALGORITHMS,
    ATTACKS,
    CLIENT_OPTIMIZERS,
    DATASETS,
    KINDS,
    PARTITIONS,
    SCHEDULES,
    SERVER_SCHEDULES,
    TABLES,
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
    """Standard deviation of the noise divided by the clipping norm, z; it must be less than 0.1
    times clients_per_round."""
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
    """Probability that a client of a round completes only a random fraction of its local steps."""
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


CLOCK_FIELDS = ("device_speed", "bandwidth", "latency")


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


def find_choice(field: str, name: str) -> Any:
    """Return the choice of this name; of FILE.py:FUNCTION what is known before the file is read."""
    if name in TABLES[field] or field not in KINDS:
        return TABLES[field][name]
    made = KINDS[field]("", function=name)
    title = short_name(name).replace("{", "{{").replace("}", "}}")
    return made._replace(title=title) if field == "partition" else made


def has_owners(partition: Any) -> bool:
    """Return whether the clients of a partition are the owners of the images."""
    chosen = PARTITIONS.get(partition) if isinstance(partition, str) else None
    return chosen is not None and "owner_choice" in chosen.fields


class ExperimentConfig(ConfigGroup):
    """A configuration of which some values follow from others: the script's Config is one."""

    if TYPE_CHECKING:  # groups that Config has
        partitioning: Any
        training: Any
        clock: Clock

    def __post_init__(self) -> None:
        """Raise UserError if fields do not go together."""
        super().__post_init__()
        check_combination(self.to_dict(), self.defaults())
        check_comparison(self)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values in these fields.

        First come the fields that a preset sets, the data of the run that --evaluate names, and
        all owners as the clients of partition="natural".
        """
        kind = type(self)
        implied = presets.preset_fields(changes.get("preset"), functools.partial(parse, kind))
        is_usual = self.partitioning.num_clients == self.defaults()["num_clients"]
        is_new = not has_owners(self.partitioning.partition)
        if has_owners(changes.get("partition")) and is_new and is_usual:
            implied = {"num_clients": 0} | implied
        if changes.get("evaluate"):
            super().replace(evaluate=changes["evaluate"])  # refuses what is no text
            saved = saved_config.read_saved(changes["evaluate"], kind())
            implied |= saved.data.to_dict()
        return super().replace(**implied | changes)

    def effective(self, **changes: Any) -> Self:
        """Return a copy with these changes, and then with the values that are really in use.

        Default rates are filled in, and a field that has no effect is at its default. Two
        configurations that make the same run have the same effective copy.
        """
        chosen = self.to_dict() | changes
        return super().replace(**changes | effective_values(chosen, self.defaults()))

    def with_absolute_paths(self) -> Self:
        """Return a copy whose files are named wherever it is read, FL_DATA's too."""
        return self.replace(**absolute_paths(self.to_dict()))

    def unused_notices(self) -> list[str]:
        """Return a notice on each flag that has no effect."""
        return unused_notices(self.to_dict(), self.defaults())

    def chosen(self, field: str) -> Any:
        """Return the row of a table in choices.py that this field names.

        Of FILE.py:FUNCTION it has that as its function, and no help.
        """
        name = self.partition_name if field == "partition" else self.to_dict()[field]
        return find_choice(field, name)

    def fields_of_choice(self, field: str) -> dict[str, Any]:
        """Return the fields, by name, that the choice made in this field uses and others do not."""
        return self.subset(self.chosen(field).fields)

    @property
    def partition_name(self) -> str:
        """The partition in use: a partition_file implies "file"."""
        return "file" if self.partitioning.partition_file else self.partitioning.partition

    @property
    def has_own_model(self) -> bool:
        """Whether the model is the user's own FILE.py:FUNCTION."""
        return is_own(self.training.model)

    @property
    def is_private(self) -> bool:
        """Whether the run is differentially private, and tells nothing of single clients."""
        return self.chosen("aggregator").kind == "private"

    @property
    def cohort_size(self) -> int:
        """Clients that train in a round, m; with Poisson sampling on average."""
        drawn = self.partitioning.num_clients - self.num_unseen
        return self.training.clients_per_round or drawn

    @property
    def num_selected(self) -> int:
        """Clients that are drawn for a round, over_select * m, rounded up."""
        return math.ceil(self.clock.over_select * self.cohort_size - 1e-9)

    @property
    def num_unseen(self) -> int:
        """Clients that are never drawn."""
        partitioning = self.partitioning
        return num_unseen(partitioning.unseen_clients, partitioning.num_clients)


def parse(kind: type[ExperimentConfig], words: str | Sequence[str] | None) -> Any:
    """Return the configuration of this class that a command line asks for; see the script's.

    Which run --resume names, only a first reading tells: then the flags are read twice.
    """
    if not (words is None or isinstance(words, str | Sequence)):
        raise UserError(f"{words!r:.60} is not a command line; give flags, such as '--rounds 3'")
    try:
        word_list = shlex.split(words) if isinstance(words, str) else words
    except ValueError as error:  # a quotation mark without its other
        raise UserError(f"{words!r:.60} cannot be divided into flags ({error}); fix it") from error
    given = list(sys.argv[1:] if word_list is None else word_list)
    presets.explain_preset(given)
    usage.answer_help(kind(), given)
    base = saved_config.read_base(given, kind())
    is_given = base is not None and "num_clients" in base.changed()
    flags = insert_implied_flags(presets.insert_preset_flags(given), is_given)
    flags = join_compared(flags)
    evaluated = split_off(given, "evaluate")[0]
    names_data = any(split_off(given, field)[0] for field in ("dataset", "data"))
    if evaluated and not base and not names_data:
        base = kind().replace(evaluate=evaluated[-1])
    config = command_line.read_flags(kind, flags, default=base)
    check_given_noise(config.to_dict(), given)
    check_definition(config.to_dict(), config.defaults(), given)
    command_line.check_use(config, given)
    if config.run.resume:
        saved = saved_config.read_saved(config.run.resume, kind())
        config = command_line.read_flags(kind, flags, default=saved)
        saved_config.check_resumed(config, saved)
    for field, name in own_fields(config.to_dict()).items():
        if not split_off(given, field)[0]:
            trust.check_file(field, name, config.run.resume or config.run.config)
    return config


def check_paths(config: Any) -> None:
    """Raise UserError for a file, or a run's folder, that a flag names and that is not there."""
    check_files(config.to_dict())
    for folder in filter(None, [config.run.evaluate, *overlaid_folders(config.comparison.compare)]):
        saved_config.read_saved(str(folder), type(config)())


class Condition(NamedTuple):
    """A field has an effect only if one of the fields `deciding` has one of `values`.

    Without `values` it is enough that one of them is not at its default.
    """

    deciding: tuple[str, ...]
    values: tuple[str, ...] = ()

    def is_met(
        self, chosen: dict[str, Any], default: dict[str, Any], compared: Sequence[str]
    ) -> bool:
        """Return whether the values `chosen`, or one of the names that are `compared`, meet it."""
        actual = [chosen[field] for field in self.deciding]
        if self.values:
            return not set(self.values).isdisjoint([*actual, *compared])
        return any(chosen[field] != default[field] for field in self.deciding)

    def is_own(self, chosen: dict[str, Any]) -> bool:
        """Return whether a user's own function decides."""
        return any(is_own(str(chosen[field])) for field in self.deciding)

    def __str__(self) -> str:
        flags = " or ".join(to_flag(field) for field in self.deciding)
        return f"{flags} {' or '.join(self.values)}".strip()


def conditions_of(deciding: Sequence[str], choices: dict[str, Any]) -> dict[str, Condition]:
    """Return field -> the condition that one of the fields `deciding` has a choice that uses it."""
    users: dict[str, tuple[str, ...]] = {}
    for name, choice_made in choices.items():
        for field in choice_made.fields:
            users[field] = (*users.get(field, ()), name)
    return {field: Condition(tuple(deciding), names) for field, names in users.items()}


def all_conditions() -> dict[str, tuple[Condition, ...]]:
    """Return field -> what else must be chosen for it to have an effect."""
    by_choice = {
        **conditions_of(["partition"], PARTITIONS),
        **conditions_of(["algorithm"], ALGORITHMS),
        **conditions_of(["client_optimizer"], CLIENT_OPTIMIZERS),
        **conditions_of(["client_schedule", "server_schedule"], SCHEDULES),
        **conditions_of(["aggregator"], AGGREGATORS),
        **conditions_of(["attack"], ATTACKS),
    }
    conditions: dict[str, tuple[Condition, ...]]
    conditions = {field: (condition,) for field, condition in by_choice.items()}
    has_attackers = Condition(("byzantine",))
    conditions["attack"] = (has_attackers,)
    for field in ("attack_scale", "backdoor_target", "backdoor_share"):
        conditions[field] = (has_attackers, by_choice[field])
    weighted = tuple(name for name, made in AGGREGATORS.items() if made.kind == "weighted")
    is_uniform_draw = Condition(("sampling",), ("fixed", "poisson"))  # else all weights are equal
    conditions["client_weighting"] = (Condition(("aggregator",), weighted), is_uniform_draw)
    conditions["drop_stragglers"] = (Condition(("stragglers",)),)
    for field in ("data_name", "transpose", "test_share", "image_size"):
        conditions[field] = (Condition(("data",)),)
    for field in ("examples_per_second", "speed_by_size"):
        conditions[field] = (Condition(("device_speed",)),)
    for field in ("deadline", "over_select"):
        conditions[field] = (Condition(CLOCK_FIELDS),)
    conditions["accept_changes"] = (Condition(("resume",)),)
    conditions["after_target"] = (Condition(("target_accuracy",)),)
    has_figures = Condition(("figures",), ("png", "pdf", "svg"))
    for field in ("caption", "figure_size", "figure_font", "figure_style"):
        conditions[field] = (has_figures,)
    is_several = Condition(("compare", "seeds", "tune"))
    conditions["figure_y"] = (has_figures, is_several)
    conditions["table_columns"] = (is_several,)
    return conditions


def find_unused(chosen: dict[str, Any], default: dict[str, Any]) -> dict[str, str]:
    """Return field -> what it would need, of the fields that are set but have no effect.

    Both arguments are field -> value. A user's own FILE.py:FUNCTION may read any field of the
    choice that it replaces, except that it makes no run private.
    """
    compared = [name.strip() for name in re.split("[,;=]", chosen["compare"])]
    if chosen["partition_file"]:
        chosen = chosen | {"partition": "file"}
    unused = {}
    for field, conditions in all_conditions().items():
        missing = [
            condition
            for condition in conditions
            if not condition.is_met(chosen, default, compared)
            and (field in Privacy().to_dict() or not condition.is_own(chosen))
        ]
        if missing and chosen[field] != default[field]:
            unused[field] = " and ".join(map(str, missing))
    return unused


def unused_notices(chosen: dict[str, Any], default: dict[str, Any]) -> list[str]:
    """Return a notice on each flag that has no effect."""
    unused = [
        f"{field}={chosen[field]} has no effect without {needed}"
        for field, needed in find_unused(chosen, default).items()
    ]
    on_rounds = [*notices_on_steps(chosen, default), *memory_notices(chosen)]
    return [*unused, *on_rounds, *notices_on_attackers(chosen)]


def default_client_lr(chosen: dict[str, Any]) -> float:
    """Return the clients' rate where the user names none, of the configuration field -> value.

    It is the client optimizer's own. For sgd it is the algorithm's, or the model's or the data
    set's if that is lower.
    """
    own = CLIENT_OPTIMIZERS[chosen["client_optimizer"]].client_lr
    if own is not None:
        return own
    algorithm = find_choice("algorithm", chosen["algorithm"])
    model = find_choice("model", chosen["model"])
    dataset = DATASETS[chosen["dataset"]]
    return min(algorithm.client_lr, model.highest_default_lr, dataset.highest_default_lr)


def scheduled_by(field: str, chosen: dict[str, Any]) -> bool:
    """Return whether a rate has a schedule that uses this field."""
    schedules = (chosen["client_schedule"], chosen["server_schedule"])
    return any(field in SCHEDULES[name].fields for name in schedules)


def notices_on_steps(chosen: dict[str, Any], default: dict[str, Any]) -> list[str]:
    """Return a notice on local epochs that local steps stand in place of."""
    if chosen["local_steps"] and chosen["local_epochs"] != default["local_epochs"]:
        return [
            f"local_epochs={chosen['local_epochs']} has no effect: "
            f"local_steps={chosen['local_steps']} replaces it"
        ]
    return []


def notices_on_attackers(chosen: dict[str, Any]) -> list[str]:
    """Return a notice on more attackers than the aggregator can withstand."""
    attackers = chosen["byzantine"]
    cohort = updates_per_step(chosen)
    withstands = find_choice("aggregator", chosen["aggregator"]).withstands
    if not cohort or withstands is None or attackers <= withstands(chosen, cohort):
        return []
    return [
        f"byzantine={attackers} attackers exceed the {withstands(chosen, cohort)} per round that "
        f"aggregator={chosen['aggregator']!r} withstands in this setting"
    ]


def memory_notices(chosen: dict[str, Any]) -> list[str]:
    """Return a notice on an algorithm's memory, which a robust aggregator does not protect."""
    algorithm = find_choice("algorithm", chosen["algorithm"])
    is_robust = find_choice("aggregator", chosen["aggregator"]).kind == "unweighted"
    if not is_robust or not algorithm.function.startswith("stateful:"):
        return []
    return [
        f"aggregator={chosen['aggregator']!r} combines the updates only: the memory of algorithm="
        f"{chosen['algorithm']!r} is a plain mean, which attackers can move"
    ]


def horizon_notices(chosen: dict[str, Any]) -> list[str]:
    """Return a notice on rates that are 0, such as in rounds behind the end of a cosine."""
    for field in ("client_lr", "server_lr"):
        if chosen[field] == 0:
            return [f"{field}=0: no learning will take place"]
    if scheduled_by("lr_decay", chosen) and chosen["lr_decay"] == 0:
        return ["lr_decay=0: the rate is 0 from round 2 on, so learning stops"]
    horizon = chosen["lr_horizon"]
    if not scheduled_by("lr_horizon", chosen) or horizon is None or chosen["rounds"] <= horizon:
        return []
    return [
        f"lr_horizon={horizon}: the cosine schedule's rate is 0 from round {horizon + 1} on, so "
        "learning stops"
    ]


def effective_values(chosen: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of one run whose value in use is not the chosen one.

    A rate that is None becomes the default one. The fields that define the algorithm get its
    values. A field without effect becomes its default.
    """
    facts = find_choice("algorithm", chosen["algorithm"])
    values = {field: default[field] for field in find_unused(chosen, default)}
    if chosen["client_lr"] is None:
        values["client_lr"] = default_client_lr(chosen)
    if chosen["server_lr"] is None:
        values["server_lr"] = facts.server_lr
    if chosen["lr_horizon"] is None and scheduled_by("lr_horizon", chosen):
        values["lr_horizon"] = chosen["rounds"]
    if chosen["sampling"] == "by-size":  # the sizes count in the draw
        values["client_weighting"] = "uniform"
    if chosen["local_steps"]:
        values["local_epochs"] = default["local_epochs"]
    return values | facts.required


def insert_implied_flags(words: Sequence[str], is_given: bool) -> list[str]:
    """Return a command line with what its flags imply.

    The partition natural has all owners as clients, unless a file says how many (`is_given`);
    --list alone is that of the folder runs.
    """
    words = list(words)
    for place, word in enumerate(words):
        if word == "--list" and (words[place + 1 :] or ["--"])[0].startswith("--"):
            words[place] = "--list=runs"
    words = gather_pictures(words)
    partitions = split_off(words, "partition")[0]
    says_how_many = is_given or split_off(words, "num_clients")[0] or split_off(words, "resume")[0]
    if has_owners((partitions or [""])[-1]) and not says_how_many:
        return [*words, "--num-clients", "0"]
    return words


def gather_pictures(words: Sequence[str]) -> list[str]:
    """Return a command line with the words behind --predict RUN as its --pictures."""
    for place, word in enumerate(words):
        if word == "--predict" or word.startswith("--predict="):
            first = place + (1 if "=" in word else 2)
            named = []
            for name in words[first:]:
                if name.startswith("--"):
                    break
                named.append(name)
            rest = list(words[first + len(named) :])
            pictures = [f"--pictures={chr(10).join(named)}"] if named else []
            return [*words[:first], *pictures, *rest]
    return list(words)


def absolute_paths(chosen: dict[str, Any]) -> dict[str, str]:
    """Return the fields that name files, FL_DATA's too, as absolute paths: a run resumes anywhere.

    Fields that name no file are left out.
    """
    files = {"data": chosen["data"], "partition_file": chosen["partition_file"]}
    files["initial_model"] = chosen["initial_model"]
    files |= {field: chosen[field] for field in own_fields(chosen)}
    is_saved = chosen["resume"] or chosen["evaluate"]  # whose data its folder names
    if not is_saved and not DATASETS[chosen["dataset"]].function:
        files["data"] = files["data"] or os.environ.get("FL_DATA", "")
    return {field: str(expand_path(path).absolute()) for field, path in files.items() if path}


def check_files(chosen: dict[str, Any]) -> None:
    """Raise UserError if a file that a flag names is not there. `chosen` is field -> value.

    The files are read later, by whoever uses them; this tells a wrong path before TensorFlow is
    imported.
    """
    for field, path in absolute_paths(chosen).items():
        file = path.rpartition(":")[0] if field in OWN_FIELDS else path
        try:
            os.stat(file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or briefly(error)
            is_moved = field == "data" and chosen["resume"]
            cure = "give the data's new path with --data" if is_moved else "give an existing file"
            raise UserError(f"{field}={path!r:.200} cannot be read ({reason}); {cure}") from error


def check_combination(chosen: dict[str, Any], default: dict[str, Any]) -> None:
    """Raise UserError if flags do not go together. Both arguments are field -> value."""
    check_data(chosen, default)
    check_cohort(chosen)
    check_algorithm(chosen, default)
    check_privacy(chosen)
    check_aggregator(chosen)
    check_clock(chosen)
    if chosen["save_clients"] and chosen["workers"] != HERE:
        raise UserError(
            f"save_clients=True cannot be combined with workers={chosen['workers']!r:.60}, which "
            "keeps the shards on the hosts; drop one of them"
        )
    if chosen["save_clients"] and not find_choice("aggregator", chosen["aggregator"]).shows_updates:
        raise UserError(
            "save_clients=True cannot be combined with aggregator='secure', whose server sees "
            "only sums; drop one of them"
        )
    if chosen["baselines"] and chosen["local_steps"]:
        raise UserError(
            f"baselines=True cannot be combined with local_steps={chosen['local_steps']}, as "
            "baselines train for whole epochs; use --local-epochs, or drop one of them"
        )
    if chosen["baselines"] and (chosen["compare"] or chosen["seeds"] > 1):
        raise UserError("baselines=True cannot be combined with compare or seeds; drop one of them")


def check_data(chosen: dict[str, Any], default: dict[str, Any]) -> None:
    """Raise UserError if the data or the partition are chosen twice."""
    if chosen["dataset"] != default["dataset"] and chosen["data"]:
        raise UserError(
            f"data={chosen['data']!r} replaces mnist, so it cannot be combined with the built-in "
            f"dataset={chosen['dataset']!r}; drop one of them"
        )
    if not chosen["data_name"].isprintable():
        raise UserError(
            f"data_name={chosen['data_name']!r:.60} contains characters that plots cannot show; "
            "use letters and digits"
        )
    partition = chosen["partition"]
    reads_file = "partition_file" in find_choice("partition", partition).fields
    is_other = not reads_file and partition != default["partition"]
    if is_other if chosen["partition_file"] else reads_file:
        raise UserError(
            f"partition={partition!r} contradicts "
            f"partition_file={chosen['partition_file']!r:.60}; use partition='file' with a file, "
            "or another partition without one"
        )


def check_cohort(chosen: dict[str, Any]) -> None:
    """Raise UserError for more clients in a round, or attackers, than there are clients."""
    clients = chosen["num_clients"]
    if chosen["unseen_clients"] and chosen["baselines"]:
        raise UserError(
            f"baselines=True cannot be combined with unseen_clients={chosen['unseen_clients']:g}, "
            "whose images no federated client trains on; drop one of them"
        )
    if clients == 0:
        if not has_owners(chosen["partition"]):
            raise UserError(
                "num_clients=0 means all owners of partition='natural'; choose 1 to 60,000"
            )
        return  # how many owners there are, the data tell; then all is checked again
    drawn = clients - num_unseen(chosen["unseen_clients"], clients)
    unseen = f", {clients - drawn} of them never drawn" if drawn < clients else ""
    if drawn < 1:
        raise UserError(
            f"unseen_clients={chosen['unseen_clients']:g} of num_clients={clients} leaves no "
            "client to train; choose a smaller share, or more clients"
        )
    if chosen["clients_per_round"] > drawn:
        raise UserError(
            f"clients_per_round={chosen['clients_per_round']} exceeds "
            f"num_clients={clients}{unseen}; choose 1 to {drawn}, or 0 for all"
        )
    if chosen["byzantine"] > drawn:
        raise UserError(
            f"byzantine={chosen['byzantine']} exceeds num_clients={clients}{unseen}; choose 0 to "
            f"{drawn}"
        )


def check_clock(chosen: dict[str, Any]) -> None:
    """Raise UserError for a clock that cannot be kept, or that changes what a run may not."""
    if chosen["device_speed"]:
        Clock(device_speed=chosen["device_speed"]).speed_spread  # noqa: B018, raises
    used = [field for field in CLOCK_FIELDS if chosen[field]]
    is_private = find_choice("aggregator", chosen["aggregator"]).kind == "private"
    if used and is_private:
        raise UserError(
            f"{used[0]}={chosen[used[0]]} cannot be combined with aggregator='dp': a round's time "
            "tells how many images the drawn clients have; drop one of them"
        )
    check_asynchronous(chosen, bool(used))
    if chosen["num_clients"] == 0:
        return  # the data tell how many owners there are
    cohort = chosen["clients_per_round"]
    drawable = chosen["num_clients"] - num_unseen(chosen["unseen_clients"], chosen["num_clients"])
    selected = math.ceil(chosen["over_select"] * (cohort or drawable) - 1e-9)
    if used and chosen["over_select"] > 1 and selected > drawable:
        most = math.floor(drawable / chosen["over_select"] + 1e-9)
        cure = f"clients_per_round of at most {most}" if most else "a smaller over_select"
        raise UserError(
            f"over_select={chosen['over_select']:g} draws {selected} clients for a round of "
            f"{cohort or drawable}, more than there are ({drawable}); choose {cure}"
        )


def check_asynchronous(chosen: dict[str, Any], has_clock: bool) -> None:
    """Raise UserError for flags that asynchronous rounds have no rule for."""
    algorithm = chosen["algorithm"]
    if not find_choice("algorithm", algorithm).needs_clock:
        return
    if not has_clock:
        raise UserError(
            f"algorithm={algorithm!r} needs a clock, which tells when clients report; add "
            "--device-speed lognormal:0.5, --bandwidth or --latency"
        )
    if chosen["dropout"] == 1:
        raise UserError(
            f"dropout=1: no client reports, so the buffer of algorithm={algorithm!r} never fills; "
            "choose a smaller dropout"
        )
    default = Clock().to_dict() | Adversity().to_dict() | {"sampling": "fixed"}
    default["save_clients"] = False
    for field in ("deadline", "over_select", "drop_stragglers", "sampling", "save_clients"):
        if chosen[field] != default[field]:
            raise UserError(
                f"{field}={chosen[field]} cannot be combined with algorithm={algorithm!r}, whose "
                "clients do not begin together; drop one of them"
            )


def is_buffered(chosen: dict[str, Any]) -> bool:
    """Return whether the server makes a step once buffer_size clients have reported."""
    return "buffer_size" in find_choice("algorithm", chosen["algorithm"]).fields


def updates_per_step(chosen: dict[str, Any]) -> int:
    """Return how many updates a step of the server has at most, of fields `chosen`.

    It is 0 where all owners of the data, who are not counted yet, are drawn.
    """
    clients = chosen["num_clients"]
    drawable = max(clients - num_unseen(chosen["unseen_clients"], clients), 0)
    return chosen["buffer_size"] if is_buffered(chosen) else chosen["clients_per_round"] or drawable


def num_unseen(share: float, num_clients: int) -> int:
    """Return how many clients are never drawn; a share above 0 makes one at least."""
    return max(1, round(share * num_clients)) if share else 0


def check_definition(
    chosen: dict[str, Any], default: dict[str, Any], words: Sequence[str] = ()
) -> None:
    """Raise UserError for fields that contradict the algorithm's definition.

    A default value contradicts it only where a command line's `words` give it.
    """
    algorithm = chosen["algorithm"]
    for field, value in find_choice("algorithm", algorithm).required.items():
        is_asked_for = chosen[field] != default[field] or split_off(words, field)[0]
        if chosen[field] != value and is_asked_for:
            raise UserError(
                f"{field}={chosen[field]} contradicts algorithm={algorithm!r}, which is defined "
                f"by {field}={value}; drop one of them"
            )


def check_algorithm(chosen: dict[str, Any], default: dict[str, Any]) -> None:
    """Raise UserError for fields that do not go with the algorithm."""
    algorithm = chosen["algorithm"]
    facts = find_choice("algorithm", algorithm)
    check_definition(chosen, default)
    if chosen["local_steps"] and "local_epochs" in facts.required:
        raise UserError(
            f"local_steps={chosen['local_steps']} contradicts algorithm={algorithm!r}, which "
            "takes a single step; drop one of them"
        )
    if chosen["local_steps"] and "head_epochs" in facts.fields:
        raise UserError(
            f"local_steps={chosen['local_steps']} cannot be combined with algorithm="
            f"{algorithm!r}, whose clients train two parts for whole epochs; use --local-epochs"
        )
    if facts.client_optimizers and chosen["client_optimizer"] not in facts.client_optimizers:
        raise UserError(
            f"algorithm={algorithm!r} supports only client_optimizer "
            f"{' and '.join(facts.client_optimizers)}, not {chosen['client_optimizer']!r}; change "
            "one of the flags"
        )
    if facts.sends_loss_gradients and chosen["weight_decay"]:
        raise UserError(
            f"weight_decay={chosen['weight_decay']:g} cannot be combined with "
            "algorithm='mimelite', which sends gradients of the loss only; drop one of them"
        )


NOT_PRIVATE = {  # field -> why a private run does not have it
    "unseen_clients": "which reports nothing about the clients' own images",
    "client_test": "which reports nothing about the clients' own images",
    "save_clients": "which reveals nothing about single clients",
    "baselines": "which reveals nothing about single clients",
    "tensorboard": "as the times of rounds reveal how many images the drawn clients have",
}


def check_privacy(chosen: dict[str, Any]) -> None:
    """Raise UserError for a flag of privacy in a run that is not private, and for the reverse.

    Whoever sets such a flag would believe that the run is private.
    """
    default = Privacy().to_dict()
    for field, needed in find_unused(chosen, {**chosen, **default}).items():
        raise UserError(
            f"{field}={chosen[field]} has no effect without {needed}, and the run would not be "
            f"private; add that, or drop {to_flag(field)}"
        )
    if find_choice("aggregator", chosen["aggregator"]).kind != "private":
        return
    for field, why in NOT_PRIVATE.items():
        if chosen[field]:
            raise UserError(
                f"{field}={chosen[field]} cannot be combined with aggregator='dp', {why}; drop one "
                "of them"
            )
    if chosen["sampling"] == "by-size":
        raise UserError(
            "sampling='by-size' cannot be combined with aggregator='dp', whose epsilon assumes "
            "draws that do not depend on the data; choose fixed or poisson"
        )
    cohort = chosen["clients_per_round"] or chosen["num_clients"]
    # TFF cannot spread the noise. A cohort of 0 is one of all owners, who are not counted yet.
    is_given = not chosen["target_epsilon"]  # which decides the noise, and has a check of its own
    if cohort and is_given and chosen["noise_multiplier"] >= 0.1 * cohort:
        raise UserError(
            f"noise_multiplier={chosen['noise_multiplier']} is too high for {cohort} clients per "
            f"round; choose less than {0.1 * cohort:g}, or more clients"
        )


def check_given_noise(chosen: dict[str, Any], words: Sequence[str]) -> None:
    """Raise UserError for a command line with both the noise and the epsilon that it follows."""
    if chosen["target_epsilon"] and split_off(words, "noise_multiplier")[0]:
        raise UserError(
            f"noise_multiplier={chosen['noise_multiplier']:g} cannot be combined with "
            f"target_epsilon={chosen['target_epsilon']:g}, which determines the noise; drop one "
            "of them"
        )


def check_aggregator(chosen: dict[str, Any]) -> None:
    """Raise UserError for a robust aggregator with too few clients, or the wrong algorithm."""
    aggregator = chosen["aggregator"]
    facts = find_choice("aggregator", aggregator)
    cohort = updates_per_step(chosen)
    most = (cohort - 3) // 2
    if "tolerated" in facts.fields and cohort and chosen["tolerated"] > most:
        more = "a larger buffer_size" if is_buffered(chosen) else "more clients"
        cure = f"choose at most {most}, or {more}" if most >= 0 else f"it needs 3; choose {more}"
        raise UserError(
            f"tolerated={chosen['tolerated']} attackers among {cohort} clients per round are more "
            f"than {aggregator} can withstand; {cure}"
        )
    if facts.kind == "unweighted" and find_choice("algorithm", chosen["algorithm"]).weights_steps:
        raise UserError(
            f"aggregator={aggregator!r} cannot be combined with algorithm='fednova', whose mean "
            "number of steps is weighted by examples; change one of the flags"
        )
