"""Every configuration that the five seeds name, as flags on top of a preset.

`python -m records.ablate --list` prints them.

What no seed names and their questions need is here too: no value embeddings at all (002-none), and the
bigram table's forms.

A hypothesis is its seed's baseline (BASELINES) with what it changes. Its layers, the five topology strings,
are always those of the preset that the baseline names, 11 or 16; sizes, data and schedule come from the
preset that it is run on: `short`, `medium`, or `cpu`, which makes the layers thin. What is no flag is an
edit of train_gpt.py, as the seeds' authors did with branches: the run's log then holds the edited source. A
flag that train_gpt.py does not have is what a hypothesis `needs`.

Layers are written as in train_gpt.py, a character a layer. Seeds write the middle of a layout as three
dots: their `.01...345` is here `.01.....345`. Numbers in brackets are losses that the seed states, on eight
H100s.
"""

from dataclasses import dataclass, fields

import train_gpt as tg
from cli import need

TOPOLOGY = ("windows", "paired_heads", "value_embeds", "skips", "backout")


@dataclass(frozen=True)
class Baseline:
    preset: str  # whose layers it has
    steps: int  # that its seed ran it for
    flags: dict


BASELINES = {
    # One table a place (seed 002), from the first layer on: it moves "VEs in block 1". Zero at first.
    "000": Baseline(
        "short", 1555, dict(value_embeds="01......234", value_embed_std=0.0, ve_chunk="0:12", ve_own_dims=0)
    ),
    # Every gate on the first twelve dimensions; the first table used once.
    "001": Baseline(
        "short",
        1840,
        dict(
            value_embeds=".12.....012",
            value_embed_std=0.0,
            ve_own_dims=0,
            smear_chunk="0:12",
            skip_chunk="0:12",
            attn_chunk="0:12",
            ve_chunk="0:12",
        ),
    ),
    # Seed 001's gates.
    "002": Baseline(
        "short", 1600, dict(value_embeds=".12.....012", value_embed_std=0.0, ve_chunk="18:30", ve_own_dims=0)
    ),
    "003": Baseline(
        "medium-2025", 6000, dict(value_embeds="012..........012", extra_inputs=0, value_embed_std=0.0)
    ),
    "004": Baseline("medium-2025", 6000, dict(extra_inputs=0)),
    "bigram": Baseline("short", 1547, {}),  # of no seed: `short` as it is
    "cpu": Baseline("cpu", 163, dict(bigram_signs=8192)),  # of no seed: the preset itself
}


@dataclass(frozen=True)
class Hypothesis:
    name: str  # seed-name
    says: str
    flags: dict  # beyond the baseline's
    steps: int | None = None  # where the seed ran it for another number than the baseline
    edits: tuple = ()  # (old, new) texts of train_gpt.py, each old one there once

    @property
    def seed(self) -> str:
        return self.name.partition("-")[0]

    @property
    def needs(self) -> list[str]:
        """Flags that train_gpt.py does not have."""
        known = {field.name for field in fields(tg.Config)}
        return sorted(set(self.flags) - known)


def h(name: str, says: str, steps: int | None = None, edits: tuple = (), **flags) -> Hypothesis:
    return Hypothesis(name, says, flags, steps, edits)


def after(line: str, *more: str) -> tuple[str, str]:
    """An edit: lines behind a line."""
    return line + "\n", "\n".join([line, *more, ""])


# RMS norm of x - mean(x), wherever train_gpt.py norms.
CENTRED_NORM = (
    (
        "    return F.rms_norm(x, (x.size(-1),))",
        "    return F.rms_norm(x - x.mean(-1, keepdim=True), (x.size(-1),))",
    ),
)

# 2410.07799: attention less the plain mean of the values in sight, which is attention with queries of zeros.
CENTRED_ATTENTION = (
    after(
        "    y = attention(q, k, v, p.first_key, p.window, p.softmax_scale)",
        "    still = torch.zeros_like(q)",
        "    mean = attention(still, k, v, p.first_key, p.window, p.softmax_scale)",
        "    y = y - mean",
    ),
)

# Value embeddings for the first 80 % of the vocabulary: a BPE's ids are in the order of its merges,
# the commonest first.
COMMON_TOKENS = (
    after(
        '            values[name] = look_up(getattr(self, f"value_embed_{name}"), tokens, order)',
        "            values[name] = values[name] * (tokens < 0.8 * self.cfg.vocab_size)[:, None]",
    ),
)


