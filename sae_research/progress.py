"""Progress bars: in a terminal and in a notebook, silent while notebooks are executed for the record."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def bar(iterable: Iterable | None = None, total: int | None = None, desc: str = "") -> "tqdm":
    """Wrap an iterable (or count up to `total` with `.update()`); silent when SAE_RESEARCH_PROGRESS is 0."""
    from tqdm import tqdm

    silent = os.environ.get("SAE_RESEARCH_PROGRESS") == "0"
    return tqdm(iterable, total=total, desc=desc or None, disable=silent, leave=False, dynamic_ncols=True)
