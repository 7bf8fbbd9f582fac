"""What became of the papers' claims: checked where a run can bear them out, and said."""

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
    unjudged: str = "the papers do not say",
) -> list[Claim] | None:
    """Prints what became of the papers' claims, and returns them; None where the run cannot bear them out.

    Args:
      claims: checks them on the rows of results.csv; None where there is nothing to check, and ``unjudged`` says why.
      results: the rows.
      preset, values: the preset, and the flags.
      what: is trained.
      unjudged: see there.
    """
    if claims is None:
        print(f"verdict: none, {unjudged}")
        return None
    if not preset.judged:
        print(f"verdict: none, the preset {values.preset} is too small to show anything")
        return None
    fewer = (values.seeds or preset.seeds) < preset.seeds or (values.tests or preset.tests) < preset.tests
    if changes_a_setting(values) or fewer:
        print("verdict: none, the claims are about the preset's own settings, seeds and tests")
        return None
    lost = {row["member"] for row in results if row["status"] != "ok"}
    # The claims are about means: without its stragglers, a setting would look better than it is.
    found = [Claim(f"every {what} trained to its end", False, f"{len(lost)} diverged")] if lost else claims(results)
    print_claims(found)
    return found


def print_claims(claims: Sequence[Claim]) -> None:
    """What holds, what does not, and the verdict."""
    for claim in claims:
        print(f"  [{'x' if claim.holds else ' '}] {claim.text}: {claim.evidence}")
    print(f"verdict: {verdict(claims)}")
