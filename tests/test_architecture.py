"""The house keeps its plan: who may import whom, where heavy packages live, how large things may get."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeplan import menu

HOUSE = Path(menu.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))
LAYERS = (
    {
        "__main__",
        "cli",
        "_accuracy",
        "_emulate",
        "_execute",
        "_explain",
        "_flags",
        "_network",
        "_place",
        "_replay",
        "_screen",
        "_validate",
        "_waiting",
    },
    {"api", "executing", "explaining", "grid", "knobs", "placing", "replaying", "validating", "__init__"},
    {"accuracy"},
    {"validator", "exporters", "emulator"},
    {"planners"},
    {"placers"},
    {"simulator", "executor"},
    {"catalogue", "importers", "compiler"},
    {"partition", "network"},
    {"cost", "routers", "collectives", "schedules", "adaptations"},
    {"domain", "menu"},
    {"errors", "units", "jit"},
)
FRIENDS = {("catalogue", "importers"), ("domain", "menu")}
"""Neighbours of one floor that may meet."""
HOMES = {
    "networkx": {"domain", "planners"},
    "simpy": {"simulator"},
    "pulp": {"placers", "planners"},
    "highspy": {"placers", "planners"},
    "torch": {"executor", "importers"},
    "matplotlib": {"exporters"},
}
MENUS = {"routers", "collectives", "schedules", "adaptations", "placers", "planners", "importers", "exporters"}
MACHINES = sorted({path.parent.name for path in FILES if path.parent != HOUSE} - MENUS)
MOST_FILES = {"accuracy": 18, "domain": 25, "executor": 17, "network": 12}
"""Machines that hold more than nine files, and how many."""


def part(path: Path) -> str:
    """The folder of a file, or the file itself where it stands at the top."""
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """All modules that a file imports, wherever in the file that stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"moeplan.{alias.name}" for alias in node.names) if node.module == "moeplan" else (node.module,)


def floor(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_go_downwards_and_never_sideways(path: Path) -> None:
    here = part(path)
    for module in imports(path):
        if module.startswith("moeplan."):
            there = module.split(".")[1]
            if not ((HOUSE / there).exists() or (HOUSE / f"{there}.py").exists()):
                continue  # a name of the package itself, such as __version__
            allowed = there == here or (here, there) in FRIENDS or floor(here) < floor(there)
            together = (
                (HOUSE / f"{here}.py").exists() and (HOUSE / f"{there}.py").exists() and floor(here) == floor(there)
            )
            assert allowed or together, f"{here} imports {module}"


@pytest.mark.parametrize("path", sorted((HOUSE.parent / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_there_is(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moeplan":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_every_heavy_package_has_its_home() -> None:
    for path in FILES:
        for package in {module.split(".")[0] for module in imports(path)} & set(HOMES):
            assert part(path) in HOMES[package], f"{path} imports {package}"


def test_no_file_is_longer_than_450_lines_and_few_than_400() -> None:
    lines = {str(path.relative_to(HOUSE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 450} == {}
    assert len([name for name, count in lines.items() if count > 400]) <= 3


@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_has_at_most_nine_files_or_as_many_as_are_granted(machine: str) -> None:
    files = [path.name for path in (HOUSE / machine).glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MOST_FILES.get(machine, 9), f"{machine} has {len(files)} files"


def test_the_house_is_one_level_deep() -> None:
    assert {len(path.relative_to(HOUSE).parts) for path in FILES} <= {1, 2}


def test_no_function_is_longer_than_40_lines() -> None:
    long = [
        f"{path.relative_to(HOUSE)}:{node.lineno} {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
        if node.end_lineno - (node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]).lineno >= 40
    ]
    assert long == []


@pytest.mark.parametrize("module", ["moeplan", "moeplan.cli"])
def test_starting_loads_no_heavy_package(module: str) -> None:
    lines = [
        f"import sys, {module} as started",
        "sys.argv = ['moeplan', '--help']",
        "try: getattr(started, 'main', int)()",
        "except SystemExit: pass",
        "print(sorted({'torch', 'matplotlib', 'pulp', 'highspy', 'numba'} & set(sys.modules)))",
    ]
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
