"""`TorchGroup`: ranks as processes over a process group of torch.distributed: one made here over gloo, or the caller's.

Process groups over NCCL and HCCL take the same road, unproven: no such device has run it.

Waits poll the work handle and the abort word and never block inside the backend, so a dead peer ends them within
seconds. Sums are the backend's, in its order; `deterministic=True` gathers and sums in rank order instead.
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _resolve_process_group  # type: ignore[attr-defined]

from shardwright.comm.group import Call, Done, Group, Handle, put, sum_in_rank_order
from shardwright.comm.watch import ABORT_GRACE, AbortWord, poll
from shardwright.errors import AbortedError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed.distributed_c10d import GroupName

LOOPBACK = "127.0.0.1"
JOIN_TIMEOUT = timedelta(seconds=60)
CARRIED = frozenset(["float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"])
"""Types that every collective of gloo moves, by torch's names."""

_INITIALISE = "call torch.distributed.init_process_group as where the model was exported"


class _WorkHandle(Handle):
    """A collective of the backend; `finish` turns its buffers into the result."""

    def __init__(self, call: Call, work: dist.Work, abort: AbortWord, finish: Callable[[], Tensor]) -> None:
        super().__init__(call)
        self._work, self._abort, self._then = work, abort, finish

    def done(self) -> bool:
        """Whether the backend has finished."""
        return self._result is not None or self._work.is_completed() or self._abort.failed() is not None

    def _finish(self) -> Tensor:
        poll(self._work.is_completed, self._abort, self.call)
        _settle(self._work, self._abort, self.call)
        return self._then()


