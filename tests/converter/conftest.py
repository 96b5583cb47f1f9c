"""A tiny checkpoint as a source."""

from pathlib import Path

import pytest

from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source


@pytest.fixture(scope="session")
def source(moe_checkpoint: Path) -> ModelSource:
    """Two layers of 6 experts, top 3, n_embd 64, n_ff 96."""
    return open_source(moe_checkpoint)
