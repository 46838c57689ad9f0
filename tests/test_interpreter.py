"""Every Triton kernel in Triton's interpreter: the tests of its op on the CPU, in a process of their own.

Triton decides at its import between interpreter and compiler, so one process cannot do both.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from deeplab_fast.ops import dispatch

ROOT = Path(__file__).resolve().parent.parent
KERNELS = (ROOT / "deeplab_fast/kernels").glob("*.py")
OPS = sorted({path.stem for path in KERNELS} - {"__init__", "bilinear", "common"})


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process that it starts")
def test_kernels_in_the_interpreter(tmp_path):
    report = tmp_path / "report.xml"
    files = [f"tests/ops/test_{op}.py" for op in OPS]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton-cpu", f"--junitxml={report}", *files]
    # The interpreter's small steps gain nothing from threads.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        assert case.find("skipped") is None, f"{case.get('name')} was skipped: {case.find('skipped').get('message')}"
        passed[case.get("classname", "").rpartition("test_")[2]] += 1
    assert set(passed) == set(OPS)


def test_each_triton_backend_has_a_kernel_file():
    assert {name for name in OPS if "triton" in dispatch.OPS[name].backends} == set(OPS)
