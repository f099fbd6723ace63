"""The model against its description: operators, reach, documents, parameters, switches, formulas, sizes."""

import math
import zlib
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg
from data.shards import save_vocab

BOS = 255  # of tiny()
WINDOWS = (16, 48)
CAP = (23.0, 5.0, 7.5)  # logits 23 sigmoid((z + 5) / 7.5)


def randomise(model: tg.GPT, keep: tuple[str, ...] = (), std: float = 0.2) -> tg.GPT:
    """Opens paths that a zero closes at the start. A name gets the same values in every model."""
    for name, p in model.named_parameters():
        if name not in keep:
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            # Three factors of it in a product: it would drown the rest.
            small = 0.25 if name == "mlp" else 1.0
            # About 1: a stream that fades out would hide what came in early.
            stream = float(name == "resid_scale")
            p.data.copy_(stream + torch.randn(p.shape, generator=rng) * std * small)
    return model


def text(T: int, starts: tuple[int, ...] = (0,), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and targets (T,) in tiny()'s vocabulary, documents begin at the given places."""
    ids = torch.randint(BOS, (T + 1,), generator=torch.Generator().manual_seed(seed))
    ids[list(starts)] = BOS
    return ids[:-1], ids[1:]


def stream(model: tg.GPT, tokens: torch.Tensor, windows: tuple[int, int] = WINDOWS) -> torch.Tensor:
    """The normed stream (T, D) that the head gets: the whole model but its loss."""
    return model.hidden(tokens, windows)


class Biggest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float, name: str = "") -> None:
    """The largest error, as a share of the largest value."""
    assert a.shape == b.shape, (name, a.shape, b.shape)
    a, b = a.detach().double(), b.detach().double()
    error = float((a - b).abs().max() / (b.abs().max() + 1e-30))
    assert error <= tolerance, (name, error)


# ============================================================================================================
# Operators
# ============================================================================================================


def attention_inputs(
    T: int, window: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """[q, k, v], first_key with documents and windows up to window, a weight for each output."""
    rng = torch.Generator().manual_seed(1000 * T + window)
    q, k, v, w = (torch.randn(T, 2, 8, generator=rng).to(dtype) for _ in range(4))
    place = torch.arange(T)
    doc_start = torch.where((torch.rand(T, generator=rng) < 0.01) | (place == 0), place, 0).cummax(0).values
    whole = torch.rand(T, generator=rng) < 0.5
    shorter = torch.randint(1, window + 1, (T,), generator=rng)
    windows = torch.where(whole, window, shorter)
    return [t.requires_grad_() for t in (q, k, v)], torch.maximum(doc_start, place - windows + 1), w


def values_and_grads(function, inputs: list[torch.Tensor], w: torch.Tensor) -> list[torch.Tensor]:
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad((y * w).sum(), inputs)]


def attention_by_loops(q, k, v, first_key, scale):
    def one(i: int, h: int):
        return (scale * (k[first_key[i] : i + 1, h] @ q[i, h])).softmax(dim=0) @ v[first_key[i] : i + 1, h]

    return torch.stack([torch.stack([one(i, h) for h in range(q.size(1))]) for i in range(len(q))])


@pytest.mark.parametrize("T", [1, 5, 128, 300])
@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 200, 1000])
def test_attention_in_blocks_is_the_reference(T, window):
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 3e-2)):
        inputs, first_key, w = attention_inputs(T, window, dtype)
        banded = partial(tg.banded_attention, first_key=first_key, window=window, scale=0.5)
        reference = partial(tg.reference_attention, first_key=first_key, scale=0.5)
        fast, plain = values_and_grads(banded, inputs, w), values_and_grads(reference, inputs, w)
        for name, a, b in zip(("y", "dq", "dk", "dv"), fast, plain, strict=True):
            assert a.dtype == dtype
            if name in ("dq", "dk") and min(T, window) == 1:  # one visible key: nothing but rounding
                assert max(a.abs().max(), b.abs().max()) < 0.1
            else:
                close(a, b, tolerance, name)


@pytest.mark.parametrize("window", [2, 129, 1000])
@pytest.mark.parametrize("plainest", [True, False])
def test_attention_and_its_gradients_in_float64(window, plainest):
    inputs, first_key, w = attention_inputs(150, window, torch.float64)
    operator = (
        tg.reference_attention
        if plainest
        else lambda q, k, v, first_key, scale: tg.banded_attention(q, k, v, first_key, window, scale)
    )
    got = values_and_grads(lambda q, k, v: operator(q, k, v, first_key, 0.5), inputs, w)
    plain = values_and_grads(lambda q, k, v: attention_by_loops(q, k, v, first_key, 0.5), inputs, w)
    for name, a, b in zip(("y", "dq", "dk", "dv"), got, plain, strict=True):
        close(a, b, 2e-6, name)  # softmax is taken in float32 on purpose


def attention_cost(T: int, window: int) -> tuple[int, int]:
    """FLOPs and largest tensor of attention with one head of 8 dimensions, forward and backward."""
    q, k, v = (torch.randn(T, 1, 8, requires_grad=True) for _ in range(3))
    first_key = (torch.arange(T) - window + 1).clamp_min(0)
    with FlopCounterMode(display=False) as flops, Biggest() as biggest:
        tg.banded_attention(q, k, v, first_key, window, 0.1).sum().backward()
    return flops.get_total_flops(), biggest.elements


def test_cost_of_attention_grows_with_tokens_times_window():
    flops, elements = {}, {}
    for T, window in ((4096, 128), (4096, 256), (8192, 128)):
        flops[T, window], elements[T, window] = attention_cost(T, window)
        assert elements[T, window] <= T * (window + 256), "more than a query's window and two blocks"
        assert flops[T, window] <= 6 * 2 * 8 * T * (window + 256)  # 2 products forward, 4 backward
    assert flops[8192, 128] == 2 * flops[4096, 128] and elements[8192, 128] == 2 * elements[4096, 128]
    assert 1.2 < flops[4096, 256] / flops[4096, 128] < 2.2, "the window changes nothing"


def test_model_gives_attention_its_window():
    T, heads = 2048, 4
    model = tg.GPT(tiny(val_seq_len=T, val_tokens=T))
    with Biggest() as biggest:
        model(*text(T), torch.ones(1), (128, 128)).backward()
    assert biggest.elements <= heads * T * 256, "more than 128 tokens and a block for each head and token"


def head_inputs(T: int, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], torch.Tensor]:
    rng = torch.Generator().manual_seed(T)
    x, head = torch.randn(T, 16, generator=rng), torch.randn(16, 40, generator=rng)
    return [x.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()], torch.randint(
        40, (T,), generator=rng
    )


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5), (1.0, 0.5, 0.25), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("cap", [CAP, (0.0, 5.0, 7.5)])
@pytest.mark.parametrize("T", [50, 16, 3])
def test_head_loss_in_chunks_is_the_reference(monkeypatch, T, cap, weights):
    monkeypatch.setitem(tg.HEAD_CHUNK, "cpu", 16)
    weights, grad = torch.tensor(weights), torch.tensor(3.0)
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 3e-2)):
        inputs, targets = head_inputs(T, dtype)
        given = dict(targets=targets, weights=weights, cap=cap)
        fast = values_and_grads(partial(tg.head_loss, **given), inputs, grad)
        plain = values_and_grads(partial(tg.reference_head_loss, **given), inputs, grad)
        for name, a, b in zip(("loss", "dx", "dhead"), fast, plain, strict=True):
            close(a, b, tolerance, name)
            assert a.dtype == b.dtype, name
        with torch.no_grad():
            quiet = tg.head_loss(*inputs, targets, weights, cap)
        assert torch.equal(quiet, fast[0]) and not quiet.requires_grad


@pytest.mark.parametrize("operator", [tg.head_loss, tg.reference_head_loss])
@pytest.mark.parametrize("capped", [True, False])
def test_head_loss_by_hand(operator, capped):
    z = np.array([[-30.0, 0.0, 2.5, 40.0], [1.0, -1.0, 0.0, 3.0], [0.0, 0.0, 7.0, -5.0]])
    targets, weights = [3, 0, 2], [1.0, 0.5]
    logits = 23 / (1 + np.exp(-(z + 5) / 7.5)) if capped else z
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    # the second weight is for the token after the next, the target of the place after; the last has none
    expected = -(log_p[0, 3] + log_p[1, 0] + log_p[2, 2] + 0.5 * (log_p[0, 0] + log_p[1, 2])) / 3
    cap = CAP if capped else (0.0, 0.0, 1.0)
    loss = operator(torch.eye(3), torch.tensor(z).float(), torch.tensor(targets), torch.tensor(weights), cap)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_softmax_over_as_many_tokens_as_there_are_is_the_whole_one(monkeypatch):
    monkeypatch.setitem(tg.HEAD_CHUNK, "cpu", 16)
    results = []
    for candidates in (0, 40):
        inputs, targets = head_inputs(50)
        loss = tg.head_loss(*inputs, targets, torch.tensor([1.0, 0.5]), CAP, candidates=candidates)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-6)


