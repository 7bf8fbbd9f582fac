"""Random streams: one number per use of randomness, so that no two uses share a key."""

from __future__ import annotations

import jax

#: Uses of randomness that must not share keys; folded into a key with the seed.
EXAMPLE_STREAM, INIT_STREAM, DROPOUT_STREAM, TEST_STREAM, SUITE_STREAM, ENCRYPTED_STREAM = range(6)


def stream_key(stream: int, seed: jax.Array | int) -> jax.Array:
    """The PRNG key for one use of randomness and one seed."""
    return jax.random.fold_in(jax.random.key(stream, impl="threefry2x32"), seed)
