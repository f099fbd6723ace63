"""NorMuon, Adam, exact bfloat16 weights, the class that drives them, against docs/model.md, "Optimizers"."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(*shape: int, condition: float, seed: int = 0) -> torch.Tensor:
    """Matrices whose singular values run from 1 down to 1 / condition."""
    u, s, vh = torch.linalg.svd(random(*shape, seed=seed), full_matrices=False)
    return (u * condition ** -torch.linspace(0, 1, s.size(-1))) @ vh


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


# Polar Express


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 64, 16), (1, 16, 64), (1, 32, 32), (5, 48, 24), (5, 24, 48)])
def test_polar_express_is_nearly_orthogonal_and_keeps_the_singular_vectors(shape, condition):
    g = spread(*shape, condition=condition)
    x = tg.polar_express(g)
    assert x.dtype == torch.bfloat16 and x.shape == g.shape
    singular = torch.linalg.svdvals(x.float())
    # The coefficients end between 0.85 and 1.145 (safety 2e-2, cushion 2); a bit of room for bfloat16.
    assert singular.min() > 0.80 and singular.max() < 1.18, (singular.min(), singular.max())
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    assert (x.float() - u @ vh).norm() < 0.19 * (u @ vh).norm()


@pytest.mark.parametrize("shape", [(4, 48, 16), (4, 16, 48), (4, 24, 24)])
def test_polar_express_takes_each_matrix_of_a_batch_for_itself(shape):
    g = spread(*shape, condition=10.0) * torch.tensor([1e-3, 1.0, 30.0, 1e3]).view(4, 1, 1)
    together = tg.polar_express(g).float()
    for n in range(4):
        torch.testing.assert_close(together[n], tg.polar_express(g[n : n + 1])[0].float(), rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", [(2, 32, 8), (2, 8, 32), (2, 16, 16)])
def test_a_zero_gradient_gives_zero_and_no_nan(shape):
    g = random(*shape)
    g[0] = 0
    x = tg.polar_express(g)
    assert (x[0] == 0).all() and x.isfinite().all() and (x[1] != 0).any()


def test_polar_express_multiplies_on_the_shorter_side():
    """On the longer one the result is the same, at several times the work."""
    costs = []
    for shape in ((1, 16, 64), (1, 64, 16)):
        with FlopCounterMode(display=False) as counter:
            tg.polar_express(random(*shape))
        costs.append(counter.get_total_flops())
    assert costs == [5 * (2 * 2 * 16 * 16 * 64 + 2 * 16 * 16 * 16)] * 2


# NorMuon

COEFFICIENTS = (  # copied from docs/model.md, not from the program
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def plain_polar_express(u: torch.Tensor) -> torch.Tensor:
    """One matrix in float64."""
    tall = u.size(0) > u.size(1)
    x = u.double().T if tall else u.double()
    x = x / (1.02 * x.square().sum().sqrt() + 1e-6)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class PlainNorMuon:
    """docs/model.md, "NorMuon": one matrix, float64, no in-place tricks."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.double()
        self.m = torch.zeros_like(self.weight)
        self.second = 0.0

    def direction(self, g: torch.Tensor, mu: float, beta2: float) -> torch.Tensor:
        g = g.double()
        self.m = self.m + (1 - mu) * (g - self.m)
        u = g + mu * (self.m - g)
        rows, columns = u.shape
        x = plain_polar_express(u)
        size = x.square().sum().sqrt()
        mean_square = (
            x.square().mean(1, keepdim=True) if rows >= columns else x.square().mean(0, keepdim=True)
        )
        self.second = beta2 * self.second + (1 - beta2) * mean_square
        x = x / self.second.sqrt()
        return x * size / x.square().sum().sqrt()

    def step(self, g: torch.Tensor, lr: float, wd: float, mu: float, beta2: float, twice: bool) -> None:
        u = self.direction(g, mu, beta2)
        rows, columns = u.shape
        rate = lr * max(1.0, rows / columns) ** 0.5 * (2 if twice else 1)
        agree = torch.sign(u) * torch.sign(self.weight) >= 0
        self.weight = self.weight - rate * u - torch.where(agree, wd * lr * rate * self.weight, 0.0)


ALONE = tg.DistEnv(rank=0, world_size=1, device=CPU)


def alone(p: torch.Tensor, optimizer: str, **spec) -> tg.Optimizer:
    """The optimizer of a model that is this one parameter."""
    cfg, model = tiny(), torch.nn.Module()
    model.p, model.kernels = torch.nn.Parameter(p), tg.Cpu(cfg).choose_kernels(cfg, ALONE, {})
    model.specs = {"p": tg.ParamSpec("p", tuple(p.shape), tg.constant(0), optimizer=optimizer, **spec)}
    return tg.Optimizer(cfg, model, ALONE)