# q and k of three quarters of a head's dimensions, rotary pairs and others alike, as if there were no more.
NARROW_QK = (
    (
        "        q, k = norm(q), norm(k)\n",
        "        kept = torch.arange(q.size(-1), device=q.device) % 16 < 12\n"
        "        q, k = (0.75**0.5 * norm(kept * t) for t in (q, k))\n",
    ),
)


def value_embed_decay(times: float) -> tuple:
    """Weight decay of the value embeddings, in Adam's, 5 in train_gpt.py."""
    start = "init=normal(cfg.value_embed_std), **"
    return ((f"{start}table)", f"{start}(table | dict(wd={times})))"),)


def qk_clip(tau: float) -> tuple:
    """QK-Clip (2507.20534): after a step in which a head's largest logit was above tau, q and k shrink to it.

    The factor stands on q and k themselves: behind QK norm one on their matrices would do nothing. The
    largest logit is the mean over micro-batches of that of 256 queries with all keys, so that it is the
    same on any number of ranks.
    """
    return (
        after(
            '        self.register_buffer("long_window", torch.tensor(cfg.stages[0].windows[1]))',
            "        heads = (len(self.layers), cfg.num_heads, 1)",
            '        self.register_buffer("qk_factor", torch.ones(heads))',
            '        self.register_buffer("top_logit", torch.zeros(heads), persistent=False)',
        ),
        after(
            "        weights = [LayerWeights() for _ in self.layers]",
            "        for w, factor, top in zip(weights, self.qk_factor, self.top_logit, strict=True):",
            "            w.qk_factor, w.top_logit = factor, top",
        ),
        after(
            "        qkv = self.project_qkv(n, w.qkvo, w.qkv_scale, cfg.head_dim)  # (T, 3, H, d)",
            "        q, k, v = qkv.unbind(1)",
            "        q, k = (norm(t) * w.qk_factor.to(t.dtype) for t in (q, k))",
            "        qkv = torch.stack((q, k, v), dim=1)",
            "        if torch.is_grad_enabled():",
            "            few = q.detach()[:: max(1, len(q) // 256)].transpose(0, 1)",
            "            top = (few @ k.detach().permute(1, 2, 0)).amax((1, 2)).float()",
            "            w.top_logit += (self.softmax_scale * top)[:, None]",
        ),
        ("value, positions, cfg.qk_norm,", "value, positions, False,"),  # normed above
        (
            "        self.graphs.run(kind, lambda: self.accumulate_gradients(sequences, *kind[1:]))",
            "        self.model.top_logit.zero_()\n"
            "        self.graphs.run(kind, lambda: self.accumulate_gradients(sequences, *kind[1:]))",
        ),
        after(
            "        self.flops += batch.flops * self.env.world_size",
            "        wait = self.env.all_reduce(self.model.top_logit.clone())",
            "        top = wait() / self.cfg.micro_batches",
            f"        self.model.qk_factor.mul_(({tau} / top.clamp_min(1e-6)).clamp_max(1).sqrt())",
        ),
    )


GATES_001 = dict(smear_chunk="0:12", skip_chunk="6:18", attn_chunk="18:30", ve_chunk="18:30")
KEPT_000 = dict(value_embed_std=0.01, ve_chunk="0:6", ve_own_dims=6, value_embeds=".01.....234")

