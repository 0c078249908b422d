"""A step at every split against the unsharded twin: every gradient behind the sums, and the parameters that come of it.

The twin is one rank's decoder under torch's own loss over whole logits and torch's own AdamW; float64, so that what
differs is the order of sums and nothing else.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.test_training import VARIANTS, model_of
from torch import Tensor

from shardwright.comm.group import Group
from shardwright.comm.parallel import initialize_model_parallel
from shardwright.comm.recording import RecordingGroup
from shardwright.comm.single import SingleGroup
from shardwright.layers.batch import Batch
from shardwright.layers.layer import cut, narrowed
from shardwright.models.decoder import Decoder
from shardwright.testing.models import whole_tensors
from shardwright.testing.ranks import on_threads
from shardwright.train.recipe import OptimizerPart, ParallelPart, TrainPart
from shardwright.train.stepper import Stepper
from shardwright.train.windows import Windows

LR, BATCH = 0.05, 5
OPTIMIZER = OptimizerPart(lr=LR, eps=1e-4, clip=0.05)
"""eps well above what rounding leaves of a gradient that is none, such as a k bias's; every step's norm is clipped."""
WINDOWS = Windows((np.arange(100) * 7 % 23).astype(np.uint16), 7, 0.0, seed=1)
"""15 sequences of 7 tokens, the last of one. Five a step: two data ranks have three and two, two to a micro-batch."""


@dataclass(frozen=True)
class Split:
    """A mesh, and how it shares rows and optimiser."""

    tensor: int
    data: int
    sequence: bool = False
    zero: bool = True

    def __str__(self) -> str:
        named = f"{self.tensor}x{self.data}{' sequence' * self.sequence}"
        return f"{named}{' whole optimiser' * (not self.zero and self.data > 1)}"


class Twin:
    """The whole model in one process."""

    def __init__(self, changes: dict[str, Any]) -> None:
        self.model: Decoder = model_of(SingleGroup(), changes, sequence=False)
        decays = [
            {"params": list(parameters), "weight_decay": OPTIMIZER.weight_decay if matrix else 0.0}
            for matrix, parameters in groupby(sorted(self.model.parameters(), key=Tensor.dim), lambda p: p.dim() > 1)
        ]
        self.adamw = torch.optim.AdamW(decays, lr=LR, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)

    def gradient(self, windows: list[int]) -> tuple[float, float]:
        """Mean loss a token over all sequences at once, and the norm of its gradient."""
        self.adamw.zero_grad()
        tokens, length = torch.from_numpy(WINDOWS.row.astype(np.int64)), WINDOWS.length
        spans = [(at * length, at * length + WINDOWS.targets(at)) for at in windows]
        logits = self.model(Batch.whole([tokens[start:stop].tolist() for start, stop in spans]))
        targets = torch.cat([tokens[start + 1 : stop + 1] for start, stop in spans])
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        norms = [torch.linalg.vector_norm(p.grad) for p in self.model.parameters() if p.grad is not None]
        return float(loss.detach()), float(torch.linalg.vector_norm(torch.stack(norms)))

    def update(self, norm: float) -> None:
        """Clipped exactly: `clip_grad_norm_` adds 1e-6 to the norm."""
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad *= OPTIMIZER.clip / norm
        self.adamw.step()

    def laid_out(self, stepper: Stepper, *, gradients: bool) -> Tensor:
        """Its gradients, or values, as the rank's flat buffer has them."""
        own = {name: p.grad if gradients else p.data for name, p in self.model.named_parameters()}
        whole = whole_tensors({name: value for name, value in own.items() if value is not None}, self.model.specs())
        flat = torch.full_like(stepper.flat.grad, float("nan"))
        for name, spec in stepper.table.items():
            for piece in spec.pieces:
                narrowed(stepper.flat.view(flat, name), piece.local_ranges).copy_(cut(whole[piece.source], piece))
        return flat


def stepper_of(group: Group, split: Split, changes: dict[str, Any]) -> Stepper:
    groups = initialize_model_parallel(split.tensor, 1, split.data, world=group)
    model = model_of(groups.tensor, changes, split.sequence)
    parallel = ParallelPart(tensor=split.tensor, data=split.data, sequence=split.sequence, zero=split.zero)
    return Stepper(model, groups, TrainPart(steps=9, batch=BATCH, micro_batch=2), OPTIMIZER, parallel)


