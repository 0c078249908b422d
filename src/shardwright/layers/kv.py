"""Where keys and values of past tokens live: nowhere (`FreshKV`), or in pages (`PagedKV`). One store a layer."""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from shardwright.errors import UsageError
from shardwright.layers.batch import Batch

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one sequence, each `[L, K_r, D]`, or of sequences alike, `[sequences, S, K_r, D]`."""


class KVStore(ABC):
    """Takes the keys and values of a batch's new tokens; gives those of each sequence so far."""

    @abstractmethod
    def extend(self, batch: Batch, k: Tensor, v: Tensor) -> list[KeysValues]:
        """`k, v [T, K_r, D]` of the new tokens → those of each part of `batch.split`, past ones included."""


@final
class FreshKV(KVStore):
    """Keeps nothing: every sequence is whole in its batch. Differentiable."""

    def extend(self, batch: Batch, k: Tensor, v: Tensor) -> list[KeysValues]:
        """The new ones are all there are."""
        return list(zip(batch.split(k), batch.split(v), strict=True))


@final
class PagedKV(KVStore):
    """Pages `[pages, page, K_r, D]` shared by all sequences; a sequence's table lists its pages in order.

    Contiguous storage is one page a sequence: then nothing is copied when reading. The pages' dtype may be wider than
    the model's.
    """

    def __init__(self, page: int, kv_heads: int, head_size: int, dtype: torch.dtype, pages: int = 0) -> None:
        self.k = torch.empty(pages, page, kv_heads, head_size, dtype=dtype)
        self.v = torch.empty_like(self.k)

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return len(self.k)

    def grow(self, pages: int) -> None:
        """Have at least that many pages; room at least doubles, so that growing costs little in sum."""
        have = self.pages
        if pages > have:
            more = self.k.new_empty(max(pages, 2 * have) - have, *self.k.shape[1:])
            self.k, self.v = torch.cat((self.k, more)), torch.cat((self.v, more))

    def extend(self, batch: Batch, k: Tensor, v: Tensor) -> list[KeysValues]:
        """Write the new tokens' slots, then read each sequence's pages; `UsageError` where gradients are wanted."""
        if k.requires_grad:
            constraint = "pages keep no graph, so gradients would stop at them"
            raise UsageError("kv", "PagedKV", constraint, "decode in torch.inference_mode(), or train with FreshKV")
        page = self.k.shape[1]
        slots = torch.tensor(
            [
                table[position // page] * page + position % page
                for table, length, held in zip(batch.tables, batch.lengths, batch.held, strict=True)
                for position in range(held - length, held)
            ],
            dtype=torch.int64,
            device=self.k.device,
        )
        for pages, new in ((self.k, k), (self.v, v)):
            pages.flatten(0, 1).index_copy_(0, slots, new.to(pages.dtype))
        if batch.alike:  # whole sequences: what was written is all there is to read
            return list(zip(batch.split(k), batch.split(v), strict=True))
        return [
            (_joined(self.k, table, held).to(k.dtype), _joined(self.v, table, held).to(v.dtype))
            for table, held in zip(batch.tables, batch.held, strict=True)
        ]


def _joined(pages: Tensor, table: tuple[int, ...], held: int) -> Tensor:
    if len(table) == 1:
        return pages[table[0], :held]
    return pages[list(table)].flatten(0, 1)[:held]
