"""Small runs for tests: a recipe over a few kilobytes of text, and what a run of it leaves."""

import random
from pathlib import Path
from typing import Any

from shardwright.comm.group import Group
from shardwright.testing.ranks import on_threads
from shardwright.train.metrics import read
from shardwright.train.recipe import Recipe
from shardwright.train.trainer import Trainer

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 20,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
"""6 query heads over 2 KV heads: no split but 1 and 2 keeps groups whole."""


def recipe_of(home: Path, **changes: dict[str, Any]) -> Recipe:
    """A recipe whose output is `home/run`; `changes` go into its parts."""
    text = home / "text.txt"
    if not text.exists():
        generator = random.Random(0)
        words = ["shard", "rank", "mesh", "head", "token", "ring", "sum", "row"]
        text.write_text(" ".join(generator.choice(words) for _ in range(1500)))
    values: dict[str, dict[str, Any]] = {
        "model": {"config": CONFIG},
        "data": {"paths": ["text.txt"], "tokenizer": 280, "sequence": 11, "validation": 0.1},
        "train": {"steps": 6, "batch": 5, "micro_batch": 2, "seed": 3},
        "optimizer": {"lr": 1e-2, "warmup": 2},
        "output": {"directory": "run"},
    }
    for part, said in changes.items():
        values[part] = {**values.get(part, {}), **said}
    return Recipe.of({"home": str(home), **values})


def run(recipe: Recipe) -> list[dict[str, Any]]:
    """Run it on threads; what rank 0 was told."""
    told: list[dict[str, Any]] = []

    def body(group: Group) -> None:
        Trainer(recipe, group, report=told.append).run()

    on_threads(recipe.ranks, body)
    return told


def losses(recipe: Recipe) -> list[float]:
    """Of every step, as metrics.jsonl has them."""
    return [line["loss"] for line in read(recipe.directory / "metrics.jsonl") if "loss" in line]
