"""Kernels for AMX on a CPU that has none of it, only the bf16 products that go with it."""

import subprocess
import sys

import pytest

from dspark.models import cpu_ops


@pytest.mark.skipif(
    not cpu_ops.available() or not cpu_ops.compiler().machine.bf16_dots or cpu_ops.compiler().machine.bf16_tiles,
    reason="needs a CPU with AVX512-BF16 and without AMX, where the other tests run the kernels themselves",
)
def test_the_instructions_computed_by_hand():
    tests = ["tests/models/test_cpu_ops.py", "-k", "not without", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-p", "tests.models.amx", *tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout
