"""MENU: files for people and other programs. Each file is one dish; its name is what `moeplan export NAME` says.

A dish has `SUFFIXES`, the endings that a file of it may have, and

    export(timeline, path, **options) -> None          writes the file at `path`, whole or not at all

The first argument's name says what is exported: `timeline`, `plan`, `placing` (experts in the slots of every layer) or
`validation`. Options are keyword-only and have
defaults. A heavy package is imported inside the function that needs it.

Law (tests/contracts/test_exporters.py): for every suffix the same input gives the same bytes, what is exported stays
as it was, an existing file is replaced; another suffix, a missing folder, a folder of that name, a device and a full
disk are a MoeplanError that names the path, and leave nothing behind; hostile names do no harm; a step without tasks
is a file too; and neither `import moeplan.exporters.NAME` nor the menu loads matplotlib.

A complete dish, which writes how long the step takes:

    from moeplan.exporters import suffix_of, write_atomically

    SUFFIXES = (".txt",)

    def export(timeline, path):
        suffix_of(path, SUFFIXES)
        write_atomically(path, f"{timeline.step_s:.9f} s\\n")
"""

from moeplan.exporters._files import label, shown, suffix_of, write_atomically
from moeplan.exporters._traffic import traffic

__all__ = ["label", "shown", "suffix_of", "traffic", "write_atomically"]
