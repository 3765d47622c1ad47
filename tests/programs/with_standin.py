"""Opens the stand-in for NCCL beside the NCCL that torch has opened, and runs: `with_standin.py PROGRAM ARGS...`."""

import ctypes
import os
import pathlib
import runpy
import sys

import torch  # noqa: F401  # first: it would be linked to what has the name of its NCCL

if __name__ == "__main__":
    ctypes.CDLL(os.environ["FLEXMODEL_TEST_NCCL"])
    del sys.argv[0]
    runpy.run_path(str(pathlib.Path(__file__).with_name(sys.argv[0])), run_name="__main__")