@pytest.mark.parametrize("cap", [CAP, (0.0, 5.0, 7.5)])
@pytest.mark.parametrize("count", [36, 8])
def test_a_sampled_softmax_is_that_of_its_tokens_with_their_offsets(cap, count):
    """Of 8 tokens fewer than there are targets: those that have no place have no weight."""
    (x, head), targets = head_inputs(30)
    loss = tg.head_loss(x, head, targets, torch.ones(1), cap, candidates=count)
    tokens, offsets = tg.sample_vocab(targets[:, None], 40, count)
    logits = x @ head[:, tokens]
    logits = cap[0] * torch.sigmoid((logits + cap[1]) / cap[2]) if cap[0] else logits
    log_shares = (logits + offsets).log_softmax(1)
    picked = [log_shares[i, tokens == t] for i, t in enumerate(targets) if t in tokens]
    assert len(picked) == 30 if count == 36 else 0 < len(picked) < 30
    expected = -torch.cat(picked).sum() / 30
    close(loss, expected, 1e-5)
    for a, b in zip(
        torch.autograd.grad(loss, [x, head]), torch.autograd.grad(expected, [x, head]), strict=True
    ):
        close(a, b, 1e-5)


def test_sampled_tokens_hold_the_targets_and_stand_for_all_others():
    """Over many draws each other token comes as often, and the denominator is right on average."""
    rng = torch.Generator().manual_seed(0)
    shares, often, drawn = torch.randn(512, generator=rng).exp(), torch.zeros(512), 400
    total = 0.0
    for _ in range(drawn):
        targets = torch.randint(0, 20, (60, 2), generator=rng)
        tokens, offsets = tg.sample_vocab(targets, 512, 128)
        assert len(tokens) == 128 and torch.equal(tokens, tokens.unique())
        assert torch.isin(targets, tokens).all() and not offsets[torch.isin(tokens, targets)].any()
        total += float((shares[tokens] * offsets.exp()).sum()) / drawn
        often[tokens] += 1 / drawn
    assert total == pytest.approx(float(shares.sum()), rel=0.02)
    assert often[20:].mean() == pytest.approx(108 / 492, rel=1e-2)
    assert (often[20:] - 108 / 492).abs().max() < 5 * (0.22 * 0.78 / drawn) ** 0.5


def test_a_loss_on_prefixes_adds_that_of_shorter_tokens():
    """Of tokens 0 .. 39 every third has no prefix, another's is the token before it."""
    (x, head), targets = head_inputs(50)
    prefixes = torch.arange(40) - 1
    prefixes[::3] = -1
    plain = tg.head_loss(x, head, targets, torch.tensor([1.0, 0.5]), CAP)
    with_them = tg.head_loss(x, head, targets, torch.tensor([1.0, 0.5, 0.25]), CAP, prefixes=prefixes)
    logits = CAP[0] * torch.sigmoid((x @ head + CAP[1]) / CAP[2])
    losses = torch.nn.functional.cross_entropy(logits, prefixes[targets].clamp_min(0), reduction="none")
    expected = 0.25 * (losses * (prefixes[targets] >= 0)).mean()
    assert (with_them - plain).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_model_with_prefixes_is_validated_without_them(tiny_data):
    cfg = tiny(data_dir=str(tiny_data), prefix_weight=0.25)
    model = tg.GPT(cfg)
    plain = model(*text(256), torch.ones(1), (16, 48), learn=False)
    model.prefixes = tg.read_prefixes(cfg)
    assert torch.equal(plain, model(*text(256), torch.ones(1), (16, 48), learn=False))
    assert not torch.equal(plain, model(*text(256), torch.ones(2), (16, 48)))


def test_prefixes_are_the_longest_tokens_that_a_token_begins_with(tmp_path):
    tokens = [b"a", b"ab", b"abcd", b"b", b"abce", b"abcef"]
    save_vocab(tmp_path / "vocab.tiktoken", {token: rank for rank, token in enumerate(tokens)})
    prefixes = tg.read_prefixes(tiny(data_dir=str(tmp_path), prefix_weight=0.25))
    assert prefixes.tolist()[:6] == [-1, 0, 1, -1, 1, 4] and len(prefixes) == 256
    assert set(prefixes.tolist()[6:]) == {-1}


BAD_VOCABULARIES = [None, b"\xff 3\n", b"YQ==\n", b"YQ== x\n", b"YQ== 256\n", b"YQ 1\n", b"YQ== -1"]


@pytest.mark.parametrize("content", BAD_VOCABULARIES)
def test_a_vocabulary_that_cannot_be_read_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "vocab.tiktoken").write_bytes(content)
    with pytest.raises(tg.UserError, match=r"^--prefix_weight 0.25: .*vocab.tiktoken: .*; make the data"):
        tg.read_prefixes(tiny(data_dir=str(tmp_path), prefix_weight=0.25))


def test_cap_at_known_values():
    """Of two logits the loss tells the difference, of 23 sigmoid(5 / 7.5) and 23 sigmoid(3.5 / 7.5) here."""
    loss = tg.head_loss(torch.ones(1, 1), torch.tensor([[0.0, -1.5]]), torch.tensor([0]), torch.ones(1), CAP)
    assert loss.item() == pytest.approx(math.log1p(math.exp(14.1356735 - 15.1973965)), rel=1e-5)


def test_head_loss_holds_the_logits_of_a_chunk_and_computes_gradients_only_when_asked(monkeypatch):
    monkeypatch.setitem(tg.HEAD_CHUNK, "cpu", 16)
    inputs, targets = head_inputs(160)
    with FlopCounterMode(display=False) as training, Biggest() as biggest:
        tg.head_loss(*inputs, targets, torch.ones(1), CAP).backward()
    with FlopCounterMode(display=False) as quiet, torch.no_grad():
        tg.head_loss(*inputs, targets, torch.ones(1), CAP)
    assert biggest.elements <= 160 * 16  # x itself; the logits of all 160 tokens would be 160 * 40
    product = 2 * 160 * 16 * 40
    assert (training.get_total_flops(), quiet.get_total_flops()) == (3 * product, product)


@pytest.mark.parametrize("activation", ["relu2", "gelu"])
def test_mlp_by_hand(activation):
    rng = np.random.default_rng(0)
    x, up, down = rng.normal(size=(7, 6)), rng.normal(size=(24, 6)), rng.normal(size=(24, 6))
    hidden = x @ up.T
    if activation == "relu2":
        hidden = np.maximum(hidden, 0) ** 2
    else:
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) / 2
    close(tg.mlp(*map(torch.tensor, (x, up, down)), activation), torch.tensor(hidden @ down), 1e-12)


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (2.0, 0.0), (-0.5, 3.0)])
def test_symmetric_product_by_hand(alpha, beta):
    x = np.random.default_rng(0).normal(size=(3, 5, 5))
    x = x + x.transpose(0, 2, 1)
    expected = [alpha * m @ m.T + beta * m for m in x]
    close(tg.symmetric_product(torch.tensor(x), alpha, beta), torch.tensor(np.array(expected)), 1e-12)
    wide = torch.tensor(np.random.default_rng(1).normal(size=(2, 3, 8)))
    close(tg.symmetric_product(wide, alpha), alpha * torch.einsum("nij,nkj->nik", wide, wide), 1e-12)


# ============================================================================================================
# Causality and reach, through the gradient
# ============================================================================================================

# A layer hands on, from a window of w tokens, what is w - 1 back; paired heads half of w; a long layer one
# more through the offset half of its keys. tiny() is p s l s p l, so with windows 3 and 7: 1 + 2 + 7 + 2 + 1
# + 7 = 20 tokens back, and 21 for the token embedding, which the smear carries one further. The value
# embedding in layer 1 starts there, with its own window: 2 + 7 + 2 + 1 + 7 = 19; the one in the last layer
# sees its window only, values are not offset: 6.
REACHES = {
    "everything on": ({}, (3, 7), 21, 20, 19, 6),
    "even windows": ({}, (4, 8), 27, 26, 24, 7),  # 2 + 3 + 8 + 3 + 2 + 8; 3 + 8 + 3 + 2 + 8
    "smallest windows": ({}, (1, 2), 5, 4, 4, 1),  # 0 + 0 + 2 + 0 + 0 + 2
    "no smear": ({"smear_chunk": ""}, (3, 7), 20, 20, 19, 6),
    "no key offset": ({"key_offset": False}, (3, 7), 19, 18, 17, 6),  # each long layer 6
    "keys that only turn": ({"rotary_share": 1.0}, (3, 7), 19, 18, 17, 6),  # nothing stationary to offset
    "keys that never turn": ({"rotary_share": 0.0}, (3, 7), 21, 20, 19, 6),
    # 2 + 2 + 7 + 2 + 2 + 7; 2 + 7 + 2 + 2 + 7.
    "no paired heads": (
        {"paired_heads": "......"},
        (3, 7),
        23,
        22,
        20,
        6,
    ),
    # 3 + 1 instead of 6 + 1 in layer 2.
    "long paired heads": (
        {"paired_heads": "p.p.p."},
        (3, 7),
        18,
        17,
        16,
        6,
    ),
    "a layer without": ({"windows": "ss-ssl", "value_embeds": ".0..13"}, (3, 7), 14, 13, 12, 6),
    "one layer": (
        dict(windows="l", paired_heads=".", value_embeds="0", skips=".", backout="."),
        (3, 7),
        8,
        7,
        6,
        6,
    ),
}


