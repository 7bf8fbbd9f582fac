"""Greedy decoding with a key-value cache, for all members of a population of adapters in one program.

The prompts are read once, then one token is decoded per step until every row has ended.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instrdiv.models.llama import Adapters, Model, Rows, empty_cache, hidden, logits


def left_padded(prompts: Sequence[Sequence[int]], places: int | None = None) -> Rows:
    """Prompts as left-padded rows [B, P], numpy arrays; P is ``places``, by default the length of the longest prompt.

    An empty prompt makes an idle row: it only fills up a batch, and nothing is decoded for it.
    """
    places = max(map(len, prompts)) if places is None else places
    tokens, segments = np.zeros((2, len(prompts), places), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, places - len(prompt) :] = prompt
        segments[row, places - len(prompt) :] = 1
    arrays: Any = (tokens, np.maximum(segments.cumsum(1, dtype=np.int32) - 1, 0), segments)
    return Rows(*arrays)


@functools.partial(jax.jit, static_argnames=("new_tokens", "end_tokens", "precision"))
def decode_greedily(
    model: Model,
    prompts: Rows,
    adapters: Adapters | None = None,
    *,
    new_tokens: int,
    end_tokens: tuple[int, ...] | None = None,
    precision: str = "float32",
) -> tuple[jax.Array, jax.Array]:
    """Decodes the most likely continuation of each prompt, token by token.

    Args:
      model, adapters: see ``llama.hidden``; with adapters of M members, the prompts are grouped by member, in order,
        with the same number per member.
      prompts: B rows, padded on the left (``left_padded``).
      new_tokens: N, length of the longest answer, including its end token.
      end_tokens: any of these ends an answer; by default, the model's.
      precision: dtype of activations and cache.

    Returns:
      Tokens int32 [B, N], including the end token, then 0; and the number of tokens before the end token, int32 [B] (N
      if there was none).
    """
    ends = jnp.asarray(model.config.end_tokens if end_tokens is None else end_tokens, jnp.int32)
    rows, places = prompts.tokens.shape

    def most_likely(read: Rows, cache: Any) -> tuple[jax.Array, Any]:
        x, cache = hidden(model, read, adapters, cache, precision=jnp.dtype(precision))
        return logits(model, x[:, -1:], adapters)[:, 0].argmax(-1).astype(jnp.int32), cache

    def is_end(token: jax.Array) -> jax.Array:
        return (token[:, None] == ends).any(-1)

    def unfinished(state: tuple) -> jax.Array:
        place, _, _, ended, _, _ = state
        return (place < new_tokens) & ~ended.all()

    def step(state: tuple) -> tuple:
        place, cache, token, ended, length, answer = state
        position = prompts.positions[:, -1:] + place
        token, cache = most_likely(Rows(token[:, None], position, prompts.segments[:, -1:]), cache)
        answer = answer.at[:, place].set(jnp.where(ended, 0, token))
        ended = ended | is_end(token)
        return place + 1, cache, token, ended, length + ~ended, answer

    token, cache = most_likely(prompts, empty_cache(model.config, rows, places + new_tokens - 1, jnp.dtype(precision)))
    idle = prompts.segments[:, -1] == 0
    ended = idle | is_end(token)
    answer = jnp.zeros((rows, new_tokens), jnp.int32).at[:, 0].set(jnp.where(idle, 0, token))
    state = (jnp.int32(1), cache, token, ended, (~ended).astype(jnp.int32), answer)
    _, _, _, _, length, answer = jax.lax.while_loop(unfinished, step, state)
    return answer, length
