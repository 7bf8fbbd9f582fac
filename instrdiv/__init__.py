"""Experiments on one question: how many different instructions must a model see before it follows new ones?

In a notebook:

    import instrdiv
    instrdiv.use_cpu_cores()
    sweep = instrdiv.Sweep.grid(instrdiv.presets.LAPTOP, seeds=2, instructions=[16, 256, 4096])
    run = instrdiv.run(sweep)
    print(run.threshold().text)
    run.plot()
"""

from importlib import metadata

from instrdiv.config import presets
from instrdiv.config.layout import Options
from instrdiv.config.presets import Setting
from instrdiv.config.settings import Member
from instrdiv.config.sweep import Sweep
from instrdiv.runs.run import Run, plan, run
from instrdiv.runtime.compile_cache import use_compile_cache
from instrdiv.runtime.devices import use_cpu_cores
from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.strings.markov import MarkovAlgorithm, rewrite

__all__ = [
    "BadInput",
    "MarkovAlgorithm",
    "Member",
    "Options",
    "Run",
    "Setting",
    "Sweep",
    "plan",
    "presets",
    "rewrite",
    "run",
    "use_compile_cache",
    "use_cpu_cores",
]

try:
    __version__ = metadata.version("instrdiv")
except metadata.PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"
