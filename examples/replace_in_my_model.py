"""A model of one's own that multiplies and sums over its ranks: exported, its pairs replaced, the same result.

The sizes are those of the example in Ascend's documentation of its fused operator; here eight processes talk over gloo.

python examples/replace_in_my_model.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from shardwright import replace_matmul_all_reduce

RANKS, M, K, N = 8, 64, 512, 128


class MyModel(torch.nn.Module):
    """`x [M, K]`, `weight [K, N]`, this rank's parts of longer ones → the whole product, `[M, N]`."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As torch's own users write it."""
        output = torch.matmul(x, weight)
        dist.all_reduce(output, op=dist.ReduceOp.SUM)
        return output


def run_rank(rank: int, store: str) -> None:
    """One rank's life."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    draw = torch.Generator().manual_seed(rank)
    inputs = torch.randn(M, K, generator=draw), torch.randn(K, N, generator=draw)

    program = torch.export.export(MyModel(), inputs)
    replaced = replace_matmul_all_reduce(program)

    before, after = program.module()(*inputs), replaced.module(*inputs)
    assert torch.equal(before, after)  # the same product and the same sum: the same bits
    if rank == 0:
        print(f"{replaced}; {RANKS} ranks agree with the model as it was")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as directory:
        processes.start_processes(run_rank, (f"{directory}/store",), nprocs=RANKS, start_method="fork")
