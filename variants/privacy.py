"""Central differential privacy of clients.

Cohorts come from the operating system's entropy and are not stored, as amplification by sampling
requires; with `--public-cohorts` they follow the seed, and epsilon is computed without
amplification. `--epsilon-budget` ends the run before the round that would exceed it. Algorithms
that send more than the update are refused. Dropouts, stragglers and attackers do not weaken
epsilon: whatever a client sends is clipped.

The noise is unseeded: a private run is not reproducible, and a round that is repeated, after a kill
or from an earlier checkpoint, releases something new about the same clients. So each round is
written to the run's journal, rounds_begun.txt, before it begins, and epsilon charges every entry.
Epsilon is that of one run: releases of two runs on the same clients (two seeds, or two copies of a
folder that both continue) add up.

A record of a private run contains the fields in harness.training.records.PUBLIC, and nothing about
single clients is written: no sizes, training metrics, indices or worker.log. The time of a round
reveals how many images its cohort has, and so who was drawn, so it appears in no file, on no line
and in no file date (except the date of the last status change, which no program can set and which
reveals the time of all rounds together). With `--time-limit`, the number of rounds that fit in it
tells how long they took together. Whoever watches the terminal, the processes or the shard files of
this machine during the run can still measure it. Shards of equal size (`--partition iid`) or public
cohorts avoid that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.cli.fields import UserError
from harness.cli.output import warn
from harness.reporting.results import pluralize
from harness.storage.callbacks import Callback, StopRun
from harness.storage.files import append, read_bytes
from harness.training.records import RoundRecord
from variants.sampling import draw_cohort, draw_in_secret

import dp_accounting
import numpy as np
import tensorflow_federated as tff
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

MOST_PRECISE = 10  # thousandths: the least noise multiplier that a flag can have
WEAK_EPSILON = 10.0  # a bound above it protects hardly anybody
MUCH_MORE_NOISE = 1.5  # times the multiplier


@functools.cache
def account_for(
    event: dp_accounting.DpEvent, neighbours: dp_accounting.NeighboringRelation
) -> tuple[np.ndarray, np.ndarray]:
    """Return (orders, the Rényi divergences of these orders) float64 of one event.

    They take half a second where clients are sampled, so they are computed once.
    """
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=neighbours)
    accountant.compose(event)
    return accountant.orders, accountant.rdp


class PrivacyAccountant(Callback):
    """Counts epsilon for a configuration with --aggregator dp, round by round.

    cohorts(round_num) are a round's clients if they are public, since they follow from the seed.
    It is None if they come from the operating system's entropy and are never published, which is
    what amplification by sampling rests on. `begun` are the rounds that were begun, each as often
    as it was; a run with a folder has them in its journal.

    Dropouts, stragglers and clients whose update is not finite change nothing: whatever a client
    sends, nothing included, moves a round's sum by no more than the norm that it is clipped to.
    And the sum over nobody gets its noise too.
    """

    def __init__(self, config: Any, cohorts: Callable[[int], Sequence[int]] | None):
        self.privacy = config.privacy
        self.rounds = config.training.rounds
        self.is_poisson = config.training.sampling == "poisson"
        self.cohort_size = config.cohort_size
        self.num_clients = config.partitioning.num_clients
        self.cohorts = cohorts
        self.begun: list[int] = []
        self.journal: Path | None = None

    def events(self) -> tuple[list[dp_accounting.DpEvent], dp_accounting.NeighboringRelation]:
        """Return events that each bound a round, and which two federations are neighbours.

        All numbers are Python floats or ints: TFF's own event holds float32 ones, of which
        dp-accounting 0.4.3 counts only the first. TFF releases the noisy sum of the clipped
        updates and, for the next clipping norm, the noisy share of updates below it. Together they
        are one Gaussian of z (Andrew et al. 2021, theorem 1).

        With Poisson sampling clients come independently with probability m / K; neighbours differ
        by a client that is there or not. With fixed sampling m of K come without replacement;
        neighbours differ by a client replaced, which moves the sum by up to twice the norm that it
        is clipped to, so that the noise is worth z / 2.

        The first event is the Gaussian of a client that is drawn in every round. The second, if
        cohorts are secret, is amplified by sampling. Renyi accounting bounds a fixed size so
        loosely that this may be above the first.
        """
        z = float(self.privacy.noise_multiplier)
        if self.is_poisson:
            relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
            noise = dp_accounting.GaussianDpEvent(z)
            share = self.cohort_size / self.num_clients
            sampled = dp_accounting.PoissonSampledDpEvent(share, noise)
        else:
            relation = dp_accounting.NeighboringRelation.REPLACE_ONE
            noise = dp_accounting.GaussianDpEvent(z / 2)
            sampled = dp_accounting.SampledWithoutReplacementDpEvent(
                self.num_clients, self.cohort_size, noise
            )
        return [noise] if self.cohorts else [noise, sampled], relation

    def epsilon(self, begun: Sequence[int]) -> float:
        """Return the epsilon of (epsilon, delta)-differential privacy of the rounds `begun`.

        It is by Renyi accounting. A round that was begun twice counts twice, as its noise was
        drawn twice. With public cohorts it is the epsilon of the client that was drawn most often,
        with secret ones the lower of two bounds.
        """
        num_rounds = len(begun)
        if self.cohorts and num_rounds:
            clients = np.concatenate([self.cohorts(round_num) for round_num in begun])
            num_rounds = int(np.bincount(clients.astype(np.int64), minlength=1).max())
        if num_rounds == 0:
            return 0.0
        events, neighbours = self.events()
        bounds = []
        for event in events:
            orders, divergences = account_for(event, neighbours)
            # Rényi divergences of rounds add up.
            total = num_rounds * divergences
            bounds.append(compute_epsilon(orders, total, self.privacy.delta)[0])
        return float(min(bounds))

    def check_budget(self) -> None:
        """Raise UserError if the budget does not allow the first round."""
        budget = self.privacy.epsilon_budget
        first = self.epsilon([1])
        if 0 < budget < first:
            cure = (
                "lower target_epsilon" if self.privacy.target_epsilon else "raise noise_multiplier"
            )
            raise UserError(
                f"epsilon_budget={budget:g} allows no round, as the first one costs {first:.2f}; "
                f"raise it, or {cure}"
            )

    def before_run(self, folder: Any, first_round: int) -> None:
        """Read the journal of the run's folder, if there is one."""
        self.journal = folder.journal if folder else None
        self.begun = read_journal(self.journal, first_round)
        num_repeated = len(self.begun) - (first_round - 1)
        if num_repeated > 0 and not self.privacy.epsilon_budget:
            final = self.epsilon([*self.begun, *range(first_round, self.rounds + 1)])
            warn(
                f"{pluralize(num_repeated, 'round')} begun, but not completed, will count too: "
                f"ε will be {final:.2f} after round {self.rounds}"
            )
        budget = self.privacy.epsilon_budget
        spent = self.epsilon(self.begun) if budget and self.begun else 0.0
        if spent > budget:
            warn(
                f"epsilon_budget={budget:g} is exceeded already: the rounds so far have ε = "
                f"{spent:.2f}"
            )

    def before_round(self, round_num: int) -> None:
        """Note that the round begins, first of all in the journal. StopRun if it may not.

        Raises UserError if that leaves the run without any round.
        """
        epsilon = self.epsilon([*self.begun, round_num])
        for field in ("epsilon_budget", "target_epsilon"):
            most = getattr(self.privacy, field)
            if 0 < most < epsilon and round_num == 1:
                raise UserError(
                    f"{field}={most:g} allows no further round, and no round was completed; raise "
                    "it, or start a new run"
                )
            if 0 < most < epsilon:
                warn(
                    f"round {round_num} would raise ε to {epsilon:.2f}, above {field}={most:g}; "
                    "the run ends before it"
                )
                raise StopRun
        if self.journal:
            append(self.journal, f"{round_num}\n", sync=True)
        self.begun.append(round_num)

    def release(self, record: RoundRecord) -> RoundRecord:
        """Return the record with epsilon, and without what could tell of single clients."""
        return dataclasses.replace(record, epsilon=self.epsilon(self.begun)).public()

    def assumption(self) -> str:
        """Describe the guarantee and its assumptions, for captions."""
        kind = "a client replaced, sampling of fixed size"
        if self.is_poisson:
            kind = "a client added or removed, Poisson sampling"
        cohorts = "public cohorts, no amplification" if self.cohorts else "cohorts secret"
        return f"(ε, {self.privacy.delta:g})-DP of clients, {kind}, {cohorts}, Rényi accounting"

    def notices(self, rounds: int) -> list[str]:
        """Return notices on the noise, and on the epsilon that `rounds` will cost."""
        return [*self.noise_notices(), *self.epsilon_notices(rounds)]

    def noise_notices(self) -> list[str]:
        """Return a notice on updates that get much more noise than the multiplier says.

        The noise of the clipped count takes its part of it: TFF's is 0.05 m (Andrew et al. 2021,
        theorem 1).
        """
        z = self.privacy.noise_multiplier
        of_sum = z / math.sqrt(1 - (z / (0.1 * self.cohort_size)) ** 2)
        if of_sum < MUCH_MORE_NOISE * z:
            return []
        return [
            f"noise_multiplier={z:g} is close to {0.1 * self.cohort_size:g}, the most for "
            f"{self.cohort_size} clients per round: the updates get noise of {of_sum:.2f} times "
            "the clipping norm; draw more clients for less"
        ]

    def epsilon_notices(self, rounds: int) -> list[str]:
        """Return notices on the epsilon that `rounds` will cost."""
        if self.privacy.epsilon_budget:
            return []
        final = self.epsilon(range(1, rounds + 1))
        if self.privacy.target_epsilon:
            return [
                f"ε will be {final:.2f} after {pluralize(rounds, 'round')}, with "
                f"noise_multiplier={self.privacy.noise_multiplier:g} found for "
                f"target_epsilon={self.privacy.target_epsilon:g}"
            ]
        if final <= WEAK_EPSILON:
            return []
        return [
            f"ε will be {final:.1f} after {pluralize(rounds, 'round')}, which gives practically no "
            "protection; lower it with more clients (--num-clients, --clients-per-round) and a "
            "larger --noise-multiplier"
        ]


