"""What a calibration of the tiny checkpoint learns."""

import pytest

from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import Statistics
from tests.models.compress_plans import learnt


@pytest.fixture(scope="session")
def statistics(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learnt(source, tmp_path_factory.mktemp("statistics"), n_sequences=2)
