"""Small settings for tests: they train in seconds and are never a result."""

import dataclasses

from instrdiv.config.groups import make_groups
from instrdiv.config.pools import RulePools
from instrdiv.config.presets import SMOKE, Setting
from instrdiv.config.settings import Member
from instrdiv.runtime.mesh import make_mesh
from instrdiv.training.members import Trainer

TINY = dataclasses.replace(
    SMOKE,
    instructions=16,
    input_length=5,
    occurrences=(1,),
    layers=1,
    width=16,
    heads=2,
    mlp_ratio=4,
    batch_size=8,
    examples=64,
    epochs=2.0,
    reports=4,
    optimizer="adamw",
    learning_rate=2e-3,
)


def tiny(**changes) -> Setting:
    setting = dataclasses.replace(TINY, **changes)
    setting.validate()
    return setting


def members(count: int, **changes) -> list[Member]:
    """Members that differ in seed and instructions."""
    return [Member(tiny(**({"instructions": 4 + seed} | changes)), seed) for seed in range(count)]


def trainer(population, devices=1, data_parallel=1, members_per_vmap=1) -> Trainer:
    (group,) = make_groups(population)
    return Trainer(group, RulePools(population), make_mesh(devices, data_parallel), members_per_vmap)
