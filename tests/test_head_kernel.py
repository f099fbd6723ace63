"""The fused head: loss and gradients in the interpreter, against float64; what it compiles to."""

import interpreter
import pytest
import torch

import train_gpt as tg

CAP, OFF = (23.0, 5.0, 7.5), (0.0, 5.0, 7.5)


def head_chunk_bf16(*args, **named):
    """triton_head_chunk as a GPU without FP8 computes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "compute_capability", lambda: 80)
        return tg.triton_head_chunk(*args, **named)


PIECES = {"bf16": head_chunk_bf16, "fp8": tg.triton_head_chunk}


def inputs(T: int, V: int, n: int, spread: float = 2.0, D: int = 64) -> list[torch.Tensor]:
    """x (T, D) of rows with mean square 1, head (D, V), bfloat16; likely targets (T,), weights (n,).

    spread: the standard deviation of the logits.
    """
    rng = torch.Generator().manual_seed(T + V + n)
    x = tg.norm(torch.randn(T, D, generator=rng)).bfloat16()
    head = (torch.randn(D, V, generator=rng) * spread * D**-0.5).bfloat16()
    targets = torch.multinomial((x.float() @ head.float()).softmax(1), 1, generator=rng)[:, 0]
    return [x, head, targets, torch.tensor([1.0, 0.5, 0.25][:n])]


def chunk_inputs(*args, **named) -> list[torch.Tensor]:
    """inputs(), targets and weights as a chunk gets them, (T, n)."""
    x, head, targets, weights = inputs(*args, **named)
    T, n = len(targets), len(weights)
    place = torch.arange(T)[:, None] + torch.arange(n)
    return [x, head, targets[place.clamp_max(T - 1)], torch.where(place < T, weights / T, 0)]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def with_grads(operator, x: torch.Tensor, head: torch.Tensor, *rest) -> tuple[torch.Tensor, ...]:
    x, head = x.clone().requires_grad_(), head.clone().requires_grad_()
    loss = operator(x, head, *rest)
    return (loss, *torch.autograd.grad(loss, (x, head), torch.tensor(3.0)))


if not interpreter.ACTIVE:
    import aot

    @pytest.mark.parametrize("cc", [80, pytest.param(89, marks=pytest.mark.slow), 90, 120])
    @pytest.mark.parametrize(
        "n, cap, with_grad, offsets, registers",
        [(3, CAP, True, 0, 48), (3, CAP, True, 1, 64), (1, CAP, False, 0, 40), (2, OFF, True, 0, 60)],
    )
    def test_compiled_kernel_stays_within_its_budget(cc, n, cap, with_grad, offsets, registers):
        """registers: of a thread on sm_90, by Triton 3.9. The width of x changes nothing here."""
        z, offsets = torch.empty(2, 50304, dtype=torch.bfloat16), torch.zeros(50304) if offsets else None
        targets = torch.zeros(2, n, dtype=torch.int64)
        with aot.record(cc) as launches:
            tg.cross_entropy_(z, targets, torch.zeros(2, n), cap, with_grad, offsets)
        (kernel,) = launches
        assert kernel.fits and kernel.spill_st == kernel.spill_ld == 0, aot.row(kernel)
        assert kernel.regs <= (registers + 8 if cc == 90 else 80), aot.row(kernel)
        assert kernel.counts["atom"] == 0, "the result depends on the order of programs"
        assert kernel.counts["ldg128"] > 0, "loads of less than 16 bytes"

    @pytest.mark.parametrize("cc", [89, 90, pytest.param(120, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("n, cap, offsets", [(1, CAP, 0), (3, CAP, 0), (2, OFF, 0), (3, CAP, 1)])
    def test_compiled_gradient_kernels_stay_within_their_budget(cc, n, cap, offsets):
        z, scale = torch.empty(64, 50304, dtype=torch.bfloat16), torch.ones(())
        with aot.record(cc) as launches:
            row = torch.zeros(64)
            targets = torch.zeros(64, n, dtype=torch.int64)
            offsets = torch.zeros(50304) if offsets else None
            tg.logit_gradient(z, row, targets, torch.zeros(64, n), list(cap), scale, offsets)
        blocks, at_targets = launches
        for kernel in launches:
            assert kernel.fits and kernel.spill_st == kernel.spill_ld == 0, aot.row(kernel)
            assert kernel.counts["atom"] == 0, "the result depends on the order of programs"
        assert blocks.regs <= 96 and at_targets.regs <= 96, [aot.row(kernel) for kernel in launches]
        assert blocks.counts["ldg128"] > 0, "loads of less than 16 bytes"

else:
    import sanitizer

    sanitizer.apply()

    @pytest.mark.parametrize("piece, tolerance", [("bf16", 5e-3), ("fp8", 0.12)])  # E5M2 rounds to 1/8
    @pytest.mark.parametrize(
        "n, V, cap",  # V: a block, one and a part, a part
        [
            pytest.param(1, 4096, CAP, marks=pytest.mark.slow),
            (2, 4096 + 272, CAP),
            (2, 208, OFF),
            (1, 208, (80.0, 5.0, 30.0)),
            (3, 208, CAP),
        ],
    )
    def test_loss_and_gradients_are_the_reference(monkeypatch, piece, tolerance, cap, n, V):
        monkeypatch.setitem(
            tg.HEAD_CHUNK, "cpu", 16
        )  # two where V is small; the last has rows with a weight of zero
        x, head, targets, weights = inputs(32 if V < 4096 else 16, V, n)
        got = with_grads(lambda *args: tg.head_loss(*args, PIECES[piece]), x, head, targets, weights, cap)
        plain = with_grads(tg.reference_head_loss, x.float(), head.float(), targets, weights, cap)
        for name, a, b in zip(("loss", "dx", "dhead"), got, plain, strict=True):
            assert error(a, b) < tolerance, (name, error(a, b))
        assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.bfloat16]

    @pytest.mark.parametrize("cap", [CAP, pytest.param(OFF, marks=pytest.mark.slow)])
    def test_error_against_float64_is_that_of_plain_bfloat16(cap):
        x, head, targets, weights = chunk_inputs(24, 4368, 3, D=256)
        exact = tg.head_chunk(x.double(), head.double(), targets, weights.double(), cap, True)
        plain = tg.head_chunk(x, head, targets, weights, cap, True)
        fused = head_chunk_bf16(x, head, targets, weights, cap, True)
        for name, a, b, truth in zip(("loss", "dx", "dhead"), fused, plain, exact, strict=True):
            assert error(a, truth) <= 1.1 * error(b, truth) + 1e-6, (name, error(a, truth), error(b, truth))

    @pytest.mark.parametrize("cap", [CAP, pytest.param(OFF, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("piece, tolerance", [("bf16", 5e-3), ("fp8", 0.12)])
    def test_logits_with_offsets(piece, tolerance, cap):
        x, head, targets, weights = chunk_inputs(16, 208, 3)
        offsets = torch.where(torch.isin(torch.arange(208), targets), 0.0, torch.arange(208) / 20)
        args = x, head, targets, weights, cap, True
        plain = tg.head_chunk(*args, offsets=offsets)
        for a, b in zip(PIECES[piece](*args, offsets=offsets), plain, strict=True):
            assert error(a, b) < tolerance
        assert error(tg.head_chunk(*args)[1], plain[1]) > 2 * tolerance  # they matter

    @pytest.mark.parametrize("piece, tolerance", [("bf16", 5e-3), ("fp8", 0.12)])
    def test_a_token_that_is_the_target_twice_gets_both_weights(piece, tolerance):
        x, head, targets, weights = chunk_inputs(16, 208, 3)
        targets[:] = targets[:, :1]
        targets[3, 2] = 207
        args = x, head, targets, weights, CAP, True
        for a, b in zip(PIECES[piece](*args), tg.head_chunk(*args), strict=True):
            assert error(a, b) < tolerance

    @pytest.mark.parametrize("cap", [CAP, pytest.param(OFF, marks=pytest.mark.slow)])
    def test_gradient_in_fp8_is_plain_and_transposed(cap):
        """Each value within E5M2's rounding of the plain gradient; rows and columns that no block fills."""
        rows, V = 80, 176
        x, head, targets, weights = chunk_inputs(rows, V, 3)
        z = x @ head
        _, log_totals = tg.cross_entropy_(z, targets, weights, list(cap), False)
        scale = weights.sum(1).amax() / 2**14
        dz, dz_t = tg.logit_gradient(z, log_totals, targets, weights, list(cap), scale)
        _, plain = tg.cross_entropy(z.float(), targets, weights, cap)
        assert torch.equal(dz.T.view(torch.uint8), dz_t.view(torch.uint8))
        torch.testing.assert_close(dz.float() * scale, plain, rtol=2**-3 + 1e-3, atol=float(scale) * 2e-5)

    def test_fp8_where_all_weights_are_zero_and_where_a_chunk_is_no_multiple_of_16():
        x, head, targets, weights = chunk_inputs(16, 208, 2)
        loss, dx, d_head = tg.triton_head_chunk(x, head, targets, 0 * weights, CAP, True)
        assert float(loss) == 0 and not dx.any() and not d_head.any()
        odd = x[:10], head, targets[:10].contiguous(), weights[:10].contiguous(), CAP, True
        for a, b in zip(tg.triton_head_chunk(*odd), head_chunk_bf16(*odd), strict=True):
            assert torch.equal(a, b)  # FP8 products take multiples of 16 alone

    def test_large_logits_without_cap():
        x, head, targets, weights = chunk_inputs(6, 4368, 2, spread=1000.0)
        args = x, head, targets, weights, OFF, True
        for a, b in zip(head_chunk_bf16(*args), tg.head_chunk(*args), strict=True):
            assert a.isfinite().all() and error(a, b) < 5e-3

    def test_without_gradient_the_loss_owes_nothing_to_fp8_and_the_logits_stay():
        x, head, targets, weights = chunk_inputs(16, 208, 2)
        loss, *none = tg.triton_head_chunk(x, head, targets, weights, CAP, False)
        assert none == [None, None]
        assert torch.equal(loss, head_chunk_bf16(x, head, targets, weights, CAP, True)[0])
        assert torch.equal(loss, tg.triton_head_chunk(x, head, targets, weights, CAP, True, False)[0])
        assert not torch.equal(loss, tg.triton_head_chunk(x, head, targets, weights, CAP, True)[0])
        z = x @ head
        before = z.clone()
        tg.cross_entropy_(z, targets, weights, CAP, False)
        assert torch.equal(z, before)

    def test_fp8_saturates():
        head = torch.tensor([[0.005, -1.75, 3.0], [-0.02, 0.0, -1e4]]).bfloat16()
        head8 = tg.to_fp8(head, tg.HEAD_SCALE)
        assert head8.dtype == torch.float8_e4m3fn
        back = head8.float() * tg.HEAD_SCALE
        torch.testing.assert_close(back, head.float().clamp(-1.75, 1.75), rtol=2**-4, atol=0)

    @pytest.mark.slow
    def test_operator_keeps_its_promises_to_the_compiler():
        """Fake tensors, what it changes in place, and a graph without breaks that gives the same."""
        x, head, targets, weights = chunk_inputs(16, 208, 2)
        torch.library.opcheck(tg.cross_entropy_, (x @ head, targets, weights, list(CAP), True))
        gradient_inputs = (x @ head, torch.full((16,), 40.0), targets, weights, list(CAP), torch.tensor(1e-5))
        torch.library.opcheck(tg.logit_gradient, gradient_inputs)
        torch.compiler.assume_constant_result(tg.compute_capability)  # as choose_versions does
        whole = torch.compile(tg.triton_head_chunk, fullgraph=True, dynamic=False, backend="aot_eager")
        args = x, head, targets, weights, CAP, True
        for a, b in zip(whole(*args), tg.triton_head_chunk(*args), strict=True):
            assert torch.equal(a, b)
