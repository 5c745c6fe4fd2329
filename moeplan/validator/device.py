"""Which device this is, and where: so that what one was measured to take is not told of another."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from moeplan.domain.cluster import Gpu
from moeplan.errors import MoeplanError
from moeplan.executor.execute import gpu_name


def device_name(device: str) -> str:
    """cpu or cuda, and the name that the system has for it."""
    return f"cuda {gpu_name()}" if device == "cuda" else f"cpu {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(device: str) -> str:
    """What a measurement is good for."""
    system = f"{platform.system()} {platform.release().partition('-')[0]}, Python {platform.python_version()}"
    return f"{os.cpu_count()} x {device_name(device)}, {system}, PyTorch {version('torch')}"


def check_cost_model(gpu: Gpu, device: str) -> None:
    """Raises MoeplanError if the sheet tells of another device than the one that runs the plan."""
    if gpu.measured is None:
        return
    here = device_name(device)
    if gpu.measured.device != here:
        raise MoeplanError(
            f"{gpu.name}: was measured on {gpu.measured.device!r}, but this is {here!r}; run `moeplan calibrate` here, "
            "and give its file as --cost-model"
        )
