from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    """Give every test the same random tensors in every run."""
    torch.manual_seed(0)
