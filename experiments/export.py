"""Writes a trained member as a Transformers GPT-2 checkpoint, so that interpretability tools can open it.

    python -m experiments.export --run_dir=runs/fig2a --member=m0123456789 --out=exported

``config.json`` of the run names its members. What is written, and how to read it: docs/export.md.
"""

from pathlib import Path

from absl import flags

from instrdiv.export import export_member
from instrdiv.launcher import FLAGS, NameParser, NumberParser, start
from instrdiv.saved import SavedRun
from instrdiv.settings import BadInput


def main() -> None:
    for name in ("run_dir", "member", "out"):
        if FLAGS[name].value is None:
            raise BadInput(f"--{name}: must be given; it is {FLAGS[name].help}")
    out = Path(FLAGS.out)
    step = export_member(SavedRun(Path(FLAGS.run_dir)), FLAGS.member, out, FLAGS.step, say=print)
    print(f"{FLAGS.member}, step {step}: {out}")


if __name__ == "__main__":
    flags.DEFINE(NameParser(), "run_dir", None, "the run directory")
    flags.DEFINE(NameParser(), "member", None, "the id of the member to write")
    flags.DEFINE(NumberParser(int, low=0), "step", None, "a saved step (default: the last)")
    flags.DEFINE(NameParser(), "out", None, "the directory to write, empty or not there")
    start(main)
