"""Shared fixtures."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Slow machines are no failure; a clean check tries the same examples every time.
settings.register_profile("default", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