HYPOTHESES = (
    # Seed 000: init, gate and layout of the value embeddings. H1, H2 and H4 were kept.
    h("000-H0", "origin/master"),
    h("000-H1", "tables start normal, std 0.01", value_embed_std=0.01),
    h(
        "000-H2",
        "gate reads half the stream, half the value embedding: g(x[:6] + ve[:6])",
        ve_chunk="0:6",
        ve_own_dims=6,
    ),
    h("000-H3", "RMS norm with the mean subtracted (3.2796)", edits=CENTRED_NORM),
    h("000-H4", "first tables one layer later", value_embeds=".01.....234"),
    h("000-H5", "first tables two layers later", value_embeds="..01....234"),
    h("000-H6", "last tables one layer earlier: pulled back (3.2986)", value_embeds="01.....234."),
    h("000-kept", "H1, H2 and H4 together: the record", **KEPT_000),
    h("000-gate-24", "the gate twice as wide: g(x[:12] + ve[:12])", ve_chunk="0:12", ve_own_dims=12),
    h("000-six", "six tables", value_embeds="012.....345"),
    h(
        "000-six-common",
        "six tables, for the 80 % commonest tokens only (3.9)",  # of the vocabulary, not of the text
        value_embeds="012.....345",
        edits=COMMON_TOKENS,
    ),
    h("000-std-0.02", "tables start at std 0.02 (3.2815)", value_embed_std=0.02),
    h("000-std-0.005", "tables start at std 0.005 (3.2812)", value_embed_std=0.005),
    # Embedding and head.
    h("000-untie-500", "untied earlier, at step 500 of 1555 (3.3072)", untie_share=500 / 1555),
    h(
        "000-wd-2.5",
        "weight decay of the value embeddings 2.5 times Adam's (3.2779)",
        edits=value_embed_decay(2.5),
    ),
    h("000-wd-0", "value embeddings without weight decay (3.2818)", edits=value_embed_decay(0.0)),
    h(
        "000-centred-attention",
        "attention less its uniform part, 2410.07799 (3.2818)",
        edits=CENTRED_ATTENTION,
    ),
    h("000-qk-clip-1", "QK-Clip, 2507.20534, tau 1 (3.35)", edits=qk_clip(1.0)),
    h("000-qk-clip-10", "QK-Clip, tau 10 (3.32)", edits=qk_clip(10.0)),
    h("000-1550", "kept, 5 steps fewer", 1550, **KEPT_000),
    h("000-1547", "kept, 8 steps fewer: the record as it was timed", 1547, **KEPT_000),
    h("000-1545", "kept, 10 steps fewer", 1545, **KEPT_000),
    h("000-1540", "kept, 15 steps fewer", 1540, **KEPT_000),
    h("000-1535", "kept, 20 steps fewer", 1535, **KEPT_000),
    # Seed 001: what the gates read, and the first table used twice.
    h("001-H0", "every gate reads dimensions 0 to 12, layout .12.....012"),
    h("001-gates", "each gate its own chunk, with a little overlap", **GATES_001),
    h("001-layout", "the first table also in the first layer", value_embeds="012.....012"),
    h("001-both", "gates and layout", value_embeds="012.....012", **GATES_001),
    h(
        "001-1825",
        "gates and layout, 15 steps fewer: the record",
        1825,
        value_embeds="012.....012",
        **GATES_001,
    ),
    h(
        "001-disjoint",
        "chunks without overlap, the other end of the seed's unsearched grid",
        value_embeds="012.....012",
        smear_chunk="0:12",
        skip_chunk="12:24",
        attn_chunk="24:36",
        ve_chunk="36:48",
    ),
    # Seed 002: one table a place.
    h("002-H0", "three tables, .12.....012"),
    h("002-H1", "untied: one table a place, 25 steps fewer", 1575, value_embeds=".01.....345"),
    h("002-untied", "untied, in as many steps", value_embeds=".01.....345"),
    h("002-tied-more", "the same three tables in one more layer", value_embeds="012.....012"),
    h("002-fewer", "two tables, tied", value_embeds="01.......01"),
    h("002-other-layers", "two tables, tied, on other layers", value_embeds=".01.....01."),
    h("002-none", "no value embedding at all, to see what any is worth", value_embeds="..........."),
    h("002-all", "a table in every layer that attends", value_embeds="012345.6789"),
    # Seed 003, 16 layers; there is no attention in layer 7, so the eighth table has its second place only.
    h("003-3", "baseline: three tables, each in one of the first and one of the last layers"),
    h("003-4", "one table added", value_embeds="0123........0123"),
    h("003-5", "two added: best per time", value_embeds="01234......01234"),
    h("003-6", "three added", value_embeds="012345....012345"),
    h("003-7", "four added", value_embeds="0123456..0123456"),
    h("003-8", "five added", value_embeds="0123456.01234567"),
    h(
        "003-no-0",
        "removed from layer 0 alone; worst to best: 2, 13, 14, 15, 0, 1",
        value_embeds=".12..........012",
    ),
    h("003-no-1", "removed from layer 1", value_embeds="0.2..........012"),
    h("003-no-2", "removed from layer 2", value_embeds="01...........012"),
    h("003-no-13", "removed from layer 13", value_embeds="012...........12"),
    h("003-no-14", "removed from layer 14", value_embeds="012..........0.2"),
    h("003-no-15", "removed from layer 15", value_embeds="012..........01."),
    h("003-no-0-1", "removed from layers 0 and 1", value_embeds="..2..........012"),
    h("003-no-0-1-2", "removed from layers 0, 1 and 2", value_embeds=".............012"),
    h("003-no-0-13", "a whole table removed: layers 0 and 13", value_embeds=".12...........12"),
    h("003-no-1-14", "a whole table removed: layers 1 and 14", value_embeds="0.2..........0.2"),
    h("003-no-2-15", "a whole table removed: layers 2 and 15", value_embeds="01...........01."),
    h("003-no-0-14", "named as the better comparison, not run there", value_embeds=".12..........0.2"),
    h("003-no-1-13", "named as the better comparison, not run there", value_embeds="0.2...........12"),
    h("003-shift-1", "early places shifted to layers 1, 2, 3", value_embeds=".012.........012"),
    h("003-shift-2", "early places shifted to layers 2, 3, 4", value_embeds="..012........012"),
    h("003-two-by-two", "two tables, shared by neighbours: 0, 1 and 14, 15", value_embeds="00............11"),
    h(
        "003-two-by-three",
        "two tables, shared by neighbours: 0 to 2 and 13 to 15",
        value_embeds="000..........111",
    ),
    # Seed 004: further embeddings of the token added to the stream before every layer.
    h("004-x00", "baseline: x0 alone"),
    h("004-x01", "one added embedding", extra_inputs=1),
    h("004-x02", "two", extra_inputs=2),
    h("004-x03", "three", extra_inputs=3),
    h("004-x04", "four", extra_inputs=4),
    # The table of hashed pairs of tokens.
    h("bigram-none", "no table", bigram_rows=0),
    h("bigram-plain", "a row a pair, by hash: as `short` has it"),
    h("bigram-signs", "with the sign trick: pairs that share a row can be told apart", bigram_signs=8192),
    h("bigram-by-row", "rows count their own steps", bigram_by_row=True),
    h("bigram-triples", "triples of tokens in it, too, and twice the rows", ngrams=3, bigram_rows=10),
    # The cpu preset: the seeds' questions at its size, then each of its features taken away alone.
    h("cpu-H0", "the preset: value embeddings in U-Net form, std 0.01"),
    h("cpu-80", "the preset, 80 % of its steps", 130),
    h("cpu-90", "the preset, 90 % of its steps", 147),
    h("cpu-110", "the preset, 110 % of its steps", 179),
    h("cpu-ve-none", "no value embeddings", value_embeds="...."),
    h("cpu-ve-untied", "a table of its own for the last layer", value_embeds="01.2"),
    h(
        "cpu-ve-shifted",
        "the first table's early place moved to the next layer, seed 000",
        value_embeds=".1.0",
    ),
    h("cpu-ve-one", "one table, in the second layer and the last", value_embeds=".0.0"),
    h("cpu-ve-second", "U-Net form from the second layer on", value_embeds=".010"),
    h("cpu-ve-std0", "value embeddings begin at 0", value_embed_std=0.0),
    h("cpu-ve-std02", "value embeddings begin twice as large", value_embed_std=0.02),
    h(
        "cpu-gates-first",
        "every gate reads the first twelve dimensions",
        skip_chunk="0:12",
        attn_chunk="0:12",
        ve_chunk="0:12",
        ve_own_dims=0,
    ),
    h("cpu-gates-overlap", "seed 001's chunks, which overlap", ve_chunk="18:30", ve_own_dims=0),
    h(
        "cpu-gates-disjoint",
        "a chunk of its own for every gate",
        skip_chunk="12:24",
        attn_chunk="24:36",
        ve_chunk="36:48",
        ve_own_dims=0,
    ),
    h("cpu-bigram-none", "no bigram table", bigram_rows=0),
    h("cpu-bigram-plain", "no signs: pairs that share a row cannot be told apart", bigram_signs=0),
    h("cpu-bigram-80", "half of the bigram table's rows", bigram_rows=80),
    h("cpu-bigram-20", "an eighth of them", bigram_rows=20),
    h("cpu-bigram-320", "twice as many", bigram_rows=320),
    h(
        "cpu-bigram-zeros",
        "the table starts at zeros, its rate five times as high",
        ngram_start=0.0,
        bigram_lr=150.0,
    ),
    h("cpu-pairs", "pairs of tokens alone in it", ngrams=2),
    h("cpu-no-copy", "attention starts at random", copy_start=False),
    h("cpu-silent-copy", "attention starts out copying, its values at random", copy_values=0.0),
    h("cpu-inputs-1", "one further input embedding, seed 004", extra_inputs=1),
    h("cpu-inputs-2", "two", extra_inputs=2),
    h("cpu-no-short", "every window is the long one", windows="llll"),
    h("cpu-no-paired", "no paired heads", paired_heads="...."),
    h("cpu-no-key-offset", "keys that come from their own token alone", key_offset=False),
    h("cpu-no-smear", "no smear", smear_chunk=""),
    h("cpu-no-attn-gate", "attention's output passes whole", attn_chunk=""),
    h("cpu-no-ve-gate", "value embeddings pass whole", ve_chunk="", ve_own_dims=0),
    h("cpu-no-skip", "no skip", skips="...."),
    h("cpu-skip-second", "the skip begins behind the second layer", skips=".a.a"),
    h("cpu-no-skip-gate", "the skip keeps its scalar alone", skip_chunk=""),
    h("cpu-no-backout", "no backout", backout="...."),
    h("cpu-gelu", "GELU for ReLU²", activation="gelu"),
    h("cpu-no-qk-norm", "no QK norm: logits over the root of the width", qk_norm=False, softmax_scale=0.125),
    h("cpu-cap", "logits with a cap, as in `short`", softcap=23.0),
    h("cpu-momentum", "the bigram table's Adam with momentum, on all rows", bigram_by_row=False),
    h(
        "cpu-random",
        "embed and lm_head start at random, and are one for two thirds of the run",
        spectral=0.0,
        embed_std=0.005,
        untie_share=2 / 3,
        bigram_lr=150.0,
    ),
    # And what later public records added.
    h("cpu-no-mudd", "no dense connections into the last layer", mudd_layers=0),
    h("cpu-final-lr-10", "the rate ends at a tenth, as in `short`", final_lr=0.1),
    h("cpu-exclusive", "exclusive attention", exclusive=True),
    h("cpu-narrow-qk", "q and k of 48 of a head's 64 dimensions (takes as long here)", edits=NARROW_QK),
    h("cpu-muon-heads", "Muon on q and k by heads", muon_heads=1),
    h("cpu-ema", "a moving average of weights", ema_rate=0.02),
    h("cpu-ema-11", "a moving average over about 11 steps, not 50", ema_rate=0.09),
    h("cpu-prefix", "a loss on prefixes", prefix_weight=0.25),
    h("cpu-sampled", "the softmax over a sample of half of the vocabulary", sampled_vocab=2048),
    h("cpu-sampled-1024", "of a quarter", sampled_vocab=1024),
)


