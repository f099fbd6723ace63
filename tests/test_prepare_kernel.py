"""What makes q, k and v ready for attention, a kernel each way: in the interpreter against the plain version
in float64, every access checked, and what the kernels compile to.
"""

import interpreter
import pytest
import torch

import train_gpt as tg

if not interpreter.ACTIVE:
    import aot

    ARCHITECTURES = [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(120, marks=pytest.mark.slow)]

    @pytest.mark.parametrize("cc", ARCHITECTURES)
    @pytest.mark.parametrize("paired, key_offset", [(True, False), (False, True)])
    def test_compiled_kernels_fit(cc, paired, key_offset):
        T, H, D, switches = 256, 6, 128, (paired, key_offset, True)
        with aot.record(cc) as launches:
            new = lambda *size: torch.empty(size, dtype=torch.bfloat16, device="meta")  # noqa: E731
            angles = torch.empty(2 * T, 32, device="meta")
            is_first = torch.empty(T, dtype=torch.bool, device="meta")
            rest = (is_first, angles, angles, *switches)
            tg.prepare_op._init_fn(new(T, 3, H, D), new(T, H, D), *rest)
            size = (2 * T, H // 2, D) if paired else (T, H, D)
            tg.prepare_backward_op._init_fn(*(new(*size) for _ in range(3)), new(T, 3, H, D), *rest)
        assert [kernel.name for kernel in launches] == ["prepare_forward_kernel", "prepare_backward_kernel"]
        for kernel in launches:
            assert kernel.fits and kernel.spill_st == kernel.spill_ld == 0, aot.row(kernel)
            assert kernel.counts["atom"] == 0 and kernel.counts["ldg128"] > 0, aot.row(kernel)

else:
    import sanitizer

    sanitizer.apply()

    def inputs(T, H, D, half, dtype, value=True) -> list:
        rng = torch.Generator().manual_seed(T + D)
        random = lambda *size: torch.randn(*size, generator=rng).to(dtype)  # noqa: E731
        is_first = torch.rand(T, generator=rng) < 0.1
        is_first[0] = True
        angles = 6 * torch.rand(2 * T, half, generator=rng)
        return [random(T, 3, H, D), random(T, H, D) if value else None, is_first, angles.cos(), angles.sin()]

    def results(prepare, given, switches, dtype) -> list[torch.Tensor]:
        """q, k, v, and gradients by qkv and value."""
        given = [t if t is None or t.dtype == torch.bool else t.to(dtype) for t in given]
        places = len(given[0]) * (2 if switches[0] else 1)
        leaves = [t.clone().requires_grad_() for t in given[:2] if t is not None]
        qkv, value = leaves if len(leaves) == 2 else (leaves[0], None)
        angles = [t[:places].double() if dtype == torch.float64 else t[:places].float() for t in given[3:]]
        outputs = prepare(qkv, value, given[2], *angles, *switches)
        rng = torch.Generator().manual_seed(1)
        upstream = [torch.randn(t.shape, generator=rng).bfloat16().to(t.dtype) for t in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    CASES = {  # T, H, D, pairs that turn; paired, key_offset, qk_norm; a value is added
        "paired": (50, 4, 16, 4, True, False, True, True),
        "long": (45, 3, 32, 8, False, True, True, True),
        "plain": (32, 2, 16, 4, False, False, True, False),
        "whole rotary, no norm": (33, 2, 16, 8, False, False, False, True),
        "long, nothing turns": (70, 2, 16, 0, False, True, True, False),
        "paired and long": (40, 2, 16, 3, True, True, False, True),
    }

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
    def test_the_kernels_compute_what_the_plain_version_does(case, dtype):
        T, H, D, half, *switches, value = CASES[case]
        given = inputs(T, H, D, half, torch.bfloat16, value)
        exact = results(tg.prepare_qkv, given, switches, torch.float64)
        ours = results(tg.triton_prepare_qkv, given, switches, dtype)
        limit = 1e-5 if dtype == torch.float32 else 4e-3
        for a, b in zip(ours, exact, strict=True):
            assert a.shape == b.shape and a.dtype == dtype
            assert (a.double() - b).norm() < limit * b.norm()

    def test_a_gradient_goes_to_the_token_that_lent_its_key():
        """The key offset: the last token's still half is nobody's, a document's first lends its own twice."""
        _, _, _, cos, sin = given = inputs(3, 2, 16, 4, torch.float32)
        is_first = torch.tensor([True, False, True])
        qkv = given[0].requires_grad_()
        _, k, _ = tg.triton_prepare_qkv(qkv, None, is_first, cos[:3], sin[:3], False, True, False)
        k[..., 8:].sum().backward()
        lent = qkv.grad[:, 1, :, 8:]
        assert torch.equal(lent, torch.tensor([2.0, 0.0, 1.0])[:, None, None].expand_as(lent))
