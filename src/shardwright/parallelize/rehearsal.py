"""A rank's modules run once on meta tensors, without peers: whether their code makes the sizes that labels foretell.

Every constant that a split changes must come out as wanted, whether an attribute set it or a tensor's size did. A head
count that is a literal in the code does not, and then the traced graph runs instead.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.utils._pytree import tree_map

from shardwright.errors import ShardwrightError, UnsupportedError
from shardwright.parallelize.attributes import FAILURES, Demands
from shardwright.parallelize.placement import Placement
from shardwright.parallelize.record import Own, Recorder, on_meta
from shardwright.parallelize.trace import Trace


def rehearse(part: nn.Module, trace: Trace, demanded: Mapping[str, Demands], placement: Placement, rank: int) -> None:
    """Run those modules of a rank's part, made on meta, whose constants change, and compare their integers.

    Raises:
        UnsupportedError: one fails, or a constant is not what this rank needs.
    """
    for path, wanted in demanded.items():
        if all(want(placement, rank) == value for value, want in wanted.values()):
            continue
        call = next(one for one in trace.modules if one.path == path)
        module, recorder = part.get_submodule(path), Recorder()
        arguments, keywords = tree_map(on_meta, (call.arguments, dict(call.keywords)))
        try:
            with recorder.watching(module), recorder, torch.no_grad():
                module(*arguments, **keywords)
        except (*FAILURES, ShardwrightError) as error:
            raise UnsupportedError(f"{path}: its code fails on rank {rank}: {str(error).splitlines()[0]}") from error
        first = trace.calls.own(path)
        _compare(
            path, first[: len(first) // trace.calls.times(path)], recorder.record().own(""), wanted, (placement, rank)
        )


def _compare(path: str, first: list[Own], again: list[Own], wanted: Demands, where: tuple[Placement, int]) -> None:
    """The local calls may leave some out (nothing to repeat), but not make others."""
    placement, rank = where
    local = iter(again)
    found = next(local, None)
    for function, _, number in first:
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
