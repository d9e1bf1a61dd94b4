"""BatchNormalization in federated training: its statistics are averaged with the weights.

A layer's moving mean and variance travel as two more tensors. A client moves them as Keras does, in
each local step, and the server takes their mean. Li et al. 2021 (FedBN) and Hsieh et al. 2020 show
how skewed labels harm such a mean; GroupNormalization has no statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.cli.fields import UserError
from variants.personal import keep_at_clients

import tensorflow_federated as tff


class StatisticsApart(tff.learning.optimizers.Optimizer):
    """An optimizer of the weights alone; statistics become w - g.

    `statistics` are the places of the statistics among the tensors. Their entries of the gradients
    are how far they move, whatever the rate.
    """

    def __init__(self, optimizer: Any, statistics: Sequence[int]):
        self.optimizer = optimizer
        self.statistics = frozenset(statistics)

    def without(self, tensors: Any) -> Any:
        """Return a structure of all tensors without the statistics; anything else as it is."""
        if not isinstance(tensors, tuple | list):
            return tensors
        kept = [t for place, t in enumerate(tensors) if place not in self.statistics]
        return type(tensors)(kept)

    def initialize(self, specs: Any) -> Any:
        """Return the optimizer's state."""
        return self.optimizer.initialize(self.without(specs))

    def set_hparams(self, state: Any, hparams: dict[str, Any]) -> Any:
        """Return the state with these hyperparameters; of tensors like the weights their part."""
        own = {name: self.without(value) for name, value in hparams.items()}
        return self.optimizer.set_hparams(state, own)

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """Return (state, weights) after a step."""
        state, stepped = self.optimizer.next(state, self.without(weights), self.without(gradients))
        rest = iter(stepped)
        moved = [
            w - g if place in self.statistics else next(rest)
            for place, (w, g) in enumerate(zip(weights, gradients, strict=True))
        ]
        return state, type(weights)(moved)


def take_statistics(parts: Any, experiment: Any) -> Any:
    """Leave the statistics out of the optimizers' steps; with "local" clients keep the layers.

    Raises UserError for algorithms with a memory, and for a private run.
    """
    statistics = experiment.network.statistics
    config = experiment.config
    kind = f"batch_norm={config.training.batch_norm!r}"
    if not statistics:
        notice = f"{kind} has no effect: the model has no BatchNormalization"
        return parts._replace(notices=(*parts.notices, notice))
    if parts.memory is not None:
        raise UserError(
            f"{kind} cannot be combined with "
            f"algorithm={config.optimization.algorithm!r}, whose memory is of trained weights; use "
            "GroupNormalization, or another algorithm"
        )
    if config.is_private:
        raise UserError(
            f"{kind} cannot be combined with aggregator='dp', whose noise can make a "
            "variance negative; use GroupNormalization"
        )
    changed = parts._replace(
        client_optimizer=StatisticsApart(parts.client_optimizer, statistics),
        server_optimizer=StatisticsApart(parts.server_optimizer, statistics),
    )
    if config.training.batch_norm == "average":
        return changed
    return keep_at_clients(changed, experiment, experiment.network.norms, kind)
