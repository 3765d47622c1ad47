"""Reading needs no torch until a tensor is asked for, and numpy alone where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
from run_writer import PACKAGE, Writer


def test_torch_is_not_imported_before_a_tensor_is_asked_for(run_dir: Writer):
    run_dir.part("m", np.arange(3, dtype=np.float32))
    code = f"""
import sys
import flexmodel
run = flexmodel.open({str(run_dir.root)!r})
print(run.modules, run.records)
assert "torch" not in sys.modules
assert run.records[0].numpy().tolist() == [0, 1, 2]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(PACKAGE)})


def test_without_torch_and_safetensors_tensors_are_numpy(run_dir: Writer):
    run_dir.part("m", np.arange(3, dtype=np.float32))
    run_dir.part("b", bytes(2), dtype="bfloat16", shape=(1,))
    code = f"""
import sys
for name in ("torch", "safetensors", "ml_dtypes"):
    sys.modules[name] = None  # importing it is an ImportError
import flexmodel, numpy
run = flexmodel.open({str(run_dir.root)!r})
tensor = run.get("m")
assert type(tensor) is numpy.ndarray and tensor.dtype == numpy.float32 and tensor.tolist() == [0, 1, 2]
assert sys.modules["torch"] is None
try:
    run.get("b")
except TypeError as error:
    assert "install ml_dtypes" in str(error)
else:
    raise AssertionError("bfloat16 without torch and ml_dtypes")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(PACKAGE)})
