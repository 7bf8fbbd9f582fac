"""A laboratory for one question: how many different instructions must a model see before it follows new ones?

In a notebook:

    import instrdiv
    instrdiv.use_cpu_cores()
    sweep = instrdiv.Sweep.grid(instrdiv.presets.LAPTOP, seeds=2, instructions=[16, 256, 4096])
    run = instrdiv.run(sweep)
    print(run.threshold().text)
    run.plot()
"""

from importlib import metadata

from instrdiv import presets
from instrdiv.compile_cache import use_compile_cache
from instrdiv.launcher import use_cpu_cores
from instrdiv.rewriting.markov import MarkovAlgorithm, rewrite
from instrdiv.run import Run, plan, run
from instrdiv.settings import BadInput, Member, Setting
from instrdiv.sweep import Options, Sweep

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
