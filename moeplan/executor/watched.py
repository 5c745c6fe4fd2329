"""The products and attentions of a task one by one, with their seconds, where they stand in real blocks.

Timed alone an operation finds its operands in the cache and its memory at hand, and is a quarter too fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeplan.executor.lane import Task

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(3)
_ATTENTION = "_scaled_dot_product"


class Operation(NamedTuple):
    """One call in a task: of a forward pass, towards inputs, or towards weights, there with the sum into the table."""

    task: int
    kind: int
    seconds: float


class Watch(TorchDispatchMode):
    """Notes what runs while it is entered."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.task, self.found = -1, list[Operation]()
        self.adds = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs it, and notes it if it is a product or an attention."""
        name: str = function._schema.name.removeprefix("aten::")
        is_sum, self.adds = self.adds and name == "add_", self.adds and name != "add_"
        if name != "mm" and not name.startswith(_ATTENTION) and not is_sum:
            return function(*args, **(kwargs or {}))
        began_s = self._now_s()
        result = function(*args, **(kwargs or {}))
        seconds = self._now_s() - began_s
        if is_sum:
            seconds += self.found.pop().seconds
        kind = WEIGHT_GRADIENT if is_sum else _kind(name, args)
        self.found.append(Operation(self.task, kind, seconds))
        self.adds = kind == WEIGHT_GRADIENT and not is_sum
        return result

    def _now_s(self) -> float:
        """Of this thread's processor; on a GPU of the clock, once it has done all that it was given."""
        if self.device.type != "cuda":
            return time.thread_time()
        torch.cuda.synchronize(self.device)
        return time.monotonic()


def _kind(name: str, args: Any) -> int:
    """Of a product by how the operands lie: x W^T forward, g W towards the input, g^T x towards the weight."""
    if name != "mm":
        return INPUT_GRADIENT if "backward" in name else FORWARD
    return WEIGHT_GRADIENT if _is_turned(args[0]) else FORWARD if _is_turned(args[1]) else INPUT_GRADIENT


def _is_turned(x: Tensor) -> bool:
    return x.stride(0) == 1 and x.stride(1) != 1


def watched(handle: Callable[[Task], None], watch: Watch) -> Callable[[Task], None]:
    """The handler of tasks that tells the watch which one is at work."""

    def run(task: Task) -> None:
        watch.task = task.number
        handle(task)

    return run
