"""Pictures that are the same bytes for the same input: no dates, no random names, no settings of the user."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeplan.exporters._files import suffix_of, write_atomically

SUFFIXES = (".png", ".svg", ".pdf")
_METADATA: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_SETTINGS = {
    "svg.hashsalt": "moeplan",
    "text.parse_math": False,
    "font.size": 9,
    "axes.linewidth": 0.6,
    "figure.dpi": 100,
}


@contextmanager
def drawn(path: str | Path, *, width_in: float, height_in: float) -> Iterator[Any]:
    """An empty figure to draw on, of that many inches; written to `path` in the format of its suffix at the end."""
    import matplotlib.style
    from matplotlib.figure import Figure

    suffix = suffix_of(path, SUFFIXES)
    with matplotlib.style.context(["default", _SETTINGS], after_reset=True):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        yield figure
        page = io.BytesIO()
        figure.savefig(page, format=suffix[1:], dpi=150, metadata=_METADATA[suffix])
    write_atomically(path, page.getvalue())
