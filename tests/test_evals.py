"""What one does with a trained model: load, cache, sample, measure, export; and what the commands refuse."""

import ast
import contextlib
import json
import math
import os
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, assert_user_error, run_command, tiny

import train_gpt as tg
from cli import UserError
from data.bpe import train_bpe, write_token_bytes
from data.shards import save_vocab, write_shard
from evals import export, hellaswag, kv_cache, loss, model, plan, sample
from records import embeddings

TEXT = (
    "The war was over before the autumn came. Naïve 東京 readers — all of them — expected “another” winter. "
)
VOCAB, BOS = 300, 300  # tokens besides BOS, and its id
WINDOWS = [(16, 64), (7, 33), (1, 2)]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return train_bpe([TEXT * 3], VOCAB)


def lively(cfg: tg.Config) -> tg.GPT:
    """A model in which every gate, table and scalar says something; as it starts, many of them are 0."""
    net, rng = tg.GPT(cfg), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * (0.3 + p.std() if p.numel() > 1 else 0.5))
        net.embed.add_(torch.randn(net.embed.shape, generator=rng))
    return net


def trained(reach: tuple[int, int] = (16, 64), **changes) -> model.Trained:
    """At the end of its run, so that `reach` are the windows of the last validation. Its angles are those of
    training."""
    stages = tuple(replace(stage, windows=(reach[0], stage.windows[1])) for stage in tiny().stages)
    cfg = tiny(vocab_size=VOCAB + 1, bos_id=BOS, stages=stages, final_long_window=reach[1], **changes)
    net = lively(cfg).requires_grad_(False)
    net.set_long_window(64)
    return model.Trained(net, cfg.num_steps, ROOT / "made up", None)


def stream(count: int, seed: int = 0) -> torch.Tensor:
    """Documents of many lengths, some only a BOS."""
    tokens = torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))
    for place in (0, 1, 40, 41, 42, 130):
        tokens[place::200] = BOS
    return tokens