def muon_state(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    state = alone(p, "muon").state["p"]
    return state["momentum_buffer"], state["second_moment"]


@pytest.mark.parametrize("shape", [(2, 3, 64, 16), (2, 3, 16, 64), (2, 3, 32, 32)])
def test_normuon_state_has_one_value_for_each_index_of_the_longer_side(shape):
    m, second = muon_state(torch.zeros(shape))
    rows, columns = shape[-2:]
    assert m.shape == (6, rows, columns)  # a bank's matrices in one row, whoever updates them
    assert second.shape == (6, *((rows, 1) if rows >= columns else (1, columns)))


MATRICES = [(4, 64, 16), (4, 16, 64), (4, 32, 32)]
# As of a bank (2, 2, ...) whose [:, 1] go twice as fast.
RATES_OF_FOUR = torch.tensor([1.0, 2.0, 1.0, 2.0]).view(4, 1, 1)


@pytest.mark.parametrize("shape", MATRICES)
def test_normuon_keeps_the_norm_and_evens_out_the_longer_side(shape):
    g = random(*shape)
    across = -1 if shape[-2] >= shape[-1] else -2
    # Very uneven.
    g *= 10 ** torch.linspace(-1, 1, shape[-3 - across]).view((-1, 1) if across == -1 else (1, -1))
    m, second = muon_state(g)
    plain = tg.polar_express(g).float()
    # No momentum, first step: u's own sizes alone count.
    u = tg.normuon_direction(g.clone(), m, second, 0.0, 0.95)
    sizes = u.norm(dim=across)
    torch.testing.assert_close(u.norm(dim=(-2, -1)), plain.norm(dim=(-2, -1)), rtol=1e-5, atol=0)
    assert plain.norm(dim=across).std(dim=-1).min() > 0.05  # there was something to even out
    torch.testing.assert_close(sizes, sizes.mean(dim=-1, keepdim=True).expand_as(sizes), rtol=1e-4, atol=0)


def test_normuon_direction_of_nothing_is_nothing():
    m, second = muon_state(torch.zeros(2, 32, 16))
    for _ in range(2):
        assert (tg.normuon_direction(torch.zeros(2, 32, 16), m, second, 0.95, 0.95) == 0).all()


@pytest.mark.parametrize("shape", [(4, 64, 16), (4, 16, 64), (4, 32, 32)])
def test_polar_express_is_the_description_up_to_bfloat16(shape):
    g = spread(*shape, condition=10.0)
    expected = torch.stack([plain_polar_express(matrix) for matrix in g])
    assert (
        tg.polar_express(g) - expected
    ).norm() < 0.08 * expected.norm()  # five steps amplify bfloat16's 0.4 %
    assert tg.POLAR_EXPRESS == COEFFICIENTS  # so a slip in a late coefficient could hide


@pytest.mark.parametrize("shape", MATRICES)
def test_normuon_is_the_description_in_float64_over_several_steps(shape, monkeypatch):
    # With bfloat16 out of the way (its error is the test above), every other step can be compared closely.
    monkeypatch.setattr(
        tg, "polar_express", lambda u, **_: torch.stack([plain_polar_express(matrix) for matrix in u]).float()
    )
    settings, momenta = dict(lr=0.02, wd=8.0, beta2=0.9), (0.85, 0.9, 0.95, 0.95, 0.5)
    begin = 0.2 * random(*shape, seed=1)
    rates = max(1, shape[1] / shape[2]) ** 0.5 * RATES_OF_FOUR
    p, (m, second) = begin.clone(), muon_state(begin)
    plain = [PlainNorMuon(matrix) for matrix in begin]
    for i, mu in enumerate(momenta):
        g = spread(*shape, condition=10.0, seed=2 + i)
        tg.normuon_(p, None, g.clone(), m, second, momentum=mu, matrix_lrs=rates, **settings)
        for n, matrix in enumerate(plain):
            matrix.step(g[n], mu=mu, twice=n % 2 == 1, **settings)
    for n, matrix in enumerate(plain):
        torch.testing.assert_close(m[n], matrix.m.float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(second[n], matrix.second.float(), rtol=1e-3, atol=0)
        torch.testing.assert_close(p[n], matrix.weight.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "shape, factor", [((2, 3, 64, 16), 2.0), ((2, 3, 16, 64), 1.0), ((2, 3, 32, 32), 1.0)]
)
def test_normuon_learning_rate_follows_the_shape_and_the_second_matrix_has_its_own(shape, factor):
    optimizer = alone(torch.zeros(shape), "muon", matrix_lrs=(1.0, 2.0, 1.0))
    g, begin = random(6, *shape[2:]), random(6, *shape[2:], seed=1)
    u = tg.normuon_direction(g.clone(), *muon_state(g), 0.9, 0.95)
    p = begin.clone()
    tg.normuon_(
        p,
        None,
        g.clone(),
        *muon_state(p),
        lr=0.01,
        wd=0.0,
        momentum=0.9,
        beta2=0.95,
        matrix_lrs=optimizer.matrix_lrs["p"],
    )
    rates = torch.tensor([1.0, 2.0, 1.0] * 2).view(6, 1, 1)  # [:, 1] of each layer, and only that one
    torch.testing.assert_close(begin - p, 0.01 * factor * rates * u, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape, factor", [((4, 64, 16), 2.0), ((4, 16, 64), 1.0)])
def test_normuon_decays_only_where_update_and_weight_agree(shape, factor):
    g, begin = random(*shape), random(*shape, seed=1)
    after = {}
    for wd in (0.0, 3.0):
        after[wd] = begin.clone()
        tg.normuon_(
            after[wd],
            None,
            g.clone(),
            *muon_state(g),
            lr=0.01,
            wd=wd,
            momentum=0.9,
            beta2=0.95,
            matrix_lrs=factor * RATES_OF_FOUR,
        )
    agree = (begin - after[0.0]).sign() == begin.sign()  # the update takes away from the weight
    assert 0.3 < agree.float().mean() < 0.7
    expected = torch.where(agree, 3.0 * 0.01 * (0.01 * factor * RATES_OF_FOUR) * begin, 0.0)
    torch.testing.assert_close(after[0.0] - after[3.0], expected, rtol=1e-2, atol=3e-7)


def test_normuon_decays_what_has_no_update():
    """A weight whose update is 0 agrees with it: 3.0 x 0.01 x 0.01 of it goes. (Adam's mask: opposite.)"""
    p, begin = torch.ones(4, 32, 32), torch.ones(4, 32, 32)
    settings = dict(lr=0.01, wd=3.0, momentum=0.9, beta2=0.95, matrix_lrs=torch.ones(4, 1, 1))
    tg.normuon_(p, None, torch.zeros_like(p), *muon_state(p), **settings)
    torch.testing.assert_close(begin - p, torch.full_like(p, 3e-4), rtol=1e-3, atol=0)


def test_q_and_k_are_orthogonalised_by_groups_of_heads_and_v_and_o_whole():
    """Two heads of 16 at a time, of 4: every block of 32 rows is as if it were alone."""
    _, optimizer = build(muon_heads=2)
    by_heads, bank = optimizer.by_heads["qkvo"], optimizer.params["qkvo"].flatten(0, 1)
    assert optimizer.by_heads["mlp"] is None and len(bank) == 24
    assert by_heads.split.tolist() == [i for i in range(24) if i % 4 < 2]
    assert sorted(by_heads.split.tolist() + by_heads.whole.tolist()) == list(range(24))
    grad = spread(24, 64, 64, condition=10.0)
    result = by_heads.orthogonalise(tg.polar_express, grad)
    for i, (given, ours) in enumerate(zip(grad, result, strict=True)):
        for first in range(0, 64, 32 if i % 4 < 2 else 64):
            rows = slice(first, first + (32 if i % 4 < 2 else 64))
            expected = tg.polar_express(given[None, rows])[0]
            torch.testing.assert_close(ours[rows].float(), expected.float(), rtol=2e-2, atol=2e-3)
    for heads in (0, 4):
        assert build(muon_heads=heads)[1].by_heads["qkvo"] is None


def test_a_step_by_heads_moves_each_group_as_if_it_were_a_matrix():
    (whole_model, whole), (model, optimizer) = build(muon_heads=0), build(muon_heads=2)
    for each in (whole_model, model):
        add_gradients(each, 0)
    begin, grad = model.qkvo.detach().clone(), model.qkvo.grad.clone()
    for each in (whole, optimizer):
        each.step(0, lr_mul=1.0, momentum=0.9, untie=False)
    same = (model.qkvo == whole_model.qkvo).flatten(2).all(-1)
    assert same[:, 2:].all() and not same[:, :2].any()
    direction = tg.normuon_direction(
        grad[0, :1, :32].flatten(0, 0).clone(), *muon_state(grad[0, :1, :32]), 0.9, 0.95
    )
    moved = (begin - model.qkvo.detach())[0, 0, :32].flatten()
    assert torch.nn.functional.cosine_similarity(moved, direction.flatten(), dim=0) > 0.97


def one_layer() -> dict:
    return dict(windows="s", paired_heads=".", value_embeds=".", skips=".", backout=".", extra_inputs=0)


def test_the_second_moment_of_o_has_one_value_for_each_output():
    """A loss that looks at output 5 alone: o's gradient is its row 5, a matrix of rank one.

    Orthogonalised, that row has a length s between 0.85 and 1.145, so the mean square of its 64 inputs is
    s^2 / 64; the other outputs' are 0.
    """
    model, optimizer = build(**one_layer())
    assert model.qkvo.shape == (1, 4, 64, 64) and optimizer.state["qkvo"]["second_moment"].shape == (4, 64, 1)
    heads, zeros = random(30, 4, 16), torch.zeros(30, 64)
    out = tg.project_output(zeros, heads, zeros, model.qkvo[0], torch.tensor(1.0), None, None)
    torch.testing.assert_close(out[:, 5], heads.flatten(1) @ model.qkvo[0, 3, 5])  # row 5 makes output 5
    add_gradients(model, 0)
    model.qkvo.grad = torch.autograd.grad(out[:, 5].sum(), model.qkvo)[0]
    optimizer.step(0, lr_mul=1.0, momentum=0.9, untie=False)
    second = optimizer.state["qkvo"]["second_moment"]
    assert not second[:3].any() and second[3].flatten().nonzero().flatten().tolist() == [5]
    assert 0.85**2 < float(second[3, 5, 0]) / (0.05 / 64) < 1.145**2


# Adam


def adam_state(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    state = alone(p, "adam").state["p"]
    return state["momentum_buffer"], state["second_moment"]


@pytest.mark.parametrize("betas, eps", [((0.5, 0.95), 1e-10), ((0.9, 0.99), 1e-10), ((0.65, 0.95), 1e-3)])
def test_adam_is_torch_adam(betas, eps):
    p, (m, second) = random(40, 7), adam_state(torch.zeros(40, 7))
    known = torch.nn.Parameter(p.clone())
    oracle = torch.optim.Adam([known], lr=0.01, betas=betas, eps=eps)
    for step in range(1, 9):
        g = random(40, 7, seed=step) * 10.0 ** (step % 3 - 2)  # sizes change, so that both averages matter
        g[0] = 0  # a token that never came up: no 0 / 0
        tg.adam_(p, None, g.clone(), m, second, lr=0.01, wd=0.0, betas=betas, eps=eps, steps=step)
        known.grad = g.clone()
        oracle.step()
        torch.testing.assert_close(p, known.detach(), rtol=1e-5, atol=1e-6)


def test_adam_decays_only_where_update_and_weight_agree_by_the_square_of_the_rate():
    p, g = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0, 2.0]), torch.tensor([0.3, -0.3, 0.3, -0.3, 0.3, 0.0])
    tg.adam_(p, None, g, *adam_state(p), lr=0.1, wd=5.0, betas=(0.9, 0.99), eps=1e-10, steps=1)
    # The first update is the gradient's sign times lr 0.1; decay is 5 x 0.1^2 x 2 = 0.1, never against it.
    expected = torch.tensor([2 - 0.1 - 0.1, 2 + 0.1, -2 - 0.1, -2 + 0.1 + 0.1, -0.1, 2.0])
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)


# Exact bfloat16


def patterns(kind: str) -> torch.Tensor:
    """float32 values of one class of bit patterns, all finite."""
    rng = torch.Generator().manual_seed(3)
    any_bits = torch.randint(-(2**31), 2**31, (20000,), generator=rng).to(torch.int32)
    high, low = any_bits & -0x10000, any_bits & 0xFFFF
    edge = torch.tensor([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], dtype=torch.int32)[low % 8]
    powers = (any_bits & -0x800000) | 0x7F0000  # bfloat16's mantissa is full: a carry moves the exponent
    chosen = {
        "any": any_bits,
        "negative": any_bits | -(2**31),
        "subnormal": any_bits & -0x7F800001,  # the exponent's bits are zero
        "beside a rounding edge": high | edge,
        "carry into the exponent": powers | edge,
        "subnormal carries into normal": (any_bits & -(2**31)) | 0x7F0000 | edge,
        "zeros": torch.tensor([0, -(2**31)], dtype=torch.int32),
        "largest": torch.tensor([0x7F7FFFFF, 0x7F7FFFFF - 2**31, 0x7F7F7FFF], dtype=torch.int32),
    }[kind].view(torch.float32)
    return chosen[chosen.isfinite()]


KINDS = (
    "any",
    "negative",
    "subnormal",
    "beside a rounding edge",
    "carry into the exponent",
    "subnormal carries into normal",
    "zeros",
    "largest",
)


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_weight_and_its_store_are_inverse_bit_for_bit(kind):
    value = patterns(kind)
    p, low = torch.full_like(value, 7.0, dtype=torch.bfloat16), torch.full_like(value, 7, dtype=torch.int16)
    tg.store_fp32_weight_(p, low, value.clone())
    assert torch.equal(bits(tg.fp32_weight(p, low)), bits(value))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bfloat16_part_is_the_nearest_to_the_value(kind):
    value = patterns(kind)
    p, low = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int16)
    tg.store_fp32_weight_(p, low, value.clone())
    half_way = bits(value) & 0xFFFF == 0x8000  # there both neighbours are nearest
    assert torch.equal(p[~half_way], value.bfloat16()[~half_way])
    assert ((bits(p[half_way].float()).long() - bits(value[half_way]).long()).abs() == 0x8000).all()


