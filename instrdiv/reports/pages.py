"""Shared helpers of the HTML pages: writing a page, the columns it reads, and formatting values for people.

Numbers and coordinates are computed in Python; the templates write all markup, so that nothing from a table, a name or
a command reaches a page unescaped. The same files always give byte-identical pages.
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

#: Columns of results.csv that the pages read, apart from the settings that vary. Older runs may lack other columns.
READ_OF_RESULTS = ("member", "seed", "step", "split", "slice", "exact_match", "status", "instructions")


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> Path:
    """Writes a page atomically and returns its path."""
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
    """The launcher command that made this figure's run; None if the run was made in another way."""
    script, *flags = provenance["command"]
    flags = [flag for flag in flags if flag.lstrip("-").partition("=")[0] != "overwrite"]  # it would start from scratch
    return shlex.join(["python", "-m", f"experiments.{figure}", *flags]) if script == f"{figure}.py" else None


def labeled_thresholds(
    rows: Sequence[Row], fields: Sequence[str], slice: str
) -> list[tuple[str, thresholds.Threshold]]:
    """(label, I50) for each combination of the settings that vary apart from the number of instructions.

    Args:
      rows: rows of results.csv at each member's last step.
      fields: the settings that vary.
      slice: the headline slice.
    """
    if "instructions" not in fields:
        return []
    others = [name for name in fields if name != "instructions"]
    found = thresholds.by_setting(thresholds.select(rows, "unseen", slice), others)
    return [(setting_label(others, key), threshold) for key, threshold in found.items() if len(threshold.values) > 1]


def data_uri(picture: Path) -> str:
    """A PNG as a data URI, to embed it in a page."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def setting_label(names: Sequence[str], values: Sequence[Any]) -> str:
    """Settings as text; no-break spaces allow line breaks only between settings."""
    return ", ".join(f"{name}\u00a0=\u00a0{in_words(value)}" for name, value in zip(names, values, strict=True))


def in_words(value: Any) -> str:
    """Formats a setting's value for people."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
