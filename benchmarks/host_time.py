"""How long a host takes to launch one dense layer kernel by kernel, forward and backward, with a further forward pass
where everything is recomputed.

    python benchmarks/host_time.py

The layer of GPT-2 in PyTorch as Megatron writes it before attention was fused, on tensors so small that only dispatch
is left; on a processor, so without the calls that start kernels on a device. Printed: the median of both passes.
`cost_models/overheads` says what was made of it.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_HIDDEN, _HEADS, _TOKENS, _LAYERS, _TIMES = 8, 2, 2, 8, 100


class _Layer(nn.Module):
    """Norm, attention by products, residual, norm, two products with GELU between them, residual; with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(_HIDDEN) for _ in range(2))
        sizes = ((_HIDDEN, 3 * _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, 4 * _HIDDEN), (4 * _HIDDEN, _HIDDEN))
        self.products = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        attended = self._attended(self.norms[0](hidden_SBH))
        hidden_SBH = hidden_SBH + self.dropout(self.products[1](attended))
        inner = nn.functional.gelu(self.products[2](self.norms[1](hidden_SBH)), approximate="tanh")
        return hidden_SBH + self.dropout(self.products[3](inner))

    def _attended(self, hidden_SBH: Tensor) -> Tensor:
        length, batch, _ = hidden_SBH.shape
        mixed = self.products[0](hidden_SBH).view(length, batch * _HEADS, -1)
        query, key, value = (each.transpose(0, 1) for each in mixed.chunk(3, dim=-1))
        scores = torch.bmm(query, key.transpose(1, 2)) * 0.5
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        shares = self.dropout(torch.softmax(scores.masked_fill(mask, -1e4), dim=-1))
        return torch.bmm(shares, value).transpose(0, 1).contiguous().view(length, batch, -1)


def _passes(layers: list[_Layer], given: Tensor, *, again: bool) -> None:
    hidden = given
    for layer in layers:
        hidden = checkpoint(layer, hidden, use_reentrant=True) if again else layer(hidden)
    hidden.sum().backward()


def _median_s(layers: list[_Layer], given: Tensor, *, again: bool) -> float:
    found = []
    for _ in range(_TIMES):
        start_s = time.process_time()
        _passes(layers, given, again=again)
        found.append((time.process_time() - start_s) / len(layers))
    return statistics.median(found)


def main() -> None:
    """A line for each."""
    torch.set_num_threads(1)
    layers, given = [_Layer() for _ in range(_LAYERS)], torch.randn(_TOKENS, 1, _HIDDEN, requires_grad=True)
    _median_s(layers, given, again=True)
    for again in (False, True):
        what = "with a further forward pass" if again else "forward and backward"
        print(f"{what}: {1e3 * _median_s(layers, given, again=again):.2f} ms a layer")


if __name__ == "__main__":
    main()