def test_a_float32_parameter_needs_no_second_buffer():
    p = random(5)
    tg.store_fp32_weight_(p, None, value := random(5, seed=1))
    assert torch.equal(p, value) and torch.equal(tg.fp32_weight(p, None), value)
    assert (
        "mantissa_lo" not in alone(p, "adam").state["p"]
        and "mantissa_lo" in alone(p.bfloat16(), "adam").state["p"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_the_second_buffer_is_the_whole_value(kind):
    value = patterns(kind)
    p = value.bfloat16()
    low = alone(p, "adam").state["p"]["mantissa_lo"]
    assert low.dtype == torch.float32 and torch.equal(bits(low), bits(p.float()))
    tg.store_fp32_weight_(p, low, value.clone())
    assert torch.equal(bits(tg.fp32_weight(p, low)), bits(value)) and torch.equal(
        bits(p.float()), bits(value.bfloat16().float())
    )


def small_adam(p, low, g, state, step):
    tg.adam_(p, low, g, *state, lr=3e-4, wd=10.0, betas=(0.9, 0.99), eps=1e-10, steps=step)


def small_normuon(p, low, g, state, step):
    tg.normuon_(p, low, g, *state, lr=1e-3, wd=1.2, momentum=0.9, beta2=0.95, matrix_lrs=RATES_OF_FOUR)


@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.parametrize("update, state_of", [(small_adam, adam_state), (small_normuon, muon_state)])
def test_updates_too_small_for_bfloat16_add_up_as_in_float32(update, state_of, device):
    begin = (1 + random(4, 32, 16).abs()).bfloat16()  # neighbours of 1 in bfloat16 are 2**-7 away
    p, wide = begin.clone(), begin.float()
    low = torch.zeros_like(begin, dtype=torch.int16) if device == "gpu" else begin.float()
    state, wide_state = state_of(begin), state_of(wide)
    for step in range(1, 41):
        g = (0.5 + random(4, 32, 16, seed=step)).bfloat16()  # a drift, so that small steps go somewhere
        update(p, low, g.clone(), state, step)
        update(wide, None, g.float(), wide_state, step)
        assert torch.equal(bits(tg.fp32_weight(p, low)), bits(wide)), step
        if step == 1:
            assert (p == begin).float().mean() > 0.9 and (wide != begin.float()).float().mean() > 0.9
    assert (p != begin).float().mean() > 0.3  # alone, bfloat16 would have stayed where it was


@pytest.mark.slow
def test_compiled_adam_on_a_cpu_is_adam():
    """One compiled loop for tables of every size and every set of constants; bfloat16, as `cpu` has them."""
    (plain_model, plain), (model, optimizer) = build(torch.bfloat16), build(torch.bfloat16, compiled=True)
    torch._dynamo.utils.counters.clear()
    for step in range(6):  # tied until step 3, then not
        for which, driver in ((plain_model, plain), (model, optimizer)):
            add_gradients(which, step)
            driver.step(step, lr_mul=0.3, momentum=0.9, untie=step == 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name, p in model.named_parameters():
        for key, value in optimizer.state[name].items():
            expected = plain.state[name][key]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7, msg=f"{name} {key}")
        assert not plain.specs[name].sharded or (p != 0).any(), name


# The class that drives both

# docs/model.md's figures. Spelled out, because the cpu preset under tiny() is tuned for itself.
RATES = dict(adam_lr=0.008, adam_wd=0.005, adam_eps=1e-10, muon_lr=0.023, muon_wd=1.2, muon_beta2=0.95)


def build(
    dtype: torch.dtype = torch.float32, compiled: bool = False, **changes
) -> tuple[tg.GPT, tg.Optimizer]:
    cfg = tiny(**RATES, **{"extension_share": 0.0, "untie_share": 2 / 3, **changes})
    kernels = tg.Cpu(cfg).choose_kernels(cfg, ALONE, {})
    if compiled:
        kernels = replace(kernels, adam_=tg.flat_adam())
    model = tg.GPT(cfg, dtype, kernels)
    return model, tg.Optimizer(cfg, model, ALONE)


def add_gradients(model: tg.GPT, seed: int) -> dict[str, torch.Tensor]:
    """What a backward pass does: adds a gradient to each parameter.

    Multiples of 1/64, so that bfloat16 sums are exact.
    """
    rng, added = torch.Generator().manual_seed(seed), {}
    for name, p in model.named_parameters():
        g = torch.randint(-8, 9, p.shape, generator=rng).to(p.dtype) / 64
        added[name] = g.float()
        p.grad = g if p.grad is None else p.grad + g
    return added


def values(model: tg.GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def kinds(model: tg.GPT) -> tuple[list[str], list[str]]:
    """Names of Muon's and of Adam's parameters, from their declared optimizer."""
    return tuple(
        [name for name, spec in model.specs.items() if spec.optimizer == kind] for kind in ("muon", "adam")
    )


@pytest.mark.parametrize("every", [1, 2, 3])
def test_muon_moves_on_every_step_and_adam_on_the_last_of_adam_every(every):
    model, optimizer = build(adam_every=every)
    muon, adam = map(set, kinds(model))
    assert muon == {"qkvo", "mlp"}
    for step in range(6):
        turn = step % every == every - 1
        old = values(model)
        add_gradients(model, step)
        optimizer.step(step, lr_mul=1.0, momentum=0.9, untie=False)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
        assert moved == (muon | adam if turn else muon)
        waiting = {name for name, p in model.named_parameters() if p.grad is not None}
        assert waiting == (set() if turn else adam)  # its gradient stays for the next step
        assert not turn or optimizer.adam_steps == (step + 1) / every


@pytest.mark.parametrize("matrix_optimizer", ["normuon", "adamw"])
def test_adam_steps_on_the_sum_of_two_gradients_and_counts_its_own_steps(matrix_optimizer):
    # Not tied: each parameter for itself.
    model, optimizer = build(untie_share=0.0, matrix_optimizer=matrix_optimizer)
    muon, adam = kinds(model)
    assert set(muon) == ({"qkvo", "mlp"} if matrix_optimizer == "normuon" else set())
    expected = values(model)
    state = {name: adam_state(expected[name]) for name in adam}
    last = {}
    for step in range(6):
        lr_mul = 1.0 - 0.1 * step
        g = add_gradients(model, step)
        optimizer.step(step, lr_mul=lr_mul, momentum=0.9, untie=False)
        if step % 2:
            for name in adam:
                spec, both = model.specs[name], g[name] + last[name]
                tg.adam_(
                    expected[name],
                    None,
                    both,
                    *state[name],
                    lr=0.008 * spec.lr * torch.tensor(lr_mul),
                    wd=0.005 * spec.wd,
                    betas=spec.betas,
                    eps=1e-10,
                    steps=torch.tensor({1: 1.0, 3: 2.0, 5: 3.0}[step]),
                )
                torch.testing.assert_close(
                    optimizer.params[name].detach(), expected[name], rtol=1e-6, atol=1e-7, msg=name
                )
        last = g


def test_scalars_that_do_not_learn_stay_as_they_start():
    model, optimizer = build(scalar_lr=0.0, x0_lr=0.0, resid_scale=1.0)
    begin = values(model)
    for step in range(2):
        add_gradients(model, step)
        optimizer.step(step, lr_mul=1.0, momentum=0.9, untie=False)
    stayed = {name for name, p in model.named_parameters() if torch.equal(p, begin[name])}
    assert stayed == {name for name in begin if name.endswith("_scale")} and (model.resid_scale == 1).all()


def test_muon_steps_on_each_gradient_with_the_momentum_it_is_given():
    model, optimizer = build()
    begin = values(model)
    expected = {name: begin[name].flatten(0, 1).clone() for name in ("qkvo", "mlp")}
    # Four times as many rows as columns; the second twice.
    rates = {
        "qkvo": torch.ones(6 * 4, 1, 1),  # square
        "mlp": torch.tensor([2.0, 4.0] * 6).view(-1, 1, 1),
    }
    state = {name: muon_state(p) for name, p in expected.items()}
    for step, (lr_mul, momentum) in enumerate([(1.0, 0.85), (0.5, 0.9), (0.7, 0.95)]):
        g = add_gradients(model, step)
        optimizer.step(step, lr_mul=lr_mul, momentum=momentum, untie=False)
        for name, p in expected.items():
            tg.normuon_(
                p,
                None,
                g[name].flatten(0, 1),
                *state[name],
                lr=0.023 * torch.tensor(lr_mul),
                wd=1.2,
                momentum=torch.tensor(momentum),
                beta2=0.95,
                dtype=optimizer.kernels.muon_dtype,
                matrix_lrs=rates[name],
            )
            torch.testing.assert_close(optimizer.params[name].detach().flatten(0, 1), p, rtol=1e-6, atol=1e-7)


def test_a_bfloat16_model_is_optimized_as_if_it_were_float32():
    narrow, narrow_optimizer = build(torch.bfloat16)
    wide, wide_optimizer = build()
    with torch.no_grad():
        for name, p in wide.named_parameters():  # float32 gates and scalars are alike already
            p.copy_(narrow.get_parameter(name))
    for step in range(6):  # tied until step 3, then not
        for model, optimizer in ((narrow, narrow_optimizer), (wide, wide_optimizer)):
            add_gradients(model, step)
            optimizer.step(step, lr_mul=0.3, momentum=0.9, untie=step == 3)
    for name, p in narrow.named_parameters():
        low = narrow_optimizer.state[name].get("mantissa_lo")
        value = tg.fp32_weight(p.detach(), low if low is None else low.view_as(p))
        assert torch.equal(bits(value), bits(wide.get_parameter(name).detach())), name


# docs/model.md's tables. Adam: betas, lr x, wd x; names without the name of a table at their end.
ENDS, TABLE, SCALAR, X0 = (
    ((0.5, 0.95), 1, 150),
    ((0.75, 0.95), 75, 5),
    ((0.9, 0.99), 5, 0),
    ((0.65, 0.95), 5, 0),
)
ADAM_TABLE = {
    "embed": ENDS,
    "lm_head": ENDS,
    "input_embed": TABLE,
    "value_embed": TABLE,
    "bigram_embed": TABLE,
    "smear_scale": SCALAR,
    "skip_scale": SCALAR,
    "qkv_scale": SCALAR,
    "o_scale": SCALAR,
    "resid_scale": SCALAR,
    "bigram_scale": SCALAR,
    "backout_scale": SCALAR,
    "x0_scale": X0,
    "input_scale": X0,
    "attn_gate": ((0.9, 0.99), 1, 1),
    "ve_gate": ((0.9, 0.99), 1, 1),
    "smear_gate": ((0.9, 0.99), 0.01, 0),
    "skip_gate": ((0.9, 0.99), 0.05, 0),
}


def row(name: str) -> str:
    start, _, end = name.rpartition("_")
    return start if len(end) == 1 else name


def assert_declared(model: tg.GPT, table: dict[str, tuple]) -> None:
    muon, adam = kinds(model)
    assert {row(name) for name in adam} <= set(table)
    for name in adam:
        spec = model.specs[name]
        assert (spec.betas, spec.lr, spec.wd) == table[row(name)], name
    matrices = {name: model.specs[name] for name in muon}
    assert {name: (spec.lr, spec.wd, spec.matrix_lrs) for name, spec in matrices.items()} == {
        "qkvo": (1, 1, (1, 1, 1, 1)),
        "mlp": (1, 1, (1, 2)),
    }


# The same for medium: Adam's betas are 0.8 and 0.95, and all of it goes half as fast, but for the scalars.
MEDIUM_BETAS = (0.8, 0.95)
MEDIUM_TABLE = {
    "embed": (MEDIUM_BETAS, 1, 150),
    "lm_head": (MEDIUM_BETAS, 1, 150),
    "input_embed": (MEDIUM_BETAS, 75, 5),
    "value_embed": (MEDIUM_BETAS, 75, 5),
    **{f"{name}_scale": ((0.9, 0.99), 10, 0) for name in ("smear", "skip", "qkv", "o", "resid", "backout")},
    "x0_scale": (MEDIUM_BETAS, 5, 0),
    "input_scale": (MEDIUM_BETAS, 5, 0),
    "attn_gate": (MEDIUM_BETAS, 1, 1),
    "ve_gate": (MEDIUM_BETAS, 1, 1),
    "smear_gate": (MEDIUM_BETAS, 0.01, 0),
    "skip_gate": (MEDIUM_BETAS, 0.01, 0),
}
MEDIUM_RATES = RATES | dict(adam_lr=0.004, adam_eps=1e-8, muon_lr=0.015)


@pytest.mark.parametrize(
    "preset, table", [("short", ADAM_TABLE), ("medium", MEDIUM_TABLE), ("medium-2025", ADAM_TABLE)]
)
def test_each_parameter_of_a_record_preset_is_declared_as_its_table_says(preset, table):
    with torch.device("meta"):
        assert_declared(tg.GPT(tg.PRESETS[preset]), table)


def test_each_parameter_is_declared_as_the_table_says():
    model, _ = build()
    assert_declared(model, ADAM_TABLE)
    assert {row(name) for name in kinds(model)[1]} == set(ADAM_TABLE)


@pytest.mark.parametrize(
    "preset, rates", [("short", RATES), ("medium", MEDIUM_RATES), ("medium-2025", RATES)]
)
def test_the_record_presets_have_the_rates_of_the_description(preset, rates):
    assert {name: getattr(tg.PRESETS[preset], name) for name in rates} == rates


def test_each_of_adams_parameters_moves_and_decays_by_its_row_of_the_table():
    model, optimizer = build(untie_share=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1 + random(*p.shape).abs())  # no parameter at 0, where nothing decays
    old = values(model)
    g = add_gradients(model, 0)
    optimizer.step(1, lr_mul=0.5, momentum=0.9, untie=False)
    for name in kinds(model)[1]:
        _, lr, wd = ADAM_TABLE[row(name)]
        rate = 0.008 * lr * 0.5  # Adam's first update is the gradient's sign
        decay = torch.where(g[name] > 0, 0.005 * wd * rate**2 * old[name], 0.0)
        torch.testing.assert_close(
            optimizer.params[name].detach(),
            old[name] - rate * g[name].sign() - decay,
            rtol=3e-7,
            atol=1e-6 * rate,
            msg=name,
        )


@pytest.mark.parametrize(
    "step, name", [(0, "qkvo"), (0, "mlp"), (1, "qkvo"), (1, "x0_scale"), (1, "embed"), (1, "bigram_embed")]
)
def test_a_parameter_without_a_gradient_is_named(step, name):
    model, optimizer = build()
    add_gradients(model, 0)
    optimizer.params[name].grad = None
    with pytest.raises(AssertionError, match=rf"\b{name}\b"):
        optimizer.step(step, lr_mul=1.0, momentum=0.9, untie=False)


# Tied, then untied


def drive(model: tg.GPT, optimizer: tg.Optimizer, steps: range) -> None:
    """As the run does it: the schedule says when to untie."""
    schedule = tg.Schedule(model.cfg)
    for step in steps:
        add_gradients(model, step)
        optimizer.step(step, lr_mul=0.1, momentum=0.9, untie=step == schedule.untie_step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tied_embedding_follows_one_adam_step_on_both_gradients(dtype):
    model, optimizer = build(dtype)
    assert torch.equal(model.embed, model.lm_head.T)
    expected, state = model.lm_head.detach().clone(), adam_state(model.lm_head)
    low = expected.float() if dtype == torch.bfloat16 else None
    total = 0
    for step in range(4):
        old = values(model)
        g = add_gradients(model, step)
        total = total + g["lm_head"] + g["embed"].T
        optimizer.step(step, lr_mul=0.1, momentum=0.9, untie=False)
        if step % 2:
            tg.adam_(
                expected,
                low,
                total,
                *state,
                lr=torch.tensor(0.1) * 0.008,
                wd=150 * 0.005,
                betas=(0.5, 0.95),
                eps=1e-10,
                steps=torch.tensor((step + 1) / 2),
            )
            assert not torch.equal(model.lm_head, old["lm_head"])
            total = 0
        torch.testing.assert_close(model.lm_head.detach(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(model.embed, model.lm_head.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_untie_step_the_state_is_copied_and_then_both_go_their_own_ways(dtype):
    model, optimizer = build(dtype, num_steps=8)  # two thirds of 8 is 5.3: the next odd step is 7
    assert tg.Schedule(model.cfg).untie_step == 7
    drive(model, optimizer, range(7))
    assert optimizer.tied and (optimizer.state["embed"]["momentum_buffer"] == 0).all()
    drive(model, optimizer, range(7, 8))
    assert not optimizer.tied and torch.equal(model.embed, model.lm_head.T)
    head, embed = optimizer.state["lm_head"], optimizer.state["embed"]
    assert (
        set(head)
        == set(embed)
        == {"momentum_buffer", "second_moment"} | ({"mantissa_lo"} if dtype == torch.bfloat16 else set())
    )
    for key in head:
        assert torch.equal(embed[key], head[key].T) and (head[key] != 0).any(), key

    expected = {
        name: (p.detach().clone(), {k: t.clone() for k, t in optimizer.state[name].items()})
        for name, p in (("embed", model.embed), ("lm_head", model.lm_head))
    }
    first = add_gradients(model, 8)
    optimizer.step(8, lr_mul=0.1, momentum=0.9, untie=False)
    second = add_gradients(model, 9)
    optimizer.step(9, lr_mul=0.1, momentum=0.9, untie=False)
    for name, (p, state) in expected.items():  # each its own gradient, each its own state
        tg.adam_(
            p,
            state.get("mantissa_lo"),
            first[name] + second[name],
            state["momentum_buffer"],
            state["second_moment"],
            lr=0.1 * 0.008,
            wd=150 * 0.005,
            betas=(0.5, 0.95),
            eps=1e-10,
            steps=5,
        )
        torch.testing.assert_close(optimizer.params[name].detach(), p, rtol=1e-6, atol=1e-7)
    assert not torch.equal(model.embed, model.lm_head.T)


def test_untie_share_0_is_never_tied():
    model, optimizer = build(untie_share=0.0)
    assert not optimizer.tied
    drive(model, optimizer, range(2))
    assert not torch.equal(model.embed, model.lm_head.T)
    assert not torch.equal(
        optimizer.state["embed"]["momentum_buffer"], optimizer.state["lm_head"]["momentum_buffer"].T
    )


@pytest.mark.parametrize("num_steps", [7, 8])
def test_untie_share_1_is_always_tied(num_steps):
    model, optimizer = build(untie_share=1.0, num_steps=num_steps)
    drive(model, optimizer, range(num_steps))
    assert optimizer.tied and torch.equal(model.embed, model.lm_head.T)
    assert (optimizer.state["embed"]["momentum_buffer"] == 0).all()


def test_untying_on_an_even_step_is_refused():
    model, optimizer = build()
    add_gradients(model, 0)
    with pytest.raises(AssertionError, match="2"):
        optimizer.step(2, lr_mul=1.0, momentum=0.9, untie=True)
