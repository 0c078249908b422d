"""One step of training over tensor and data parallel ranks: forward, backward, sums, norm, update.

Decides the order of collectives in a step, and what is counted once: the loss by one rank of each tensor group, a
gradient's element by the first of its holders. Knows no files, no schedule and no recovery.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from shardwright.comm.parallel import ModelParallel
from shardwright.layers.cross_entropy import vocab_parallel_cross_entropy
from shardwright.layers.dropout import Dropout
from shardwright.layers.flow import Flow
from shardwright.layers.gradients import partial_names, sum_partial
from shardwright.layers.layer import narrowed
from shardwright.layers.recompute import Keep, KeepAll, RecomputeBlocks, RecomputeCores
from shardwright.layout.spec import within_rows
from shardwright.models.decoder import Decoder
from shardwright.train.data_parallel import GradientSynchroniser
from shardwright.train.flat import FlatParameters
from shardwright.train.optimizer import ShardedAdamW
from shardwright.train.recipe import OptimizerPart, ParallelPart, TrainPart
from shardwright.train.windows import Micro

KEEPS: dict[str, type[Keep]] = {"none": KeepAll, "selective": RecomputeCores, "full": RecomputeBlocks}


@dataclass(frozen=True)
class Gradient:
    """What a step found before it changes anything: mean loss a token, norm of the whole gradient."""

    loss: float
    norm: float


@final
class Stepper:
    """A model's parameters, their gradients and optimiser, on this rank. The model's own tensors move into `flat`."""

    def __init__(
        self,
        model: Decoder,
        groups: ModelParallel,
        train: TrainPart,
        optimizer: OptimizerPart,
        parallel: ParallelPart,
    ) -> None:
        self.model, self.groups, self.train, self.clip = model, groups, train, optimizer.clip
        self.tables = [model.specs(rank) for rank in range(groups.tensor.size)]
        self.table = self.tables[groups.tensor.rank]
        self.late = partial_names(self.table)
        self.flat = FlatParameters(dict(model.named_parameters()), self.late)
        self.shares = self.flat.shares(groups.data.size)
        self.zero = parallel.zero and groups.data.size > 1
        own = self.shares.range(groups.data.rank) if self.zero else (0, self.flat.numel)
        self.uncompressed = parallel.uncompressed_steps
        signs = parallel.compression == "1bit" and groups.data.size > 1
        self.optimizer = ShardedAdamW(self.flat, own, optimizer, self.uncompressed if signs else None)
        self.synchroniser = GradientSynchroniser(
            self.flat,
            groups.data,
            shares=self.shares if self.zero else None,
            compression=None if parallel.compression == "none" else parallel.compression,
        )
        self.keep = KEEPS[train.recompute]()
        self._counted = list(self._views_counted())

    def gradient(self, micros: Sequence[Micro], tokens: int, step: int) -> Gradient:
        """Fill `flat.grad` with the gradient of the mean loss over a step's `tokens`; `micros` are this rank's part.

        Every rank enters, one without sequences too.
        """
        self.flat.clear()
        compress = self.optimizer.done >= self.uncompressed
        total = torch.zeros((), dtype=torch.float64)
        for at, micro in enumerate(micros):
            if at == len(micros) - 1:
                self.synchroniser.begin(compress=compress)
            loss = self.losses(micro, step).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if not micros:
            self.synchroniser.begin(compress=compress)
        self.flat.complete()
        partial = {name: self.flat.view(self.flat.grad, name) for name in self.late}
        sum_partial(partial, self.tables, self.groups.tensor, like=self.flat.grad)
        self.synchroniser.finish()
        return self._agreed(total)

    def update(self, gradient: Gradient, lr: float) -> None:
        """Clip, update what this rank owns, and hand the new parameters round."""
        if self.clip and gradient.norm > self.clip:
            self.flat.grad.mul_(self.clip / gradient.norm)
        self.optimizer.step(lr)
        self.share_parameters()

    def share_parameters(self) -> None:
        """Have every data rank hold what their owners have."""
        if self.zero:
            mine = self.flat.data[slice(*self.optimizer.own)]
            self.flat.data.copy_(self.groups.data.all_gather(mine, 0, self.shares.widths, tag="parameters"))

    def losses(self, micro: Micro, step: int | None = None) -> Tensor:
        """The loss of each token, alike on the ranks of a tensor group; step: of dropout's draws, or none dropped."""
        dropout, asked = None, self.train
        if step is not None and (asked.dropout or asked.attention_dropout):
            dropout = Dropout(asked.dropout, asked.seed, step, micro.first_row, asked.attention_dropout)
        logits = self.model(micro.batch, flow=Flow(keep=self.keep, dropout=dropout))
        return vocab_parallel_cross_entropy(logits, micro.targets, self.model.cuts.vocabulary, self.model.group)

    def evaluate(self, micros: Sequence[Micro]) -> float:
        """Mean loss a token over all data ranks' `micros`."""
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for micro in micros:
                losses = self.losses(micro)
                sums += torch.tensor([float(losses.double().sum()), len(losses)])
        total = self.groups.data.all_reduce(sums, tag="evaluation")
        return float(total[0] / total[1].clamp_min(1))

    def _agreed(self, loss: Tensor) -> Gradient:
        """The same two numbers on every rank, bit for bit, so that all decide alike."""
        squares = sum(float(torch.linalg.vector_norm(view)) ** 2 for view in self._counted)
        mine = torch.tensor([float(loss) if self.groups.tensor.rank == 0 else 0.0, squares], dtype=torch.float64)
        total = self.groups.world.all_reduce(mine, tag="loss and norm")
        return Gradient(float(total[0]), float(total[1].sqrt()))

    def _views_counted(self) -> list[Tensor]:
        """What of `flat.grad` this rank counts in the norm: of each piece the first holder, of each row the owner."""
        if not self.zero and self.groups.data.rank:
            return []
        found = []
        for name, spec in self.table.items():
            view = self.flat.view(self.flat.grad, name)
            for piece in spec.pieces:
                owned = within_rows(piece, *self.optimizer.owned_rows(name))
                if piece.holders[0] == self.groups.tensor.rank and owned is not None:
                    found.append(narrowed(view, owned.local_ranges))
        return found
