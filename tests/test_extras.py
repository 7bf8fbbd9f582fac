"""Without its extra, a launcher ends in one line that says how to install it, and leaves nothing behind."""

import subprocess
import sys

import pytest

from tests.commands import ENVIRONMENT, ROOT

#: Top-level packages of all extras.
PACKAGES = ("datasets", "peft", "pyarrow", "safetensors", "sentence_transformers", "sklearn", "tensorboard",
            "tokenizers", "torch", "transformers")  # fmt: skip


def command(launcher, *flags):
    """Runs a launcher where none of them can be imported."""
    block = f"import runpy, sys; sys.modules.update(dict.fromkeys({PACKAGES}))"
    run = f"runpy.run_module('experiments.{launcher}', run_name='__main__', alter_sys=True)"
    arguments = [sys.executable, "-c", f"{block}; {run}", *flags]
    return subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("launcher", "flags", "package"),
    [
        ("finetune_encrypted", "--preset=smoke --run_dir={new}", "tokenizers"),
        ("finetune_encrypted", "--preset=smoke --run_dir={new} --dry_run", "tokenizers"),
        ("finetune_mixtures", "--preset=smoke --run_dir={new}", "tokenizers"),
        ("diversity_report", "--data={rows}.jsonl --run_dir={new}", "scikit-learn"),
        ("diversity_report", "--data={rows}.parquet --run_dir={new}", "pyarrow"),
        ("show_finetuning_data", "--data={rows}.jsonl --checkpoint={new}", "tokenizers"),
    ],
)
def test_a_launcher_without_its_extra_says_how_to_install_it(tmp_path, launcher, flags, package):
    for kind in ("jsonl", "parquet"):
        (tmp_path / f"rows.{kind}").write_text('{"instruction": "say a", "response": "a"}\n')
    done = command(launcher, *flags.format(rows=tmp_path / "rows", new=tmp_path / "new").split())
    *_, said = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert said.startswith("error: ") and said.endswith(f": needs the package {package}: pip install -e '.[finetune]'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "rows.parquet"]


def test_help_needs_no_extra():
    done = command("finetune_encrypted", "--help")
    assert done.returncode == 0 and "--base" in done.stdout, done.stderr
