"""Triton's kernels, run by its interpreter: the tests of five files that need TRITON_INTERPRET=1."""

from pathlib import Path

import interpreter
import pytest

TESTS = Path(__file__).parent
FILES = ("attention_kernel", "lookup_kernel", "head_kernel", "matrix_kernels", "prepare_kernel")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(which):
    """All files in a process: importing the compiler takes as long as a file's tests."""
    first, *others = (TESTS / f"test_{name}.py" for name in FILES)
    interpreter.interpreted(first, *map(str, others), "-m", which)
