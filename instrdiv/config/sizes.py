"""Sizes of the presets, for every task: how large the model is and how long it trains.

- ``SMOKE``: everything runs, nothing is learned; half a minute on two CPU cores.
- ``LAPTOP``: a model small enough to show the effect on two CPU cores in three minutes (measured on figure 2a).
- ``GPU``: the papers' model, with a budget of 25 to 45 minutes on one H200 (extrapolated, not run).
- ``PAPER``: the papers' full budget (P2, arXiv 2410.04717, section 3.1 and appendix B); a day or two on one H200
  (extrapolated, not run).

Our choices, where the papers are silent: batch size, warmup, weight decay (0.1 with Muon, 0 with AdamW, as in the
Transformers trainer), positions (learned), loss on the answer only, no dropout. The recipe of ``GPU`` (Muon, 1.5
epochs) is extrapolated from ``LAPTOP`` and not yet measured.
"""

from __future__ import annotations

import dataclasses

from instrdiv.config.settings import TaskSetting

LAPTOP = TaskSetting(
    examples=16_384,
    epochs=3.0,
    batch_size=64,
    layers=3,
    width=64,
    heads=4,
    mlp_ratio=1,  # half the compute of 4, and the same curve (docs/performance.md)
    activation="relu",
    norm="rmsnorm",
    biases=False,
    tied_head=False,
    init="fan_in",
    optimizer="muon",
    learning_rate=2e-2,
    adam_learning_rate=8e-3,
    adam_b2=0.98,
    weight_decay=0.1,
    warmup_steps=50,
    final_rate=0.02,
    reports=20,
)

SMOKE = dataclasses.replace(
    LAPTOP,
    instructions=64,
    examples=512,
    epochs=2.0,
    batch_size=32,
    layers=2,
    width=32,
    heads=2,
    warmup_steps=4,
    reports=4,
)

PAPER = TaskSetting(
    examples=1_000_000,
    epochs=50.0,
    batch_size=512,
    layers=6,
    width=256,
    heads=4,
    positions="learned",
    activation="gelu",
    norm="layernorm",
    biases=True,
    tied_head=True,
    init="gpt2",
    precision="bfloat16",
    optimizer="adamw",
    schedule="linear",
    learning_rate=1e-3,
    weight_decay=0.0,
    warmup_steps=1_000,
    reports=500,
)

GPU = dataclasses.replace(
    PAPER,
    epochs=1.5,
    optimizer="muon",
    learning_rate=2e-2,
    adam_learning_rate=2e-3,
    adam_b2=0.98,
    weight_decay=0.1,
    warmup_steps=150,
    final_rate=0.05,
    tied_head=False,
    init="fan_in",
    reports=50,
)

#: Number of held-out instructions tested at every report; the final tests use the ones after them.
DEV_TESTS = {"smoke": 64, "laptop": 256, "gpu": 1024, "paper": 1024}
