"""Seam 1, `Group`: who this rank can talk to, and the words it may use.

This file fixes what every collective means, checks its arguments and counts the time spent waiting. How bytes move is
each implementation's own business: it fills in the underscored methods, which get checked arguments.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from time import perf_counter
from typing import Any, final

import torch
from torch import Tensor

from shardwright.errors import CommError, UnsupportedError, UsageError


@dataclass(frozen=True)
class Call:
    """One collective as this rank issues it.

    bytes: payload this rank hands over · dtype: torch's name without the prefix · tag: what the caller named it ·
    detail: whatever else all ranks must agree on (shape, dim and sizes, root), in words.
    """

    op: str
    bytes: int
    dtype: str
    tag: str
    detail: str = ""

    def __str__(self) -> str:
        name = f" '{self.tag}'" if self.tag else ""
        return f"{self.op}{name} of {self.dtype}{f' ({self.detail})' if self.detail else ''}"


class Handle(ABC):
    """A collective under way. Whoever holds it must `wait()`; one never waited for is an error at `end_step`."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._owner: Group | None = None
        self._result: Tensor | None = None

    @final
    def wait(self) -> Tensor:
        """Block until the result is there, and return it; a second call returns the same tensor."""
        if self._result is None:
            start = perf_counter()
            try:
                self._result = self._finish()
            finally:
                if self._owner is not None:
                    self._owner.retire(self, perf_counter() - start)
        return self._result

    @abstractmethod
    def done(self) -> bool:
        """Whether `wait()` would end at once, with the result or with an error. Never blocks."""

    @abstractmethod
    def _finish(self) -> Tensor: ...


@final
class Done(Handle):
    """A collective that needed no waiting."""

    def __init__(self, call: Call, result: Tensor) -> None:
        super().__init__(call)
        self._value = result

    def done(self) -> bool:
        """Always."""
        return True

    def _finish(self) -> Tensor:
        return self._value


@dataclass
class _Ledger:
    """What one rank has under way, over a group and all that was split from it."""

    open: dict[int, Handle] = field(default_factory=dict)
    waited_s: float = 0.0
    timeout_s: float = 30.0


