"""`TorchGroup` on processes over gloo. A launch costs seconds, so one body checks much; references are plain loops.

More ranks than cores. Moves are bit-exact; gloo sums in its own order, so float sums are compared on whole numbers that
every type holds exactly, and in bits only with `deterministic=True`.
"""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.comm import regions
from shardwright.comm.group import Group, sum_in_rank_order
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.torch_group import TorchGroup
from shardwright.errors import CommError, UnsupportedError, UsageError
from shardwright.testing.ranks import on_gloo, on_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.uint8]


def whole_numbers(rank: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    """0…7, so that sums over five ranks are exact in every type."""
    draw = torch.Generator().manual_seed(rank)
    return torch.randint(0, 8, shape, generator=draw).to(dtype)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def check_dtypes(group: Group) -> None:
    """Every collective in every type, on widths 2, 0, 3, 1, 2 along the first, last and a negative dim."""
    n, sizes = group.size, [2, 0, 3, 1, 2][: group.size]
    for dtype in DTYPES:
        parts = [whole_numbers(rank, [3, sum(sizes)], dtype) for rank in range(n)]
        total, mine = sum_in_rank_order(parts), parts[group.rank]
        before = mine.clone()
        assert equal(group.all_reduce(mine), total)
        assert equal(group.reduce_scatter(mine, 1, sizes), total.split(sizes, 1)[group.rank])
        assert equal(group.reduce_scatter(mine.T, -2, sizes), total.split(sizes, 1)[group.rank].T)
        share = mine[:, : sizes[group.rank]]
        expected = torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], 1)
        assert equal(group.all_gather(share, -1, sizes), expected)
        assert equal(group.all_gather(share.T, 0, sizes), expected.T)
        assert equal(group.broadcast(mine, 2 % n), parts[2 % n])
        dealt = [part.T.split(sizes) for part in parts]
        received = group.all_to_all(mine.T, sizes, [sizes[group.rank]] * n)
        assert equal(received, torch.cat([rows[group.rank] for rows in dealt]))
        right, left = (group.rank + 1) % n, (group.rank - 1) % n
        handle = group.send_async(mine.T, right, tag="ring")
        assert equal(group.recv((sum(sizes), 3), dtype, left, tag="ring"), parts[left].T)
        handle.wait()
        assert equal(mine, before)


def check_memory(group: Group) -> None:
    """`out=` of any layout, `x` itself too; results are new; nothing, and nothing times something; inference mode."""
    n, expected = group.size, torch.full((2, 3), float(group.size))
    for out in (torch.empty(2, 3), torch.empty(3, 2).T):
        assert group.all_reduce(torch.ones(2, 3), out=out) is out
        assert equal(out, expected)
    x = torch.ones(3, 2).T
    assert group.all_reduce(x, out=x) is x
    assert equal(x, expected)
    assert equal(group.all_reduce(torch.ones(1, 3).expand(2, 3)), expected)
    weight = torch.nn.Parameter(torch.ones(2, 3))
    assert group.all_reduce(weight, out=weight) is weight
    assert equal(weight.detach(), expected)
    assert not group.all_gather(weight, 0, [2] * n).requires_grad

    empty = torch.empty(0, 3, dtype=torch.bfloat16)
    for result in (
        group.all_reduce(empty),
        group.all_gather(empty, 0, [0] * n),
        group.reduce_scatter(empty, 0, [0] * n),
        group.all_to_all(empty, [0] * n, [0] * n),
        group.broadcast(empty, 0),
    ):
        assert equal(result, empty)
    assert group.all_gather(torch.empty(1, 0), 0, [1] * n).shape == (n, 0)
    with torch.inference_mode():
        y = torch.ones(2)
        assert group.all_reduce(y).tolist() == [n, n]
        assert group.all_gather(y, 0, [2] * n).tolist() == [1] * 2 * n
        assert group.broadcast(y, 0).is_inference()


