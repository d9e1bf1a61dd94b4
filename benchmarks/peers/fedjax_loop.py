"""FedJAX's own federated averaging, with a current JAX."""

import fedjax
import jax
import jax.numpy as jnp
import jax_network
import numpy as np
import protocol

# The last release calls names that JAX has since moved; their new places are the same functions.
jax.tree_map = jax.tree_util.tree_map
jax.tree_util.tree_multimap = jax.tree_util.tree_map


def contend(work):
    def loss(weights, batch, rng):
        return jax_network.loss(work.paddings, weights, batch["x"], batch["y"])

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.grad(loss),
        client_optimizer=fedjax.optimizers.sgd(work.rate),
        server_optimizer=fedjax.optimizers.sgd(1.0),
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(
            batch_size=work.batch, num_epochs=work.epochs, seed=work.seed
        ),
    )
    state = algorithm.init([jnp.asarray(w) for w in work.weights])
    examples = {
        str(number).encode(): {"x": x, "y": y} for number, (x, y) in enumerate(work.clients)
    }
    clients = fedjax.InMemoryFederatedData(examples)
    sampler = fedjax.client_samplers.UniformGetClientSampler(clients, work.cohort, work.seed)
    while True:
        state, _ = algorithm.apply(state, sampler.sample())
        yield [np.asarray(w) for w in jax.block_until_ready(state.params)]


protocol.serve(contend, jax_network.build_predict)
