"""The catalogue: find a YAML file, refuse what is odd in it, build a Scenario, and keep every figure's source.

    sheet      text to plain values that remember their line
    files      names and paths: the shelves, and reading with care
    overlay    one sheet laid over another: extends, a scenario's own numbers, --set
    citations  sources of figures
    resolve    names to one self-contained document
    figures    value and unit to SI
    translate  what pydantic found wrong, in our words
    checks     what must fit together
    build      document to Scenario; the verbs

Everything that is wrong is a CatalogueError of one line (three at most): file, line, field, what was found, what is
allowed, a remedy.
"""

from moeplan.catalogue.build import (
    build,
    cluster_from,
    document,
    load,
    read_plan,
    read_result,
    scenario_from,
    show,
    sources,
)
from moeplan.catalogue.citations import Citation
from moeplan.catalogue.files import Found, find, names, root

__all__ = [
    "Citation",
    "Found",
    "build",
    "cluster_from",
    "document",
    "find",
    "load",
    "names",
    "read_plan",
    "read_result",
    "root",
    "scenario_from",
    "show",
    "sources",
]
