"""Checks the papers' claims, if a run can test them, and prints the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from absl.flags import FlagValues

from instrdiv.analysis.claims import Claim, verdict
from instrdiv.launch.flags import changes_a_setting
from instrdiv.launch.presets import Preset
from instrdiv.runtime.tables import Row


def judge(
    claims: Callable[[Sequence[Row]], list[Claim]] | None,
    results: Sequence[Row],
    preset: Preset,
    values: FlagValues,
    what: str = "model",
    unjudged: str = "the papers make no claim to check",
) -> list[Claim] | None:
    """Prints which of the papers' claims hold, and returns them; None if the run cannot test them.

    Args:
      claims: checks the claims on the rows of results.csv; None if there is nothing to check.
      results: the rows of results.csv.
      preset, values: the preset and the flags.
      what: the kind of thing trained, such as "model".
      unjudged: why there is nothing to check, if ``claims`` is None.
    """
    if claims is None:
        print(f"Not judged: {unjudged}.")
        return None
    if not preset.judged:
        print(f"Not judged: the preset {values.preset} is too small to test the claims.")
        return None
    fewer = (values.seeds or preset.seeds) < preset.seeds or (values.tests or preset.tests) < preset.tests
    if changes_a_setting(values) or fewer:
        print("Not judged: claims apply only to the unmodified preset.")
        return None
    lost = {row["member"] for row in results if row["status"] != "ok"}
    # The claims are about means, which would look too good without the diverged members.
    found = [Claim(f"every {what} trained to its end", False, f"{len(lost)} diverged")] if lost else claims(results)
    print_claims(found)
    return found


def print_claims(claims: Sequence[Claim]) -> None:
    """Prints which claims hold, and the verdict."""
    for claim in claims:
        print(f"  [{'x' if claim.holds else ' '}] {claim.text}: {claim.evidence}")
    print(f"verdict: {verdict(claims)}")