def public_cohorts(config: Any) -> Callable[[int], Sequence[int]] | None:
    """Return round -> its clients if they follow from the seed, or None if they are secret."""
    if not config.privacy.public_cohorts:
        return None
    # Each round's is asked for after every later round.
    return functools.cache(functools.partial(draw_cohort, config, sizes=None))


def private_mean(parts: Any, experiment: Any) -> Any:
    """The unweighted mean of updates, clipped adaptively, with Gaussian noise.

    McMahan et al. 2018. The sum over nobody gets its noise too, as the accountant counts it.
    """
    config = experiment.config
    accountant = PrivacyAccountant(config, public_cohorts(config))
    accountant.check_budget()
    if not config.privacy.public_cohorts:
        parts = draw_in_secret(parts, experiment)
    mean = tff.learning.dp_aggregator(
        config.privacy.noise_multiplier, config.cohort_size, zeroing=False
    )
    inner = parts.train_cohort

    def train_cohort(worker, experiment, state, clients):
        if clients:
            return inner(worker, experiment, state, clients)
        name = f"round {int(state.client_work.round) + 1}"
        nobody = [np.array([], np.int64)]
        next_state, measured, _ = worker.run_round(name, experiment.process, state, nobody)
        return next_state, [], measured

    return parts._replace(
        aggregator=tff.aggregators.as_weighted_aggregator(mean),
        num_chunks=None,
        train_cohort=train_cohort,
        message_bytes=parts.message_bytes + 4,  # the adaptive norm
        callbacks=(*parts.callbacks, accountant),
        note=accountant.assumption(),
        notices=(*parts.notices, *accountant.notices(config.training.rounds)),
    )


