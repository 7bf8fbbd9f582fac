"""Rows of every source that are kept out of training.

Which ones is decided by a keyed hash of what they say, with a key of its own: it depends on no member's seed or
mixture, and more of them contain fewer. Nothing of them is in any mixture, for mixtures are taken of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from instrdiv.data.cleaning import whole
from instrdiv.data.mixtures import shuffled
from instrdiv.data.schemas import TextRow
from instrdiv.runtime.errors import BadInput

#: Key of the order in which rows are held out; seeds of members are below 2^31.
_KEY = 2**63


def hold_out(
    sources: Mapping[str, Sequence[TextRow]], count: int
) -> tuple[dict[str, list[TextRow]], dict[str, list[TextRow]]]:
    """The rows to train on, in their order, and ``count`` rows of every source that are kept out of training.

    No text is in both where the sources hold none twice (``clean`` with duplicates dropped). Raises BadInput where a
    source would have nothing left.
    """
    training, held_out = {}, {}
    for name, rows in sources.items():
        if count >= len(rows):
            raise BadInput(f"--held_out={count}: {name} has {len(rows):,} rows once cleaned, and some must be left to "
                           "train on")  # fmt: skip
        order = shuffled([whole(row) for row in rows], _KEY)
        held_out[name] = [rows[i] for i in order[:count]]
        training[name] = [rows[i] for i in np.sort(order[count:])]
    return training, held_out
