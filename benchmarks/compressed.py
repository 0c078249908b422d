"""Does the loss fall with compressed gradients as it does with whole ones?

python benchmarks/compressed.py [--case SUBSTRING] [--peer whole|bf16|int8|1bit] [--json]

A Qwen3-shaped model of 0.9 M parameters on the text of Python's asyncio, two data-parallel ranks, batch 8 x 128, AdamW:
300 steps, the first 100 of every run uncompressed. Training losses are means of ten steps. One run of each: the same
numbers every time. A few minutes.
"""

import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import Case, Options, main

STEPS, UNCOMPRESSED = 300, 100
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def run(compression: str) -> tuple[list[float], float]:
    """Every step's loss, and the validation loss at the end."""
    from shardwright.testing.ranks import on_threads
    from shardwright.train.metrics import read
    from shardwright.train.recipe import Recipe
    from shardwright.train.trainer import Trainer

    with tempfile.TemporaryDirectory() as home:
        text = str(Path(sysconfig.get_path("stdlib")) / "asyncio")
        parallel = {"data": 2, "compression": compression, "uncompressed_steps": UNCOMPRESSED}
        recipe = Recipe.of(
            {
                "home": home,
                "model": {"config": MODEL},
                "data": {"paths": [text], "suffixes": [".py"], "tokenizer": 2048, "sequence": 128},
                "train": {"steps": STEPS, "batch": 8, "micro_batch": 4},
                "optimizer": {"lr": 2e-3, "warmup": 20},
                "parallel": parallel,
                "output": {"directory": "run", "evaluate_sequences": 128},
            }
        )
        on_threads(2, lambda group: Trainer(recipe, group).run())
        lines = read(recipe.directory / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line], lines[-1]["validation"]


def cases(options: Options) -> Iterator[Case]:
    """A case for each stretch of steps."""
    sides = {side: run("none" if side == "whole" else side) for side in ("whole", "bf16", "int8", "1bit")
             if options.wants_peer(side)}  # fmt: skip
    for stop in (UNCOMPRESSED, 110, 150, 200, 250, STEPS):
        means = {side: sum(losses[stop - 10 : stop]) / 10 for side, (losses, _) in sides.items()}
        yield Case(f"steps {stop - 9} to {stop}", "nats", means)
    yield Case("validation", "nats", {side: validation for side, (_, validation) in sides.items()})


if __name__ == "__main__":
    main("compressed", __doc__.splitlines()[0], cases)
