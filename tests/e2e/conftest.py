"""What is given to tests that do not make their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from neighbours import MAX_MODEL_LEN
from small_models import write_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small", max_position_embeddings=MAX_MODEL_LEN)
