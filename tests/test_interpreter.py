"""Every Triton kernel in Triton's interpreter: the tests of its op on the CPU, in a process of their own.

Triton decides at its import between interpreter and compiler, so one process cannot do both.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deeplab_fast.ops import dispatch
from tests.test_layout import FORMS, KERNEL_PARTS

ROOT = Path(__file__).resolve().parent.parent
KERNELS = (ROOT / "deeplab_fast/kernels").glob("*.py")
OPS = sorted({path.stem for path in KERNELS} - KERNEL_PARTS | FORMS)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process that it starts")
def test_kernels_in_the_interpreter(tmp_path):
    # As many processes as cores, each for its share of the ops: the interpreter's small steps gain nothing from threads
    # of torch.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def run(ops: list[str]) -> str:
        """What went wrong, in words; empty where all tests of these ops passed and each has some."""
        report = tmp_path / f"{ops[0]}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-k", "triton-cpu", f"--junitxml={report}"]
        command += [f"tests/ops/test_{op}.py" for op in ops]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            return f"{', '.join(ops)}: {result.stdout[-4000:]}{result.stderr[-1000:]}"
        cases = list(ElementTree.parse(report).iter("testcase"))
        names = {case.get("classname") for case in cases}
        missing = [f"{op}: no test" for op in ops if f"tests.ops.test_{op}" not in names]
        skipped = [case for case in cases if case.find("skipped") is not None]
        return "\n".join(missing + [f"{case.get('classname')}: {case.get('name')} was skipped" for case in skipped])

    count = min(os.cpu_count() or 1, len(OPS))
    with ThreadPoolExecutor(count) as pool:
        wrong = "\n".join(filter(None, pool.map(run, [OPS[i::count] for i in range(count)])))
    assert not wrong, wrong


def test_each_triton_backend_has_a_kernel_file():
    assert {name for name in OPS if "triton" in dispatch.OPS[name].backends} == set(OPS)