def meet_target(config: Any, dataset: Any) -> Any:
    """Return the configuration with the least noise multiplier that keeps --target-epsilon.

    It is rounded up to a thousandth. A run that is resumed keeps its own; so does one without a
    target. Raises UserError for a target that no noise which TFF can add would keep.
    """
    cohorts = public_cohorts(config)
    target = config.privacy.target_epsilon
    rounds = range(1, config.training.rounds + 1)
    if target and config.run.resume:
        final = PrivacyAccountant(config, cohorts).epsilon(rounds)
        if final > target:
            raise UserError(
                f"rounds={config.training.rounds} would raise epsilon to {final:.2f}, above the "
                f"run's target_epsilon={target:g}; resume it with fewer rounds, or start a new run"
            )
    if not target or config.run.resume:
        return config

    def epsilon(thousandths: int) -> float:
        noisier = config.replace(noise_multiplier=thousandths / 1000)
        return PrivacyAccountant(noisier, cohorts).epsilon(rounds)

    most = int(np.ceil(100 * config.cohort_size)) - 1  # TFF needs less than 0.1 of the cohort
    if most < MOST_PRECISE or epsilon(most) > target:
        lowest = f" (the most, {most / 1000:g}, gives {epsilon(most):.2f})" if most > 0 else ""
        raise UserError(
            f"target_epsilon={target:g} needs more noise than {config.cohort_size} clients per "
            f"round allow{lowest}; raise the target, or use more clients or fewer rounds"
        )
    low = MOST_PRECISE - 1
    high = most
    while high - low > 1:
        middle = (low + high) // 2
        if epsilon(middle) > target:
            low = middle
        else:
            high = middle
    found = high / 1000
    given = config.privacy.noise_multiplier
    if given not in (type(config.privacy)().noise_multiplier, found):
        raise UserError(
            f"noise_multiplier={given:g} contradicts target_epsilon={target:g}, which needs "
            f"{found:g}; drop one of them"
        )
    return config.replace(noise_multiplier=found)


def read_journal(journal: Path | None, first: int) -> list[int]:
    """Return the rounds that were begun before round `first`, each as often as it was.

    Without a journal that is once each. Raises UserError if the journal lacks one of them: then
    epsilon is not known.
    """
    if journal is None:
        return list(range(1, first))
    begun = []
    try:
        if journal.exists():
            begun = [int(line) for line in read_bytes(journal).decode().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{journal} cannot be read, so epsilon is unknown; restore it, or start a new run"
        ) from error
    missing = set(range(1, first)) - set(begun)
    if missing:
        raise UserError(
            f"{journal} lacks round {min(missing)}, so epsilon is unknown; restore it, or start a "
            "new run"
        )
    return begun
