"""Held-out rows of every source, which are excluded from training.

They are chosen by a keyed hash of their text, with a separate key: the choice does not depend on any member's seed or
mixture, and a larger held-out set contains a smaller one. Mixtures are drawn from the remaining rows only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from instrdiv.data.cleaning import whole
from instrdiv.data.mixtures import shuffled
from instrdiv.data.schemas import TextRow
from instrdiv.runtime.errors import BadInput

#: Hash key for the order in which rows are held out; member seeds are below 2^31.
_KEY = 2**63


def hold_out(
    sources: Mapping[str, Sequence[TextRow]], count: int
) -> tuple[dict[str, list[TextRow]], dict[str, list[TextRow]]]:
    """Splits every source into rows to train on, in their order, and ``count`` held-out rows.

    No text is in both if the sources contain no duplicates (``clean`` with duplicates dropped). Raises BadInput if a
    source would have nothing left.
    """
    training, held_out = {}, {}
    for name, rows in sources.items():
        if count >= len(rows):
            raise BadInput(f"--held_out={count}: {name} has {len(rows):,} rows after cleaning, and some must be left "
                           "for training")  # fmt: skip
        order = shuffled([whole(row) for row in rows], _KEY)
        held_out[name] = [rows[i] for i in order[:count]]
        training[name] = [rows[i] for i in np.sort(order[count:])]
    return training, held_out
