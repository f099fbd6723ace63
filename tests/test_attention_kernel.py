"""Attention's kernels: values and gradients in the interpreter, against float64; what they compile to."""

from itertools import product

import interpreter
import pytest
import torch

import train_gpt as tg


def intervals(T: int, window: int, starts: tuple[int, ...]) -> torch.Tensor:
    """first_key (T,) of documents that begin at starts, and a window in tokens."""
    doc_start = torch.zeros(T, dtype=torch.int64)
    doc_start[list(starts)] = torch.tensor(starts)
    return torch.maximum(doc_start.cummax(0).values, torch.arange(T) - window + 1)


def visible(first_key: torch.Tensor) -> torch.Tensor:
    key = torch.arange(len(first_key))
    return (key >= first_key[:, None]) & (key <= key[:, None])


if not interpreter.ACTIVE:
    import aot

    def compiled(cc: int, *shapes: tuple[int, int, int]) -> list[aot.Result]:
        """Forward, dq, dk and dv for each (T, H, d), as the model launches them: v is a slice."""
        with aot.record(cc) as launches:
            for T, H, d in shapes:
                q, k, do = (torch.empty(T, H, d, dtype=torch.bfloat16, device="meta") for _ in range(3))
                v = torch.empty(T, 3, H, d, dtype=torch.bfloat16, device="meta")[:, 2]
                first_key = torch.empty(T, dtype=torch.int32, device="meta")
                inputs = (q, k, v, first_key, torch.empty((), device="meta"))
                tg.attention_backward(do, *inputs, *tg.attention_forward(*inputs))
        return launches

    SHAPES = {
        "width 128": [(49152, 6, 128), (98304, 3, 128), (49152, 8, 128)],  # short, its paired heads, medium
        "width 64": [(49152, 12, 64)],
    }

    @pytest.mark.parametrize(
        "shapes, registers, shared",
        [
            ("width 128", (144, 160, 212), (114744, 98336, 82472)),
            pytest.param("width 64", (112, 124, 144), (57400, 49184, 41512), marks=pytest.mark.slow),
        ],
    )
    def test_kernels_on_hopper_use_its_matrix_and_copy_units_and_stay_within_budget(
        shapes, registers, shared
    ):
        launches = compiled(90, *SHAPES[shapes])
        kernels = [f"attention_{name}_kernel" for name in ("forward", "dq", "dkv")]
        assert [kernel.name for kernel in launches] == kernels * len(SHAPES[shapes])
        for kernel in launches:
            which = kernels.index(kernel.name)
            assert kernel.fits and kernel.spill_st == kernel.spill_ld == 0, aot.row(kernel)
            assert kernel.ctas_per_sm >= 2, "one program alone waits for memory: " + aot.row(kernel)
            assert kernel.regs <= registers[which] and kernel.smem <= shared[which], aot.row(kernel)
            assert min(kernel.counts[name] for name in ("wgmma", "tma_ld", "tma_st")) > 0, aot.row(kernel)
            assert not kernel.warnings, "ptxas serializes wgmma: " + aot.row(kernel)
            assert kernel.counts["atom"] == 0, "the result depends on the order of programs"
        assert launches[0].grid == (49152 // 64, SHAPES[shapes][0][1])

    @pytest.mark.slow
    @pytest.mark.parametrize("cc", [80, 89, 120])
    def test_kernels_fit_older_and_smaller_gpus(cc):
        for kernel in compiled(cc, (12288, 6, 128)):
            assert kernel.fits and kernel.spill_st == kernel.spill_ld == kernel.counts["atom"] == 0, aot.row(
                kernel
            )
            assert kernel.counts["mma"] > 0 and (cc == 120) == (kernel.counts["tma_ld"] > 0), aot.row(kernel)
            assert kernel.counts["cpasync"] > 8 or cc == 120, "tiles are not loaded ahead: " + aot.row(kernel)

else:
    import sanitizer

    sanitizer.apply()

    # T, H, d, window, starts. With a window of 66 the first query of a block is the only one in it that sees
    # a block of keys.
    CASES = {
        "documents and a window": (336, 1, 128, 100, (0, 130, 131, 300)),
        "everything": (272, 1, 64, 272, (0,)),
        "a padded width": (208, 2, 96, 66, (0, 5, 17)),
        "less than a block": (16, 1, 64, 8, (0, 3)),
        "documents of one token": (144, 1, 128, 64, tuple(range(144))),
    }

    def inputs(T: int, H: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k, v (T, 3, H, d), one projection, and the output's gradient (T, H, d)."""
        rng = torch.Generator().manual_seed(T + d)
        return torch.randn(T, 3, H, d, generator=rng).to(dtype), torch.randn(T, H, d, generator=rng).to(dtype)

    def with_grads(operator, x: torch.Tensor, do: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.clone().requires_grad_()
        y = operator(*x.unbind(1))
        return (y.detach(), *torch.autograd.grad(y, x, do)[0].unbind(1))

    def in_float64(q, k, v, first_key, scale) -> torch.Tensor:
        scores = torch.einsum("qhd,khd->hqk", q * scale, k).masked_fill(~visible(first_key), float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v)

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        assert a.shape == b.shape, (a.shape, b.shape)
        return float((a.double() - b).norm() / b.norm())

    USUAL = "documents and a window"  # what is tried by default before Hopper, and in float32

    def rare(case: str, *kind) -> list[pytest.MarkDecorator]:
        return [] if case == USUAL or kind == (torch.bfloat16, 90) else [pytest.mark.slow]

    KINDS = [
        pytest.param(*kind, marks=rare(*kind))
        for kind in product(CASES, (torch.bfloat16, torch.float32), (80, 90))
    ]

    @pytest.mark.parametrize("case, dtype, capability", KINDS)
    def test_values_and_gradients(monkeypatch, case, dtype, capability):
        """No further from the truth than plain PyTorch; by descriptors and, as before Hopper, by pointers."""
        T, H, d, window, starts = CASES[case]
        monkeypatch.setattr(tg, "compute_capability", lambda: capability)
        (x, do), first_key, scale = inputs(T, H, d, dtype), intervals(T, window, starts), torch.tensor(0.12)
        got = with_grads(lambda q, k, v: tg.triton_attention(q, k, v, first_key, window, scale), x, do)
        plain = with_grads(lambda q, k, v: tg.reference_attention(q, k, v, first_key, scale), x, do)
        exact = with_grads(
            lambda q, k, v: in_float64(q, k, v, first_key, scale.double()), x.double(), do.double()
        )
        for name, a, b, truth in zip(("o", "dq", "dk", "dv"), got, plain, exact, strict=True):
            assert a.dtype == dtype
            if len(starts) == T and name in ("dq", "dk"):  # a softmax of one score passes no gradient
                assert a.abs().max() < 1e-4, (name, a.abs().max())
            elif dtype == torch.bfloat16:
                ours, theirs = error(a, truth), error(b, truth)
                assert ours < 5e-3 and ours <= theirs, (name, ours, theirs)
            else:
                assert error(a, truth) < 3e-6, (name, error(a, truth))

    def test_layouts_of_inputs_and_gradient_and_kinds_of_scale_and_lo():
        (x, _), first_key = inputs(80, 2, 64, torch.bfloat16), intervals(160, 48, (0, 50))
        paired = torch.stack([tg.pair(t) for t in x.unbind(1)], dim=1)  # (160, 3, 1, 64)
        ones = torch.ones(()).bfloat16().expand(160, 1, 64)  # the gradient of a sum

        def run(scale, first_key, given, do):
            return with_grads(lambda q, k, v: tg.triton_attention(q, k, v, first_key, 48, scale), given, do)

        plain = run(torch.tensor(0.12), first_key, paired, ones.contiguous())
        by_column = paired.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
        for other in (
            (0.12, first_key.int(), paired, ones),
            (torch.tensor(0.12), first_key, by_column, ones),
        ):
            assert all(torch.equal(a, b) for a, b in zip(run(*other), plain, strict=True))

    @pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
    def test_only_blocks_that_hold_a_visible_pair_are_multiplied(monkeypatch, capability):
        T, window = 640, 150
        first_key = intervals(T, window, (0, 260, 500))
        builder = tg.triton.runtime.interpreter.InterpreterBuilder
        products, multiply = [], builder.create_dot
        monkeypatch.setattr(tg, "compute_capability", lambda: capability)
        monkeypatch.setattr(builder, "create_dot", lambda *args: products.append(1) or multiply(*args))
        with_grads(
            lambda q, k, v: tg.triton_attention(q, k, v, first_key, window, 0.12),
            *inputs(T, 1, 16, torch.float32),
        )
        needed = 0
        for table, each in ((tg.ATTENTION_FORWARD, 2), (tg.ATTENTION_DQ, 3), (tg.ATTENTION_DKV, 4)):
            BLOCK_M, BLOCK_N, *_ = tg.config_for_arch(table)
            blocks = visible(first_key).view(T // BLOCK_M, BLOCK_M, T // BLOCK_N, BLOCK_N)
            needed += each * int(blocks.any(3).any(1).sum())
        assert len(products) == needed

    @pytest.mark.slow
    def test_operator_keeps_its_promises_to_the_compiler():
        """Fake tensors, the autograd formula, and a graph without breaks that gives the same."""
        (x, do), first_key = inputs(48, 2, 16, torch.bfloat16), intervals(48, 20, (0, 30))
        scale = torch.tensor(0.12)
        leaves = [t.clone().requires_grad_() for t in x.unbind(1)]
        torch.library.opcheck(
            tg.attention_op,
            (*leaves, first_key.int(), scale),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )

        def attend(q, k, v):
            return 2 * tg.triton_attention(q, tg.norm(k), v, first_key, 20, scale)

        whole = torch.compile(attend, fullgraph=True, dynamic=False, backend="aot_eager")
        for a, b in zip(with_grads(whole, x, do), with_grads(attend, x, do), strict=True):
            assert torch.equal(a, b)
