"""A tiny checkpoint as a source."""

from pathlib import Path

import pytest
import torch

from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source


@pytest.fixture(scope="session")
def source(moe_checkpoint: Path) -> ModelSource:
    """Two layers of 6 experts, top 3, n_embd 64, n_ff 96."""
    return open_source(moe_checkpoint)


@pytest.fixture
def gelu_of_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's GELU as ggml's CPU has it, which looks it up in a table of F16."""
    gelu = torch.nn.functional.gelu

    def looked_up(x: torch.Tensor, approximate: str) -> torch.Tensor:
        found: torch.Tensor = gelu(x.half().float(), approximate=approximate).half().float()
        return found

    monkeypatch.setattr(torch.nn.functional, "gelu", looked_up)
