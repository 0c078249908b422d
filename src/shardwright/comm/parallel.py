"""`initialize_model_parallel`: a job's ranks arranged as a mesh, and a group along each axis, made at once."""

from dataclasses import dataclass

from shardwright.comm.group import Group
from shardwright.comm.launch import join
from shardwright.comm.single import SingleGroup
from shardwright.errors import UsageError
from shardwright.layout.mesh import Axis, Mesh


@dataclass(frozen=True)
class ModelParallel:
    """A rank's groups.

    world: all ranks · tensor: those that share a layer's shards · pipeline: those of the other stages · data: those
    that hold the same shards and see other sequences.
    """

    mesh: Mesh
    world: Group
    tensor: Group
    pipeline: Group
    data: Group


def initialize_model_parallel(
    tensor: int, pipeline: int = 1, data: int = 1, *, world: Group | None = None
) -> ModelParallel:
    """Arrange the ranks of `world` as `tensor x pipeline x data`, tensor running fastest; every rank enters.

    world: by default what `torchrun` started this process in (`comm.launch.join`), a group of one where nothing did.

    Raises:
        UsageError: the axes do not multiply to the number of ranks.
    """
    mesh = Mesh(tensor, pipeline, data)
    world = world or join()
    if mesh.size != world.size:
        axes = f"{tensor} x {pipeline} x {data}"
        remedy = f"start {mesh.size} ranks: torchrun --nproc-per-node {mesh.size} SCRIPT"
        raise UsageError("tensor x pipeline x data", axes, f"the job has {world.size} ranks", remedy)
    return ModelParallel(mesh, world, *(_along(axis, mesh, world) for axis in ("tensor", "pipeline", "data")))


def _along(axis: Axis, mesh: Mesh, world: Group) -> Group:
    ranks = mesh.line(axis, world.rank)
    if len(ranks) == 1:
        return SingleGroup(world)
    return world if len(ranks) == world.size else world.split(ranks)