class Group(ABC):
    """The ranks that share one set of shards: `size` of them, of which this is `rank`.

    Every rank enters every collective, in the same order, also when its part is empty. Nothing here is differentiable:
    see `comm.regions`. Inputs are left untouched and results are new tensors, except where `out=` is given. Each call
    takes a `tag`, which recorders and errors show, and has a twin `…_async` that returns a `Handle` at once.

    A group split from another, or wrapped around it, passes it as `parent`: they share the handles still open.
    """

    def __init__(self, rank: int, size: int, parent: "Group | None" = None) -> None:
        if size < 1 or not 0 <= rank < size:
            raise UsageError("rank", rank, f"a group of {size} has ranks 0…{size - 1}", "pass a rank of the group")
        self.rank = rank
        self.size = size
        self._ledger: _Ledger = _Ledger() if parent is None else parent._ledger

    def __deepcopy__(self, memo: dict[int, object]) -> "Group":
        """Itself: a copied model still speaks to the same peers."""
        return self

    @property
    def waited_s(self) -> float:
        """Seconds this rank has spent inside waits, by the clock, those of splits included."""
        return self._ledger.waited_s

    @property
    def timeout_s(self) -> float:
        """Seconds that a rank which shows no life may keep this one waiting, in a group and all that is split from it.

        May be set. Life is seen over shared memory only; elsewhere a wait ends with the connection or the launcher.
        """
        return self._ledger.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._ledger.timeout_s = seconds

    # ---- collectives

    def all_reduce(self, x: Tensor, *, out: Tensor | None = None, tag: str = "") -> Tensor:
        """The sum of every rank's `x`, on every rank. `out` (`x` itself too) receives it without a new allocation."""
        return self.all_reduce_async(x, out=out, tag=tag).wait()

    def all_reduce_async(self, x: Tensor, *, out: Tensor | None = None, tag: str = "") -> Handle:
        """`all_reduce` under way."""
        if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
            raise UsageError("out", _kind(out), f"the result is {_kind(x)}", "pass a tensor like x, or leave it out")
        _check_summed(x)
        return self._issue(self._all_reduce(_values(x), out, _call("all_reduce", x, tag, f"shape {list(x.shape)}")))

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int], *, tag: str = "") -> Tensor:
        """Every rank's `x` joined along `dim` in rank order; `sizes` are the widths of all ranks, zeros allowed."""
        return self.all_gather_async(x, dim, sizes, tag=tag).wait()

    def all_gather_async(self, x: Tensor, dim: int, sizes: Sequence[int], *, tag: str = "") -> Handle:
        """`all_gather` under way."""
        dim, sizes = self._check_sizes(x, dim, sizes)
        if x.shape[dim] != sizes[self.rank]:
            raise UsageError("x", _kind(x), f"rank {self.rank} hands over {sizes[self.rank]} along dim {dim}", "fix x")
        return self._issue(self._all_gather(_values(x), dim, sizes, _call("all_gather", x, tag, _cut(x, dim, sizes))))

    def reduce_scatter(self, x: Tensor, dim: int, sizes: Sequence[int], *, tag: str = "") -> Tensor:
        """This rank's `sizes[rank]` wide share, along `dim`, of the sum of every rank's `x`."""
        return self.reduce_scatter_async(x, dim, sizes, tag=tag).wait()

    def reduce_scatter_async(self, x: Tensor, dim: int, sizes: Sequence[int], *, tag: str = "") -> Handle:
        """`reduce_scatter` under way."""
        dim, sizes = self.check_whole(x, dim, sizes)
        _check_summed(x)
        call = _call("reduce_scatter", x, tag, _cut(x, dim, sizes))
        return self._issue(self._reduce_scatter(_values(x), dim, sizes, call))

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], *, tag: str = "") -> Tensor:
        """Rows of `x` dealt out: `send[r]` rows go to rank r, `receive[r]` rows come from it, in rank order."""
        return self.all_to_all_async(x, send, receive, tag=tag).wait()

    def all_to_all_async(self, x: Tensor, send: Sequence[int], receive: Sequence[int], *, tag: str = "") -> Handle:
        """`all_to_all` under way."""
        _, send = self._check_sizes(x, 0, send)
        _, receive = self._check_sizes(x, 0, receive)
        if x.shape[0] != sum(send):
            raise UsageError("send", send, f"x has {x.shape[0]} rows", "deal out each row once")
        call = _call("all_to_all", x, tag, f"rows of {list(x.shape[1:])}")
        return self._issue(self._all_to_all(_values(x), send, receive, call))

    def broadcast(self, x: Tensor, root: int, *, tag: str = "") -> Tensor:
        """The root's `x`, on every rank; the others pass a tensor of its shape and dtype."""
        return self.broadcast_async(x, root, tag=tag).wait()

    def broadcast_async(self, x: Tensor, root: int, *, tag: str = "") -> Handle:
        """`broadcast` under way."""
        self._check_rank("root", root)
        call = _call("broadcast", x, tag, f"shape {list(x.shape)}, root {root}")
        return self._issue(self._broadcast(_values(x), root, call))

    def send(self, x: Tensor, destination: int, *, tag: str = "") -> Tensor:
        """Hand `x` to one rank, which must `recv` it; returns `x` when it may be overwritten."""
        return self.send_async(x, destination, tag=tag).wait()

    def send_async(self, x: Tensor, destination: int, *, tag: str = "") -> Handle:
        """`send` under way."""
        self._check_rank("destination", destination)
        call = _call("send", x, tag, f"shape {list(x.shape)}, to rank {destination}")
        return self._issue(self._send(_values(x), destination, call))

    def recv(self, shape: Sequence[int], dtype: torch.dtype, source: int, *, tag: str = "") -> Tensor:
        """The next tensor that `source` sends to this rank. Tensors between two ranks arrive in the order sent."""
        return self.recv_async(shape, dtype, source, tag=tag).wait()

    def recv_async(self, shape: Sequence[int], dtype: torch.dtype, source: int, *, tag: str = "") -> Handle:
        """`recv` under way."""
        self._check_rank("source", source)
        detail = f"shape {list(shape)}, from rank {source}"
        return self._issue(self._recv(tuple(shape), dtype, source, Call("recv", 0, name_of(dtype), tag, detail)))

    def barrier(self, *, tag: str = "") -> None:
        """Return once every rank has come here."""
        self.barrier_async(tag=tag).wait()

    def barrier_async(self, *, tag: str = "") -> Handle:
        """`barrier` under way; its result is an empty tensor."""
        return self._issue(self._barrier(Call("barrier", 0, "int8", tag)))

    @abstractmethod
    def split(self, ranks: Sequence[int]) -> "Group":
        """The group of some of these ranks, in rank order. All enter, each with its own list; lists never overlap."""

    # ---- the end of a step

    @final
    def end_step(self) -> None:
        """Raise `CommError` if a handle of this step was never waited for."""
        if self._ledger.open:
            calls = ", ".join(str(handle.call) for handle in self._ledger.open.values())
            self._ledger.open.clear()
            raise CommError(f"rank {self.rank} ended its step without waiting for {calls}; call wait() on each handle")

    @final
    def spent(self, seconds: float) -> None:
        """Count time that compiled code waited in this group's collectives."""
        self._ledger.waited_s += seconds

    @final
    def retire(self, handle: Handle, seconds: float) -> None:
        """Called by a handle when it has been waited for, with the time that took."""
        self._ledger.open.pop(id(handle), None)
        self._ledger.waited_s += seconds

    # ---- what an implementation fills in

    @abstractmethod
    def _all_reduce(self, x: Tensor, out: Tensor | None, call: Call) -> Handle: ...

    @abstractmethod
    def _all_gather(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle: ...

    @abstractmethod
    def _reduce_scatter(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle: ...

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int], call: Call) -> Handle:
        raise UnsupportedError(f"{type(self).__name__} has no all_to_all yet; use all_gather and keep your rows")

    @abstractmethod
    def _broadcast(self, x: Tensor, root: int, call: Call) -> Handle: ...

    @abstractmethod
    def _send(self, x: Tensor, destination: int, call: Call) -> Handle: ...

    @abstractmethod
    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, call: Call) -> Handle: ...

    @abstractmethod
    def _barrier(self, call: Call) -> Handle: ...

    # ---- checks

    def _issue(self, handle: Handle) -> Handle:
        handle._owner = self
        self._ledger.open[id(handle)] = handle
        return handle

    def _check_rank(self, name: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise UsageError(name, rank, f"the group has ranks 0…{self.size - 1}", "pass one of them")

    def _check_sizes(self, x: Tensor, dim: int, sizes: Sequence[int]) -> tuple[int, list[int]]:
        if not -x.dim() <= dim < x.dim():
            remedy = f"use 0…{x.dim() - 1}" if x.dim() else "pass a tensor with dims"
            raise UsageError("dim", dim, f"x is {_kind(x)}", remedy)
        if len(sizes) != self.size or min(sizes) < 0:
            raise UsageError(
                "sizes", list(sizes), f"one width, not negative, for each of {self.size} ranks", "fix sizes"
            )
        return dim % x.dim(), list(sizes)

    def check_whole(self, x: Tensor, dim: int, sizes: Sequence[int]) -> tuple[int, list[int]]:
        """`dim` and `sizes` of a cut of the whole of `x`, checked."""
        dim, sizes = self._check_sizes(x, dim, sizes)
        if x.shape[dim] != sum(sizes):
            raise UsageError("x", _kind(x), f"the shares along dim {dim} sum to {sum(sizes)}", "pass the whole tensor")
        return dim, sizes

    def check_members(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """The ranks of a split in rank order, checked: of this group, none twice, this rank among them."""
        members = tuple(sorted(ranks))
        if len(set(members)) != len(members) or self.rank not in members:
            raise UsageError("ranks", list(members), f"no rank twice, and rank {self.rank} among them", "fix the list")
        for rank in members:
            self._check_rank("ranks", rank)
        return members

    def agree_on_members(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """`check_members`, and that every rank named passes the same list: one small collective."""
        members = self.check_members(ranks)
        mine = torch.zeros(1, self.size, dtype=torch.int8, device="cpu")
        mine[0, list(members)] = 1
        table = self.all_gather(mine, 0, [1] * self.size, tag="split").tolist()
        lists = [[rank for rank, named in enumerate(row) if named] for row in table]
        for rank, named in enumerate(lists):
            for other in named:
                if lists[other] != named:
                    raise CommError(
                        f"split: rank {rank} names {named}, rank {other} names {lists[other]}; "
                        "the ranks of a group all pass the same list"
                    )
        return members


def _values(x: Tensor) -> Tensor:
    """`x` without its graph, and with memory that says what it is: torch conjugates and negates lazily."""
    return x.detach().resolve_conj().resolve_neg()


def _check_summed(x: Tensor) -> None:
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64) or (x.is_floating_point() and x.itemsize == 1):
        raise UnsupportedError(f"x={_kind(x)}: torch does not add {name_of(x.dtype)}; convert it to a wider type")


def sum_in_rank_order(parts: Sequence[Tensor]) -> Tensor:
    """A new tensor: the parts added first to last, so that every rank and every run gets the same bits.

    Half types are summed in float32 and rounded once; float64 in float64; integers exactly.
    """
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def put(result: Tensor, out: Tensor | None) -> Tensor:
    """The result itself, or `out` holding it."""
    if out is None:
        return result
    if (out.data_ptr(), out.stride()) != (result.data_ptr(), result.stride()):
        out.detach().copy_(result)  # a parameter may be the target: nothing here is differentiable
    return out


def _call(op: str, x: Tensor, tag: str, detail: str) -> Call:
    return Call(op, prod(x.shape) * x.element_size(), name_of(x.dtype), tag, detail)


def _cut(x: Tensor, dim: int, sizes: list[int]) -> str:
    shape: list[Any] = list(x.shape)
    shape[dim] = "+".join(map(str, sizes))
    return f"shape [{', '.join(map(str, shape))}]"


def _kind(x: Tensor) -> str:
    return f"{name_of(x.dtype)} {list(x.shape)}"
