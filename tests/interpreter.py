"""Triton's interpreter, made right for bfloat16 and FP8, and a way to run code in it.

Triton (3.7 to 3.9) keeps bfloat16 values as raw 16-bit integers in its interpreter and computes with those
bits: tl.dot multiplies them, + and tl.maximum add and compare them, casts from float32 cut instead of
rounding, casts to FP8 lose the carry of the mantissa; without an error. Here operands are widened to float32,
computed, and rounded to nearest even.

Kernels are interpreted if TRITON_INTERPRET=1 is set before they are defined, so what is interpreted needs a
process of its own; `interpreted` starts one. A file of tests can have both kinds, and
test_interpreter.py runs the second:

    if not interpreter.ACTIVE:
        ...tests that compile
    else:
        ...tests that call the kernels on CPU tensors; an autotuned one through its .fn
"""

import inspect
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent
ACTIVE = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted(code: str | Path, *arguments: str, repair: bool = True, timeout: float = 280) -> str:
    """Runs code, a script, or a file test_*.py (by pytest) in a process with the repaired interpreter.

    Returns what it printed; AssertionError with the end of its output if it fails. One thread: NumPy's
    products of 128 columns are ten times slower with several. repair=False: code calls apply() itself.
    timeout in seconds.
    """
    # without what a pytest around it has set
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env = own | {
        "TRITON_INTERPRET": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryDirectory() as folder:
        # A kernel's source must stand in a file.
        path = code if isinstance(code, Path) else Path(folder, "code.py")
        if path is not code:
            path.write_text(code)
        command = [sys.executable, __file__, "repaired" if repair else "as-it-is", str(path), *arguments]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, (
        f"{path.name}: exit code {run.returncode}\n{(run.stdout + run.stderr)[-6000:]}"
    )
    return run.stdout


def main() -> int:
    if sys.argv[1] == "repaired":
        apply()
    path, sys.argv = sys.argv[2], sys.argv[2:]
    if Path(path).name.startswith("test_"):
        import pytest

        return pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv])
    runpy.run_path(path, run_name="__main__")
    return 0


# the repair: operands up to float32, results down to bfloat16


