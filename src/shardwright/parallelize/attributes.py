"""Which integers of a model's modules reach constants that a split changes, found by perturbing them.

A module's forward is run again on meta tensors with one integer changed by one. Every torch call in it is answered with
what it gave the first time, so that nothing fails and only the integers differ: those positions the attribute reaches.
Integers of a plain object that the module holds (a config) count too; the module then gets a copy of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from shardwright.errors import UnsupportedError
from shardwright.parallelize.constants import Wanted, constants
from shardwright.parallelize.flow import Flow
from shardwright.parallelize.placement import Placement
from shardwright.parallelize.record import Like, ModuleCall, Watch, on_meta
from shardwright.parallelize.trace import Trace, owner

FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model's own code may raise at sizes it was not made for."""

Place = tuple[int, int]
"""(number of a torch call, position among the integers of its arguments)."""

Demands = dict[Place, tuple[int, Wanted]]
"""Place → (value in the trace, what it must be on a rank)."""

Path = tuple[str, ...]
"""Where an integer is, from its module: its name, or a held object's name and its name there."""

Settings = dict[str, dict[Path, tuple[int, ...]]]
"""Module path → integers to set, one value a rank."""


@dataclass(frozen=True)
class Reach:
    """An attribute and the constants it reaches: place, calls counted within the module → change for one of one."""

    path: Path
    value: int
    slopes: Mapping[Place, int]


def solve(model: nn.Module, trace: Trace, demanded: Mapping[str, Demands], placement: Placement) -> Settings:
    """For each module path with a constant that must change, the integers to set: one value a rank."""
    modules = dict(model.named_modules())
    found: Settings = {}
    known: dict[Any, list[Reach]] = {}
    for path, wanted in demanded.items():
        if not any(
            want(placement, rank) != value for value, want in wanted.values() for rank in range(placement.ranks)
        ):
            continue
        module = modules[path]
        call = next(call for call in trace.modules if call.path == path)
        key = (type(module), tuple(_integers(module)), _shapes(call), tuple(trace.functions[call.start : call.stop]))
        if key not in known:
            known[key] = _reaches(module, call, trace)
        found[path] = _values(known[key], wanted, call, placement)
    return found


def demands(trace: Trace, flow: Flow) -> dict[str, Demands]:
    """For each module path all constants in its own code that labels say something about."""
    found: dict[str, Demands] = {}
    for node in trace.graph.graph.nodes:
        if node.op == "call_function" and "call" in node.meta.get("custom", {}):
            for position, one in constants(flow, node).items():
                where = (node.meta["custom"]["call"], _at(trace, node, position))
                found.setdefault(owner(node), {})[where] = one
    return found


def _at(trace: Trace, node: Node, position: int) -> int:
    """The position among the integers of the Python call: an index has no dim argument; a slice in the graph has."""
    number = node.meta["custom"]["call"]
    if trace.functions[number] != "__getitem__":
        return position
    before, at = 0, node.prev
    while at.meta.get("custom", {}).get("call") == number:
        before += {"slice": 2, "select": 1}.get(str(at.target).split(".")[1], 0)
        at = at.prev
    return before + position - 1


def _values(
    reaches: list[Reach], wanted: Mapping[Place, tuple[int, Wanted]], call: ModuleCall, placement: Placement
) -> dict[Path, tuple[int, ...]]:
    """Each attribute's value on each rank, from a constant that it alone reaches, or alone among those still unknown.

    A constant may be a product with a size of a tensor, which changes too: the one with the smallest slope is taken.
    """
    local = {(number - call.start, at): one for (number, at), one in wanted.items()}
    steps: dict[Path, list[int]] = {}
    rest = [one for one in reaches if any(place in local for place in one.slopes)]
    while rest:
        found = [(one, place) for one in rest for place in one.slopes if place in local and _alone(one, place, rest)]
        if not found:
            break
        reach, place = min(found, key=lambda pair: (abs(pair[0].slopes[pair[1]]), pair[1]))
        value, want = local[place]
        steps[reach.path] = []
        for rank in range(placement.ranks):
            change = want(placement, rank) - value
            change -= sum(
                one.slopes.get(place, 0) * steps[one.path][rank]
                for one in reaches
                if one.path in steps and one is not reach
            )
            steps[reach.path].append(round(change / reach.slopes[place]))
        rest.remove(reach)
    value_of = {one.path: one.value for one in reaches}
    return {path: tuple(value_of[path] + step for step in mine) for path, mine in steps.items() if any(mine)}


def _alone(reach: Reach, place: Place, others: list[Reach]) -> bool:
    return not any(place in other.slopes for other in others if other is not reach)


def _reaches(module: nn.Module, call: ModuleCall, trace: Trace) -> list[Reach]:
    alone = without_data(module)
    arguments, keywords = tree_map(on_meta, call.arguments), tree_map(on_meta, dict(call.keywords))
    first = _Replay()
    with torch.device("meta"), first:
        alone(*arguments, **keywords)
    if first.functions != list(trace.functions[call.start : call.stop]):
        return []
    found = []
    for path, value in _integers(alone):
        again = _Replay(first)
        _assign(alone, path, value + 1)
        try:
            with torch.device("meta"), again:
                alone(*arguments, **keywords)
        except (*FAILURES, UnsupportedError):  # whatever a model raises at another size, the attribute is of no use
            continue
        finally:
            _assign(alone, path, value)
        if again.functions == first.functions:
            slopes = {
                (number, at): b - a
                for number, (before, after) in enumerate(zip(first.integers, again.integers, strict=True))
                for at, (a, b) in enumerate(zip(before, after, strict=False))
                if a != b
            }
            if slopes:
                found.append(Reach(path, value, slopes))
    return found


@final
class _Replay(Watch):
    """Keeps what each call gave; given an earlier run it answers with that run's results."""

    def __init__(self, first: "_Replay | None" = None) -> None:
        super().__init__()
        self.first = first
        self.results: list[Any] = []

    def answer(self, number: int, run: Callable[[], Any]) -> Any:
        """Run it, or answer from the first run as long as that went the same way."""
        if self.first is None:
            self.results.append(run())
            return self.results[-1]
        if number >= len(self.first.results) or self.first.functions[number] != self.functions[-1]:
            raise UnsupportedError("another path")
        return self.first.results[number]


def without_data(module: nn.Module) -> nn.Module:
    """A copy without data."""
    from copy import deepcopy

    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return deepcopy(module, memo)


def _integers(module: nn.Module) -> Iterator[tuple[Path, int]]:
    for name, value in vars(module).items():
        if type(value) is int:
            yield (name,), value
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
            for inner, deep in vars(value).items():
                if type(deep) is int:
                    yield (name, inner), deep


def _assign(module: nn.Module, path: Path, value: int) -> None:
    setattr(module if len(path) == 1 else getattr(module, path[0]), path[-1], value)


def set_own(module: nn.Module, values: Mapping[Path, int]) -> None:
    """Give a module these integers; an object it shares with others is copied first."""
    for name in {path[0] for path in values if len(path) > 1}:
        setattr(module, name, copy(getattr(module, name)))
    for path, value in values.items():
        _assign(module, path, value)


def _shapes(call: ModuleCall) -> tuple[Any, ...]:
    leaves = tree_leaves((call.arguments, dict(call.keywords)))
    return tuple(x if isinstance(x, Like | int | float | str | bool) else type(x) for x in leaves)
