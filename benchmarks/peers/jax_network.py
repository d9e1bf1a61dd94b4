"""The network that the weights' shapes tell, in JAX: its loss and its logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def logits_of(paddings, weights, x):
    """float32[n,784] -> [n,classes]; paddings and weights as protocol.Work has them."""
    for position, (kernel, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        if kernel.ndim == 4:
            x = x.reshape(-1, 28, 28, 1) if x.ndim == 2 else x
            padding = paddings[position].upper()
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            window = (1, 2, 2, 1)
            x = jax.lax.reduce_window(
                jax.nn.relu(x + bias), -jnp.inf, jax.lax.max, window, window, "VALID"
            )
        else:
            x = x.reshape(len(x), -1) @ kernel + bias
            x = x if kernel is weights[-2] else jax.nn.relu(x)
    return x


def loss(paddings, weights, x, y):
    log_p = jax.nn.log_softmax(logits_of(paddings, weights, x))
    return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1))


def build_predict(work):
    logits = jax.jit(functools.partial(logits_of, work.paddings))
    return lambda weights, images: np.concatenate(
        [logits(weights, chunk) for chunk in np.split(images, 10)]
    )
