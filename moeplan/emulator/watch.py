"""A process that outlives a run for as long as it takes to remove what the run has made.

`python -m moeplan.emulator.watch PREFIX FOLDER` waits for the end of its standard input, which is the end of its
parent, and then removes the namespaces of that prefix, all that runs in them, and the folder.
"""

from __future__ import annotations

import shutil
import sys

from moeplan.emulator.namespaces import remove


def main(prefix: str, folder: str) -> None:
    """The entry point."""
    sys.stdin.buffer.read()
    remove(prefix)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