@pytest.mark.parametrize("case", REACHES)
def test_a_position_sees_exactly_its_reach(case):
    """Every token stands once, so the rows of a table's gradient are the gradients by position."""
    changes, windows, by_token, by_input, by_first_value, by_last_value = REACHES[case]
    cfg = tiny(bigram_rows=400, bigram_signs=16, **changes)
    model = randomise(tg.GPT(cfg))
    T, at = 64, 45
    tokens = torch.randperm(BOS, generator=torch.Generator().manual_seed(2))[:T]
    ((rows, _),) = tg.ngram_rows(tokens, torch.arange(T) == 0, 400 * 256, longest=2)
    rows = rows.long()
    assert len(rows.unique()) == T, "the test wants a row of its own for each pair: another seed"
    output = stream(model, tokens, windows)[at]
    (output * torch.randn(64, generator=torch.Generator().manual_seed(3))).sum().backward()
    tables = sorted(set(cfg.value_embeds) - {"."})
    for name, back in (
        ("embed", by_token),
        ("input_embed_0", by_input),
        ("bigram_embed", by_input),
        (f"value_embed_{tables[0]}", by_first_value),
        (f"value_embed_{tables[-1]}", by_last_value),
    ):
        grad = model.get_parameter(name).grad[rows if name == "bigram_embed" else tokens]
        seen = grad.abs().sum(dim=1).nonzero().flatten().tolist()
        assert seen == list(range(at - back, at + 1)), (name, back)


def test_a_token_changes_nothing_before_it():
    model = randomise(tg.GPT(tiny(bigram_signs=16)))
    tokens, _ = text(200, (0, 90))
    outputs = stream(model, tokens)
    for s in (1, 89, 90, 128, 199):
        changed = tokens.clone()
        changed[s] = (tokens[s] + 100) % BOS
        differs = (stream(model, changed) != outputs).any(dim=1)
        assert not differs[:s].any() and differs[s], s


def test_a_prefix_alone_gives_the_same():
    model = randomise(tg.GPT(tiny(bigram_signs=16)))
    tokens, _ = text(200, (0, 90))
    whole = stream(model, tokens)
    for n in (1, 2, 60, 129):
        close(stream(model, tokens[:n]), whole[:n], 1e-5)


# ============================================================================================================
# Documents
# ============================================================================================================


def test_documents_begin_at_their_token_and_at_the_sequence():
    docs = tg.Documents.find(torch.tensor([7, 8, BOS, 9, BOS, BOS, 3]), BOS)
    assert docs.is_first.tolist() == [True, False, True, False, True, True, False]
    assert docs.starts.tolist() == [0, 0, 2, 2, 4, 5, 5]


@pytest.mark.parametrize("windows", [(16, 48), (1000, 1000)])
@pytest.mark.parametrize(
    "changes", [{}, {"paired_heads": "pppppp"}, {"rotary_share": 0.0, "value_embeds": "010101"}]
)
def test_documents_do_not_leak(windows, changes):
    """Not through attention nor through what looks one token back: smear, keys, bigrams and their signs."""
    model = randomise(tg.GPT(tiny(bigram_signs=16, **changes)))
    tokens, _ = text(200, (0, 90, 150))
    for begin, end in ((0, 90), (90, 150), (150, 200)):
        changed = tokens.clone()
        changed[begin + 1 : end] = (tokens[begin + 1 : end] + 1 + torch.arange(end - begin - 1) % 200) % BOS
        if begin == 0:
            changed[0] = 17  # the stream need not begin with a document's first token
        differs = (stream(model, changed, windows) != stream(model, tokens, windows)).any(dim=1)
        assert differs[begin + 1 : end].all() and not differs[:begin].any() and not differs[end:].any()


def test_packed_documents_are_each_as_alone():
    model = randomise(tg.GPT(tiny(bigram_signs=16)))
    tokens, targets = text(200, (0, 37, 161))
    packed, loss = stream(model, tokens), model(tokens, targets, torch.ones(1), WINDOWS)
    alone = 0.0
    for begin, end in ((0, 37), (37, 161), (161, 200)):
        close(stream(model, tokens[begin:end]), packed[begin:end], 2e-5)
        one = model(tokens[begin:end], targets[begin:end], torch.ones(1), WINDOWS)
        alone += (end - begin) / 200 * one.item()
    assert loss.item() == pytest.approx(alone, rel=1e-5)


# ============================================================================================================
# Declarations
# ============================================================================================================


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, dict(bigram_signs=16, extra_inputs=2, value_embeds="012.01"), dict(qk_norm=False)]
)
def test_every_parameter_is_declared_and_gets_a_gradient(dtype, changes):
    model = randomise(tg.GPT(tiny(**changes), dtype))
    model(*text(200, (0, 90)), torch.tensor([1.0, 0.5]), WINDOWS).backward()
    assert set(model.specs) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name
        if "embed" in name or name == "lm_head":
            assert p.dtype == dtype, name
        else:  # a bank: its rows are layers'
            assert p.grad.flatten(1).any(dim=1).all() if p.dim() > 1 else p.grad.all(), name
            assert p.dtype == (dtype if model.specs[name].optimizer == "muon" else torch.float32), name


