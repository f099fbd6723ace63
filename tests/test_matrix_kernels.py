"""The MLP, Muon's symmetric product and the embedding's transposes as kernels: in the interpreter against
reference and float64, with every access checked, and what they compile to for the presets' sizes.
"""

from functools import partial

import interpreter
import pytest
import torch
import torch.nn.functional as F

import train_gpt as tg

BF16, F32 = torch.bfloat16, torch.float32
ELSEWHERE = [pytest.param(cc, marks=pytest.mark.slow) for cc in (80, 89, 120)]  # the default tests try Hopper


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


if not interpreter.ACTIVE:
    import aot

    def compiled(cc: int, operator, *args) -> aot.Result:
        with aot.record(cc) as launches:
            operator(*args)
        (kernel,) = launches
        assert kernel.fits and kernel.spill_st == kernel.spill_ld == 0, aot.row(kernel)
        assert kernel.counts["atom"] == 0, "the result depends on the order of programs"
        assert not kernel.warnings, aot.row(kernel)  # ptxas says here that it had to serialize wgmma
        return kernel

    def mlp_inputs(T: int, D: int, backward: bool) -> list[torch.Tensor | None]:
        return [
            torch.empty(T, D, dtype=BF16),
            torch.empty(4 * D, D, dtype=BF16),
            torch.empty(T, 4 * D, dtype=BF16) if backward else None,
        ]

    def bank(preset: str, name: str) -> torch.Tensor:
        """What polar_express multiplies: a bank's matrices, the shorter side first."""
        cfg = tg.PRESETS[preset]
        D, layers = cfg.model_dim, len(cfg.windows)
        if name == "mlp":
            return torch.empty(2 * layers, D, 4 * D, dtype=BF16)
        return torch.empty(4 * layers, D, D, dtype=BF16)

    @pytest.mark.parametrize(
        "preset", ["short", *(pytest.param(name, marks=pytest.mark.slow) for name in ("medium", "one-gpu"))]
    )
    @pytest.mark.parametrize("backward, registers", [(False, 155), (True, 172)])
    def test_mlp_on_hopper(preset, backward, registers):
        """registers: of a thread, by Triton 3.9; one program fills a multiprocessor, so only spills would
        cost. The number of tokens, which a stage changes, is not known to the compiler.
        """
        cfg = tg.PRESETS[preset]
        inputs = mlp_inputs(cfg.stages[0].batch_tokens // cfg.micro_batches, cfg.model_dim, backward)
        kernel = compiled(90, tg.relu2_product, *inputs)
        assert kernel.regs <= registers + 16, aot.row(kernel)
        assert kernel.counts["wgmma"] and kernel.counts["tma_ld"] and kernel.counts["tma_st"], aot.row(kernel)
        assert kernel.counts["mma"] == 0 and kernel.grid == (132,), aot.row(kernel)

    @pytest.mark.parametrize("cc", [89, 90, pytest.param(120, marks=pytest.mark.slow)])
    def test_mlp_in_fp8(cc):
        a, b = (torch.empty(size, 768, dtype=torch.float8_e4m3fn) for size in (49152, 3072))
        kernel = compiled(cc, tg.relu2_product_fp8, a, b, BF16)
        assert kernel.counts["wgmma" if cc == 90 else "mma"] and kernel.grid == (132,), aot.row(kernel)
        assert "e4m3" in kernel.kernel.asm["ptx"], "its products are not FP8's"

    @pytest.mark.parametrize("preset", ["short", pytest.param("medium", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("name", ["mlp", "qkvo", "gram"])
    def test_symmetric_product_on_hopper(preset, name):
        x = bank(preset, "qkvo" if name == "gram" else name)
        kernel = compiled(90, tg.triton_symmetric_product, x, *((-2.5, 0.5) if name == "gram" else ()))
        assert kernel.regs <= 115 and kernel.smem <= 128 * 1024 and kernel.ctas_per_sm == 2, aot.row(kernel)
        assert kernel.counts["wgmma"] and kernel.counts["mma"] == 0, aot.row(kernel)

    @pytest.mark.parametrize("cc", ELSEWHERE)
    def test_matrix_kernels_fit_elsewhere(cc):
        """No spills, tensor cores, shared memory as there is: 163 KB on sm_80, 99 KB on sm_89 and sm_120."""
        for backward in (False, True):
            kernel = compiled(cc, tg.relu2_product, *mlp_inputs(4096, 768, backward))
            assert kernel.counts["mma"] and (kernel.counts["cpasync"] or kernel.counts["tma_ld"]), aot.row(
                kernel
            )
        for x, *scales in ((bank("one-gpu", "mlp"),), (bank("one-gpu", "qkvo"), -2.5, 0.5)):
            assert compiled(cc, tg.triton_symmetric_product, x, *scales).counts["mma"]

    @pytest.mark.parametrize("cc", [90, *ELSEWHERE])
    @pytest.mark.parametrize("dtype", [BF16, F32])
    def test_transposes_move_16_bytes_at_a_time(cc, dtype):
        table, head = torch.empty(50304, 768, dtype=dtype), torch.empty(768, 50304, dtype=dtype)
        values = 64 * 64 // (4 * 32)  # of each thread
        for dst, src, add in ((head, table, True), (table, head, False)):
            kernel, loads = compiled(cc, tg.triton_transpose_, dst, src, add), 1 + add
            assert kernel.counts["ldg128"] == loads * values * dtype.itemsize // 16, aot.row(kernel)
            assert kernel.kernel.asm["ptx"].count("st.global.v4.b32") == values * dtype.itemsize // 16, (
                aot.row(kernel)
            )
            assert kernel.smem >= 64 * 64 * dtype.itemsize, "not through shared memory"
            assert kernel.ctas_per_sm >= 5, aot.row(kernel)

else:
    import sanitizer

    sanitizer.apply()

    def with_grads(operator, dtype: torch.dtype, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """y and the gradients of the sum of y * dy; inputs: x, up, down, dy"""
        *leaves, dy = (t.to(dtype) for t in inputs)
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = operator(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    plain_mlp, fused_mlp = partial(tg.mlp, activation="relu2"), partial(tg.triton_mlp, activation="relu2")

    def mlp_inputs(T: int, D: int) -> list[torch.Tensor]:
        """x, up, down, dy, with values that bfloat16 has"""
        x, up, down, dy = (
            random(T, D),
            random(4 * D, D, seed=1),
            random(4 * D, D, seed=2),
            random(T, D, seed=3),
        )
        return [t.to(BF16).float() for t in (x, up * D**-0.5, down * D**-0.5, dy)]

    @pytest.mark.parametrize("dtype, tolerance", [(BF16, 5e-3), (F32, 1e-6)])
    @pytest.mark.parametrize("T, D", [(140, 72), (128, 64), (1, 8)])  # parts of blocks, whole blocks, little
    @pytest.mark.parametrize("capability", [90, *ELSEWHERE])
    def test_mlp_and_its_gradients_are_the_reference(monkeypatch, dtype, tolerance, T, D, capability):
        monkeypatch.setattr(tg, "compute_capability", lambda: capability)
        inputs = mlp_inputs(T, D)
        for name, a, b in zip(
            ("y", "dx", "dup", "ddown"),
            with_grads(fused_mlp, dtype, *inputs),
            with_grads(plain_mlp, F32, *inputs),
            strict=True,
        ):
            assert a.dtype == dtype and error(a, b) < tolerance, (name, error(a, b))

    def test_mlp_error_against_float64_is_at_most_that_of_plain_bfloat16():
        inputs = mlp_inputs(384, 128)
        exact, plain = with_grads(plain_mlp, torch.float64, *inputs), with_grads(plain_mlp, BF16, *inputs)
        for name, a, b, truth in zip(
            ("y", "dx", "dup", "ddown"), with_grads(fused_mlp, BF16, *inputs), plain, exact, strict=True
        ):
            assert error(a, truth) <= error(b, truth), (name, error(a, truth), error(b, truth))

    @pytest.mark.parametrize("T, D", [(140, 80), (256, 128)])
    def test_mlp_in_fp8_errs_as_plain_products_of_the_same_fp8_values_do(T, D):
        inputs = mlp_inputs(T, D)
        fused = with_grads(lambda *args: fused_mlp(*args, fp8=True), BF16, *inputs)
        x, up, down, _ = inputs

        def rounded(t: torch.Tensor, scale: float) -> torch.Tensor:
            return tg.to_fp8(t, scale).float() * scale

        hidden = F.relu(rounded(x, tg.X_SCALE) @ rounded(up, tg.HEAD_SCALE).T).square()
        by_hand = rounded(hidden, tg.HIDDEN_SCALE) @ rounded(down, tg.HEAD_SCALE)
        assert error(fused[0], by_hand) < 5e-3
        exact = with_grads(plain_mlp, torch.float64, *inputs)
        for name, a, b in zip(("y", "dx", "dup", "ddown"), fused, exact, strict=True):
            assert a.dtype == BF16 and error(a, b) < 0.12, (name, error(a, b))

    def test_mlp_in_fp8_saturates_and_is_for_training_alone():
        x, up, down, _ = (t.to(BF16) for t in mlp_inputs(32, 16))
        with torch.no_grad():
            plain = fused_mlp(x, up, down)
            assert torch.equal(plain, fused_mlp(x, up, down, fp8=True))
        assert torch.equal(plain, fused_mlp(x, up, down))
        assert not torch.equal(plain, fused_mlp(x, up, down, fp8=True))
        assert fused_mlp(1e4 * x, up, down, fp8=True).isfinite().all()

    @pytest.mark.parametrize("programs", [1, 3])
    def test_any_number_of_programs_gives_the_same_bits(monkeypatch, programs):
        inputs = mlp_inputs(140, 72)
        many = with_grads(fused_mlp, BF16, *inputs)
        monkeypatch.setattr(tg, "PROCESSORS", programs)
        for a, b in zip(with_grads(fused_mlp, BF16, *inputs), many, strict=True):
            assert torch.equal(a, b)

    def test_mlp_keeps_one_tensor_of_its_hidden_size():
        x, up, down, dy = (t.to(BF16).requires_grad_() for t in mlp_inputs(40, 16))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = fused_mlp(x, up, down)
        assert sorted(t.shape for t in kept) == [(40, 16), (40, 64), (64, 16), (64, 16)]
        y.sum().backward()  # a gradient without strides
        plain = with_grads(plain_mlp, F32, *(t.detach() for t in (x, up, down, torch.ones(40, 16))))
        for t, grad in zip((x, up, down), plain[1:], strict=True):
            assert error(t.grad, grad) < 5e-3

    def assert_symmetric(product: torch.Tensor, tolerance: float) -> None:
        """A block of 128 x 128 and its mirror image are the same bits, as the kernel stores one product in
        both places. Within a block on the diagonal the two halves are sums of their own: whether those agree
        to the bit is the affair of whoever multiplies, here NumPy's library.
        """
        mirrored = product.mT.contiguous()
        for row in range(0, product.size(-2), 128):
            here = slice(row, row + 128)
            for column in range(0, row, 128):
                there = slice(column, column + 128)
                assert torch.equal(product[:, here, there], mirrored[:, here, there]), (row, column)
            assert error(product[:, here, here], mirrored[:, here, here]) < tolerance, row

    SHAPES = {"blocks": (2, 256, 128), "parts": (3, 200, 72), "tall": (2, 136, 168), "one": (1, 8, 8)}

    @pytest.mark.parametrize("dtype, tolerance", [(BF16, 5e-3), (F32, 1e-6)])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
    def test_symmetric_product_is_the_reference_for_any_strides(
        monkeypatch, dtype, tolerance, shape, capability
    ):
        monkeypatch.setattr(tg, "compute_capability", lambda: capability)
        n, rows, columns = SHAPES[shape]
        x = random(n, rows, columns, dtype=dtype)
        padded = random(2 * n, rows + 8, 2 * columns + 8, dtype=dtype)
        views = {
            "plain": x,
            "turned": x.mT.contiguous().mT,
            "inside": padded[::2, 8:, 8 : 8 + columns],
            "turned inside": padded[::2, 8:, 8 : 8 + columns].mT,
            "scattered": padded[:n, 8:, 8::2],
        }
        for name, view in views.items():
            product = tg.triton_symmetric_product(view)
            assert product.dtype == dtype, name
            assert_symmetric(product, tolerance)
            assert error(product, tg.symmetric_product(view.float())) < tolerance, name

    @pytest.mark.parametrize("dtype, tolerance", [(BF16, 5e-3), (F32, 1e-6)])
    @pytest.mark.parametrize("turned", [False, True])
    def test_symmetric_product_with_both_terms(dtype, tolerance, turned):
        x = tg.symmetric_product(random(3, 200, 72) / 72).to(dtype)
        product = tg.triton_symmetric_product(x.mT if turned else x, -2.4, 0.7)
        assert error(product, tg.symmetric_product(x.float(), -2.4, 0.7)) < tolerance
        assert_symmetric(product, tolerance)

    def test_symmetric_product_error_against_float64_is_at_most_that_of_plain_bfloat16():
        x = random(2, 136, 264, dtype=BF16)
        gram = tg.symmetric_product(x.float() / 16).to(BF16)
        for args in ((x, 1.5, 0.0), (gram, -2.4, 0.7)):
            truth = tg.symmetric_product(args[0].double(), *args[1:])
            fused, (x, alpha, beta) = tg.triton_symmetric_product(*args), args
            plain = alpha * (x @ x.mT) + beta * x if beta else alpha * (x @ x.mT)  # each operation rounds
            assert error(fused, truth) <= error(plain, truth), args[1:]

    @pytest.mark.parametrize("shape", [(2, 72, 200), (2, 200, 72)])
    def test_polar_express_with_the_kernel(shape):
        """As with products that round once; the plain ones, which round twice in bfloat16, are 5 % away."""

        def rounded_once(x, alpha=1.0, beta=0.0):
            return tg.symmetric_product(x.double(), alpha, beta).to(x.dtype)

        expected = tg.polar_express(random(*shape), rounded_once)
        assert error(tg.polar_express(random(*shape), tg.triton_symmetric_product), expected) < 0.02

    @pytest.mark.parametrize("dst_dtype, src_dtype", [(BF16, BF16), (F32, F32), (F32, BF16), (BF16, F32)])
    @pytest.mark.parametrize("rows, columns", [(64, 128), (72, 203), (1, 3)])
    def test_transposes_change_what_they_should_and_nothing_else(dst_dtype, src_dtype, rows, columns):
        whole, src = (
            random(rows + 2, columns + 5, dtype=dst_dtype),
            random(columns, rows + 3, dtype=src_dtype)[:, 2:-1],
        )
        for add in (True, False):
            changed, expected = whole.clone(), whole.clone()
            expected[1:-1, 3:-2] = (add * whole[1:-1, 3:-2].float() + src.T.float()).to(dst_dtype)
            tg.triton_transpose_(changed[1:-1, 3:-2], src, add)
            assert torch.equal(changed, expected), add

    def test_transposes_refuse_other_shapes_and_strides():
        for dst, src in (
            (torch.zeros(8, 16), torch.zeros(8, 16)),
            (torch.zeros(8, 16), torch.zeros(8, 16).T),
            (torch.zeros(8, 32)[:, ::2], torch.zeros(16, 8)),
        ):
            with pytest.raises(AssertionError, match="torch.Size"):
                tg.triton_transpose_(dst, src, True)

    @pytest.mark.slow
    def test_operators_keep_their_promises_to_the_compiler():
        """Fake tensors, and graphs without breaks that give the same."""
        x, up, down, dy = (t.to(BF16) for t in mlp_inputs(40, 16))
        hidden = tg.relu2_product(x, up, None)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(tg.relu2_product, (x, up, None), test_utils=checks)
        torch.library.opcheck(tg.relu2_product, (dy, down, hidden), test_utils=checks)
        torch.library.opcheck(tg.triton_symmetric_product, (up[None].mT, 1.0, 0.0), test_utils=checks)
        whole = torch.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        eager, compiled = (
            with_grads(fused_mlp, BF16, x, up, down, dy),
            with_grads(whole(fused_mlp), BF16, x, up, down, dy),
        )
        for a, b in zip(eager, compiled, strict=True):
            assert torch.equal(a, b)
        gram, up = whole(lambda g: tg.triton_symmetric_product(g.mT, 0.5, 0.0)), up.detach()
        assert torch.equal(gram(up[None]), tg.triton_symmetric_product(up[None].mT, 0.5, 0.0))
