"""A rank's modules run once on meta tensors, without peers: whether their code makes the sizes that labels foretell.

Every constant that a split changes must come out as wanted, whether an attribute set it or a tensor's size did. A head
count that is a literal in the code does not, and then the traced graph runs instead.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from shardwright.errors import ShardwrightError, UnsupportedError
from shardwright.parallelize.attributes import FAILURES, Demands
from shardwright.parallelize.flow import Flow
from shardwright.parallelize.placement import Placement
from shardwright.parallelize.record import Calls, Own, Recorder, on_meta
from shardwright.parallelize.trace import Trace, owner


def rehearse(part: nn.Module, trace: Trace, demanded: Mapping[str, Demands], placement: Placement, rank: int) -> None:
    """Run those modules of a rank's part, made on meta, whose constants change, and compare their integers.

    Raises:
        UnsupportedError: one fails, or a constant is not what this rank needs.
    """
    for path, wanted in demanded.items():
        if all(want(placement, rank) == value for value, want in wanted.values()):
            continue
        again = _run(part, trace, path, rank)
        first = trace.calls.own(path)
        _compare(path, first[: len(first) // trace.calls.times(path)], again.own(""), wanted, (placement, rank))


def compare_factors(part: nn.Module, trace: Trace, flow: Flow, rank: int) -> None:
    """Run those modules that compute with numbers on what is split: a number may come from a tensor's size.

    What is called on a part is run by the module around it that is not.

    Raises:
        UnsupportedError: one fails, or computes with another number on this rank.
    """
    taking, called = _taking_parts(flow), {one.path for one in trace.modules}
    around: dict[str, set[str]] = {}
    for path in _computing(trace, flow):
        outer = path
        while outer in taking or outer not in called:
            outer = outer.rpartition(".")[0]
        around.setdefault(outer, set()).add(path.removeprefix(outer).removeprefix("."))
    for outer, inner in around.items():
        again = _run(part, trace, outer, rank)
        for path in inner:
            whole = f"{outer}.{path}" if outer and path else outer or path
            first = [one[2] for one in trace.calls.own(whole) if one[2]]
            mine = [one[2] for one in again.own(path) if one[2]]
            if not set(mine) <= set(first):
                raise UnsupportedError(f"{whole or 'the model'}: its code computes with a size that is split")


def _computing(trace: Trace, flow: Flow) -> Iterator[str]:
    """The paths of modules whose own code computes with a number on what is split."""
    found = {
        owner(node)
        for node, labels in flow.values.items()
        if isinstance(labels, Tensor) and "call" in node.meta.get("custom", {})
        if trace.calls.factors[node.meta["custom"]["call"]]
    }
    yield from sorted(found)


def _taking_parts(flow: Flow) -> set[str]:
    """The paths of modules called on what is split."""
    found = set[str]()
    for node, labels in flow.values.items():
        if isinstance(labels, Tensor):
            for user in node.users:
                path = owner(user)
                while path and not f"{owner(node)}.".startswith(f"{path}."):
                    found.add(path)
                    path = path.rpartition(".")[0]
    return found


def _run(part: nn.Module, trace: Trace, path: str, rank: int) -> Calls:
    """The torch calls of one call of a rank's module on meta tensors."""
    call = next(one for one in trace.modules if one.path == path)
    module, recorder = part.get_submodule(path), Recorder()
    arguments, keywords = tree_map(on_meta, (call.arguments, dict(call.keywords)))
    try:
        with torch.device("meta"), recorder.watching(module), recorder, torch.no_grad():
            module(*arguments, **keywords)
    except (*FAILURES, ShardwrightError) as error:
        raise UnsupportedError(f"{path}: its code fails on rank {rank}: {str(error).splitlines()[0]}") from error
    return recorder.record()


def _compare(path: str, first: list[Own], again: list[Own], wanted: Demands, where: tuple[Placement, int]) -> None:
    """The local calls may leave some out (nothing to repeat), but not make others."""
    placement, rank = where
    local = iter(again)
    found = next(local, None)
    for function, _, _, number in first:
        if found is None or found[0] != function:
            continue
        for (call, at), (_, want) in wanted.items():
            if call == number and at < len(found[1]) and found[1][at] not in (want(placement, rank), -1):
                raise UnsupportedError(
                    f"{path or 'the model'}: integer {at} of a {function} is {found[1][at]} whatever its attributes, "
                    f"and rank {rank} needs {want(placement, rank)}"
                )
        found = next(local, None)
    if found is not None:
        raise UnsupportedError(f"{path or 'the model'}: its code takes another way on rank {rank} (at {found[0]})")
