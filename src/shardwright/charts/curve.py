"""Loss over training steps, as a picture file."""

from collections.abc import Sequence
from pathlib import Path

Points = Sequence[tuple[int, float]]
"""(step, loss)."""


def draw_curve(path: Path, training: Points, validation: Points = (), title: str = "") -> None:
    """Write the curve; the file's suffix says in which format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(
        *zip(*training, strict=True), color="#9db8d6", linewidth=1, label="training, each step"
    ) if training else None
    smooth = smoothed([loss for _, loss in training])
    if training:
        axes.plot([step for step, _ in training], smooth, color="#1f5fa8", linewidth=1.6, label="training, smoothed")
    if validation:
        axes.plot(
            *zip(*validation, strict=True), "o-", color="#c4542d", markersize=3, linewidth=1.2, label="validation"
        )
    axes.set(xlabel="step", ylabel="loss a token (nats)", title=title)
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential mean of the values so far, without the bias of its start."""
    found, mean, mass = [], 0.0, 0.0
    for value in values:
        mean, mass = weight * mean + (1 - weight) * value, weight * mass + (1 - weight)
        found.append(mean / mass)
    return found
