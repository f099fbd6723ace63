"""Triton's kernels, run by its interpreter: the tests of four files that need TRITON_INTERPRET=1."""

from pathlib import Path

import interpreter
import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "first, second", [("attention_kernel", "lookup_kernel"), ("head_kernel", "matrix_kernels")]
)
def test_kernels_in_the_interpreter(first, second, which):
    """Two files in a process: importing the compiler takes as long as a file's tests."""
    interpreter.interpreted(TESTS / f"test_{first}.py", str(TESTS / f"test_{second}.py"), "-m", which)
