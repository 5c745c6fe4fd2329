"""The code is in the house style: types, lints and format, by the tools that pyproject.toml configures."""

import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
CHECKS = {
    "types": ["mypy", "-p", "moeplan"],
    "lints": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_code_has_good(name: str) -> None:
    run = subprocess.run([sys.executable, "-m", *CHECKS[name]], cwd=HOUSE, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
