"""Shared fixtures."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Slow machines are no failure; a clean check tries the same examples every time.
settings.register_profile("default", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("default")
# Where no GPU compiles them, Triton's kernels run in its interpreter. Read when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tiny towers: threads cost more than they bring, above all on a shared machine.
torch.set_num_threads(1)

MOST_WORKERS = 8
"""Of `-n auto`: each loads torch and Transformers, which takes time and memory."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return min(os.cpu_count() or 1, MOST_WORKERS)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