class _PeerHandle(Handle):
    """A send or receive: gloo's work handle never reports completion by itself, so a thread of its own waits for it."""

    def __init__(self, call: Call, work: dist.Work, abort: AbortWord, x: Tensor) -> None:
        super().__init__(call)
        self._work, self._abort, self._x = work, abort, x
        self._thread = Thread(target=self._wait_for_peer, daemon=True)
        self._broken: RuntimeError | None = None
        self._thread.start()

    def done(self) -> bool:
        """Whether the tensor has moved, or never will."""
        return not self._thread.is_alive() or self._abort.failed() is not None

    def _wait_for_peer(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            self._broken = error

    def _finish(self) -> Tensor:
        poll(lambda: not self._thread.is_alive(), self._abort, self.call)
        if self._broken:
            raise _lost(self._abort, self.call, self._broken)
        return self._x


@final
class TorchGroup(Group):
    """Ranks as processes: `join` connects them through a store, `of` and `named` take a process group that exists.

    deterministic: sum in rank order · device: where `recv` puts what arrives.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        abort: AbortWord,
        device: torch.device,
        address: str | None = None,
        parent: Group | None = None,
    ) -> None:
        super().__init__(process_group.rank(), process_group.size(), parent)
        self._backend, self._abort, self.device, self._address = process_group, abort, device, address
        self.deterministic = False

    @classmethod
    def join(
        cls,
        store: "Store",
        rank: int,
        size: int,
        abort: AbortWord,
        address: str | None = LOOPBACK,
        parent: Group | None = None,
    ) -> "TorchGroup":
        """Rank `rank` of `size` over gloo, connected when this returns.

        address: where this host listens for its peers; None leaves it to torch, as `init_process_group` does.
        """
        try:
            process_group = _gloo(store, rank, size, address)
        except RuntimeError as error:
            raise _lost(abort, f"joining {size} ranks", error) from error
        group = cls(process_group, abort, torch.device("cpu"), address, parent)
        group.barrier(tag="join")  # nobody leaves, having nothing to do, while others still connect
        return group

    @classmethod
    def of(cls, process_group: dist.ProcessGroup, device: torch.device | None = None) -> "TorchGroup":
        """The caller's own process group, as `torch.distributed` made it; nothing moves. Its timeouts stay its own.

        device: by default the CPU where the process group serves it, else the first device that it serves.
        """
        served = process_group._device_types
        cpu = torch.device("cpu")
        return cls(process_group, AbortWord(), device or (cpu if cpu in served or not served else served[0]))

    @classmethod
    def named(cls, name: str) -> "TorchGroup":
        """The process group that `torch.distributed` knows by this name, as traced collectives carry it."""
        try:
            return cls.of(_resolve_process_group(cast("GroupName", name)))
        except RuntimeError as error:
            raise UsageError("group", name, "no process group of this process has that name", _INITIALISE) from error

    def split(self, ranks: Sequence[int]) -> "TorchGroup":
        """The group of those ranks over gloo, connected before this returns, through the store of this one.

        Raises:
            UnsupportedError: the process group is the caller's, and not over gloo.
        """
        members = self.agree_on_members(ranks)
        if self.device.type != "cpu":
            remedy = "make the smaller one with torch.distributed.new_group, and pass it to TorchGroup.of"
            raise UnsupportedError(f"a process group on {self.device.type} is not split here; {remedy}")
        store, name = self._backend.get_group_store(), "-".join(map(str, members))
        times = store.add(f"splits {name} of {self.rank}", 1)  # alike on all: each counts there what it enters
        store = PrefixStore(f"split {name}, {times}", store)
        child = TorchGroup.join(store, members.index(self.rank), len(members), self._abort, self._address, self)
        child.deterministic = self.deterministic
        return child

    @property
    def name(self) -> str:
        """What `torch.distributed` calls the process group."""
        return self._backend.group_name

    def is_named(self) -> bool:
        """Whether `name` leads back to this process group, as operators that take a name need: not that of a split."""
        try:
            return bool(_resolve_process_group(self._backend.group_name) == self._backend)
        except RuntimeError:
            return False

    def hccl_name(self, rank: int | None = None) -> str:
        """The communicator's name, which Ascend's fused operators take as `hcom`. rank: this one's, in the whole job.

        Unproven: never run on such a device. The calls are those of op-plugin's documentation.
        """
        if rank is None:
            rank = dist.get_global_rank(self._backend, self.rank) if self.is_named() else self.rank
        if torch.__version__ > "2.0.1":
            npu: Any = self._backend._get_backend(torch.device("npu"))
        else:
            npu = self._backend
        return str(npu.get_hccl_comm_name(rank))

    def _all_reduce(self, x: Tensor, out: Tensor | None, call: Call) -> Handle:
        if self.deterministic:
            return self._gathered(x, call, lambda parts: put(sum_in_rank_order(parts), out))
        y = put(x, out) if out is not None and out.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
        return self._handle(
            call, lambda: self._backend.allreduce([y]), lambda: y if out is None or out is y else out.copy_(y)
        )

    def _all_gather(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        rows = x.movedim(dim, 0)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # gloo refuses unequal sizes
        padded[: len(rows)] = rows
        return self._gathered(
            padded, call, lambda parts: _joined([p[:n] for p, n in zip(parts, sizes, strict=True)], dim)
        )

    def _reduce_scatter(self, x: Tensor, dim: int, sizes: list[int], call: Call) -> Handle:
        mine = sizes[self.rank]

        def summed(rows: Tensor) -> Tensor:
            parts = list(rows.view(self.size, mine, *rows.shape[1:]))
            return sum_in_rank_order(parts).movedim(0, dim).contiguous()

        return self._exchanged(x.movedim(dim, 0), sizes, [mine] * self.size, call, summed)

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int], call: Call) -> Handle:
        return self._exchanged(x, send, receive, call, lambda rows: rows)

    def _broadcast(self, x: Tensor, root: int, call: Call) -> Handle:
        y = x.clone(memory_format=torch.contiguous_format)
        return self._handle(call, lambda: self._backend.broadcast(y, root), lambda: y)

    def _send(self, x: Tensor, destination: int, call: Call) -> Handle:
        work = self._started(call, lambda: self._backend.send([x.contiguous()], destination, 0))
        return _PeerHandle(call, work, self._abort, x)

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, call: Call) -> Handle:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        work = self._started(call, lambda: self._backend.recv([x], source, 0))
        return _PeerHandle(call, work, self._abort, x)

    def _barrier(self, call: Call) -> Handle:
        one = torch.zeros(1, device=self.device)
        return self._handle(call, lambda: self._backend.allreduce([one]), lambda: torch.empty(0))

    def _gathered(self, x: Tensor, call: Call, finish: Callable[[list[Tensor]], Tensor]) -> Handle:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        if not x.numel():
            return Done(call, finish(parts))
        return self._handle(call, lambda: self._backend.allgather([parts], [x]), lambda: finish(parts))

    def _exchanged(
        self, x: Tensor, send: list[int], receive: list[int], call: Call, finish: Callable[[Tensor], Tensor]
    ) -> Handle:
        rows = x.new_empty(sum(receive), *x.shape[1:])
        return self._handle(
            call,
            lambda: self._backend.alltoall_base(rows, x.contiguous(), receive, send),
            lambda: finish(rows),
        )

    def _handle(self, call: Call, start: Callable[[], dist.Work], finish: Callable[[], Tensor]) -> Handle:
        return _WorkHandle(call, self._started(call, start), self._abort, finish)

    def _started(self, call: Call, start: Callable[[], dist.Work]) -> dist.Work:
        """The work under way; a connection already broken is another rank's fault, as it is in a wait."""
        if call.dtype not in CARRIED:
            raise UnsupportedError(f"{call}: gloo does not move {call.dtype}; convert it to one of {sorted(CARRIED)}")
        try:
            return start()
        except RuntimeError as error:
            raise _lost(self._abort, call, error) from error


def _gloo(store: "Store", rank: int, size: int, address: str | None) -> dist.ProcessGroup:
    """A process group that listens on one address only, connected to all its peers."""
    gloo: Any = dist.ProcessGroupGloo  # torch's stubs leave out its options
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address) if address else gloo.create_default_device()]
    options._timeout = JOIN_TIMEOUT
    process_group = dist.ProcessGroup(store, rank, size)
    kind = dist.ProcessGroup.BackendType.GLOO
    process_group._register_backend(torch.device("cpu"), kind, gloo(store, rank, size, options))
    process_group._set_default_backend(kind)
    return process_group


def _settle(work: dist.Work, abort: AbortWord, call: Call) -> None:
    """Raise what went wrong in a work that has completed."""
    try:
        work.wait()
    except RuntimeError as error:
        raise _lost(abort, call, error) from error


def _lost(abort: AbortWord, call: object, error: RuntimeError) -> AbortedError:
    """A connection broke: give the launcher a moment to say who died, since that is the cause."""
    deadline = time.monotonic() + ABORT_GRACE
    while abort.failed() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    abort.check(call)
    said = str(error).splitlines()[0]
    return AbortedError(f"{call} broke off: {said.partition('] ')[2] or said}")  # after the place in gloo's source


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts).movedim(0, dim).contiguous()
