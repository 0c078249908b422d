"""Recipes: what is refused, in one line that names the key; what a schema says; the examples."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.train.runs import recipe_of

from shardwright.errors import FileError, UsageError
from shardwright.train.recipe import Recipe

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"optimizer": {"lrr": 1}}, r"optimizer.lrr=1: there is no such key; see shardwright train --schema"),
    ({"train": {"steps": 0}}, r"train.steps=0: input should be greater than or equal to 1; see"),
    ({"train": {"steps": "many"}}, r"train.steps='many': input should be a valid integer"),
    ({"train": {"dtype": "float8"}}, r"train.dtype='float8': input should be 'float32' or 'bfloat16'"),
    ({"parallel": {"pipeline": 2}}, r"parallel.pipeline=2: only one stage is trained so far; use parallel.tensor"),
    ({"optimizer": {"warmup": 7}}, r"optimizer.warmup=7: there are only 6 steps; shorten the warm-up"),
    ({"optimizer": {"min_lr": 1.0}}, r"optimizer.min_lr=1.0: it is above optimizer.lr=0.01; lower it"),
    ({"data": {"tokenizer": "model"}}, r"data.tokenizer=model: a model from scratch has no tokenizer; give a path"),
    ({"model": {"path": "x"}}, r"model=path and config: exactly one of them is given; drop the other one"),
    ({"model": {"config": None}}, r"model=path and config: exactly one of them is given"),
    ({"model": {"config": None, "path": "x"}}, r"data.tokenizer=280: a trained model knows its own tokens only"),
    ({"data": {"tokenizer": 256}}, r"data.tokenizer=256: every byte is a word, and so is the end"),
    ({"model": {"config": {"attention_dropout": 0.1}}}, r"model.config.attention_dropout=0.1: no dropout is taken"),
    ({"output": {"sample_every": 2}}, r"output.sample_prompt='': a sample continues some text; give a prompt"),
    ({"parallel": {"compression": "1bit", "uncompressed_steps": 0}}, r"parallel.uncompressed_steps=0: signs"),
    ({"optimizer": {"betas": (1.0, 0.95)}}, r"optimizer.betas.0=1.0: input should be less than 1; see"),
    ({"optimizer": {"betas": (0.9, -0.1)}}, r"optimizer.betas.1=-0.1: input should be greater than or equal to 0"),
    ({"optimizer": {"lr": float("nan")}}, r"optimizer.lr=nan: input should be a finite number"),
])  # fmt: skip
def test_what_contradicts_or_does_not_exist_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        recipe_of(tmp_path, **changes)
    assert "\n" not in str(raised.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"gone.toml: it cannot be read: No such file or directory; check the path"):
        Recipe.load(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(FileError, match=r"bad.toml: it is not TOML: .*; see shardwright train --schema"):
        Recipe.load(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(UsageError, match=r"model=\(not set\): it is required"):
        Recipe.load(tmp_path / "empty.toml")


def test_the_schema_describes_every_key() -> None:
    schema = Recipe.model_json_schema()
    for part in schema["$defs"].values():
        for name, key in part["properties"].items():
            assert key.get("description"), name
    assert json.dumps(schema)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_recipes(path: Path) -> None:
    assert Recipe.load(path).ranks in (2, 8)
    assert Recipe.load(path).place("text.txt") == path.parent / "text.txt"
