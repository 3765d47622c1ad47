"""Lets these tests import `flexmodel` from the checkout, installed or not."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "python-shim")]

import pytest
from run_writer import Writer


@pytest.fixture
def run_dir(tmp_path: Path) -> Writer:
    """A run to be written."""
    return Writer(tmp_path / "run")