def checkpoint(folder, vocab: dict[bytes, int], step: int = 8, run: str = "run", saved_at=0.0, **changes):
    """As a run leaves it, with the data's folder beside it."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    save_vocab(data / "vocab.tiktoken", vocab)
    write_shard(data / "x_val_000000.bin", stream(700, seed=3).numpy())
    cfg = tiny(vocab_size=VOCAB + 1, bos_id=BOS, data_dir=str(data), **changes)
    path, net = folder / f"{run}.step{step:06d}.pt", lively(cfg)
    net.set_long_window(tg.Schedule(cfg).windows(step - 1)[1])  # what its last step was trained with
    content = {
        "config": json.dumps(tg.settings(cfg)),
        "run_id": run,
        "step": step,
        "saved_at": saved_at,
        "model": net.state_dict(),
    }
    tg.save_checkpoint(path, content | {"format": tg.CHECKPOINT_FORMAT})
    return path


# The cache


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("sizes", ["one by one", "uneven"])
def test_a_cache_says_what_a_full_pass_says(windows, sizes):
    """Over edges of windows and documents: smear, bigrams, key offset look one token back, triples two."""
    it, tokens = trained(windows), stream(140)
    want = it.logits(it.hidden(tokens))
    past = kv_cache.KVCache(it, 140)
    parts = tokens.split(1 if sizes == "one by one" else [1, 39, 2, 1, 60, 37])
    found = it.logits(torch.cat([past.feed(part) for part in parts]))
    assert want.std() > 1  # a model that says something
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)


FEATURES = {
    "no features": dict(
        windows="ll",
        paired_heads="..",
        value_embeds="..",
        skips="..",
        backout="..",
        smear_chunk="",
        bigram_rows=0,
        key_offset=False,
        extra_inputs=0,
        attn_chunk="",
    ),
    "a layer without attention": dict(windows="sl-ssl", value_embeds=".0..23"),
    "signs": dict(bigram_signs=64),
    "triples": dict(bigram_signs=64, ngrams=3),
    "four tokens in a row": dict(ngrams=4),
    "no cap": dict(softcap=0.0),
    "exclusive attention": dict(exclusive=True),
    "dynamic dense connections": dict(mudd_layers=2),
    "rotary all": dict(rotary_share=1.0),
    "no rotary": dict(rotary_share=0.0),
    "every layer paired and long": dict(windows="llllll", paired_heads="pppppp"),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_cache_follows_every_feature(feature):
    it, tokens = trained((5, 24), **FEATURES[feature]), stream(90)
    past = kv_cache.KVCache(it, 90)
    found = torch.cat([past.feed(part) for part in tokens.split([50, *[1] * 40])])
    torch.testing.assert_close(it.logits(found), it.logits(it.hidden(tokens)), rtol=0, atol=1e-4)


def test_a_long_prompt_is_fed_in_parts(monkeypatch):
    it, tokens = trained(), stream(100)
    whole = kv_cache.KVCache(it, 100).feed(tokens)
    monkeypatch.setattr(kv_cache, "FEED_CHUNK", 7)
    torch.testing.assert_close(kv_cache.KVCache(it, 100).feed(tokens), whole, rtol=0, atol=1e-4)


def test_a_copy_of_a_cache_goes_on_alone():
    it, tokens = trained(), stream(60)
    past = kv_cache.KVCache(it, 60)
    past.feed(tokens[:30])
    other = past.copy()
    other.feed(tokens[:20].flip(0))
    found = past.feed(tokens[30:])
    torch.testing.assert_close(found, it.hidden(tokens)[30:], rtol=0, atol=1e-4)


def test_bfloat16_stays_close():
    it, tokens = trained(), stream(120)
    half = model.Trained(tg.GPT(it.cfg, torch.bfloat16).requires_grad_(False), it.step, it.source, None)
    half.model.load_state_dict(it.model.state_dict())
    half.model.update_rotary()
    past = kv_cache.KVCache(half, 120)
    found = torch.cat([past.feed(part) for part in tokens.split(40)])
    want = half.hidden(tokens).float()
    assert (found.float() - want).norm() < 0.05 * want.norm()


# Loading


# Of 8 steps the first four have a long window of 48 tokens, the others one of 64; the last validation looks
# 96 far.
@pytest.mark.parametrize(
    "step, windows, trained_with",
    [(2, (16, 48), 48), (4, (16, 64), 64), (6, (16, 64), 64), (8, (16, 96), 64)],
    ids=["in a stage", "where a stage begins", "in the last stage", "at the end"],
)
def test_a_checkpoint_is_loaded_with_its_windows_its_angles_and_its_vocabulary(
    tmp_path, ranks, step, windows, trained_with
):
    """As the run validated it there: with the stage that begins, and at the end with the angles of
    training."""
    it = model.load(checkpoint(tmp_path, ranks, step=step, final_long_window=96), device="cpu")
    net = lively(it.cfg)
    net.set_long_window(trained_with)
    assert it.windows == windows and int(it.model.long_window) == trained_with
    for (name, want), found in zip(net.state_dict().items(), it.model.state_dict().values(), strict=True):
        assert torch.equal(found, want), name
    tokens = stream(80)
    torch.testing.assert_close(it.hidden(tokens), net.hidden(tokens, windows), rtol=0, atol=1e-5)
    assert it.decode(it.encode(TEXT)) == "<|endoftext|>" + TEXT


@pytest.mark.parametrize("changes", [{}, FEATURES["every layer paired and long"], FEATURES["no rotary"]])
def test_a_long_stream_attends_a_span_at_a_time(tmp_path, ranks, monkeypatch, changes):
    it, tokens = model.load(checkpoint(tmp_path, ranks, **changes), device="cpu"), stream(300)
    net = lively(it.cfg)
    net.set_long_window(64)
    want, lengths, attention = net.hidden(tokens, it.windows), [], tg.attend_in_blocks

    def noting(q, *rest):
        lengths.append(len(q))
        return attention(q, *rest)

    monkeypatch.setattr(tg, "attend_in_blocks", noting)
    for span in (1000, 128, 50):
        monkeypatch.setattr(tg, "SPAN", span)
        lengths.clear()
        torch.testing.assert_close(it.hidden(tokens), want, rtol=0, atol=1e-4)
        assert max(lengths) <= min(2 * 300, span + 63), "queries with the keys that they reach, and no more"


def test_of_a_folder_the_newest_is_loaded(tmp_path, ranks):
    """Of several runs by the time that the files say, whatever the clock says; of one run by its steps."""
    for age, (run, step) in enumerate([("a", 4), ("a", 8), ("b", 2), ("b", 6)]):
        path = checkpoint(tmp_path, ranks, step=step, run=run, saved_at=1000.0 + age)
        os.utime(path, (2000 - age, 2000 - age))
    assert model.load(tmp_path, device="cpu").source.name == "b.step000006.pt"


def test_loading_runs_no_code_of_the_file(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"config": "{}", "step": 1, "model": Evil()}, tmp_path / "run.step000001.pt")
    for path, words in ((tmp_path / "run.step000001.pt", "not a whole"), (tmp_path, "none of its 1")):
        with pytest.raises(UserError, match=words):
            model.load(path)
    assert not (tmp_path / "ran").exists()


def spoil_stage(content: dict, **changes) -> dict:
    stages = json.loads(content["config"])["stages"]
    return spoil(content, stages=[stages[0] | changes, *stages[1:]])


def spoil(content: dict, **config) -> dict:
    return content | {"config": json.dumps(json.loads(content["config"]) | config)}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: spoil(c, new_field=1), "another version of train_gpt.py .*new_field"),
        (lambda c: spoil(c, vocab_size="many"), "configuration cannot be read"),
        (lambda c: spoil(c, bigram_signs=True), "configuration cannot be read .bigram_signs True"),
        (lambda c: spoil(c, stages=[]), "configuration has no stages"),
        (lambda c: spoil_stage(c, until="soon"), "configuration cannot be read .a stage's numbers"),
        (lambda c: spoil_stage(c, max_doc_len=-1), "configuration cannot be read .a stage's numbers"),
        (lambda c: spoil_stage(c, windows=[16, True]), "configuration cannot be read .a stage's numbers"),
        (
            lambda c: c | {"model": c["model"] | {"mlp": c["model"]["mlp"] * math.nan}},
            "mlp holds .* not finite",
        ),
        (lambda c: c | {"model": c["model"] | {"embed": "text"}}, "weights are not those"),
        (lambda c: c | {"step": 10**9}, "stands at step 1000000000 of 8"),
        (lambda c: c | {"step": 2.5}, "not a whole checkpoint"),
        (lambda c: [c], "not a whole checkpoint"),
        (lambda c: spoil(c, head_dim=24), "head_dim"),
        (lambda c: spoil(c, mlp_ratio=2), "weights are not those"),
        (lambda c: c | {"config": "[]"}, "another version|cannot be read"),
        (lambda c: {k: v for k, v in c.items() if k != "model"}, "not a whole checkpoint"),
        (
            lambda c: {k: v for k, v in c.items() if k != "format"},
            "another version of train_gpt.py, whose model",
        ),
        (lambda c: c | {"format": 1}, "another version of train_gpt.py, whose model"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(tmp_path, ranks, change, words):
    path = checkpoint(tmp_path, ranks)
    torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(UserError, match=words):
        model.load(path)


def test_half_a_checkpoint_an_empty_folder_and_no_file(tmp_path, ranks):
    path = checkpoint(tmp_path, ranks)
    path.write_bytes(path.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    for wrong, words in (
        (path, "not a whole checkpoint"),
        (tmp_path / "empty", "no checkpoint in this folder"),
        (tmp_path / "nowhere", "no such"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            model.load(wrong)
        assert str(wrong) in str(caught.value)


def test_a_vocabulary_of_another_size_is_refused(tmp_path, ranks):
    path = checkpoint(tmp_path, ranks)
    other = tmp_path / "other.tiktoken"
    save_vocab(other, train_bpe([TEXT], 290))
    with pytest.raises(UserError, match="other.tiktoken: 290 tokens and BOS, but the model has 301"):
        model.load(path, vocab=other)
    (tmp_path / "data" / "vocab.tiktoken").unlink()
    with pytest.raises(UserError, match="no vocab.tiktoken"):
        model.load(path).encode("x")


# Sampling


def shares(logits, n: int = 4000, **how) -> torch.Tensor:
    how = dict(temperature=1.0, top_k=0, top_p=1.0) | how
    rng = torch.Generator().manual_seed(0)
    found = torch.tensor([sample.choose(torch.tensor(logits), rng=rng, **how) for _ in range(n)])
    return torch.bincount(found, minlength=len(logits)) / n


LOGITS = [math.log(share) for share in (0.1, 0.4, 0.2, 0.3)]


@pytest.mark.parametrize(
    "how, want",
    [
        (dict(), [0.1, 0.4, 0.2, 0.3]),
        (dict(temperature=0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (dict(top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        (dict(top_k=3, top_p=0.7), [0, 4 / 7, 0, 3 / 7]),  # shares of the three: 0.44, 0.33, 0.22
        (dict(top_p=1e-9), [0, 1, 0, 0]),
        (dict(temperature=0), [0, 1, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(how, want):
    found, want = shares(LOGITS, **how), torch.tensor(want)
    assert (found[want == 0] == 0).all() and (found - want).abs().max() < 0.04, found  # 5 sigma of 4000 draws


def test_a_sample_is_what_full_passes_would_make():
    it = trained()
    past, tokens = kv_cache.KVCache(it, 70), stream(20)[:20].tolist()
    x = past.feed(torch.tensor(tokens))[-1:]
    found = list(sample.generate(it, past, x, 50, lambda logits: int(logits[:BOS].argmax())))
    for token in found:
        assert token == int(it.logits(it.hidden(torch.tensor(tokens)))[-1, :BOS].argmax())
        tokens.append(token)
    assert len(found) == 50


def test_a_sample_ends_with_its_document_and_never_pads():
    it = trained()
    assert it.cfg.vocab_rows > it.cfg.vocab_size
    # Rows that nothing trains may say anything.
    it.model.lm_head[:, it.cfg.vocab_size :] = 10 * it.model.lm_head[:, :1]
    seen = []

    def pick(logits):
        seen.append(len(logits))
        return BOS if len(seen) == 4 else 5

    past = kv_cache.KVCache(it, 20)
    assert list(sample.generate(it, past, past.feed(torch.tensor([BOS])), 10, pick)) == [5, 5, 5]
    assert seen == [VOCAB + 1] * 4


def test_half_characters_are_held_back_until_they_are_whole(ranks):
    it = model.Trained(types.SimpleNamespace(cfg=tiny(vocab_size=VOCAB + 1, bos_id=BOS)), 1, ROOT, ranks)
    singles = {bytes([b]): ranks[bytes([b])] for b in range(256)}
    shown = []
    tokens = [singles[bytes([b])] for b in "é東x".encode()] + [singles[b"\xe6"]]
    assert sample.write(it, iter(tokens), shown.append) == 7
    assert shown == ["", "é", "", "", "東", "x", "", "\ufffd"]


@pytest.mark.parametrize("prompt", ["", "The war", " \n\n\t", "<|endoftext|>", "東京 – naïve 🙂", "a" * 700])
def test_prompts_of_any_text(tmp_path, ranks, prompt):
    it = model.load(checkpoint(tmp_path, ranks, val_seq_len=1024, val_tokens=1024), device="cpu")
    first = sample.complete(it, prompt, tokens=5, seed=1)
    assert first.startswith(prompt) and first == sample.complete(it, prompt, tokens=5, seed=1)
    assert it.encode(prompt)[0] == BOS and BOS not in it.encode(prompt)[1:]


def test_another_seed_is_another_sample(tmp_path, ranks):
    it = model.load(checkpoint(tmp_path, ranks), device="cpu")
    assert (
        len({sample.complete(it, "The", tokens=8, temperature=5.0, top_k=0, seed=seed) for seed in range(4)})
        == 4
    )


# Loss


def test_losses_are_the_model_s_own():
    it, tokens = trained(), stream(150)
    with torch.no_grad():
        want = it.model(tokens[:-1], tokens[1:], torch.ones(1), it.windows)
    torch.testing.assert_close(it.losses(tokens).mean(), want, rtol=1e-6, atol=1e-6)
    parts = tokens[:41], tokens[40:81], tokens[80:121], tokens[120:]
    want = sum(float(it.losses(part).sum()) for part in parts)
    it.model.cfg = replace(it.cfg, val_seq_len=40)  # sequences as these, the last not full
    assert abs(loss.total_loss(it, tokens.numpy()) - want) < 1e-3


def test_each_checkpoint_of_a_run_has_the_loss_of_its_log(tmp_path, ranks, monkeypatch, capsys):
    """The whole way: train, save in each stage, where the second begins, and at the end; load, measure."""
    monkeypatch.setattr(tg, "KEPT_CHECKPOINTS", 99)
    data = tmp_path / "data"
    data.mkdir()
    save_vocab(data / "vocab.tiktoken", ranks)
    write_token_bytes(data, ranks)
    for split, seed in (("train", 1), ("val", 2)):
        write_shard(data / f"x_{split}_000000.bin", stream(9000, seed=seed).numpy())
    cfg = tiny(
        vocab_size=VOCAB + 1,
        bos_id=BOS,
        data_dir=str(data),
        log_dir=str(tmp_path / "logs"),
        warmup=False,
        save_every=2,
        val_every=2,
        final_long_window=96,
        ema_rate=0.3,
    )
    tg.train(cfg, {})
    logged = [line for line in capsys.readouterr().out.splitlines() if " val_loss:" in line]
    files = sorted((tmp_path / "logs").glob("*.pt"))
    assert [line.split("/")[0] for line in logged] == ["step:0", "step:2", "step:4", "step:6", "step:8"]
    for file, line in zip([*files, tmp_path / "logs"], [*logged[1:], logged[-1]], strict=True):
        loss.main([str(file), "--device", "cpu"])
        printed = dict(pair.split(":") for pair in capsys.readouterr().out.split()[:3])
        wanted = dict(pair.split(":") for pair in line.split())
        # Digits, rounded.
        assert float(printed["loss"]) == pytest.approx(float(wanted["val_loss"]), abs=1.1e-4)
        assert float(printed["bpb"]) == pytest.approx(float(wanted["val_bpb"]), abs=1.1e-4)
        assert printed["tokens"] == "512"


def test_sequences_of_another_length_than_the_run_s(tmp_path, ranks, capsys):
    """Longer ones too, for which there are no angles in the file."""
    path, shard = checkpoint(tmp_path, ranks), tmp_path / "data" / "x_val_000000.bin"
    assert model.load(path, device="cpu").longest == 512
    for size in (100, 699, 5000):
        loss.main([str(path), str(shard), "--device", "cpu", "--val_seq_len", str(size)])
        it = model.load(path, device="cpu", val_seq_len=size)
        parts = stream(700, seed=3)
        nats = sum(float(it.losses(parts[at : at + size + 1]).sum()) for at in range(0, 699, size))
        assert capsys.readouterr().out.startswith(f"loss:{nats / 699:.4f} ")


def test_a_text_s_bits_per_byte(tmp_path, ranks, capsys):
    path = checkpoint(tmp_path, ranks)
    text, shard = tmp_path / "some.txt", tmp_path / "data" / "x_val_000000.bin"
    text.write_text(TEXT * 5)
    loss.main([str(path), str(text), str(shard), "--device", "cpu"])
    it, lines = model.load(path, device="cpu"), capsys.readouterr().out.splitlines()
    tokens = torch.tensor(it.encode(TEXT * 5))
    nats = sum(float(it.losses(tokens[at : at + 257]).sum()) for at in range(0, len(tokens) - 1, 256))
    bpb = nats / math.log(2) / len((TEXT * 5).encode())
    assert lines[0] == f"loss:{nats / (len(tokens) - 1):.4f} bpb:{bpb:.4f} tokens:{len(tokens) - 1} {text}"
    assert f"tokens:699 {shard}" in lines[1]


# HellaSwag

ITEMS = [
    {
        "ctx": "The war",
        "endings": ["was over.", "came before all that.", "winter", "“another” 東京"],
        "label": 0,
    },
    {
        "ctx": "All of them",
        "endings": ["expected", "the autumn", "readers", "before, before, before"],
        "label": "2",
    },
]


def test_endings_are_scored_by_their_own_tokens(tmp_path, ranks, monkeypatch):
    it = model.load(checkpoint(tmp_path, ranks), device="cpu")
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(map(json.dumps, ITEMS * 3)))
    items = hellaswag.read_items(file)
    monkeypatch.setattr(hellaswag, "PACK", 200)  # several packs
    score_pack, packs = hellaswag.score_pack, []

    def noting(it, pack, most):
        packs.append(len(pack))
        return score_pack(it, pack, most)

    monkeypatch.setattr(hellaswag, "score_pack", noting)
    found = list(hellaswag.score(it, items))
    assert len(packs) > 1 and sum(packs) == 6
    assert [label for _, label in found] == [0, 2] * 3
    for (scores, _), item in zip(found, items, strict=True):
        for n, ending in enumerate(item.endings):  # one alone, token by token
            context, own = it.encode(item.context), it.encode(" " + ending)[1:]
            logs = it.padded_logits(it.hidden(torch.tensor(context + own))).log_softmax(-1)
            want = sum(float(logs[len(context) + k - 1, token]) for k, token in enumerate(own))
            assert (
                abs(float(scores[0, n]) - want) < 1e-3 and abs(float(scores[1, n]) - want / len(own)) < 1e-3
            )


def test_accuracies_are_those_of_the_two_scores(tmp_path, ranks, monkeypatch, capsys):
    path, file = checkpoint(tmp_path, ranks), tmp_path / "items.jsonl"
    file.write_text("\n".join(map(json.dumps, ITEMS)))
    scores = [
        torch.tensor([[-1.0, -2, -3, -4], [-1, -1, -0.5, -1]]),
        torch.tensor([[-9.0, -2, -3, -4], [-1, -1, -0.5, -1]]),
    ]
    monkeypatch.setattr(
        hellaswag,
        "score",
        lambda it, items: [(s, item.label) for s, item in zip(scores, items, strict=False)],
    )
    hellaswag.main([str(path), str(file), "--device", "cpu"])
    assert "accuracy:0.5000 accuracy_per_token:0.5000 items:2" in capsys.readouterr().out
    hellaswag.main([str(path), str(file), "--items", "1", "--device", "cpu"])
    assert "accuracy:1.0000 accuracy_per_token:0.0000 items:1" in capsys.readouterr().out


BAD_LABELS = ("2", "-1", "true", "0.0", "null", '""', '"x"', "[0]", "1" + "0" * 400, "1" * 5000)


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "{}",
        '{"ctx": "a", "endings": ["b"], "label": 1}',
        '["a"]',
        '{"ctx": "a", "endings": [""], "label": 0}',
        '{"ctx": "a", "endings": "abcd", "label": 0}',
        '{"ctx": "a", "endings": ["b", 1], "label": 0}',
        '{"ctx": "a", "endings": {"b": 1, "c": 2}, "label": 0}',
        '{"ctx": 1, "endings": ["b", "c"], "label": 0}',
        *['{"ctx": "a", "endings": ["b", "c"], "label": ' + label + "}" for label in BAD_LABELS],
        "[" * 10_000,
        '{"ctx": "\xff',
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, bad):
    file = tmp_path / "items.jsonl"
    file.write_bytes((json.dumps(ITEMS[0]) + "\n" + bad).encode("latin-1"))
    with pytest.raises(UserError, match="items.jsonl: line 2 is no item"):
        hellaswag.read_items(file)


def test_blank_lines_are_left_out_and_too_long_items_are_counted(tmp_path, ranks, capsys):
    path, file = checkpoint(tmp_path, ranks), tmp_path / "items.jsonl"
    long = ITEMS[0] | {"endings": ["x" * 600, "b", "c", "d"]}  # the model has positions for 512
    four = ITEMS[0] | {"endings": ["x" * 200] * 4}  # each fits, the four together do not
    file.write_text("\n".join(["", *map(json.dumps, [long, four, ITEMS[1]]), " ", ""]))
    hellaswag.main([str(path), str(file), "--device", "cpu"])
    assert " items:2 skipped:1 " in capsys.readouterr().out
    file.write_text(json.dumps(long))
    with pytest.raises(UserError, match="more than 512 tokens"):
        hellaswag.main([str(path), str(file), "--device", "cpu"])


def test_fetching_writes_the_hub_s_items(tmp_path, monkeypatch):
    """A hub and a parquet reader made up here: what is asked of them, and what becomes of it."""
    import huggingface_hub

    asked = []
    table = types.SimpleNamespace(to_pylist=lambda: ITEMS)
    parquet = types.SimpleNamespace(read_table=lambda path, columns: asked.append((path, columns)) or table)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "list_repo_files",
        lambda self, repo, repo_type: ["data/test-0.parquet", "data/validation-0.parquet"],
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, repo_type: f"{repo}/{name}")
    hellaswag.fetch(tmp_path / "got" / "items.jsonl")
    assert asked == [("Rowan/hellaswag/data/validation-0.parquet", ["ctx", "endings", "label"])]
    assert [item.label for item in hellaswag.read_items(tmp_path / "got" / "items.jsonl")] == [0, 2]


def test_a_byte_order_mark_is_no_text(tmp_path, ranks, capsys):
    path = checkpoint(tmp_path, ranks)
    for name, mark in (("plain.txt", b""), ("marked.txt", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(mark + TEXT.encode())
        loss.main([str(path), str(tmp_path / name), "--device", "cpu"])
    plain, marked = capsys.readouterr().out.splitlines()
    assert plain.split()[:3] == marked.split()[:3]


def test_a_name_s_terminal_escapes_are_not_printed(tmp_path, ranks, capsys):
    file = tmp_path / "a\x1b[31mb\n.txt"
    file.write_text(TEXT)
    loss.main([str(checkpoint(tmp_path, ranks)), str(file), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and len(out.splitlines()) == 1


@pytest.mark.parametrize("text", [" " * 10**6 + "end", "\ud800 half", "\r\n" * 1000, "\0"])
def test_text_of_any_kind_is_encoded(tmp_path, ranks, text):
    it = model.load(checkpoint(tmp_path, ranks), device="cpu")
    assert it.encode(text)[0] == BOS and it.decode(it.encode(text)[1:]) == text.replace("\ud800", "\ufffd")


# Export


def test_an_export_is_the_same_model(tmp_path, ranks):
    path = checkpoint(tmp_path, ranks, final_long_window=96)
    it = model.load(path, device="cpu")
    file = export.export(it, tmp_path / "out")
    assert str(tmp_path).encode() not in file.read_bytes()  # nothing of this machine's folders
    (tmp_path / "data" / "vocab.tiktoken").unlink()  # it needs nothing but itself
    path.unlink()
    back, tokens = model.load(tmp_path / "out", device="cpu"), stream(100)
    assert back.source == file and back.windows == it.windows == (16, 96)
    for (name, want), found in zip(
        it.model.state_dict().items(), back.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, want), name
    assert torch.equal(back.hidden(tokens), it.hidden(tokens))
    assert sample.complete(back, TEXT, tokens=9) == sample.complete(it, TEXT, tokens=9)


def test_an_export_leaves_nothing_where_it_cannot_be_whole(tmp_path, ranks):
    it, out = model.load(checkpoint(tmp_path, ranks), device="cpu"), tmp_path / "out"
    out.mkdir()
    (out / "vocab.tiktoken").symlink_to("nowhere")
    with pytest.raises(UserError, match="vocab.tiktoken: is already there"):
        export.export(it, out)
    assert os.listdir(out) == ["vocab.tiktoken"]


def test_of_several_exports_none_is_the_newest(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds 2 exports; give the file"):
        model.newest(tmp_path)


def test_a_checkpoint_that_is_passed_over_is_named(tmp_path, ranks, capsys):
    checkpoint(tmp_path, ranks)
    (tmp_path / "x.step000009.pt").write_bytes(b"cut")
    assert model.newest(tmp_path).name == "run.step000008.pt"
    assert "x.step000009.pt is not whole" in capsys.readouterr().err


def test_an_export_that_is_cut_is_refused(tmp_path, ranks):
    file = export.export(model.load(checkpoint(tmp_path, ranks), device="cpu"), tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole export"):
        model.load(file)


@pytest.mark.parametrize("package", ["safetensors", "pyarrow"])
def test_a_missing_extra_is_named(tmp_path, ranks, monkeypatch, package):
    it = model.load(checkpoint(tmp_path, ranks), device="cpu")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name in (package, f"{package}.torch", f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    uses = {
        "safetensors": [
            lambda: export.export(it, tmp_path / "out"),
            lambda: model.load(tmp_path / "model.safetensors"),
        ],
        "pyarrow": [lambda: hellaswag.fetch(tmp_path / "items.jsonl")],
    }
    for use in uses[package]:
        with pytest.raises(UserError, match=f"package {package}.*: pip install -r evals/requirements.txt"):
            use()
    assert not (tmp_path / "out").exists() and not (tmp_path / "items.jsonl").exists()


# The commands


def test_samples_are_printed_and_counted(tmp_path, ranks, capsys):
    flags = [
        str(checkpoint(tmp_path, ranks)),
        "The war",
        "--tokens",
        "12",
        "--temperature",
        "2",
        "--device",
        "cpu",
    ]
    sample.main([*flags, "--samples", "2"])
    printed = capsys.readouterr()
    assert printed.out.startswith("--- sample 1 of 2\nThe war") and printed.out.count("The war") == 2
    assert re.search(r"then \d+ tokens in .* a second\n$", printed.err)
    sample.main(flags)  # the same seed: the same first sample
    assert capsys.readouterr().out == printed.out.split("\n", 1)[1].split("--- sample 2")[0]


AWKWARD = {"LOOP": "loop", "PIPE": "pipe", "FOLDER": "folder", "x" * 300: "xxx"}  # and a part of the message


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("sample", ["CHECKPOINT", "--top_p", "0"], ["--top_p 0.0"]),
        ("sample", ["CHECKPOINT", "--temperature", "nan"], ["--temperature nan"]),
        ("sample", ["CHECKPOINT", "--tokens", "9999"], ["positions for 512 tokens", "--tokens"]),
        ("sample", ["CHECKPOINT", b"\xff"], ["not UTF-8"]),
        ("loss", ["CHECKPOINT", "NOTEXT"], ["no.txt", "byte 3 is not UTF-8"]),
        ("loss", ["CHECKPOINT", "nowhere.bin"], ["nowhere.bin"]),
        ("loss", ["CHECKPOINT", "--val_seq_len", "0"], ["--val_seq_len 0"]),
        ("hellaswag", ["CHECKPOINT", "nowhere.jsonl"], ["nowhere.jsonl", "--fetch"]),
        ("export", ["nowhere", "out"], ["nowhere", "--save_every"]),
        ("export", ["CHECKPOINT", ""], ["FOLDER", "names no file or folder"]),
        *[
            (name, ["", *more], ["CHECKPOINT", "names no file or folder"])
            for name, more in (("sample", []), ("loss", []), ("hellaswag", []), ("export", ["out"]))
        ],
        *[
            (name, ["CHECKPOINT", *more, "--device", "cuda"], ["--device cuda", "--device cpu"])
            for name, more in (("sample", []), ("loss", []), ("hellaswag", ["ITEMS"]), ("export", ["OUT"]))
        ],
        *[("loss", [place], [part]) for place, part in AWKWARD.items()],
        *[("loss", ["CHECKPOINT", place], [part]) for place, part in AWKWARD.items()],
        *[("hellaswag", ["CHECKPOINT", place], [part]) for place, part in AWKWARD.items()],
        *[("sample", ["CHECKPOINT", "--vocab", place], [part]) for place, part in AWKWARD.items()],
        ("export", ["CHECKPOINT", "NOTEXT"], ["no.txt"]),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(tmp_path, ranks, monkeypatch, name, flags, words):
    """In this process: a command's start takes seconds. What `command` makes of it is tested once, below."""
    (tmp_path / "no.txt").write_bytes(b"abc\xff")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits for ever
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEMS[0]))
    places = {"CHECKPOINT": checkpoint(tmp_path, ranks), "NOTEXT": tmp_path / "no.txt"}
    places |= {name.upper(): tmp_path / name for name in ("pipe", "loop", "folder", "out")}
    places["ITEMS"] = tmp_path / "items.jsonl"
    flags = [os.fsdecode(flag) if isinstance(flag, bytes) else str(places.get(flag, flag)) for flag in flags]
    with pytest.raises(UserError) as caught:
        {"sample": sample, "loss": loss, "hellaswag": hellaswag, "export": export}[name].main(flags)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def sparse(weights: dict) -> None:
    weights["embed"] = weights["embed"].to_sparse()


