"""
Accesses out of bounds and races between programs, found in Triton's interpreter (TRITON_INTERPRET=1).

After apply(), each launch of a kernel raises SanitizerError where
    a load or store that is not masked leaves the storage of every tensor argument,
    a store hits a byte that another program of the launch has stored or loaded,
    a load reads a byte that another program of the launch has stored (a GPU runs programs in any order).
Atomics may race.
"""

from functools import wraps

import numpy as np
from triton.runtime import interpreter as triton_interpreter


class SanitizerError(Exception):
    pass


ranges: list[tuple] = []  # of a tensor argument each: first address, end, who stored each byte, who loaded it
state = {"on": False, "races": True}


def apply(races: bool = True) -> None:
    """races=False: only bounds, which needs no memory besides the tensors'."""
    state["races"] = races
    builder = triton_interpreter.InterpreterBuilder
    if getattr(builder, "sanitized", False):
        return
    builder.sanitized = True
    _check_accesses(builder)
    _follow_launches(triton_interpreter.GridExecutor)


def _check_accesses(builder) -> None:
    original_load, original_store = builder.create_masked_load, builder.create_masked_store
    original_atomic = builder.create_atomic_rmw

    @wraps(original_load)
    def load(self, ptrs, mask, *rest, **named):
        check(ptrs, mask, "load")
        return original_load(self, ptrs, mask, *rest, **named)

    @wraps(original_store)
    def store(self, ptrs, value, mask, *rest, **named):
        check(ptrs, mask, "store")
        return original_store(self, ptrs, value, mask, *rest, **named)

    def atomic(self, op, ptrs, value, mask, sem, scope):
        check(ptrs, mask, "atomic")
        on, state["on"] = state["on"], False
        try:
            return original_atomic(self, op, ptrs, value, mask, sem, scope)
        finally:
            state["on"] = on

    builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = load, store, atomic


def _follow_launches(executor) -> None:
    original_begin, original_end = executor._init_args_hst, executor._restore_args_dev

    def begin(self, args, kwargs):
        args, kwargs = original_begin(self, args, kwargs)
        ranges.clear()
        for argument in [*args, *kwargs.values()]:
            _remember(argument)
        state["on"] = True
        return args, kwargs

    def end(self, *args, **kwargs):
        state["on"] = False
        return original_end(self, *args, **kwargs)

    executor._init_args_hst, executor._restore_args_dev = begin, end


def _remember(argument) -> None:
    """The storage of a tensor, a tensor descriptor's or a tuple's tensors, once."""
    if isinstance(argument, triton_interpreter.TensorDescriptor):
        argument = argument.base
    if isinstance(argument, tuple):
        for part in argument:
            _remember(part)
    elif hasattr(argument, "data_ptr"):
        storage = triton_interpreter._unwrap_tensor(argument).untyped_storage()
        begin, size = storage.data_ptr(), storage.nbytes()
        if size and begin not in [known for known, *_ in ranges]:
            stored, loaded = (np.zeros(size, np.int32) if state["races"] else None for _ in range(2))
            ranges.append((begin, begin + size, stored, loaded))


def check(ptrs, mask, kind: str) -> None:
    """ptrs, mask: the interpreter's handles; kind "load", "store" or "atomic"."""
    if not state["on"]:
        return
    size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    addresses, live = np.broadcast_arrays(ptrs.data, mask.data)
    addresses = addresses[live].astype(np.int64)
    left = np.ones(addresses.shape, bool)
    for begin, end, stored, loaded in ranges:
        inside = left & (addresses >= begin) & (addresses + size <= end)
        left &= ~inside
        if inside.any() and stored is not None and kind != "atomic":
            _check_races(addresses[inside] - begin, stored, loaded, kind)
    if left.any():
        raise SanitizerError(
            f"out-of-bounds {kind} in program {triton_interpreter.interpreter_builder.grid_idx}: "
            f"{int(left.sum())} lanes, first 0x{int(addresses[left][0]):x}"
        )


def _check_races(offsets: np.ndarray, stored: np.ndarray, loaded: np.ndarray, kind: str) -> None:
    """The first byte of each element stands for it. 0: nobody yet; -1: several programs."""
    builder = triton_interpreter.interpreter_builder
    (x, y, z), (columns, rows, _) = builder.grid_idx, builder.grid_dim
    program = 1 + x + columns * (y + rows * z)
    verb = "reads" if kind == "load" else "overwrites"
    writer, reader = stored[offsets], loaded[offsets]
    if (other := (writer != 0) & (writer != program)).any():
        raise SanitizerError(
            f"program {builder.grid_idx} {verb} byte {offsets[other][0]} written by program "
            f"#{writer[other][0] - 1}"
        )
    if kind == "load":
        loaded[offsets] = np.where((reader == 0) | (reader == program), program, -1)
        return
    if (other := (reader != 0) & (reader != program)).any():
        raise SanitizerError(
            f"program {builder.grid_idx} overwrites byte {offsets[other][0]} read by another program"
        )
    stored[offsets] = program