def test_bfloat16_computes_about_the_same():
    exact, coarse = (
        randomise(tg.GPT(tiny(bigram_signs=16), dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    for p, q in zip(exact.parameters(), coarse.parameters(), strict=True):
        p.data.copy_(q.data)
    batch = (*text(200, (0, 90)), torch.tensor([1.0, 0.5]), WINDOWS)
    losses = [model(*batch) for model in (exact, coarse)]
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=3e-3)


def test_one_step_down_the_gradient_lowers_the_loss_as_it_says():
    """The whole backward pass at once, the loss's own gradient with it."""
    model = randomise(tg.GPT(tiny()))
    batch = (*text(200, (0, 90)), torch.tensor([1.0, 0.5]), WINDOWS)
    loss = model(*batch)
    loss.backward()
    slope = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 / slope * p.grad
        assert (loss - model(*batch)).item() == pytest.approx(1e-3, rel=0.1)


def test_how_each_parameter_is_optimized():
    """The tables of docs/model.md, "Optimizers"; extra inputs are tables and scalars like the others."""
    model = tg.GPT(tiny())
    adam = {
        "embed": (0.5, 0.95, 1, 150),
        "lm_head": (0.5, 0.95, 1, 150),
        "bigram_embed": (0.75, 0.95, 75, 5),
        "input_embed_0": (0.75, 0.95, 75, 5),
        "x0_scale": (0.65, 0.95, 5, 0),
        "input_scale": (0.65, 0.95, 5, 0),
        "attn_gate": (0.9, 0.99, 1, 1),
        "ve_gate": (0.9, 0.99, 1, 1),
        "smear_gate": (0.9, 0.99, 0.01, 0),
        "skip_gate": (0.9, 0.99, 0.05, 0),
    }
    adam |= {f"value_embed_{k}": (0.75, 0.95, 75, 5) for k in "0123"}
    adam |= {
        f"{name}_scale": (0.9, 0.99, 5, 0)
        for name in ("smear", "skip", "qkv", "o", "resid", "bigram", "backout")
    }
    got = {
        name: (*spec.betas, spec.lr, spec.wd)
        for name, spec in model.specs.items()
        if spec.optimizer == "adam"
    }
    assert got == adam
    matrices = {
        name: (spec.lr, spec.wd, spec.matrix_lrs)
        for name, spec in model.specs.items()
        if spec.optimizer == "muon"
    }
    assert matrices == {"qkvo": (1, 1, (1, 1, 1, 1)), "mlp": (1, 1, (1, 2))}


def test_initial_values():
    """The figures in docs/model.md's brackets."""
    model = tg.GPT(tiny(bigram_signs=64, extra_inputs=2))
    p = dict(model.named_parameters())
    constants = {
        "resid_scale": 1.1,
        "x0_scale": 0,
        "input_scale": 0,
        "bigram_scale": 0.1,
        "skip_scale": -1.5,
        "qkv_scale": 0.5,
        "o_scale": 1.0,
        "smear_scale": 0,
        "backout_scale": 0.5,
        "smear_gate": 0,
        "skip_gate": 0,
        "attn_gate": 0,
        "ve_gate": 0,
        "bigram_embed": 0,
    }
    normals = {"embed": 0.005, "input_embed_0": 1.0, "input_embed_1": 1.0} | {
        f"value_embed_{k}": 0.01 for k in "0123"
    }
    for name, value in constants.items():
        assert torch.equal(p[name], torch.full_like(p[name], value)), name
    for name, std in normals.items():
        assert (
            p[name].std().item() == pytest.approx(std, rel=0.03) and abs(p[name].mean().item()) < std / 30
        ), name
        assert p[name].abs().max().item() > 3 * std, name  # not uniform
    for k in range(4):  # q, k, v, o
        assert_uniform(p["qkvo"][:, k], 0.5 / 64**0.5)
    assert_uniform(p["mlp"][:, 0], 0.5 / 64**0.5)
    assert not p["mlp"][:, 1].any()
    assert torch.equal(p["lm_head"], p["embed"].T)
    assert not torch.equal(p["input_embed_0"], p["input_embed_1"])
    assert (
        set(model.bigram_sign.unique().tolist()) == {-1.0, 1.0}
        and abs(model.bigram_sign.mean().item()) < 0.05
    )
    assert set(p) == set(constants) | set(normals) | {"lm_head", "qkvo", "mlp"}


def assert_uniform(x: torch.Tensor, std: float) -> None:
    """Its ends are at sqrt(3) std."""
    assert x.std().item() == pytest.approx(std, rel=0.03)
    assert 0.99 < x.abs().max().item() / (3**0.5 * std) < 1.000001


def test_initial_values_of_medium():
    """What docs/model.md says of them, in a narrow model: D = 64, so that 1 / sqrt(D) is 1/8."""
    medium = tg.PRESETS["medium"]
    names = [
        "embed_std",
        "value_embed_std",
        "input_embed_std",
        "matrix_std",
        "qkv_std",
        "o_std",
        "resid_scale",
        "bigram_rows",
    ]
    p = dict(tg.GPT(tiny(**{name: getattr(medium, name) for name in names})).named_parameters())
    for k in range(3):  # q, k, v: std 1 / sqrt(D); o begins at 0
        assert_uniform(p["qkvo"][:, k], 1 / 8)
    assert not p["qkvo"][:, 3].any() and not p["mlp"][:, 1].any()
    assert_uniform(p["mlp"][:, 0], 0.5 / 8)
    assert (p["resid_scale"] == 1.05).all() and (p["qkv_scale"] == 0.5).all() and (p["o_scale"] == 1.0).all()
    assert (p["skip_scale"] == -1.5).all() and (p["backout_scale"] == 0.5).all()
    assert p["lm_head"].std().item() == pytest.approx(0.005, rel=0.03)
    assert p["input_embed_0"].std().item() == pytest.approx(1.0, rel=0.03)
    zero = [f"value_embed_{k}" for k in "0123"] + ["x0_scale", "input_scale", "smear_scale"]
    zero += ["attn_gate", "ve_gate", "skip_gate", "smear_gate"]
    assert not any(p[name].any() for name in zero)


# ============================================================================================================
# Switches
# ============================================================================================================


def case(gone: str = "", new: str = "", reshaped: str = "", restarted: str = "", **changes):
    """Names of parameters that the changes take away, bring, give another shape or other initial values."""
    names = dict(gone=gone, new=new, reshaped=reshaped, restarted=restarted)
    return pytest.param(
        changes,
        {key: set(value.split()) for key, value in names.items()},
        id=" ".join(f"{key}={value}" for key, value in changes.items()),
    )


TABLES = "value_embed_0 value_embed_1 value_embed_2 value_embed_3"
ATTENTION = "qkvo qkv_scale o_scale attn_gate"


@pytest.mark.parametrize(
    "changes, expected",
    [
        case(smear_chunk="", gone="smear_gate smear_scale"),
        case(smear_chunk="12:24"),
        case(smear_chunk="0:6", reshaped="smear_gate"),
        case(skip_chunk="", gone="skip_gate"),
        case(skip_chunk="12:24"),
        case(attn_chunk="", gone="attn_gate"),
        case(attn_chunk="0:12"),
        case(ve_chunk="", gone="ve_gate"),
        case(ve_chunk="0:6"),
        case(ve_chunk="18:30", ve_own_dims=0),
        case(ve_own_dims=0, reshaped="ve_gate"),
        case(bigram_rows=0, gone="bigram_embed bigram_scale"),
        case(bigram_rows=2, reshaped="bigram_embed"),
        case(bigram_signs=64),
        case(ngrams=3),
        case(extra_inputs=0, gone="input_embed_0 input_scale"),
        case(extra_inputs=2, new="input_embed_1", reshaped="input_scale"),
        case(key_offset=False),
        case(qk_norm=False),
        case(exclusive=True, new="exclusive_scale"),
        case(mudd_layers=1, new="mudd_up mudd_down"),
        case(mudd_layers=6, new="mudd_up mudd_down"),
        case(rotary_share=0.0),
        case(rotary_share=1.0),
        case(rotary_base=64.0),
        case(yarn_limit=0),
        case(softmax_scale=0.3),
        case(softcap=0.0),
        case(softcap=30.0),
        case(softcap_shift=0.0),
        case(softcap_width=10.0),
        case(activation="gelu"),
        case(max_predict=1),
        case(mlp_ratio=2, reshaped="mlp"),
        case(paired_heads="......"),
        case(paired_heads="pppppp"),
        case(skips="......", gone="skip_scale skip_gate"),
        case(skips=".a.a.."),
        case(skips="ab.ba.", reshaped="skip_scale skip_gate"),
        case(backout="......", gone="backout_scale"),
        case(backout=".b...."),
        case(value_embeds="......", gone=f"{TABLES} ve_gate"),
        case(value_embeds=".01.01", gone="value_embed_2 value_embed_3"),
        case(value_embeds=".01.32"),
        case(value_embeds="x01.23", new="value_embed_x", reshaped="ve_gate"),
        case(windows="sllssl"),
        case(windows="ssssss"),
        case(windows="-slssl", reshaped=ATTENTION),
        case(windows="------", value_embeds="......", gone=f"{ATTENTION} {TABLES} ve_gate"),
        case(seed=1, restarted=f"embed lm_head input_embed_0 {TABLES} qkvo mlp"),
        case(embed_std=0.01, restarted="embed lm_head"),
        case(input_embed_std=0.5, restarted="input_embed_0"),
        case(value_embed_std=0.0, restarted=TABLES),
        case(matrix_std=0.25, restarted="mlp"),
        case(qkv_std=0.25, restarted="qkvo"),
        case(o_std=0.0, restarted="qkvo"),
        case(resid_scale=1.0, restarted="resid_scale"),
    ],
)
def test_a_switch_changes_what_it_should_and_nothing_else(changes, expected):
    models, losses = [], []
    # Sharp: where it looks matters.
    for cfg in (
        tiny(softmax_scale=1.0),
        tiny(**dict(softmax_scale=1.0) | changes),
    ):
        tg.check_config(cfg)
        model = tg.GPT(cfg)
        models.append({name: p.detach().clone() for name, p in model.named_parameters()})
        model.set_long_window(64)
        weights = torch.tensor(tg.Schedule(cfg).predict(0))
        randomise(model)  # three texts: the mean loss of one may stay the same by chance
        losses.append(
            np.array([model(*text(150, (0, 60), seed), weights, WINDOWS).item() for seed in range(3)])
        )
    base, changed = models
    assert set(base) - set(changed) == expected["gone"]
    assert set(changed) - set(base) == expected["new"]
    common = set(base) & set(changed)
    reshaped = {name for name in common if base[name].shape != changed[name].shape}
    assert reshaped == expected["reshaped"]
    assert {name for name in common - reshaped if not torch.equal(base[name], changed[name])} == expected[
        "restarted"
    ]
    assert np.isfinite(losses[1]).all()
    difference = np.abs(losses[1] - losses[0]).max()
    if expected["restarted"]:  # these initial values are overwritten above
        assert difference == 0
    else:
        assert difference > 2e-5, "no more than rounding"


def test_reshaped_banks_lose_only_the_rows_of_the_layers_that_went():
    """With the smaller bank's rows copied over, a layer less in the table is that layer less in the sum."""
    whole, less = randomise(tg.GPT(tiny())), randomise(tg.GPT(tiny(windows="sslss-", value_embeds=".01.2.")))
    with torch.no_grad():
        for name in ("qkvo", "qkv_scale", "o_scale", "attn_gate"):
            less.get_parameter(name).copy_(whole.get_parameter(name)[:5])
        less.ve_gate.copy_(whole.ve_gate[:3])
        whole.o_scale[5] = 0  # the last layer attends, but nothing comes of it
    batch = (*text(150, (0, 60)), torch.ones(1), WINDOWS)
    assert whole(*batch).item() == pytest.approx(less(*batch).item(), rel=1e-6)


@pytest.mark.parametrize(
    "chunk, names, changes",
    [
        ("smear_chunk", ("smear_scale", "smear_gate"), {}),
        ("skip_chunk", ("skip_gate",), {}),
        ("ve_chunk", ("ve_gate",), {}),
        ("ve_chunk", ("ve_gate",), {"ve_chunk": "18:30", "ve_own_dims": 0}),
        ("attn_chunk", ("attn_gate",), {}),
    ],
)
def test_a_gate_at_its_start_is_a_constant_whatever_the_input(chunk, names, changes):
    """0 for the smear, 1 for skip and value embeddings, 1/2 for attention."""
    gated, plain = tg.GPT(tiny(**changes)), tg.GPT(tiny(**changes | {chunk: ""}))
    randomise(gated, keep=names, std=0.4)
    randomise(plain, std=0.4)
    if chunk == "attn_chunk":
        plain.o_scale.data *= 0.5
    tokens, _ = text(150, (0, 60))
    close(stream(gated, tokens), stream(plain, tokens), 1e-6)


def test_mix_wants_a_scale_for_each_stream():
    streams, scales = [torch.ones(3, 4) * k for k in (1, 2, 3)], [torch.tensor(float(k)) for k in (5, 7, 11)]
    assert torch.equal(tg.mix(streams, scales), torch.full((3, 4), 5.0 + 14 + 33))
    for few, many in ((streams, scales[:2]), (streams[:2], scales)):
        with pytest.raises(AssertionError, match=f"{len(few)} streams, {len(many)} scales"):
            tg.mix(few, many)


def test_skip_brings_sigmoid_of_minus_three_halves_at_its_start():
    rng = torch.Generator().manual_seed(0)
    x, saved, x0 = (10 * torch.randn(9, 24, generator=rng) for _ in range(3))
    for w, dims in ((torch.zeros(1, 12), slice(6, 18)), (None, None)):
        close(tg.skip(x, saved, x0, torch.tensor(-1.5), w, dims), x + 0.182425524 * saved, 1e-6)


# The seeds' layouts, and how many tables each has.
@pytest.mark.parametrize(
    "layout, tables",
    [
        ("...........", 0),
        (".12.....012", 3),
        ("012.....012", 3),
        (".01.....345", 5),
        (".01.....234", 5),
        ("00.......11", 2),
        ("012345.6789", 10),
    ],
)
def test_value_embeddings_have_a_table_for_each_character(layout, tables):
    cfg = tiny(
        windows="ssslss-sssl", paired_heads="." * 11, skips="." * 11, backout="." * 11, value_embeds=layout
    )
    model = randomise(tg.GPT(cfg))
    assert sum(name.startswith("value_embed") for name in model.specs) == tables
    assert ("ve_gate" in model.specs) == (tables > 0)
    if tables:
        assert model.ve_gate.shape == (sum(c != "." for c in cfg.value_embeds), 4, 12)
    model(*text(64), torch.ones(1), WINDOWS).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_shared_table_is_one_parameter_with_the_gradients_of_both_places():
    eleven = dict(
        windows="ssslss-sssl", paired_heads="p.p..p...p.", skips="...a..a....", backout=".......b..."
    )
    shared = randomise(tg.GPT(tiny(value_embeds="012.....012", **eleven)))
    untied = randomise(tg.GPT(tiny(value_embeds="012.....345", **eleven)))
    batch = (*text(150, (0, 60)), torch.ones(1), WINDOWS)
    with torch.no_grad():
        for a, b in ("03", "14", "25"):
            untied.get_parameter(f"value_embed_{b}").copy_(untied.get_parameter(f"value_embed_{a}"))
    losses = [model(*batch) for model in (shared, untied)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for a, b in ("03", "14", "25"):
        first, second = (untied.get_parameter(f"value_embed_{k}").grad for k in (a, b))
        assert first.any() and second.any()
        close(shared.get_parameter(f"value_embed_{a}").grad, first + second, 1e-5)


@pytest.mark.parametrize("chunk", ["smear", "skip", "attn", "ve"])
@pytest.mark.parametrize("own", [0, 6])
def test_a_gate_reads_its_chunk(chunk, own):
    """The same as a gate over all dimensions, with zero weights outside the chunk."""
    tokens, _ = text(150, (0, 60))
    for first, last in ((0, 12), (20, 27), (60, 64)):
        narrow = randomise(tg.GPT(tiny(**{f"{chunk}_chunk": f"{first}:{last}", "ve_own_dims": own})))
        wide = randomise(tg.GPT(tiny(**{f"{chunk}_chunk": "0:64", "ve_own_dims": own})))
        gate, all_ = narrow.get_parameter(f"{chunk}_gate").data, wide.get_parameter(f"{chunk}_gate").data
        gate *= 5
        all_[..., :64] = 0
        all_[..., first:last] = gate[..., : last - first]
        all_[..., 64:] = gate[..., last - first :]
        close(stream(wide, tokens), stream(narrow, tokens), 1e-5)


def test_a_gate_has_no_gradient_outside_its_chunk():
    rng = torch.Generator().manual_seed(0)
    n, other = (torch.randn(5, 32, generator=rng, requires_grad=True) for _ in range(2))
    heads = other.view(5, 4, 8)
    dims, w = slice(10, 17), torch.randn(4, 7 + 6, generator=rng)
    inside = torch.zeros(32, dtype=torch.bool)
    inside[dims] = True
    x, qkvo = torch.zeros(5, 32), torch.randn(4, 32, 32, generator=rng)
    for y in (
        tg.project_output(x, heads, n, qkvo, torch.tensor(1.0), w[:, :7], dims),
        tg.skip(x, other, n, torch.tensor(-1.5), w[:1, :7], dims),
        tg.gate_value(n, heads, w[:, :7], dims, 0),
        tg.gate_value(n, heads, w, dims, 6),
    ):
        (grad,) = torch.autograd.grad(y.square().sum(), n, retain_graph=True)
        assert torch.equal(grad != 0, inside.expand(5, 32))
    # what the other heads' share says of head 0's value: the gate's own dimensions of it, and no more
    (grad,) = torch.autograd.grad(tg.gate_value(n, heads, w, dims, 6)[:, 1:].square().sum(), other)
    assert torch.equal((grad != 0)[:, :8], (torch.arange(8) < 6).expand(5, 8))


# ============================================================================================================
# Formulas
# ============================================================================================================


@pytest.mark.parametrize("vocab", [256, 50257, 65536])
def test_bigram_hash_is_that_of_wrapping_32_bit_integers(vocab):
    rng = np.random.default_rng(vocab)
    tokens = rng.integers(vocab // 2, vocab, 2000)
    first = rng.random(2000) < 0.05
    first[0], rows = True, 5 * vocab
    hashed = key = before = tokens.astype(np.int32)
    with np.errstate(over="ignore"):
        hashed = np.int32(36313) * hashed
    assert (vocab < 65536) == np.array_equal(hashed.astype(np.int64), 36313 * tokens), (
        "only 65536 tokens make it wrap"
    )
    found = tg.ngram_rows(torch.tensor(tokens), torch.tensor(first), rows, longest=4)
    for factor, (got, got_key) in zip((27191, 51749, 44617), found, strict=True):
        before = np.where(first, np.int32(0), np.roll(before, 1))
        with np.errstate(over="ignore"):
            hashed, key = hashed ^ (np.int32(factor) * before), key ^ before
        got = got.numpy()
        assert np.array_equal(got, np.where(first, rows - 1, hashed % (rows - 1))) and got.min() >= 0
        assert (got[first] == rows - 1).all() and (got[~first] < rows - 1).all()
        assert np.array_equal(got_key.numpy(), key)
    ((pairs, _),) = tg.ngram_rows(torch.tensor(tokens), torch.tensor(first), rows, longest=2)
    assert torch.equal(pairs, found[0][0])


def test_bigram_rows_get_the_sign_of_their_pair():
    model = randomise(tg.GPT(tiny(bigram_signs=24)))
    tokens, _ = text(100, (0, 40))
    docs = tg.Documents.find(tokens, BOS)
    got = model.bigrams(tokens, docs)
    ((rows, _),) = tg.ngram_rows(tokens, docs.is_first, 5 * 256, longest=2)
    for t in range(100):
        # Of a first token, nothing before it.
        pair = int(tokens[t]) ^ (int(tokens[t - 1]) if t not in (0, 40) else 0)
        assert torch.equal(got[t], model.bigram_embed[rows[t]] * model.bigram_sign[pair % 24]), t
    assert model.bigram_sign.shape == (24, 64)
    # Not a matter of the seed.
    assert torch.equal(model.bigram_sign, tg.GPT(tiny(bigram_signs=24, seed=5)).bigram_sign)
    unsigned = randomise(tg.GPT(tiny()))
    assert torch.equal(unsigned.bigrams(tokens, docs), unsigned.bigram_embed[rows])


@pytest.mark.parametrize("share, turning", [(0.5, 8), (1.0, 16), (0.25, 4), (0.0, 0)])
def test_rotary_turns_adjacent_pairs(share, turning):
    model = tg.GPT(tiny(rotary_share=share))
    x = torch.randn(100, 3, 16, generator=torch.Generator().manual_seed(0))
    turned = tg.rotary(x, model.rotary_cos[:100], model.rotary_sin[:100])
    assert torch.equal(turned[..., turning:], x[..., turning:])
    if turning:
        z = torch.view_as_complex(x[..., :turning].double().unflatten(-1, (-1, 2)).contiguous())
        # From 1 to 1/1024 radians a token.
        freqs = [1024 ** (-j / (turning / 2 - 1)) for j in range(turning // 2)]
        angles = torch.outer(torch.arange(100.0), torch.tensor(freqs, dtype=torch.float64))
        expected = torch.view_as_real(z * torch.polar(torch.ones(()).double(), angles)[:, None]).flatten(-2)
        close(turned[..., :turning], expected, 1e-5)
        assert not torch.allclose(turned[1:, :, :2], x[1:, :, :2])


def test_rotary_knows_only_distances():
    model = tg.GPT(tiny())
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 60, 1, 16)
    q, k = (tg.rotary(t, model.rotary_cos[:60], model.rotary_sin[:60])[:, 0] for t in (q, k))
    scores = q @ k.T
    for distance in (-59, -7, 0, 1, 30):
        line = scores.diagonal(distance)
        assert torch.allclose(line, line[0].expand_as(line), atol=1e-5)
    assert scores[0].std() > 0.1


def test_yarn_by_hand():
    """384 -> 896 tokens: a/b = 3/7; of a f / 2pi rotations 32 stay, 1 stretches, between them: on a line."""
    rotations = torch.tensor([61.0, 32.0, 16.5, 1.0, 0.06])
    freqs, scale = tg.yarn(2 * math.pi / 384 * rotations, 384, 896)
    close(freqs, 2 * math.pi / 384 * torch.tensor([61.0, 32.0, 16.5 * 5 / 7, 3 / 7, 0.06 * 3 / 7]), 1e-6)
    assert scale == pytest.approx(1.16945957, rel=1e-8)  # 0.2 ln(7/3) + 1, ln(7/3) = 0.84729786


def test_a_chain_of_long_windows():
    model = tg.GPT(tiny(stages=tg.SHORT.stages[:1], micro_batches=64, softmax_scale=0.1, head_dim=32))
    freqs, scale = [1024 ** (-j / 7) for j in range(8)], 0.1
    assert int(model.long_window) == 384
    for before, after in ((384, 384), (384, 896), (896, 1408), (1408, 1408), (1408, 1664), (1664, 1920)):
        model.set_long_window(after)
        if after not in (before, 1920):  # yarn_limit is 1664: above it only the window grows
            ramps = [min(max((before * f / (2 * math.pi) - 1) / 31, 0), 1) for f in freqs]
            freqs = [
                f * (before / after + m * (1 - before / after)) for f, m in zip(freqs, ramps, strict=True)
            ]
            scale *= 0.2 * math.log(after / before) + 1
        close(model.rotary_freqs, torch.tensor(freqs), 1e-6)
        assert float(model.softmax_scale) == pytest.approx(scale, rel=1e-6)
        angles = torch.outer(torch.arange(300.0), torch.tensor(freqs))
        torch.testing.assert_close(model.rotary_cos[:300], angles.cos(), atol=1e-4, rtol=0)
        torch.testing.assert_close(model.rotary_sin[:300], angles.sin(), atol=1e-4, rtol=0)
        assert int(model.long_window) == after
    assert freqs[0] == 1 and freqs[-1] == pytest.approx(384 / 1664 / 1024)  # never, and always, stretched
    assert float(model.softmax_scale) == pytest.approx(0.13178, abs=5e-6)


def test_without_yarn_only_the_window_is_noted():
    model, still = tg.GPT(tiny(yarn_limit=0)), tg.GPT(tiny())
    model.set_long_window(64)
    assert int(model.long_window) == 64
    for name in ("rotary_freqs", "rotary_cos", "rotary_sin", "softmax_scale"):
        assert torch.equal(model.get_buffer(name), still.get_buffer(name)), name


def test_smear_by_hand():
    rng = torch.Generator().manual_seed(0)
    x, w, scale = torch.randn(6, 24, generator=rng), torch.randn(1, 7, generator=rng), torch.tensor([0.7])
    got = tg.smear(x, torch.tensor([1, 0, 0, 1, 0, 0]) > 0, scale, w, slice(5, 12))
    for t in range(6):
        y = x[t] + (0.7 / (1 + math.exp(-float(w[0] @ x[t, 5:12]))) * x[t - 1] if t not in (0, 3) else 0)
        close(got[t], y / y.square().mean().sqrt(), 1e-6)


def test_paired_heads_are_interleaved_in_time():
    x = torch.arange(3 * 4 * 2).view(3, 4, 2)
    paired = tg.pair(x)
    assert paired.shape == (6, 2, 2)
    for t in range(3):
        for j in range(2):
            assert torch.equal(paired[2 * t, j], x[t, 2 * j]) and torch.equal(
                paired[2 * t + 1, j], x[t, 2 * j + 1]
            )
    assert torch.equal(tg.unpair(paired), x)


# The whole model once more, as docs/model.md says it: float64, T x T attention, a layer and a head at a time.
# The softmax is sharper for the test's sake: at scale 0.1 little follows from where a head looks.
PLAIN = dict(
    windows="sslss-sl",
    paired_heads="p..p..p.",
    value_embeds="01.2..01",
    skips="a.b..ab.",
    backout="....b...",
    extra_inputs=2,
    bigram_rows=3,
    bigram_signs=24,
    ngrams=4,
    smear_chunk="0:12",
    skip_chunk="10:22",
    attn_chunk="22:34",
    ve_chunk="34:40",
    ve_own_dims=6,
    exclusive=True,
    mudd_layers=3,
    softmax_scale=1.0,
)
SKIP_FROM, BACKOUT = {5: 0, 6: 2}, 4


def plain_attention(q, k, v, start, window, freqs, scale):
    """(T, d) each of one head, or of a pair interleaved in time -> (T, d)."""
    T, turning = len(q), 2 * len(freqs)
    turn = torch.polar(torch.ones(T, len(freqs)).double(), torch.outer(torch.arange(T).double(), freqs))

    def rotate(x):
        z = torch.complex(x[:, 0:turning:2], x[:, 1:turning:2]) * turn
        return torch.cat([torch.stack([z.real, z.imag], dim=2).reshape(T, turning), x[:, turning:]], dim=1)

    sees = torch.tensor([[max(start[i], i - window + 1) <= j <= i for j in range(T)] for i in range(T)])
    scores = (scale * rotate(q) @ rotate(k).T).masked_fill(~sees, -math.inf)
    return scores.softmax(dim=1) @ v


def plain_loss(P, signs, tokens, targets, weights, windows, freqs, scale):
    n = lambda x: x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()  # noqa: E731, what torch adds in float32
    sigmoid = torch.sigmoid
    T, H, d, ids = len(tokens), 4, 16, tokens.tolist()
    start = [0] * T
    for t in range(1, T):
        start[t] = t if ids[t] == BOS else start[t - 1]
    inner = [t for t in range(T) if start[t] < t]  # has a token before it in its document

    embedded = P["embed"][tokens]
    x = embedded.clone()
    for t in inner:
        x[t] = x[t] + P["smear_scale"] * sigmoid(P["smear_gate"][0] @ embedded[t, 0:12]) * embedded[t - 1]
    x0 = n(x)
    x = x0
    B, bigram = len(P["bigram_embed"]), []
    for t in range(T):
        hashed, key, rows = 36313 * ids[t], ids[t], []
        for back, factor in ((1, 27191), (2, 51749), (3, 44617)):
            before = ids[t - back] if t - back >= start[t] else 0
            hashed, key = hashed ^ (factor * before), key ^ before  # too small to wrap
            row = hashed % (B - 1) if start[t] < t else B - 1
            rows.append(P["bigram_embed"][row] * signs[key % 24])
        bigram.append(sum(rows))
    bigram, extra = torch.stack(bigram), [n(P[f"input_embed_{k}"][tokens]) for k in range(2)]

    outputs, attending, valued, skipping, lone = [], 0, 0, 0, 0
    for i in range(8):
        if i in SKIP_FROM:  # first, so that resid_scale holds for what comes in too
            share = 2 * sigmoid(x0[:, 10:22] @ P["skip_gate"][skipping, 0])
            x = x + sigmoid(P["skip_scale"][skipping]) * share[:, None] * outputs[SKIP_FROM[i]]
            skipping += 1
        if i >= 5:  # the last three layers take in x0 and all outputs
            hidden = torch.nn.functional.gelu(n(x) @ P["mudd_up"][i - 5].T)
            for source, row in zip([x0, *outputs], P["mudd_down"][i - 5], strict=False):
                x = x + (hidden @ row)[:, None] * source
        x = P["resid_scale"][i] * x + P["x0_scale"][i] * x0 + P["bigram_scale"][i] * bigram
        x = x + P["input_scale"][i, 0] * extra[0] + P["input_scale"][i, 1] * extra[1]
        if PLAIN["windows"][i] != "-":
            m, (Wq, Wk, Wv, Wo), long = n(x), P["qkvo"][attending], PLAIN["windows"][i] == "l"
            q, k, v = ((P["qkv_scale"][attending] * m @ W.T).view(T, H, d) for W in (Wq, Wk, Wv))
            q, k = n(q), n(k)
            if PLAIN["value_embeds"][i] != ".":
                own = P[f"value_embed_{PLAIN['value_embeds'][i]}"][tokens]
                z = torch.cat([m[:, 34:40], own[:, 0:6]], dim=1)
                v = v + (2 * sigmoid(z @ P["ve_gate"][valued].T))[:, :, None] * own.view(T, H, d)
                valued += 1
            if long:  # the key's stationary half, one token late
                late = k.clone()
                for t in inner:
                    late[t, :, d // 2 :] = k[t - 1, :, d // 2 :]
                k = late
            window, y = windows[1 if long else 0], torch.zeros(T, H, d).double()
            if PLAIN["paired_heads"][i] == "p":
                for j in range(0, H, 2):
                    both = [t[:, j : j + 2].reshape(2 * T, d) for t in (q, k, v)]
                    begin = [2 * s for s in start for _ in range(2)]
                    y[:, j : j + 2] = plain_attention(*both, begin, window, freqs, scale).view(T, 2, d)
            else:
                for h in range(H):
                    y[:, h] = plain_attention(q[:, h], k[:, h], v[:, h], start, window, freqs, scale)
            if PLAIN["paired_heads"][i] != "p":
                unit = v / v.square().sum(-1, keepdim=True).sqrt()
                y = y - P["exclusive_scale"][lone][:, None] * (y * unit).sum(-1, keepdim=True) * unit
                lone += 1
            y = y * sigmoid(m[:, 22:34] @ P["attn_gate"][attending].T)[:, :, None]
            x = x + P["o_scale"][attending] * y.reshape(T, H * d) @ Wo.T  # a row of Wo an output
            attending += 1
        W1, W2 = P["mlp"][i]
        x = x + (n(x) @ W1.T).clamp_min(0) ** 2 @ W2
        outputs.append(x)
    x = x - P["backout_scale"] * outputs[BACKOUT]
    log_p = (23 * sigmoid((n(x) @ P["lm_head"] + 5) / 7.5)).log_softmax(dim=1)
    return -sum(w * log_p[t, targets[t + k]] for k, w in enumerate(weights) for t in range(T - k)) / T


@pytest.mark.parametrize("long_window", [48, 64])
def test_the_whole_model_is_what_the_description_says(long_window):
    """Loss and every parameter's gradient, everything on, before and after a change of the long window."""
    model = randomise(tg.GPT(tiny(**PLAIN)), std=0.3)
    model.mudd_down.data.mul_(0.1)  # else three layers of them amplify float32's rounding
    model.set_long_window(long_window)
    freqs, scale = torch.tensor([1024 ** (-j / 3) for j in range(4)]).double(), 1.0
    if long_window == 64:  # from 48, the first stage's
        ramp = ((48 * freqs / (2 * math.pi) - 1) / 31).clamp(0, 1)
        freqs, scale = freqs * (48 / 64 + ramp * (1 - 48 / 64)), 0.2 * math.log(64 / 48) + 1
    tokens, targets = text(90, (0, 70))
    P = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    weights = [1.0, 0.5, 0.25]
    expected = plain_loss(P, model.bigram_sign.double(), tokens, targets, weights, (9, 33), freqs, scale)
    loss = model(tokens, targets, torch.tensor(weights), (9, 33))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    loss.backward()
    for name, p in model.named_parameters():
        # q and k are normed, their share of this scale's gradient is 0, as the sum of large terms
        close(p.grad, P[name].grad, 1e-3 if name == "qkv_scale" else 3e-5, name)


# ============================================================================================================
# Presets
# ============================================================================================================


def on_meta(preset: str) -> tg.GPT:
    with torch.device("meta"):
        return tg.GPT(tg.PRESETS[preset])


# Vocabulary 50257, in tables 393 * 128 = 50304 rows.
SIZES = {
    "short": {  # 11 layers, 10 of them attend; 768 dimensions, 6 heads of 128
        "embed": 38_633_472,  # 50304 * 768
        "lm_head": 38_633_472,
        "value_embed_0": 38_633_472,  # 50304 * 6 * 128
        "value_embed_1": 38_633_472,
        "value_embed_2": 38_633_472,
        "value_embed_3": 38_633_472,
        "value_embed_4": 38_633_472,
        "bigram_embed": 193_167_360,  # 5 * 50304 * 768, B = 5 V
        "qkvo": 23_592_960,  # 10 * 4 * 768 * 768
        "mlp": 51_904_512,  # 11 * 2 * 3072 * 768
        "attn_gate": 720,  # 10 * 6 * 12
        "ve_gate": 360,  # 5 * 6 * (6 + 6)
        "smear_gate": 12,
        "smear_scale": 1,
        "skip_gate": 12,  # one skip
        "skip_scale": 1,
        "qkv_scale": 10,
        "o_scale": 10,
        "resid_scale": 11,
        "x0_scale": 11,
        "bigram_scale": 11,
        "backout_scale": 1,
    },
    "medium": {  # 16 layers, all attend; 1024 dimensions, 8 heads of 128; one extra input, no bigrams
        "embed": 51_511_296,  # 50304 * 1024
        "lm_head": 51_511_296,
        "input_embed_0": 51_511_296,
        "value_embed_0": 51_511_296,  # 50304 * 8 * 128
        "value_embed_1": 51_511_296,
        "value_embed_2": 51_511_296,
        "value_embed_3": 51_511_296,
        "value_embed_4": 51_511_296,
        "qkvo": 67_108_864,  # 16 * 4 * 1024 * 1024
        "mlp": 134_217_728,  # 16 * 2 * 4096 * 1024
        "attn_gate": 2_048,  # 16 * 8 * 16
        "ve_gate": 1_280,  # 10 * 8 * 16
        "smear_gate": 16,
        "smear_scale": 1,
        "skip_gate": 48,  # 3 skips * 16
        "skip_scale": 3,
        "qkv_scale": 16,
        "o_scale": 16,
        "resid_scale": 16,
        "x0_scale": 16,
        "input_scale": 16,  # 16 * 1
        "backout_scale": 1,
    },
    "medium-2025": {  # 16 layers, 15 of them attend; 1024 dimensions, 8 heads of 128; one extra input
        "embed": 51_511_296,  # 50304 * 1024
        "lm_head": 51_511_296,
        "input_embed_0": 51_511_296,
        "value_embed_0": 51_511_296,  # 50304 * 8 * 128
        "value_embed_1": 51_511_296,
        "value_embed_2": 51_511_296,
        "bigram_embed": 257_556_480,  # 5 * 50304 * 1024
        "qkvo": 62_914_560,  # 15 * 4 * 1024 * 1024
        "mlp": 134_217_728,  # 16 * 2 * 4096 * 1024
        "attn_gate": 1_440,  # 15 * 8 * 12
        "ve_gate": 576,  # 6 * 8 * (6 + 6)
        "smear_gate": 12,
        "smear_scale": 1,
        "skip_gate": 36,  # 3 skips * 12
        "skip_scale": 3,
        "qkv_scale": 15,
        "o_scale": 15,
        "resid_scale": 16,
        "x0_scale": 16,
        "input_scale": 16,  # 16 * 1
        "bigram_scale": 16,
        "backout_scale": 1,
    },
}
# short: tables 7 * 38,633,472 + 193,167,360, matrices 23,592,960 + 51,904,512, the rest 1,160
# medium: tables 8 * 51,511,296, matrices 67,108,864 + 134,217,728, the rest 3,477
# medium-2025: tables 6 * 51,511,296 + 257,556,480, matrices 62,914,560 + 134,217,728, the rest 2,163
TOTALS = {"short": 539_100_296, "medium": 613_420_437, "medium-2025": 763_758_707}


@pytest.mark.parametrize("preset", SIZES)
def test_sizes_of_presets_by_name(preset):
    got = {name: p.numel() for name, p in on_meta(preset).named_parameters()}
    wrong = {name: (got.get(name), size) for name, size in SIZES[preset].items() if got.get(name) != size}
    assert not wrong and set(got) == set(SIZES[preset]), (wrong, set(got) ^ set(SIZES[preset]))
    assert sum(got.values()) == TOTALS[preset]


# A layer of short: its MLP 2 * 3072 * 768 = 4,718,592, scales of stream, x0 and bigram 3; attention 4 * 768 *
# 768 = 2,359,296, 2 scales, gates 6 * 12 = 72; a value embedding's gates 6 * 12 = 72 more; a skip 1 scale and
# 12 of a gate. A layer of medium: MLP 2 * 4096 * 1024 = 8,388,608, scales of stream, x0 and extra input 3;
# attention 4 * 1024 * 1024 = 4,194,304, 2 scales, gates 8 * 16 = 128; a value embedding's gates 128 more; a
# skip 17 more. A layer of medium-2025: the same MLP, 4 scales (bigrams too); the same attention, gates 8 * 12
# = 96; a value embedding's gates 96 more; a skip 13 more.
LAYER_SIZES = {
    "short": [
        7_077_965,
        7_078_037,
        7_078_037,
        7_077_965,
        7_077_965,
        7_077_965,
        4_718_608,
        7_077_965,
        7_078_037,
        7_078_037,
        7_078_037,
    ],
    "medium": [
        12_583_173,
        12_583_173,
        12_583_173,
        12_583_173,
        12_583_173,
        12_583_045,
        12_583_045,
        12_583_045,
        12_583_045,
        12_583_062,
        12_583_062,
        12_583_190,
        12_583_173,
        12_583_173,
        12_583_173,
        12_583_173,
    ],
    "medium-2025": [
        12_583_110,
        12_583_110,
        12_583_110,
        12_583_014,
        12_583_014,
        12_583_014,
        12_583_014,
        8_388_612,
        12_583_014,
        12_583_027,
        12_583_027,
        12_583_027,
        12_583_014,
        12_583_110,
        12_583_110,
        12_583_110,
    ],
}


@pytest.mark.parametrize("preset", LAYER_SIZES)
def test_sizes_of_presets_by_layer(preset):
    model = on_meta(preset)
    cfg, p = model.cfg, dict(model.named_parameters())
    L = len(cfg.windows)
    banks = {"mlp": L, "resid_scale": L, "x0_scale": L, "input_scale": L, "bigram_scale": L}
    banks |= dict.fromkeys(("qkvo", "qkv_scale", "o_scale", "attn_gate"), L - cfg.windows.count("-"))
    banks["ve_gate"] = L - cfg.value_embeds.count(".")
    banks["skip_gate"] = banks["skip_scale"] = (L - cfg.skips.count(".")) // 2
    assert all(len(p[name]) == rows for name, rows in banks.items() if name in p)
    got = []
    for row in tg.topology(cfg):
        has = ["mlp", "resid_scale", "x0_scale", "input_scale", "bigram_scale"]
        has += ["qkvo", "qkv_scale", "o_scale", "attn_gate"] if row.window != "none" else []
        has += ["ve_gate"] if row.value_embed else []
        has += ["skip_gate", "skip_scale"] if row.skip_from is not None else []
        got.append(sum(p[name][0].numel() for name in has if name in p))
    assert got == LAYER_SIZES[preset]
    apart = sum(
        size for name, size in SIZES[preset].items() if "embed" in name or name in ("lm_head", "smear_gate")
    )
    assert sum(got) + apart + 2 == TOTALS[preset]  # 2: the scales of smear and backout


def test_shapes_of_banks_and_tables():
    shapes = {name: tuple(p.shape) for name, p in on_meta("short").named_parameters()}
    assert shapes["qkvo"] == (10, 4, 768, 768) and shapes["mlp"] == (11, 2, 3072, 768)
    assert shapes["embed"] == (50304, 768) and shapes["lm_head"] == (768, 50304)


def places(preset: str) -> dict[str, list]:
    """What is where, by layer."""
    rows = list(enumerate(tg.topology(tg.PRESETS[preset])))
    return {
        "long": [i for i, row in rows if row.window == "long"],
        "none": [i for i, row in rows if row.window == "none"],
        "paired": [i for i, row in rows if row.paired],
        "value": [(i, row.value_embed) for i, row in rows if row.value_embed],
        "skip": [(row.skip_from, i) for i, row in rows if row.skip_from is not None],
        "backout": [i for i, row in rows if row.backout],
    }


def test_topology_of_short():
    assert places("short") == {
        "long": [3, 10],
        "none": [6],
        "paired": [0, 2, 5, 9],
        "skip": [(3, 6)],
        "backout": [7],
        "value": [(1, "0"), (2, "1"), (8, "2"), (9, "3"), (10, "4")],
    }


def test_topology_of_medium():
    assert places("medium") == {
        "long": [0, 4, 11, 15],
        "none": [],
        "paired": [],
        "skip": [(6, 9), (4, 10), (2, 11)],
        "backout": [11],
        "value": [(i, str(i)) for i in range(5)] + [(11 + i, str(i)) for i in range(5)],
    }


def test_topology_of_medium_2025():
    """What seeds 003 and 004 build on."""
    medium = places("medium-2025")
    # Every fourth, but layer 7 has no attention.
    assert medium["long"] == [3, 11, 15] and medium["none"] == [7]
    assert medium["paired"] == [] and medium["backout"] == [10]  # 2/3 of the depth
    assert medium["value"] == [(0, "0"), (1, "1"), (2, "2"), (13, "0"), (14, "1"), (15, "2")]
    skips = medium["skip"]  # U-Net: nested pairs around the middle
    assert len(skips) > 1 and all(a < 8 <= b for a, b in skips)
    assert all(c < a and b < d for (a, b), (c, d) in pairwise(skips))


def test_numbers_of_presets():
    """Everything of docs/model.md that is a number of the model and not of its layers."""
    short, medium, older = (tg.PRESETS[name] for name in ("short", "medium", "medium-2025"))
    for cfg in (short, medium, older):
        assert (cfg.head_dim, cfg.softmax_scale, cfg.rotary_base, cfg.rotary_share) == (128, 0.1, 1024, 0.5)
        assert (cfg.softcap, cfg.softcap_shift, cfg.softcap_width) == (23, 5, 7.5)
        assert cfg.key_offset and cfg.qk_norm and cfg.activation == "relu2" and cfg.bigram_signs == 0
        assert cfg.embed_std == 0.005 and cfg.matrix_std == 0.5 and cfg.yarn_limit == 13 * 128
        assert cfg.vocab_size == 50257 and cfg.vocab_rows == 50304 and cfg.bos_id == 50256
    for cfg in (short, older):
        assert (cfg.smear_chunk, cfg.skip_chunk, cfg.attn_chunk, cfg.ve_chunk) == (
            "0:12",
            "6:18",
            "18:30",
            "18:24",
        )
        assert (cfg.value_embed_std, cfg.qkv_std, cfg.o_std, cfg.resid_scale) == (0.01, 0.5, 0.5, 1.1)
        assert (cfg.ve_own_dims, cfg.bigram_rows, cfg.final_long_window) == (6, 5, 20 * 128) and cfg.fp8_head
    assert {medium.smear_chunk, medium.skip_chunk, medium.attn_chunk, medium.ve_chunk} == {"0:16"}
    assert (medium.value_embed_std, medium.qkv_std, medium.o_std, medium.resid_scale) == (0.0, 1.0, 0.0, 1.05)
    assert (medium.ve_own_dims, medium.bigram_rows, medium.final_long_window) == (0, 0, 27 * 128)
    assert (medium.model_dim, medium.extra_inputs, medium.input_embed_std) == (1024, 1, 1.0)
    assert not medium.fp8_head


def plain_gpt2_loss(
    p: dict[str, torch.Tensor], tokens: torch.Tensor, targets: torch.Tensor, windows: str
) -> torch.Tensor:
    """A pre-norm transformer with rotary attention and GELU, no more; heads of 64, its windows 16 and 48."""

    def norm(x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-7).rsqrt()

    place = torch.arange(len(tokens))
    start = torch.where(tokens == 4095, place, 0).cummax(0).values
    turn = torch.polar(torch.ones(()).double(), place[:, None] * 1024 ** (-torch.arange(32).double() / 31))[
        :, None
    ]

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (32, 2))) * turn).flatten(-2)

    x = norm(p["embed"][tokens])
    for (wq, wk, wv, wo), (up, down), window in zip(p["qkvo"], p["mlp"], windows, strict=True):
        q, k, v = ((norm(x) @ w.T / 2).unflatten(-1, (-1, 64)) for w in (wq, wk, wv))
        seen = (
            (place <= place[:, None])
            & (place > place[:, None] - {"s": 16, "l": 48}[window])
            & (place >= start[:, None])
        )
        scores = torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) / 64**0.5
        x = (
            x
            + torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v).flatten(1)
            @ wo.T
        )
        x = x + torch.nn.functional.gelu(norm(x) @ up.T) @ down
    return torch.nn.functional.cross_entropy(norm(x) @ p["lm_head"], targets)


def test_the_cpu_tracks_baseline_is_a_plain_gpt2():
    cfg = replace(tg.PRESETS["cpu-adamw"], dtype="float32", compile=False)
    model = tg.GPT(cfg)
    frozen = {name for name, spec in model.specs.items() if spec.lr == 0}
    assert set(model.specs) - frozen == {"embed", "lm_head", "qkvo", "mlp"} and all(
        name.endswith("_scale") for name in frozen
    )
    assert all(spec.optimizer == "adam" for spec in model.specs.values())
    randomise(model, keep=(*frozen, "embed", "lm_head"), std=0.1)  # its second matrices begin at 0
    tokens, targets = text(150, seed=1)
    tokens[[0, 60]] = 4095
    p = {name: value.detach().double() for name, value in model.named_parameters()}
    close(
        model(tokens, targets, torch.ones(1), WINDOWS), plain_gpt2_loss(p, tokens, targets, cfg.windows), 1e-5
    )


# One graph of all layers, as a GPU compiles them


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_layers_compile_once_for_all_lengths_and_windows(monkeypatch, backend):
    """Without a kernel that asks for the window: a graph to learn with, one to validate with."""

    def see_everything(q, k, v, first_key, window, scale):
        assert window is None
        return tg.reference_attention(q, k, v, first_key, scale)

    monkeypatch.setattr(tg.torch, "compile", partial(torch.compile, backend=backend))
    cfg = tiny(windows="sl", paired_heads="p.", value_embeds=".0", skips="aa", backout="b.", extra_inputs=1)
    kernels = tg.plain_kernels(attention=see_everything, reads_window=False)
    plain = tg.GPT(cfg, kernels=kernels)
    whole = tg.GPT(cfg, kernels=replace(kernels, compile_layers=tg.compile_for_any_length))
    randomise(plain)
    whole.load_state_dict(plain.state_dict())
    torch._dynamo.utils.counters.clear()
    for T, windows in ((128, (16, 48)), (192, (16, 64)), (128, (8, 32))):
        tokens, targets = text(T, (0, 50, 51), seed=T)
        losses = []
        for model in (plain, whole):
            model.zero_grad()
            loss = model(tokens, targets, torch.ones(2), windows)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        for (name, a), b in zip(plain.named_parameters(), whole.parameters(), strict=True):
            close(b.grad, a.grad, 1e-4, name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