def without_values(weights: dict) -> None:
    weights["embed"] = weights["embed"].to("meta")


def whole_numbers(weights: dict) -> None:
    weights["embed"] = weights["embed"].long()


def a_number_for_a_name(weights: dict) -> None:
    weights[7] = weights.pop("embed")


def no_window(weights: dict) -> None:
    weights["long_window"] = torch.zeros_like(weights["long_window"])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (sparse, "not those of its configuration .embed"),
        (without_values, "not those of its configuration .embed"),
        (whole_numbers, "not those of its configuration .embed"),
        (a_number_for_a_name, "have keys that are no names"),
        (no_window, "its long window is 0, which no run has at step 8"),
    ],
)
def test_weights_of_another_kind_are_refused(spoil, words, tmp_path, ranks):
    path = checkpoint(tmp_path, ranks)
    content = torch.load(path, weights_only=True)
    spoil(content["model"])
    torch.save(content, path)
    with pytest.raises(UserError, match=words):
        model.load(path)


@pytest.mark.parametrize("main", [loss.main, embeddings.main])
def test_a_bit_that_has_turned_in_a_checkpoint_is_noticed(main, tmp_path, ranks):
    path = checkpoint(tmp_path, ranks)
    data = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["model"]["embed"]
    data[data.index(weights.numpy().tobytes()[:64]) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="whole checkpoint"):
        main([str(path)])


