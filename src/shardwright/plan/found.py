"""What a search gives: the winner, the others with why each lost, and what there is to show. Plain records."""

from dataclasses import asdict, dataclass, field
from typing import Any

from shardwright.plan.memory import Memory
from shardwright.plan.quantities import Floats

GIB = 2**30

IMBALANCE, COMMUNICATION = 0.10, 0.50
"""Rules of the field: ranks of a stage differ by less in memory; less of a step is communication."""


TRUSTED_ZERO = 256
"""Ranks of ZeRO-3 up to which published runs bear the cost model out."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to cut the job, and what it costs. step_s: a training step, or a decode step when serving.

    micro_batch: sequences a rank takes at once; when serving, requests under way at each of dp replicas. shares: of the
    work, each device's; none where they are equal.
    """

    tp: int
    pp: int
    vpp: int
    dp: int
    sp: int
    micro_batch: int
    recompute: str
    zero: int
    step_s: float
    memory_bytes: int
    communication_share: float
    tokens_per_s: float
    first_token_s: float | None = None
    per_token_s: float | None = None
    shares: tuple[float, ...] = ()

    def __str__(self) -> str:
        said = [f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}", f"micro-batch {self.micro_batch}"]
        said += [f"vpp{self.vpp}"] * (self.vpp > 1) + ["sp"] * (self.sp > 0)
        said += [f"recompute {self.recompute}"] * (self.recompute != "none") + [f"zero {self.zero}"] * (self.zero > 0)
        return " ".join(said)


@dataclass(frozen=True)
class Loser:
    """A layout that lost, and why."""

    layout: Layout
    reason: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """A plan. best is None where nothing fits; warnings: the rules that the winner breaks, and notes.

    stages: bytes by kind on a rank of each stage of the winner · seconds: a step by kind of the winner and the next
    ones that fit · frontier: (label, bytes,
    tokens a second, fits) of every shape, to draw.
    """

    model: str
    cluster: str
    mode: str
    best: Layout | None
    candidates: int
    search_s: float
    losers: tuple[Loser, ...]
    warnings: tuple[str, ...]
    stages: tuple[dict[str, float], ...]
    seconds: tuple[tuple[str, dict[str, float]], ...]
    frontier: tuple[tuple[str, float, float, bool], ...] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """One object; losers' layouts are said in short, as `tp4 pp2 dp1 …`, beside their figures."""
        said = asdict(self)
        said.pop("frontier")
        said["seconds"] = self.seconds[0][1] if self.best else {}
        said["losers"] = [
            {"layout": str(loser.layout), "reason": loser.reason, **asdict(loser.layout)} for loser in self.losers
        ]
        return said


def by_kind(held: Memory, stages: int) -> tuple[dict[str, float], ...]:
    """Bytes by kind, one record a stage."""
    return tuple({kind: float(_at(value, stage)) for kind, value in held.__dict__.items()} for stage in range(stages))


def _at(value: Floats, at: int) -> float:
    return float(value[at]) if getattr(value, "ndim", 0) else float(value)


def warnings_of(best: Layout, imbalance: float, alike: bool) -> tuple[str, ...]:
    """The rules that a layout breaks. alike: whether all devices are."""
    said = []
    if not alike and not best.shares:
        said.append("unequal devices with equal shares: all are priced as the slowest")
    if imbalance >= IMBALANCE:
        said.append(f"memory of the ranks of a stage differs by {100 * imbalance:.0f} %, over {100 * IMBALANCE:.0f} %")
    if best.zero == 3 and best.dp > TRUSTED_ZERO:
        said.append(f"ZeRO-3 over {best.dp} ranks: published runs above {TRUSTED_ZERO} are not predicted well")
    if best.communication_share >= COMMUNICATION:
        said.append(
            f"communication is {100 * best.communication_share:.0f} % of a step, over {100 * COMMUNICATION:.0f} %"
        )
    return tuple(said)


def summary(found: Found) -> str:
    """The winner in a sentence or two."""
    searched = f"{found.candidates:,} layouts in {found.search_s:.2f} s"
    best = found.best
    if best is None:
        return f"No layout of {found.model} on {found.cluster} is possible ({searched})."
    said = (
        f"{best}: {best.memory_bytes / GIB:.1f} GiB on the fullest device, {_rate(best.tokens_per_s)} tokens/s, "
        f"communication {100 * best.communication_share:.0f} % of a step of {best.step_s:.4g} s"
    )
    if best.first_token_s is not None and best.per_token_s is not None:
        said += f"; first token after {best.first_token_s:.3g} s, then {1e3 * best.per_token_s:.1f} ms each"
    if best.shares:
        said += "; shares " + ", ".join(f"{100 * share:.0f} %" for share in best.shares)
    return f"{said} ({searched})."


def _rate(tokens: float) -> str:
    """Whole tokens a second, or two digits where there are few."""
    return f"{tokens:,.0f}" if tokens >= 10 else f"{tokens:.2g}"
