"""The published measurements, and small clusters."""

from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "data" / "planning"


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA
