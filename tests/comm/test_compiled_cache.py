"""Where compiled code is cached: under a name that changes with every file that compiled code comes from."""

import shutil
import subprocess
import sys
from pathlib import Path

import shardwright
from shardwright.comm.compiled import SOURCES, cache_directory

PACKAGE = Path(shardwright.__file__).parent


def test_every_file_with_compiled_code_is_a_source() -> None:
    named = {path for pattern in SOURCES for path in PACKAGE.glob(pattern)}
    using = {path for path in PACKAGE.rglob("*.py") if "from numba" in path.read_text()}
    assert using <= named
    assert PACKAGE / "comm" / "segment.py" in named, "its constants are compiled in"


def test_a_changed_constant_is_another_cache(tmp_path: Path) -> None:
    """In a copy of the package: one byte more in a file that others inline."""
    shutil.copytree(PACKAGE, tmp_path / "shardwright", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "shardwright" / "comm" / "segment.py").open("a").write("\n")
    code = "from shardwright.comm.compiled import cache_directory; print(cache_directory().name)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip().startswith("compiled-")
    assert done.stdout.strip() != cache_directory().name
