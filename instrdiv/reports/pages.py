"""What the HTML pages have in common: how they are written, what they read, and how values read on them.

Numbers and coordinates are computed in Python; the templates write all markup, so that nothing from a table, a name or
a command reaches a page unescaped. The same files give the same bytes.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from instrdiv.analysis import thresholds
from instrdiv.runtime.files import replacing
from instrdiv.runtime.tables import Row

#: What the pages read of results.csv, besides the settings that vary; a run of an older version may lack other columns.
READ_OF_RESULTS = ("member", "seed", "step", "split", "slice", "exact_match", "status", "instructions")


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> Path:
    """Writes a page whole or not at all, and returns its path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template(template).render(values)
    with replacing(path) as file:
        file.write(html)
    return path


def launched(provenance: Mapping[str, Any], figure: str) -> str | None:
    """The command of the launcher that made the run of this figure; None if it was made in another way."""
    script, *flags = provenance["command"]
    flags = [flag for flag in flags if flag.lstrip("-").partition("=")[0] != "overwrite"]  # it would begin anew
    return shlex.join(["python", "-m", f"experiments.{figure}", *flags]) if script == f"{figure}.py" else None


def labeled_thresholds(
    rows: Sequence[Row], fields: Sequence[str], slice: str
) -> list[tuple[str, thresholds.Threshold]]:
    """(which, I50) for every combination of the settings that vary besides the number of instructions.

    Args:
      rows: of results.csv, about each member's end.
      fields: the settings that vary.
      slice: the headline's.
    """
    if "instructions" not in fields:
        return []
    others = [name for name in fields if name != "instructions"]
    found = thresholds.by_setting(thresholds.select(rows, "unseen", slice), others)
    return [(setting_label(others, key), threshold) for key, threshold in found.items() if len(threshold.values) > 1]


def data_uri(picture: Path) -> str:
    """A PNG as part of a page."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def setting_label(names: Sequence[str], values: Sequence[Any]) -> str:
    """Settings in words; a line breaks only between them (no-break spaces)."""
    return ", ".join(f"{name}\u00a0=\u00a0{in_words(value)}" for name, value in zip(names, values, strict=True))


def in_words(value: Any) -> str:
    """A setting's value for people."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
