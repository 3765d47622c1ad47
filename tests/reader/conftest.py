"""Lets these tests import `flexmodel` from the checkout, installed or not."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "python-shim")]