def check(group: Group, split: Split, changes: dict[str, Any], steps: int = 2) -> None:
    """Loss, norm, every gradient that this rank updates with, and every parameter afterwards; 1e-12 in float64, and for
    parameters 1e-8, since AdamW divides by what may be as small as eps.
    """
    stepper, twin = stepper_of(group, split, changes), Twin(changes)
    mine = slice(*stepper.optimizer.own)
    for step in range(steps):
        windows = WINDOWS.of_step(step, BATCH)
        micros = WINDOWS.micros(windows, stepper.groups.data.rank, split.data, 2)
        found = stepper.gradient(micros, sum(map(WINDOWS.targets, windows)), step)
        loss, norm = twin.gradient(windows)
        assert norm > OPTIMIZER.clip
        assert (found.loss, found.norm) == (pytest.approx(loss, rel=1e-12), pytest.approx(norm, rel=1e-12))
        expected = twin.laid_out(stepper, gradients=True)[mine]
        torch.testing.assert_close(stepper.flat.grad[mine], expected, rtol=1e-12, atol=1e-14)
        stepper.update(found, LR)
        twin.update(norm)
        torch.testing.assert_close(stepper.flat.data, twin.laid_out(stepper, gradients=False), rtol=1e-8, atol=1e-9)


DIAGONAL = [
    (Split(1, 2, zero=False), "untied"),
    (Split(2, 2, sequence=True), "tied"),
    (Split(3, 2), "qwen3"),
    (Split(3, 2, sequence=True, zero=False), "biases"),
    (Split(5, 2, sequence=True), "qwen3"),
    (Split(5, 1), "untied"),
]
"""Every degree, kind of model and way of sharing in some case."""

GRID = [
    (Split(tensor, data, sequence, zero), kind)
    for kind in VARIANTS
    for tensor in (1, 2, 3, 5)
    for data, zero in ((1, False), (2, False), (2, True))
    for sequence in (False, True)
]


@pytest.mark.parametrize(
    ("split", "kind"),
    [*DIAGONAL, *(pytest.param(*case, marks=pytest.mark.long) for case in GRID if case not in DIAGONAL)],
    ids=str,
)
def test_gradients_and_updates_are_those_of_the_twin(split: Split, kind: str) -> None:
    """6 query heads over 2 KV heads: at 3 and 5 ranks KV heads straddle; nothing is even but hidden at 2 and 5."""
    on_threads(split.tensor * split.data, check, split, VARIANTS[kind])


def moved(group: Group, split: Split) -> tuple[dict[tuple[str, str], list[int]], int, int]:
    """What this rank hands over in a step of one micro-batch of 14 rows: bytes of each call by (op, what for); bytes of
    its gradients, and of what of them it owns.
    """
    recording = RecordingGroup(group)
    stepper = stepper_of(recording, split, {})
    recording.calls.clear()
    windows = WINDOWS.of_step(0, 2 * split.data)
    micros = WINDOWS.micros(windows, stepper.groups.data.rank, split.data, 2)
    assert [len(micro.targets) for micro in micros] == [14]
    stepper.update(stepper.gradient(micros, 14 * split.data, 0), LR)
    found: dict[tuple[str, str], list[int]] = {}
    own = ("gradients", "parameters", "partial gradients", "loss and norm", "loss")
    for call in recording.calls:
        found.setdefault((call.op, call.tag if call.tag in own else "rows"), []).append(call.bytes)
    start, stop = stepper.optimizer.own
    return found, stepper.flat.grad.nbytes, stepper.flat.grad[start:stop].nbytes


ROWS = 14 * 20 * 8
"""Bytes of the residual stream; five products are entered and five left (two a layer, one at each end of the model)."""


def test_collectives_of_a_step() -> None:
    """Whole rows, whole optimiser: ten all-reduces of rows, three numbers a row for the loss, all gradients once."""
    for found, gradients, _ in on_threads(4, moved, Split(2, 2, zero=False)):
        assert found == {
            ("all_reduce", "rows"): [ROWS] * 10,
            ("all_gather", "loss"): [3 * 14 * 8],
            ("all_reduce", "gradients"): [gradients],
            ("all_reduce", "loss and norm"): [16],
        }


def test_collectives_of_a_step_with_shared_rows_and_optimiser() -> None:
    """Each all-reduce becomes a reduce-scatter and an all-gather of half, and what entered a product is gathered again.

    The five norms are summed over tensor ranks, and are the last bucket of the sum over data ranks; each rank hands
    round what it owns.
    """
    for found, gradients, owned in on_threads(4, moved, Split(2, 2, sequence=True)):
        norms = 5 * 20 * 8
        assert found == {
            ("reduce_scatter", "rows"): [ROWS] * 10,
            ("all_gather", "rows"): [ROWS // 2] * 15,
            ("all_gather", "loss"): [3 * 14 * 8],
            ("all_reduce", "partial gradients"): [norms],
            ("reduce_scatter", "gradients"): [gradients - norms, norms],
            ("all_gather", "parameters"): [owned],
            ("all_reduce", "loss and norm"): [16],
        }
