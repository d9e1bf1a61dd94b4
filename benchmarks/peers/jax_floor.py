"""JAX without a federated framework: one compiled `lax.scan` a client, clients on two threads, mean
in NumPy."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import jax_network
import protocol


def contend(work):
    loss = functools.partial(jax_network.loss, work.paddings)

    @jax.jit
    def train(weights, images, labels, key):
        order = jax.random.permutation(key, len(labels))
        whole = len(labels) // work.batch * work.batch

        def step(weights, chosen):
            gradients = jax.grad(loss)(weights, images[chosen], labels[chosen])
            return [w - work.rate * g for w, g in zip(weights, gradients, strict=True)], None

        weights, _ = jax.lax.scan(step, weights, order[:whole].reshape(-1, work.batch))
        return step(weights, order[whole:])[0] if whole < len(labels) else weights

    def epochs(weights, client, key):
        for one in jax.random.split(key, work.epochs):
            weights = train(weights, *client, one)
        return jax.block_until_ready(weights)

    clients = [(jnp.asarray(x), jnp.asarray(y)) for x, y in work.clients]
    weights = [jnp.asarray(w) for w in work.weights]
    key = jax.random.PRNGKey(work.seed)
    with ThreadPoolExecutor(2) as pool:
        for cohort in work.cohorts():
            key, *keys = jax.random.split(key, len(cohort) + 1)
            chosen = [clients[client] for client in cohort]
            trained = pool.map(lambda client, k, w=weights: epochs(w, client, k), chosen, keys)
            results = [(len(y), w) for (_, y), w in zip(chosen, trained, strict=True)]
            weights = protocol.weighted_mean(results)
            yield weights


protocol.serve(contend, jax_network.build_predict)