def check_rank_order(group: TorchGroup) -> None:
    """Bits of a sum from the first rank to the last, also of halves, and in a split; `ThreadGroup` gives the same."""
    group.deterministic = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        parts = [
            (torch.randn(50, generator=torch.Generator().manual_seed(rank)) * 10.0**rank).to(dtype)
            for rank in range(group.size)
        ]
        assert equal(group.all_reduce(parts[group.rank]), sum_in_rank_order(parts))
        x = parts[group.rank].clone()
        assert group.all_reduce(x, out=x) is x
        assert equal(x, sum_in_rank_order(parts))
        pair = group.split(range(group.size))
        assert equal(pair.all_reduce(parts[group.rank]), sum_in_rank_order(parts))
    group.deterministic = False


def check_splits(group: Group) -> None:
    """Disjoint, nested, listed in any order, twice the same; letters within one stay within it."""
    n, side = group.size, group.rank % 2
    mine = group.split([rank for rank in reversed(range(n)) if rank % 2 == side])
    assert (mine.rank, mine.size) == (group.rank // 2, (n + 1 - side) // 2)
    numbers = mine.all_gather(torch.tensor([group.rank]), 0, [1] * mine.size).tolist()
    assert numbers == list(range(side, n, 2))
    inner = mine.split([mine.rank])
    assert inner.all_reduce(torch.tensor([2.0])).tolist() == [2]
    again = group.split(range(n))
    first, second = again.all_reduce_async(torch.ones(1)), group.all_reduce_async(torch.full((1,), 2.0))
    assert (second.wait().item(), first.wait().item()) == (2 * n, n)
    if mine.rank == 0:
        mine.send(torch.tensor([1.0]), 1)
    elif mine.rank == 1:
        assert mine.recv((1,), torch.float32, 0).item() == 1


def check_handles(group: Group) -> None:
    """Issued before the peers come, done when they have, waited for in any order; letters keep theirs."""
    n = group.size
    if group.rank == 0:
        handle = group.all_reduce_async(torch.ones(1), tag="early")
        letter = group.recv_async((1,), torch.float32, 1)
        assert not handle.done()
        assert not letter.done()
        group.send(torch.zeros(1), 1)  # only now does rank 1 go on
        while not (handle.done() and letter.done()):
            pass
        assert (handle.wait().item(), letter.wait().item()) == (n, 5)
    else:
        if group.rank == 1:
            group.recv((1,), torch.float32, 0)
            group.send(torch.tensor([5.0]), 0)
        assert group.all_reduce(torch.ones(1), tag="early").item() == n
    handles = [group.all_reduce_async(torch.tensor([float(i)])) for i in range(20)]
    order = list(range(20))
    random.Random(group.rank).shuffle(order)
    assert all(handles[i].wait().item() == n * i for i in order)
    if group.rank == 0:
        for letter in [group.send_async(torch.tensor([float(i)]), 1) for i in range(5)]:
            letter.wait()
    elif group.rank == 1:
        letters = [group.recv_async((1,), torch.float32, 0) for _ in range(5)]
        assert [letter.wait().item() for letter in reversed(letters)] == [4, 3, 2, 1, 0]


def check_refusals(group: Group) -> None:
    with pytest.raises(UnsupportedError, match=r"all_reduce 't' of int16 .*: gloo does not move int16; convert it"):
        group.all_reduce(torch.ones(1, dtype=torch.int16), tag="t")
    wrong = [0, 1, 2] if group.rank == 2 else list(range(group.size))
    with pytest.raises(CommError, match=r"split: rank 0 names \[0, 1, 2, 3, 4\], rank 2 names \[0, 1, 2\]"):
        group.split(wrong)
    group.split(range(group.size)).broadcast_async(torch.ones(1), 0, tag="forgotten")
    with pytest.raises(CommError, match="'forgotten'"):
        group.end_step()


def check_sockets() -> None:
    """Every TCP socket of this process, listening or connected, has loopback at both ends (or nobody yet)."""
    inodes = {link.readlink().name for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.exists()}
    local = 0
    for table in (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6")):
        for line in table.read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in inodes:
                assert {fields[1].split(":")[0], fields[2].split(":")[0]} <= {"0100007F", "00000000"}, line
                assert fields[1].split(":")[0] == "0100007F", f"listens on all interfaces: {line}"
                local += 1
    assert local, "the ranks are connected somehow"


def check_regions(group: Group) -> list[float]:
    """The same gradients on processes as on threads; widths 2, 0, 3, 1, 2."""
    recorder, sizes = RecordingGroup(group), [2, 0, 3, 1, 2]
    x = torch.arange(8.0, dtype=torch.float64).requires_grad_()
    share = regions.scatter(regions.copy(x, recorder, "c"), 0, sizes, recorder, "s").sin()
    whole = regions.reduce(regions.gather(share, 0, sizes, recorder, "g"), recorder, "r")
    whole.square().sum().backward()
    assert [call.tag for call in recorder.calls] == ["g", "r", "s/grad", "c/grad"]
    assert x.grad is not None
    return x.grad.tolist()


def check_everything(group: TorchGroup) -> list[float]:
    check_dtypes(group)
    check_memory(group)
    check_rank_order(group)
    check_splits(group)
    check_handles(group)
    check_refusals(group)
    check_sockets()
    group.barrier()
    return check_regions(group)


def test_five_processes() -> None:
    """Gradients of sums of five equal values: 1e-12 lies far above float64's rounding of values below 100."""
    processes: list[Any] = on_gloo(5, check_everything)
    threads = on_threads(5, check_regions)
    assert processes == [pytest.approx(gradient, abs=1e-12) for gradient in threads]


def check_wrapped(group: Group, store: str) -> None:
    """A process group that torch.distributed made does all that our own does, and so does a subgroup of it."""
    dist.init_process_group("gloo", store=dist.FileStore(store, group.size), rank=group.rank, world_size=group.size)
    world = dist.distributed_c10d._get_default_group()
    wrapped = TorchGroup.of(world)
    assert (wrapped.rank, wrapped.size, wrapped.device) == (group.rank, group.size, torch.device("cpu"))
    check_dtypes(wrapped)
    check_memory(wrapped)
    check_rank_order(wrapped)
    check_splits(wrapped)
    check_handles(wrapped)
    check_refusals(wrapped)
    check_sockets()
    named = TorchGroup.named(world.group_name)
    assert named.all_reduce(torch.ones(1)).item() == group.size
    assert (named.name, named.is_named()) == (world.group_name, True)
    assert not named.split(range(group.size)).is_named()
    assert not group.is_named()  # type: ignore[attr-defined]
    members = [4, 1, 2]
    made = dist.new_group(members)
    if group.rank in members:
        some = TorchGroup.of(made)
        assert some.all_gather(torch.tensor([group.rank]), 0, [1] * 3).tolist() == sorted(members)
        assert dist.get_global_rank(made, some.rank) == group.rank
    with pytest.raises(UsageError, match="group=gone: no process group of this process has that name; call torch"):
        TorchGroup.named("gone")
    group.barrier()


def test_a_process_group_of_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    on_gloo(5, check_wrapped, str(tmp_path / "store"))


HCCL = """
import sys, torch
from shardwright.comm.torch_group import TorchGroup
torch.utils.rename_privateuse1_backend("npu")  # as torch_npu does; for good, so not in the tests' own process
asked = []
class Backend:
    def get_hccl_comm_name(self, rank):
        asked.append((type(self).__name__, rank))
        return f"hccl-{rank}"
class ProcessGroup(Backend):
    group_name, _device_types = "0", [torch.device("npu")]
    def rank(self): return 1
    def size(self): return 2
    def _get_backend(self, device):
        assert device == torch.device("npu")
        return Backend()
group = TorchGroup.of(ProcessGroup())
assert group.device == torch.device("npu")
torch.__version__ = torch.torch_version.TorchVersion(sys.argv[1])
print(group.hccl_name(5), group.hccl_name(), asked)
"""


@pytest.mark.parametrize(
    ("version", "asked"),
    [("2.13.0", "Backend"), ("2.1.0", "Backend"), ("2.0.1", "ProcessGroup"), ("1.11", "ProcessGroup")],
)
def test_the_name_of_an_hccl_communicator_is_asked_as_documented(version: str, asked: str) -> None:
    """A recorded fake of torch_npu's two ways; no such device has been seen."""
    done = subprocess.run(
        [sys.executable, "-c", HCCL, version], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == f"hccl-5 hccl-1 {[(asked, 5), (asked, 1)]}\n", done.stderr


def test_threads_pass_the_same_checks() -> None:
    """One seam: what holds for processes holds for threads."""
    for body in (check_dtypes, check_memory, check_splits):
        on_threads(5, body)