def bf16_to_f32(u16: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(u16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(f32: np.ndarray) -> np.ndarray:
    """float32 -> bits of the nearest bfloat16, uint16; of two, the even one."""
    bits = np.ascontiguousarray(f32, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(f32), np.uint16(0x7FC0), rounded.astype(np.uint16))


# Those whose bfloat16 result is bfloat16 again; comparisons stay boolean.
BINARY = [
    "fadd",
    "fmul",
    "fdiv",
    "frem",
    "fsub",
    "minimumf",
    "minnumf",
    "maximumf",
    "maxnumf",
    "precise_divf",
    "approx_divf",
]
COMPARISONS = ["OLT", "OGT", "OLE", "OGE", "OEQ", "ONE", "ULT", "UGT", "ULE", "UGE", "UEQ", "UNE"]
UNARY = [
    "fneg",
    "cos",
    "exp",
    "exp2",
    "floor",
    "ceil",
    "log",
    "log2",
    "precise_sqrt",
    "sqrt",
    "sin",
    "erf",
    "rsqrt",
]


def apply() -> None:
    """Repairs the interpreter of this process, once."""
    import triton.language as tl
    from triton.runtime import interpreter as triton_interpreter

    builder = triton_interpreter.InterpreterBuilder
    if getattr(builder, "bf16_repaired", False):
        return
    builder.bf16_repaired = True
    for repair in (_repair_operators, _repair_dot, _repair_casts, _repair_atomic_add, _repair_reductions):
        repair(tl, triton_interpreter, builder, *_converters(tl, triton_interpreter))


def _converters(tl, ti):
    def is_bf16(h):
        return h.dtype.scalar == tl.bfloat16 and h.data.dtype == np.uint16

    def up(h):
        return ti.TensorHandle(bf16_to_f32(h.data), tl.float32) if is_bf16(h) else h

    def down(h):
        return ti.TensorHandle(f32_to_bf16(h.data), tl.bfloat16)

    return is_bf16, up, down


def _repair_operators(tl, ti, builder, is_bf16, up, down) -> None:
    def numeric(original, decides, self, *operands):
        """decides: the operands whose being bfloat16 makes the result so."""
        if any(is_bf16(h) for h in operands[decides]):
            return down(original(self, *[up(h) if isinstance(h, ti.TensorHandle) else h for h in operands]))
        return original(self, *operands)

    def comparison(original, self, a, b):
        return original(self, up(a), up(b))

    rules = {
        **dict.fromkeys(BINARY, slice(0, 2)),
        **dict.fromkeys([*UNARY, "clampf"], slice(0, 1)),
        "fma": slice(2, 3),
    }
    for name, decides in rules.items():
        if hasattr(builder, f"create_{name}"):
            setattr(builder, f"create_{name}", _method(numeric, getattr(builder, f"create_{name}"), decides))
    for name in COMPARISONS:
        setattr(builder, f"create_fcmp{name}", _method(comparison, getattr(builder, f"create_fcmp{name}")))


def _method(f, *first):
    return lambda self, *operands: f(*first, self, *operands)


def _repair_dot(tl, ti, builder, is_bf16, up, down) -> None:
    def widened(h):
        if is_bf16(h):
            return bf16_to_f32(h.data)
        if h.dtype.scalar.primitive_bitwidth == 8 and h.dtype.scalar.is_floating():
            return ti._convert_float(h.data, h.dtype, tl.float16, None).view(np.float16).astype(np.float32)
        return h.data.astype(np.float32) if h.data.dtype == np.float16 else h.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return ti.TensorHandle(
            (np.matmul(widened(a), widened(b)) + d.data).astype(d.data.dtype), d.dtype.scalar
        )

    builder.create_dot = create_dot


def _repair_casts(tl, ti, builder, is_bf16, up, down) -> None:
    import torch

    largest = {tl.float8e4nv: (torch.float8_e4m3fn, 448.0), tl.float8e5: (torch.float8_e5m2, 57344.0)}

    def to_fp8(values, kind):  # what the GPU's cvt.rn.satfinite does
        dtype, limit = largest[kind]
        x = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-limit, limit)
        return x.to(dtype).view(torch.uint8).numpy()

    original_cast, original_narrowing = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return original_cast(self, up(src), dst_type) if target != tl.float32 else up(src)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return down(src if source == tl.float32 else original_cast(self, src, tl.float32))
        return original_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        source, target = src.dtype.scalar, dst_type.scalar
        to_nearest = rounding_mode != ti._ir.ROUNDING_MODE.RTZ
        if source == tl.float32 and target == tl.bfloat16 and to_nearest:
            return down(src)
        if target in largest and to_nearest and source in (tl.float32, tl.bfloat16, tl.float16):
            values = src.data.astype(np.float32) if source == tl.float16 else up(src).data
            return ti.TensorHandle(to_fp8(values, target), target)
        if source == tl.bfloat16:
            return (
                up(src)
                if target == tl.float32
                else original_narrowing(self, up(src), dst_type, rounding_mode)
            )
        return original_narrowing(self, src, dst_type, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_atomic_add(tl, ti, builder, is_bf16, up, down) -> None:
    """Programs run one after another here: load, add, store is exact, but for two lanes at one address."""
    original = builder.create_atomic_rmw

    def plain(access, *operands):  # Triton's versions differ in how many cache options follow
        options = len(inspect.signature(access).parameters) - len(operands)
        return access(*operands, *[None] * options)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        if val.dtype.scalar != tl.bfloat16 or op != ti._ir.ATOMIC_OP.FADD:
            return original(self, op, ptr, val, mask, sem, scope)
        addresses = np.unique(ptr.data[mask.data])
        assert addresses.size == int(mask.data.sum()), (
            "a bfloat16 atomic_add of one program meets an address twice"
        )
        old = plain(self.create_masked_load, ptr, mask, None)
        plain(self.create_masked_store, ptr, self.create_fadd(old, val), mask)
        return old

    builder.create_atomic_rmw = create_atomic_rmw


def _repair_reductions(tl, ti, builder, is_bf16, up, down) -> None:
    original = ti.ReduceOps.apply_impl

    def apply_impl(self, operands):
        x = operands[0] if isinstance(operands, tuple) else operands
        if len(operands) != 1 or not is_bf16(x.handle):  # sum, max and min have one operand
            return original(self, operands)
        reduced = original(self, (self.to_tensor(bf16_to_f32(x.handle.data), tl.float32),))
        reduced = reduced[0] if isinstance(reduced, (tuple, list)) else reduced
        bits = f32_to_bf16(reduced.handle.data)
        kind = tl.block_type(tl.bfloat16, list(bits.shape)) if reduced.type.is_block() else tl.bfloat16
        return tl.core.tensor(ti.TensorHandle(bits, tl.bfloat16), kind)

    ti.ReduceOps.apply_impl = apply_impl


if __name__ == "__main__":
    sys.exit(main())
