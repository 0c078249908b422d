"""A forward of what `parallelize_model` makes beside the same block built by hand from the layers: best of many.

One rank's part of a group of four, alone (`PlannedGroup` answers at once), so that only the code around the arithmetic
differs: a SwiGLU block of H 1024, F 2816, 64 tokens, float32, one thread.
"""

import argparse
import json
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from shardwright import ColumnParallelLinear, Partition, RowParallelLinear, parallelize_model
from shardwright.comm.single import SingleGroup

H, F, T = 1024, 2816, 64


class Block(nn.Module):
    """Gate, up and down, as anybody writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((H, F), (H, F), (F, H)))

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, H]` → `[T, H]`."""
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


class ByHand(nn.Module):
    """The same from parallel layers."""

    def __init__(self) -> None:
        super().__init__()
        group, inner = SingleGroup(), Partition.balanced(F, 1)
        self.gate, self.up = ColumnParallelLinear(H, inner, group), ColumnParallelLinear(H, inner, group)
        self.down = RowParallelLinear(inner, H, group)

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, H]` → `[T, H]`."""
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def seconds(run: Callable[[], Any]) -> float:
    """One call."""
    start = perf_counter()
    run()
    return perf_counter() - start


def main() -> None:
    """Measure alternately, so that both see the same machine, and print medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    torch.set_num_threads(1)
    x = torch.randn(T, H)
    split, by_hand = parallelize_model(Block(), SingleGroup(), (x,)), ByHand()
    times: dict[str, list[float]] = {"parallelized": [], "by hand": []}
    with torch.no_grad():
        for _ in range(300):
            times["parallelized"].append(seconds(lambda: split(x)))
            times["by hand"].append(seconds(lambda: by_hand(x)))
    middle = {name: sorted(found)[len(found) // 2] for name, found in times.items()}
    result = {**middle, "ratio": middle["parallelized"] / middle["by hand"]}
    print(json.dumps(result) if parser.parse_args().json else result)


if __name__ == "__main__":
    main()