def test_weights_so_large_that_losses_are_not_finite_are_named():
    it = trained(softcap=0.0)
    it.model.lm_head.fill_(3e38)
    with pytest.raises(UserError, match="made up: its losses are not finite"):
        it.losses(stream(50))


@pytest.mark.parametrize("where", [0, 1, 2])
def test_flags_may_stand_before_between_and_after(where):
    words = ["logs", "The king"]
    words[where:where] = ["--tokens", "5"]
    args = sample.parse(words)
    assert (str(args.checkpoint), args.prompt, args.tokens) == ("logs", "The king", 5)
    assert sample.parse(["logs", "--tokens", "5"]).prompt == ""


@pytest.mark.parametrize("program", [sample, loss, hellaswag, export, plan])
def test_help_does_not_need_docstrings(program, monkeypatch, capsys):
    """python -OO has none."""
    monkeypatch.setattr(program, "__doc__", None)
    with contextlib.suppress(SystemExit):
        program.main(["--help"])
    assert "usage: " in capsys.readouterr().out


def test_nothing_that_a_user_gives_is_checked_by_an_assertion():
    """python -O leaves assertions out. The one that is there is about our own logic."""
    found = []
    for file in (ROOT / "evals").glob("*.py"):
        tree = ast.parse(file.read_text())
        found += [file.name for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert found == ["kv_cache.py"]


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    failed = run_command([sys.executable, "-m", "evals.sample", tmp_path])
    assert_user_error(failed, "no checkpoint in this folder", "--save_every")


def test_a_command_runs_and_whoever_reads_it_may_leave(tmp_path, ranks):
    flags = f"{checkpoint(tmp_path, ranks)} --tokens 100 --samples 5 --temperature 3 --device cpu"
    done = run_command(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m evals.sample {flags} | head -c 16"]
    )
    assert (done.returncode, done.stderr, done.stdout) == (141, "", "--- sample 1 of ")


def test_importing_the_trainer_imports_none_of_these():
    assert not re.search(r"^(import|from) evals", tg.SOURCE, re.MULTILINE)


def test_the_readme_s_python_runs(tmp_path, ranks, monkeypatch, capsys):
    export.export(model.load(checkpoint(tmp_path, ranks), device="cpu"), tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    code = (ROOT / "evals" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("The king") and "likeliest next: '" in out and "nats a token: " in out
