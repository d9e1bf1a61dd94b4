"""JAX without a federated framework: one compiled `lax.scan` a client, clients on two threads, mean in NumPy."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import protocol


def contend(work):
    def loss(weights, x, y):
        kernel1, bias1, kernel2, bias2 = weights
        logits = jax.nn.relu(x @ kernel1 + bias1) @ kernel2 + bias2
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))

    @jax.jit
    def train(weights, images, labels, key):
        order = jax.random.permutation(key, len(labels))
        whole = len(labels) // work.batch * work.batch

        def step(weights, chosen):
            gradients = jax.grad(loss)(weights, images[chosen], labels[chosen])
            return [w - work.rate * g for w, g in zip(weights, gradients, strict=True)], None

        weights, _ = jax.lax.scan(step, weights, order[:whole].reshape(-1, work.batch))
        return step(weights, order[whole:])[0] if whole < len(labels) else weights

    clients = [(jnp.asarray(x), jnp.asarray(y)) for x, y in work.clients]
    weights, key = [jnp.asarray(w) for w in work.weights], jax.random.PRNGKey(0)
    with ThreadPoolExecutor(2) as pool:
        while True:
            key, *keys = jax.random.split(key, len(clients) + 1)
            trained = pool.map(lambda client, k, w=weights: jax.block_until_ready(train(w, *client, k)), clients, keys)
            results = [(len(y), w) for (_, y), w in zip(clients, trained, strict=True)]
            weights = protocol.weighted_mean(results)
            yield weights


protocol.serve(contend)