def find(names: list[str]) -> list[Hypothesis]:
    """By name, seed ("003") or beginning ("003-no-"), in the table's order for each. UserError if none."""
    found: list[Hypothesis] = []
    for name in names:
        exact = [one for one in HYPOTHESES if one.name == name]
        some = exact or [
            one for one in HYPOTHESES if one.name.startswith(name if name.endswith("-") else name + "-")
        ]
        need(some, f"{name}: no such hypothesis; --list shows them all")
        found += [one for one in some if one not in found]
    return found


def flags_on(one: Hypothesis, preset: str, num_steps: int | None = None) -> dict:
    """What differs from `preset` when the hypothesis runs on it: its baseline's layers and flags, its own.

    num_steps: the baseline's; by default the seed's on the preset whose layers it has, on another that
    preset's own. A hypothesis with another number of steps keeps its proportion to them. Where num_steps is
    given, momentum warms up and cools down for the same share of the run as in the preset.
    """
    need(preset in tg.PRESETS, f"--on {preset}: choose from {', '.join(tg.PRESETS)}")
    baseline, sizes = BASELINES[one.seed], tg.PRESETS[preset]
    layers = {name: getattr(tg.PRESETS[baseline.preset], name) for name in TOPOLOGY}
    base = num_steps or (baseline.steps if preset == baseline.preset else sizes.num_steps)
    steps = round(base * (one.steps or baseline.steps) / baseline.steps)
    # Signs came after the seeds.
    wanted = layers | {"num_steps": steps, "bigram_signs": 0} | baseline.flags | one.flags
    for name in ("momentum_warmup", "momentum_cooldown") if num_steps else ():
        wanted.setdefault(name, round(getattr(sizes, name) * steps / sizes.num_steps))
    if wanted.get("untie_share"):
        wanted["spectral"] = 0.0  # what starts as one cannot start from counts
    return {name: value for name, value in wanted.items() if getattr(sizes, name, None) != value}


def source_of(one: Hypothesis, source: str) -> str:
    """train_gpt.py's source with the hypothesis's edits. UserError if one does not fit."""
    for old, new in one.edits:
        need(
            source.count(old) == 1,
            f"{one.name}: its edit of train_gpt.py does not fit any more, at {old.strip()!r}",
        )
        source = source.replace(old, new)
    return source
