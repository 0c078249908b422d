"""What a tokenizer costs to import, and what it says to texts that are none."""

import subprocess
import sys

import pytest

from shardwright.errors import UsageError
from shardwright.text.tokenizer import Tokenizer

BUILD = """
import os, sys
from shardwright.text.tokenizer import Tokenizer
before = [name for name in ("tokenizers", "jinja2", "torch", "transformers", "numpy") if name in sys.modules]
keys = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
metadata["tokenizer.chat_template"] = "{{ messages[0].content }}"
tokenizer = Tokenizer.from_gguf(metadata, "x")
ids = tokenizer.chat([{"role": "user", "content": "ab"}])
after = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
print(before, ids, after, len(os.listdir("/proc/self/task")))
"""


def test_imports_late_and_leaves_no_thread() -> None:
    """A tokenizer may be built before ranks are forked, and a thread that is alive then is lost in the child."""
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, check=True)
    assert done.stdout == "[] [2] [] 1\n"


def test_half_a_surrogate_pair_is_a_usage_error(smollm: Tokenizer) -> None:
    """What an undecodable byte on the command line becomes."""
    with pytest.raises(UsageError, match=r"text='caf\\udce9': half a surrogate pair"):
        smollm.encode("caf\udce9")


def test_ids_beyond_the_vocabulary_are_no_text(smollm: Tokenizer) -> None:
    """A model may have more rows than its tokenizer has tokens."""
    ids = smollm.encode("ab")
    assert smollm.decode([*ids, smollm.vocabulary, smollm.vocabulary + 99]) == "ab"
