"""Gradients of lookups, added to a table's by rows: in the interpreter against index_add_, every access
checked, and what the kernels compile to.
"""

import interpreter
import pytest
import torch

import train_gpt as tg

if not interpreter.ACTIVE:
    import aot

    @pytest.mark.parametrize("cc", [80, 90, 120])
    # Bigrams of short, a table of medium.
    @pytest.mark.parametrize("rows, D", [(251_520, 768), (50_304, 1024)])
    def test_compiled_kernels_fit(cc, rows, D):
        order = tg.RowOrder.of(torch.zeros(256, dtype=torch.int64))
        with aot.record(cc) as launches:
            grad = torch.empty(rows, D, dtype=torch.bfloat16, device="meta")
            tg.add_rows_(grad, torch.empty(256, D, dtype=torch.bfloat16), order)
        assert [kernel.name for kernel in launches] == ["add_rows_kernel", "finish_rows_kernel"]
        for kernel in launches:
            assert kernel.fits and kernel.spill_st == kernel.spill_ld == 0, aot.row(kernel)
            assert kernel.counts["atom"] == 0, "the result depends on the order of programs"
            assert kernel.regs <= 64 and kernel.counts["ldg128"] > 0, aot.row(kernel)

else:
    import sanitizer

    sanitizer.apply()
    CHUNK = tg.ROWS_AT_ONCE

    # How the sorted rows fall into the chunks that programs take.
    ROWS = {
        "one row": [3],
        "a chunk of one row": [5] * CHUNK,
        "one row over many chunks": [2] * (5 * CHUNK + 3),
        "a row begins at the end of a chunk": [0] * (CHUNK - 1) + [1] * (2 * CHUNK) + [4],
        "a row ends where a chunk does": [0] * 5 + [1] * (2 * CHUNK - 5) + [2] * 3,
        "chunks of many rows": [i // 3 for i in range(4 * CHUNK + 7)],
        "all different": list(range(2 * CHUNK + 1)),
    }

    @pytest.mark.parametrize("case", ROWS)
    @pytest.mark.parametrize("D", [pytest.param(16, marks=pytest.mark.slow), 24])
    def test_rows_are_added_to_what_is_there(case, D):
        rng = torch.Generator().manual_seed(D)
        rows = torch.tensor(ROWS[case])[torch.randperm(len(ROWS[case]), generator=rng)]
        V = int(rows.max()) + 2
        grad, dy = torch.randn(V, D, generator=rng), torch.randn(len(rows), D, generator=rng)
        expected = grad.double().index_add_(0, rows, dy.double())
        first, again = grad.clone(), grad.clone()
        for to in (first, again):
            tg.add_rows_(to, dy, tg.RowOrder.of(rows))
        torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(first, again)

    def test_a_lookup_adds_up_over_several_backward_passes_and_tables():
        rng = torch.Generator().manual_seed(0)
        rows = torch.randint(9, (100,), generator=rng)
        tables = [torch.randn(9, 16, generator=rng).requires_grad_() for _ in range(2)]
        plain = [t.detach().clone().requires_grad_() for t in tables]
        order = tg.RowOrder.of(rows)
        for factor in (1.0, 2.0):
            for own, look_up in ((tables, tg.triton_look_up), (plain, tg.look_up)):
                x = look_up(own[0], rows, order) * look_up(own[1], rows, order)
                (factor * x).square().sum().backward()
        for a, b in zip(tables, plain, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-4)

    def test_nothing_is_kept_where_nothing_learns():
        table = torch.randn(9, 16).requires_grad_()
        rows = torch.tensor([1, 1, 8])
        with torch.no_grad():
            assert torch.equal(tg.triton_look_up(table, rows, None), table[rows])
        assert table.grad is None

    def test_gradients_in_bfloat16_are_rounded_once():
        rows, dy = torch.zeros(3 * CHUNK, dtype=torch.int64), torch.full((3 * CHUNK, 16), 2.0**-9).bfloat16()
        grad = torch.ones(1, 16, dtype=torch.bfloat16)
        tg.add_rows_(grad, dy, tg.RowOrder.of(rows))
        assert torch.equal(grad.float(), torch.full((1, 16), 1 + 3 * CHUNK * 2.0**-9).bfloat16().float())
