"""How fast the device is at the moment: seconds of a fixed piece of work, of the kind that a step is made of.

A processor of a virtual machine is slower while others use its caches, its memory or its other thread, and no counter
of the guest tells. So the same small block of experts is run before each step and behind the last, forward and
backward, and what a step takes can be seen beside it.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor

from moeplan.executor.layers import Tape, expert_rows

_ROWS, _WIDTH, _EXPERTS, _RUNS = 32, 512, 8, 3
"""Rows of each expert: small enough for some ten milliseconds on one core; no cache of a core holds the weights."""


class Yardstick:
    """A block of experts on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, shapes = device, {"up": (2 * _WIDTH, _WIDTH // 2), "down": (_WIDTH // 2, _WIDTH)}
        names = [(f"{expert}.{name}", shape) for expert in range(_EXPERTS) for name, shape in shapes.items()]
        self.weights = {name: torch.full(shape, 0.01, device=device) for name, shape in names}
        self.gradients = {name: torch.zeros(shape, device=device) for name, shape in names}
        self.x_ND = torch.full((_ROWS * _EXPERTS, _WIDTH // 2), 0.1, device=device)

    def value(self, name: str) -> Tensor:
        """A weight, for the tape."""
        return self.weights[name]

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Adds, for the tape."""
        self.gradients[name].add_(gradient)

    def seconds(self) -> float:
        """Of this thread's processor; on a GPU of the clock."""
        return median(self._once() for _ in range(_RUNS))

    def _once(self) -> float:
        clock = time.monotonic if self.device.type == "cuda" else time.thread_time
        began_s = clock()
        x_ND, tape = self.x_ND.clone().requires_grad_(True), Tape(self)
        y_ND = expert_rows(tape, x_ND, (_ROWS,) * _EXPERTS, [f"{expert}." for expert in range(_EXPERTS)], gated=True)
        torch.autograd.grad(y_ND, [x_ND], torch.ones_like(y_ND))
        tape.finish()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock() - began_s
