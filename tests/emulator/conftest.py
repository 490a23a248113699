from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the simulated runs keep what they compile: most of them train the same stages."""
    return tmp_path_factory.mktemp("compiled")
