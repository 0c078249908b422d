"""metrics.jsonl as a resumed run, a kill and a full disk leave it."""

from pathlib import Path
from typing import Any

from shardwright.train.metrics import Metrics, read


def written(run: Path, after: int, steps: range, said: list[str]) -> None:
    with Metrics(run, after, said.append, tensorboard=False) as metrics:
        for step in steps:
            metrics.add({"step": step, "loss": 1 / step})


def steps_in(run: Path) -> list[int]:
    return [line["step"] for line in read(run / "metrics.jsonl")]


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    """Lines after it go, and so does one that a kill cut short."""
    written(tmp_path, 0, range(1, 6), [])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    written(tmp_path, 3, range(4, 8), [])
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


class Full:
    """A file on a disk that has room for five bytes at the second write."""

    def __init__(self, file: Any) -> None:
        self.file, self.writes = file, 0

    def write(self, text: bytes) -> int:
        self.writes += 1
        return int(self.file.write(text[:5] if self.writes == 2 else text))

    def truncate(self, size: int) -> None:
        self.file.truncate(size)

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_costs_the_lines_that_found_no_room_and_one_warning(tmp_path: Path) -> None:
    said: list[str] = []
    with Metrics(tmp_path, 0, said.append, tensorboard=False) as metrics:
        metrics._file = Full(metrics._file)  # type: ignore[assignment]
        for step in range(1, 5):
            metrics.add({"step": step})
    assert steps_in(tmp_path) == [1, 3, 4]
    assert said == [f"{tmp_path}: No space left on device; metrics go missing, training goes on"]
