"""What takes the place of a model's modules at the ends of a chain. Parameters keep their names; sizes are local."""

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from shardwright.comm import regions
from shardwright.comm.group import Group
from shardwright.kernels.matmul_all_reduce import matmul_all_reduce
from shardwright.parallelize.sites import Product

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""Where a module keeps what its user registered around its forward."""


class _Product(nn.Module):
    """A module of one weight and perhaps a bias, under the names the model gave them, with the hooks it had."""

    def __init__(self, old: nn.Module, product: Product, group: Group) -> None:
        super().__init__()
        self.group, self.tag, self.transposed = group, product.path, product.transposed
        self.weight_name, self.bias_name = product.weight, product.bias
        for name, parameter in old.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name in HOOKS:
            getattr(self, name).update(getattr(old, name))
        self.train(old.training)

    def _weight(self) -> Tensor:
        """`[in, out]`."""
        weight = self.get_parameter(self.weight_name)
        return weight if self.transposed else weight.T

    def _biased(self, y: Tensor) -> Tensor:
        return y if self.bias_name is None else y + self.get_parameter(self.bias_name)

    def extra_repr(self) -> str:
        """Local sizes."""
        return f"{list(self._weight().shape)}, rank {self.group.rank} of {self.group.size}"


@final
class Carried:
    """A partial sum on its way from the module that made it to the one whose all-reduce carries it."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self) -> Tensor | None:
        """It, once."""
        value, self.value = self.value, None
        return value


@final
class RowSplit(_Product):
    """`x_r [..., I_r]` → `y [..., O]`, alike on every rank: one all-reduce; the bias is added once, after it.

    carried: a partial sum that the model adds to this one; the same all-reduce sums both.
    """

    def __init__(self, old: nn.Module, product: Product, group: Group, carried: Carried | None = None) -> None:
        super().__init__(old, product, group)
        self.carried = carried

    def forward(self, x: Tensor) -> Tensor:
        """`all_reduce(x_r @ w_r + carried) + b`."""
        flat = x if x.dim() in (2, 3) else x.flatten(0, -2) if x.dim() > 3 else x[None]
        also = None if self.carried is None else self.carried.take()
        also = None if also is None else also.view(*flat.shape[:-1], -1)
        y = matmul_all_reduce(flat, self._weight(), self.group, x3=also, tag=self.tag)
        return self._biased(y.view(*x.shape[:-1], y.shape[-1]))


@final
class RowDeferred(_Product):
    """A row-parallel product that is added to a later one: its partial sum goes there, and what it gives is zeros."""

    def __init__(self, old: nn.Module, product: Product, group: Group, carried: Carried) -> None:
        super().__init__(old, product, group)
        self.carried = carried

    def forward(self, x: Tensor) -> Tensor:
        """`0 + b`; `x_r @ w_r` is carried."""
        y = x @ self._weight()
        self.carried.value = y
        return self._biased(y.new_zeros(()).expand_as(y))


@final
class RowScatter(_Product):
    """`x [..., I]`, alike on every rank, of which each takes its columns → `y [..., O]`: one all-reduce."""

    def __init__(self, old: nn.Module, product: Product, group: Group, widths: Sequence[int]) -> None:
        super().__init__(old, product, group)
        self.widths = tuple(widths)

    def forward(self, x: Tensor) -> Tensor:
        """`all_reduce(x[..., mine] @ w_r) + b`."""
        mine = regions.scatter(x, x.dim() - 1, self.widths, self.group, self.tag)
        return self._biased(regions.reduce(mine @ self._weight(), self.group, self.tag))


@final
class ColumnGather(_Product):
    """`x [..., I]` → `y [..., O]`, gathered from the ranks' columns; or this rank's `y_r` where `widths` is None.

    Each rank's gradient of `x` is its part of a sum, which is for whoever places this module to sum: `CopyHook`.
    """

    def __init__(self, old: nn.Module, product: Product, group: Group, widths: Sequence[int] | None) -> None:
        super().__init__(old, product, group)
        self.widths = None if widths is None else tuple(widths)

    def forward(self, x: Tensor) -> Tensor:
        """`all_gather(x @ w_r + b_r)`."""
        y = self._biased(x @ self._weight())
        return y if self.widths is None else regions.gather(y, y.dim() - 1, self.widths, self.group, self.tag)


@final
class VocabularySplit(nn.Module):
    """Ids `[...]` → `x [..., H]`: each rank looks up the rows it has and gives zeros for the others: one all-reduce."""

    def __init__(self, old: nn.Module, product: Product, start: int, stop: int, group: Group) -> None:
        super().__init__()
        self.group, self.tag, self.weight_name = group, product.path, product.weight
        self.start, self.stop, self.padding = start, stop, product.padding
        self.register_parameter(product.weight, old.get_parameter(product.weight))

    def forward(self, ids: Tensor) -> Tensor:
        """`all_reduce(rows of w_r, or 0)`."""
        weight = self.get_parameter(self.weight_name)
        outside = (ids < self.start) | (ids >= self.stop)
        if self.start == self.stop:  # still part of the graph, so that this rank's backward goes where the others' goes
            found = weight.new_zeros(*ids.shape, weight.shape[1]) + weight.sum()
        else:
            found = F.embedding((ids - self.start).masked_fill(outside, 0), weight)
        found = torch.where((ids == self.padding)[..., None], found.detach(), found)
        return regions.reduce(found.masked_fill(outside[..., None], 0), self.group, self.tag)


@final
class CopyHook:
    """A hook: gradients of what passes are summed over the ranks."""

    def __init__(self, group: Group, tag: str) -> None:
        self.group, self.tag = group, tag

    def before(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """On a module's input: its first argument, whichever way it is passed."""
        if arguments:
            return (regions.copy(arguments[0], self.group, self.tag), *arguments[1:]), keywords
        name = next(name for name, value in keywords.items() if isinstance(value, Tensor))
        return arguments, keywords | {name: regions.copy(keywords[name], self.group, self.tag)}

    def after(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        """On a module's output, a tensor or a structure with one that is used."""
        return tree_map(lambda x: regions.copy(x, self.group, self.tag) if isinstance(x, Tensor) else x, output)
