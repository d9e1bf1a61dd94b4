"""FedJAX's own federated averaging, with a current JAX."""

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
import protocol

# The last release calls names that JAX has since moved; their new places are the same functions.
jax.tree_map, jax.tree_util.tree_multimap = jax.tree_util.tree_map, jax.tree_util.tree_map


def contend(work):
    def loss(weights, batch, rng):
        kernel1, bias1, kernel2, bias2 = weights
        logits = jax.nn.relu(batch["x"] @ kernel1 + bias1) @ kernel2 + bias2
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1))

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.grad(loss),
        client_optimizer=fedjax.optimizers.sgd(work.rate),
        server_optimizer=fedjax.optimizers.sgd(1.0),
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(batch_size=work.batch, num_epochs=1),
    )
    state, key = algorithm.init([jnp.asarray(w) for w in work.weights]), jax.random.PRNGKey(0)
    clients = [fedjax.ClientDataset({"x": x, "y": y}) for x, y in work.clients]
    while True:
        key, *keys = jax.random.split(key, len(clients) + 1)
        ids = [str(number).encode() for number in range(len(clients))]
        state, _ = algorithm.apply(state, list(zip(ids, clients, keys, strict=True)))
        yield [np.asarray(w) for w in jax.block_until_ready(state.params)]


protocol.serve(contend)
