"""Decodes the answers of all members of a population as text, and checks whether they are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.data.packing import prompt_tokens
from instrdiv.data.schemas import TextRow
from instrdiv.data.templates import Template, end_ids
from instrdiv.data.tokenizer import Tokenizer
from instrdiv.models.generation import decode_greedily, left_padded
from instrdiv.models.llama import Model
from instrdiv.runtime.mesh import padded_size
from instrdiv.training.adapter_trainer import Population


def answers(
    model: Model,
    tokenizer: Tokenizer,
    template: Template,
    tests: Sequence[Sequence[TextRow]],
    new_tokens: int,
    mesh: Mesh,
    population: Population | None = None,
    precision: str = "float32",
    at_once: int = 128,
) -> list[list[str]]:
    """Each member's answers to its tests, by greedy decoding.

    Args:
      model: the base, its weights on ``mesh``.
      tokenizer, template: how a test becomes a prompt.
      tests: the tests of each member, the same number for all.
      new_tokens: length of the longest answer, including its end token; longer answers are truncated.
      mesh: members are sharded over its axis ``member``.
      population: the members' adapters, on ``mesh``; None for the base itself, as a single member.
      precision: dtype of activations and cache.
      at_once: number of tests per member that are decoded together.

    Returns:
      The text of every answer without its end token, never None.
    """
    members, count = len(tests), len(tests[0])
    idle = padded_size(members, mesh, 1) - members
    ends = end_ids(template, tokenizer)
    rows_over_mesh = NamedSharding(mesh, P(("member", "data")))
    at_once = -(-min(at_once, count) // mesh.shape["data"]) * mesh.shape["data"]
    prompts_of: dict[int, list[list[int]]] = {}
    for member_tests in tests:  # members may share their tests
        if id(member_tests) not in prompts_of:
            prompts_of[id(member_tests)] = prompt_tokens(member_tests, template, tokenizer)
    prompts = [prompts_of[id(member_tests)] for member_tests in tests]
    places = max(len(prompt) for of_member in prompts_of.values() for prompt in of_member)

    found: list[list[str]] = [[] for _ in tests]
    for first in range(0, count, at_once):
        piece = [of_member[first : first + at_once] for of_member in prompts]
        flat: list[list[int]] = []
        for of_member in [*piece, *[[]] * idle]:
            flat += [*of_member, *[[]] * (at_once - len(of_member))]
        rows = jax.device_put(left_padded(flat, places), rows_over_mesh)
        adapters = population.adapters if population else None
        decoded: Any = decode_greedily(
            model, rows, adapters, new_tokens=new_tokens, end_tokens=ends, precision=precision
        )
        tokens, lengths = map(np.asarray, decoded)
        for member, of_member in enumerate(piece):
            at = member * at_once
            found[member] += [tokenizer.decode(tokens[i, : lengths[i]]) for i in range(at, at + len(of_member))]
    return found


def is_right(row: TextRow, answer: str) -> bool:
    """Whether the whole answer matches, ignoring leading and trailing whitespace."""
    return answer.strip() == row.response.strip()
