"""The schedule at steps worked out by hand; the command line: presets, overrides, values refused."""

import math
import re
from dataclasses import fields, replace
from itertools import pairwise

import pytest
from conftest import ROOT, tiny

import train_gpt as tg
from data.prepare import tokens_needed

# The schedule: pure functions of the step


def short(**changes) -> tg.Schedule:
    return tg.Schedule(replace(tg.PRESETS["short"], **changes))


def test_short_has_1507_scheduled_steps_and_an_extension_of_40():
    cfg = tg.PRESETS["short"]
    assert (cfg.num_steps, cfg.scheduled_steps) == (1547, 1507)


@pytest.mark.parametrize(
    "step, stage",
    [(0, 0), (501, 0), (502, 1), (1004, 1), (1005, 2), (1506, 2), (1507, 3), (1546, 3), (1547, 3)],
)
def test_each_stage_of_short_is_a_third_of_the_scheduled_steps(step, stage):
    schedule = short()  # 1507 / 3 = 502.3, 2 x 1507 / 3 = 1004.7
    assert schedule.stage_index(step) == stage
    assert schedule.stage(step) is schedule.cfg.stages[stage]


@pytest.mark.parametrize(
    "step, batch, windows, max_doc_len",
    [
        (0, 131072, (128, 384), 2048),
        (502, 262144, (384, 896), 2048),
        (1005, 393216, (640, 1408), 2048),
        (1507, 393216, (768, 1664), 2048),
        (1546, 393216, (768, 1664), 2048),
    ],
)
def test_the_stages_of_short_are_those_of_the_description(step, batch, windows, max_doc_len):
    stage = short().stage(step)
    assert (stage.batch_tokens, stage.max_doc_len) == (batch, max_doc_len)
    assert short().windows(step) == short().val_windows(step) == windows


def test_only_the_validation_after_the_last_step_looks_further():
    assert short().val_windows(1546) == (768, 1664)
    assert short().val_windows(1547) == (768, 2560)
    assert short(final_long_window=4000).val_windows(1547) == (768, 4000)
    assert short().windows(1547) == (768, 1664)  # what the model was trained with
    assert short().val_windows(502) == (384, 896)  # before a stage's first step: that stage's own


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 1.0),
        (501, 1.0),  # flat, stage 1
        (502, 1.52),
        (678, 1.52),  # 45 % of 1507 is 678.15: the line to 0.1 begins at 678 and is 829 steps long
        (679, 1.52 - 1.42 / 829),
        (1000, 1.52 - 1.42 * 322 / 829),
        (1004, 1.52 - 1.42 * 326 / 829),
        (1005, 1.73 - 1.63 * 327 / 829),  # the next stage's multiplier, on the way down
        (1506, 1.73 - 1.63 * 828 / 829),
        (1507, 0.1),
        (1530, 0.1),
        (1546, 0.1),
    ],
)
def test_learning_rate_of_short(step, expected):
    assert short().lr_mul(step) == pytest.approx(expected, abs=1e-12)


def test_learning_rate_of_short_in_digits():
    """The same line, worked out once on paper."""
    digits = {679: "1.518287", 1000: "0.968444", 1005: "1.087045", 1506: "0.101966"}
    assert {step: f"{short().lr_mul(step):.6f}" for step in digits} == digits


def test_learning_rate_ends_at_final_lr_and_stays_flat_without_a_cooldown():
    assert short(final_lr=0.15).lr_mul(1507) == pytest.approx(0.15)
    for share in (0.0, 1e-18):  # the second is lost in 1 - 1e-18
        assert [short(cooldown_share=share).lr_mul(step) for step in (0, 700, 1506, 1507)] == [
            1.0,
            1.52,
            1.73,
            1.73,
        ]
    assert short(cooldown_share=1.0).lr_mul(0) == 1.0


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.85),
        (150, 0.90),
        (300, 0.95),
        (301, 0.95),
        (1497, 0.95),
        (1498, 0.948),
        (1522, 0.90),
        (1546, 0.852),
    ],
)
def test_momentum_of_short(step, expected):
    assert short().momentum(step) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, (1.0, 0.5, 0.25)),
        (251, (1.0, 0.5, 0.125)),
        (501, (1.0, 0.5, 0.25 / 502)),
        (502, (1.0, 0.5, 0.0)),
        (753, (1.0, 0.5 - 0.5 * 251 / 503, 0.0)),
        (1004, (1.0, 0.5 / 503, 0.0)),
        (1005, (1.0, 0.0, 0.0)),
        (1507, (1.0, 0.0, 0.0)),
        (1546, (1.0, 0.0, 0.0)),
    ],
)
def test_weights_of_the_next_tokens_of_short(step, expected):
    assert short().predict(step) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("max_predict, count", [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_there_are_always_as_many_weights(max_predict, count):
    schedule = short(max_predict=max_predict)
    assert {len(schedule.predict(step)) for step in range(1547)} == {count}
    assert all(schedule.predict(step)[0] == 1.0 for step in range(1547))


def test_the_loss_on_prefixes_has_the_last_weight_which_falls_to_nothing():
    schedule, without = short(prefix_weight=0.25), short()
    for step in (0, 700, 1546):
        *others, last = schedule.predict(step)
        assert tuple(others) == without.predict(step) and last == pytest.approx(0.25 * (1 - step / 1547))


# Of as many tokens as there are, or more, none are sampled.
@pytest.mark.parametrize("count, last", [(0, 0), (128, 1402), (50_432, 0)])
def test_the_softmax_is_sampled_up_to_its_share_of_the_schedule(count, last):
    schedule = tg.Schedule(replace(tg.PRESETS["short"], sampled_vocab=count))
    sampled = [step for step in range(1547) if schedule.candidates(step)]
    assert sampled == list(range(last)) and {schedule.candidates(step) for step in sampled} <= {count}
    cuts = [502, 1005, 1507] + [last] * (last > 0)
    assert schedule.spans == list(pairwise([0, *sorted(cuts), 1547]))


def test_untie_step_of_short_is_odd_and_at_two_thirds():
    assert short().untie_step == 1005  # 1004.7 rounded up is odd already
    assert short(num_steps=1546).untie_step == 1005  # 2 / 3 x 1506 is 1004, even: one later


# medium: 4,700 scheduled steps, of which a twelfth is 391.67, and 40 more at the final settings. Stage k
# begins at the first step in its twelfth, ceil(4700 k / 12). Windows in blocks of 128: (first step, tokens a
# step, short, long, multiplier).
MEDIUM_STAGES = [
    (0, 131072, 1, 3, 1.0),
    (392, 262144, 3, 7, 1.52),
    (784, 393216, 5, 11, 1.73),
    (1175, 524288, 6, 13, 2.0),
    (1567, 524288, 7, 15, 2.0),
    (1959, 524288, 8, 17, 2.0),
    (2350, 524288, 9, 19, 2.0),
    (2742, 524288, 10, 21, 2.0),
    (3134, 524288, 11, 23, 2.0),
    (3525, 524288, 11, 23, 2.0),
    (3917, 524288, 11, 23, 2.0),
    (4309, 524288, 11, 23, 2.0),
    (4700, 524288, 11, 23, 2.0),
]


def medium(**changes) -> tg.Schedule:
    return tg.Schedule(replace(tg.PRESETS["medium"], **changes))


def test_the_stages_of_medium():
    schedule, begins = medium(), [row[0] for row in MEDIUM_STAGES]
    assert (schedule.cfg.num_steps, schedule.cfg.scheduled_steps) == (4740, 4700)
    assert schedule.ends == [*begins[1:], 4740]
    for (begin, tokens, short_blocks, long_blocks, _), end in zip(MEDIUM_STAGES, schedule.ends, strict=True):
        for step in (begin, end - 1):
            stage = schedule.stage(step)
            assert (stage.batch_tokens, stage.max_doc_len) == (tokens, 4096)
            assert schedule.windows(step) == (128 * short_blocks, 128 * long_blocks)
            assert schedule.val_windows(step) == schedule.windows(step)
    assert schedule.windows(4740) == (11 * 128, 23 * 128)
    assert schedule.val_windows(4740) == (11 * 128, 27 * 128)


@pytest.mark.parametrize(
    "step, expected",
    [  # flat to int(4700 x 0.3) = 1410, then a line of 3,290 steps to 0.1
        *[(begin, mul) for begin, _, _, _, mul in MEDIUM_STAGES if begin <= 1410],
        (391, 1.0),
        (783, 1.52),
        (1174, 1.73),
        (1410, 2.0),
        (1411, 2.0 - 1.9 / 3290),
        (1566, 2.0 - 1.9 * 156 / 3290),
        (1567, 2.0 - 1.9 * 157 / 3290),
        (3055, 1.05),  # half way
        (4699, 2.0 - 1.9 * 3289 / 3290),
        (4700, 0.1),
        (4739, 0.1),
    ],
)
def test_learning_rate_of_medium(step, expected):
    assert medium().lr_mul(step) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "step, expected",
    [  # stages of 392, 392 and 391 steps
        (0, (1.0, 0.5, 0.25)),
        (196, (1.0, 0.5, 0.125)),
        (391, (1.0, 0.5, 0.25 / 392)),
        (392, (1.0, 0.5, 0.0)),
        (588, (1.0, 0.25, 0.0)),
        (783, (1.0, 0.5 / 392, 0.0)),
        (784, (1.0, 0.0, 0.0)),
        (1174, (1.0, 0.0, 0.0)),
        (4739, (1.0, 0.0, 0.0)),
    ],
)
def test_weights_of_the_next_tokens_of_medium(step, expected):
    assert medium().predict(step) == pytest.approx(expected, abs=1e-12)


def test_momentum_of_medium():
    momenta = {0: 0.85, 150: 0.90, 300: 0.95, 4690: 0.95, 4715: 0.90, 4739: 0.852}
    assert {step: medium().momentum(step) for step in momenta} == pytest.approx(momenta, abs=1e-12)


def test_embedding_and_head_of_medium_part_at_step_785():
    assert medium().untie_step == 785  # a sixth of 4,700 is 783.3, the next odd step after 784


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 2 / 3, 0.9])
def test_untie_step_is_the_first_of_adams_from_its_share_on(share, every):
    for num_steps in range(1, 60):
        cfg = tiny(num_steps=num_steps, untie_share=share, adam_every=every)
        step = tg.Schedule(cfg).untie_step
        assert (
            step + 1
        ) % every == 0 and share * cfg.scheduled_steps <= step + 1e-9 < share * cfg.scheduled_steps + every


@pytest.mark.parametrize("extension_share", [0.0, 0.3])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 8, 20])
def test_untie_share_1_never_comes_not_even_in_the_extension(num_steps, extension_share):
    cfg = tiny(num_steps=num_steps, untie_share=1.0, extension_share=extension_share)
    assert tg.Schedule(cfg).untie_step >= num_steps


@pytest.mark.parametrize(
    "step, stage, lr, momentum, predict",
    [  # the line begins at int(120 x 0.45) = 53, as 1 - 0.55 is 0.44999... in floating point; 67 steps long
        (0, 0, 1.0, 0.85, (1.0, 0.5)),
        (30, 0, 1.0, 0.90, (1.0, 0.25)),
        (53, 0, 1.0, 0.85 + 0.1 * 53 / 60, (1.0, 0.5 * 7 / 60)),
        (54, 0, 1.0 - 0.9 / 67, 0.94, (1.0, 0.05)),
        (60, 1, 1.0 - 0.9 * 7 / 67, 0.95, (1.0, 0.0)),
        (87, 1, 1.0 - 0.9 * 34 / 67, 0.95, (1.0, 0.0)),
        (100, 1, None, 0.95, (1.0, 0.0)),
        (110, 1, None, 0.90, (1.0, 0.0)),
        (119, 1, None, 0.855, (1.0, 0.0)),
        (120, 1, 0.1, 0.85, None),
    ],
)
def test_a_schedule_of_120_steps_on_a_cpu(step, stage, lr, momentum, predict):
    """The cpu preset's shape, its figures spelled out: tuning the preset does not change what is tested."""
    sizes = dict(batch_tokens=8192, windows=(128, 512), max_doc_len=1024, lr_mul=1.0)
    stages = (tg.Stage(until=0.5, predict=((1.0, 1.0), (0.5, 0.0)), **sizes), tg.Stage(until=2.0, **sizes))
    schedule = tg.Schedule(
        replace(
            tg.PRESETS["cpu"],
            stages=stages,
            num_steps=120,
            extension_share=0.0,
            momentum_warmup=60,
            momentum_cooldown=20,
            momentum_min=0.85,
            momentum_max=0.95,
            cooldown_share=0.55,
            final_lr=0.1,
            untie_share=2 / 3,
            max_predict=3,
            adam_every=2,
        )
    )
    assert schedule.untie_step == 81 and schedule.stage_index(step) == stage
    assert schedule.momentum(step) == pytest.approx(momentum)
    assert lr is None or schedule.lr_mul(step) == pytest.approx(lr)
    assert predict is None or schedule.predict(step) == pytest.approx(predict)


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_every_preset_has_a_schedule_that_makes_sense(preset):
    cfg = tg.PRESETS[preset]
    schedule, steps = tg.Schedule(cfg), range(cfg.num_steps)
    indices = [schedule.stage_index(step) for step in steps]
    # Every row is used, in order.
    assert indices == sorted(indices) and set(indices) == set(range(len(cfg.stages)))
    assert all(
        cfg.final_lr <= schedule.lr_mul(step) <= max(stage.lr_mul for stage in cfg.stages) for step in steps
    )
    assert all(cfg.momentum_min <= schedule.momentum(step) <= cfg.momentum_max for step in steps)
    assert schedule.lr_mul(0) == cfg.stages[0].lr_mul and schedule.lr_mul(cfg.num_steps) == pytest.approx(
        cfg.final_lr
    )
    assert schedule.momentum(0) == cfg.momentum_min
    between = range(cfg.momentum_warmup, cfg.num_steps - cfg.momentum_cooldown + 1)
    assert between and all(schedule.momentum(step) == pytest.approx(cfg.momentum_max) for step in between)
    trained, last = schedule.windows(cfg.num_steps - 1), schedule.val_windows(cfg.num_steps)
    assert schedule.windows(cfg.num_steps) == trained
    assert last == (trained[0], cfg.final_long_window) and last[1] >= trained[1]


@pytest.mark.parametrize(
    "num_steps, batches", [(1, [262144]), (2, [131072, 393216]), (3, [131072, 262144, 393216])]
)
def test_runs_of_very_few_steps(num_steps, batches):
    schedule = short(num_steps=num_steps)
    steps = range(num_steps + 1)
    assert [schedule.stage(step).batch_tokens for step in range(num_steps)] == batches
    for step in steps:
        assert math.isfinite(schedule.lr_mul(step)) and 0.85 <= schedule.momentum(step) <= 0.95
        assert len(schedule.predict(step)) == 3 and schedule.untie_step % 2 == 1
    assert schedule.lr_mul(0) >= 1.0 and schedule.val_windows(num_steps) == (768, 2560)


@pytest.mark.parametrize(
    "preset, changes, tokens",
    [
        ("short", {}, 502 * 131072 + 503 * 262144 + 542 * 393216),
        ("short", {"num_steps": 1}, 262144),
        ("short", {"num_steps": 2, "micro_batches": 16}, 131072 + 393216),
        ("one-gpu", {}, 502 * 131072 + 503 * 262144 + 542 * 393216),
        ("medium", {}, 392 * 131072 + 392 * 262144 + 391 * 393216 + 3565 * 524288),
        ("cpu", {"num_steps": 10, "stages": (tg.Stage(2.0, 4096, (64, 64), 512, 1.0),)}, 40960),
    ],
)
def test_tokens_needed(preset, changes, tokens):
    assert tokens_needed(replace(tg.PRESETS[preset], **changes)) == tokens


# docs/model.md


DESCRIBED = ("short", "medium", "cpu")


def constants() -> dict[str, tuple[str, ...]]:
    """Field -> the values of DESCRIBED in the table in docs/model.md."""
    text = (ROOT / "docs" / "model.md").read_text().split("### Constants")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.+)\|$", text, re.MULTILINE)
    return {field: tuple(value.strip() for value in values.split("|")) for field, values in rows}


def test_the_description_s_constants_are_those_of_the_presets():
    for field, texts in constants().items():
        for name, text in zip(DESCRIBED, texts, strict=True):
            value = getattr(tg.PRESETS[name], field)
            read = {bool: {"yes": True, "no": False}.get, str: str}.get(type(value), float)
            assert value == read(text), (name, field)


def test_the_description_has_every_number_in_which_its_presets_differ():
    presets = [tg.PRESETS[name] for name in DESCRIBED]
    layers = {"preset", "stages", "windows", "paired_heads", "value_embeds", "skips", "backout"}
    elsewhere = {"extension_share", "untie_share", "fp8_head", "bos_id"}  # in words
    machine = {"data_dir", "device", "save_every"}
    differing = {f.name for f in fields(tg.Config) if len({getattr(p, f.name) for p in presets}) > 1}
    assert differing - layers - elsewhere - machine <= set(constants())


def test_the_description_s_table_of_cpu_is_its_schedule():
    text = (ROOT / "docs" / "model.md").read_text().split("### `cpu`")[1].split("\n### ")[0]
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| (\d+), (\d+) \|$", text, re.MULTILINE)
    cfg = tg.PRESETS["cpu"]
    schedule = tg.Schedule(cfg)
    assert [int(row[0]) for row in rows] == [begin for begin, _ in schedule.spans]
    for step, tokens, short_window, long_window in rows:
        assert schedule.stage(int(step)).batch_tokens == int(tokens.replace(",", ""))
        assert schedule.windows(int(step)) == (int(short_window), int(long_window))
    decay = next(step for step in range(cfg.num_steps) if schedule.lr_mul(step + 1) < schedule.lr_mul(step))
    assert f"its line begins at step {decay}." in text and f"\n{cfg.num_steps} steps," in text


# The command line


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_a_preset_passes_without_overrides(preset):
    cfg, overrides = tg.parse_config(["--preset", preset])
    assert cfg is tg.PRESETS[preset] or cfg == tg.PRESETS[preset]
    assert cfg.preset == preset and overrides == {}


@pytest.mark.parametrize("cuda, preset", [(False, "cpu"), (True, "short")])
def test_the_preset_without_flags_is_what_the_machine_can_run(cuda, preset, monkeypatch):
    monkeypatch.setattr(tg.torch.cuda, "is_available", lambda: cuda)
    assert tg.parse_config([])[0].preset == preset


def test_overrides_name_only_what_differs_from_the_preset():
    base = tg.PRESETS["cpu"]
    cfg, overrides = tg.parse_config(
        [
            "--preset",
            "cpu",
            "--num_steps",
            "7",
            "--seed",
            str(base.seed),
            "--warmup",
            "--no-qk_norm",
            "--muon_lr",
            str(base.muon_lr),
            "--smear_chunk",
            "",
        ]
    )
    assert overrides == {"num_steps": 7, "qk_norm": False, "smear_chunk": ""}
    assert cfg == replace(base, **overrides)


@pytest.mark.parametrize(
    "mul, tokens", [(0.5, [65536, 131072, 196608, 196608]), (2, [262144, 524288, 786432, 786432])]
)
def test_batch_mul_scales_every_stage(mul, tokens):
    cfg, overrides = tg.parse_config(["--preset", "short", f"--batch_mul={mul}"])
    assert [stage.batch_tokens for stage in cfg.stages] == tokens and overrides == {"batch_mul": mul}
    assert [replace(stage, batch_tokens=0) for stage in cfg.stages] == [
        replace(stage, batch_tokens=0) for stage in tg.PRESETS["short"].stages
    ]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--preset short --batch_mul 0.001", "--micro_batches 8: must divide the 131 tokens of a step with"),
        ("--preset short --batch_mul 1e-6", "--batch_mul 1e-06: leaves no token"),
        ("--preset short --micro_batches 3", "--micro_batches 3: must divide the 131072 tokens of a step$"),
        ("--preset cpu --ema_rate 0.1 --adam_every 30", "--ema_rate 0.1: times --adam_every 30"),
    ],
)
def test_shares_of_a_step_that_cannot_be_are_refused(flags, words):
    with pytest.raises(tg.UserError, match=words):
        tg.parse_config(flags.split())


@pytest.mark.parametrize(
    "field", [f for f in fields(tg.Config) if f.name not in ("preset", "stages")], ids=lambda f: f.name
)
def test_every_scalar_field_is_a_flag(field):
    value = getattr(tg.PRESETS["cpu"], field.name)
    argv = [f"--{'' if value else 'no-'}{field.name}"] if field.type is bool else [f"--{field.name}={value}"]
    cfg, overrides = tg.parse_config(["--preset", "cpu", *argv])
    assert overrides == {} and type(getattr(cfg, field.name)) is field.type


REFUSED = [
    # the topology's strings; a word that begins with -- is the flag that is blamed instead
    ("paired_heads", "p.p", "6"),
    ("value_embeds", ".01.233", "7"),
    ("skips", "", "6"),
    ("backout", ".", "6"),
    ("windows", "sslssx", "layer 5"),
    ("paired_heads", "p..xp.", "layer 3"),
    ("backout", "...b.B", "layer 5"),
    ("windows", "s-lssl", "--value_embeds: layer 1"),
    ("value_embeds", ".#1.23", "'#'"),
    ("value_embeds", ".é1.23", "'é'"),
    ("skips", ".a....", "'a'"),
    ("skips", ".a.aa.", "'a'"),
    ("skips", ".a.ba.", "'b'"),
    ("backout", "b..b..", "one"),
    # gates
    # Int() reads no superscripts.
    *[
        (name, text, "model_dim")
        for name in ("smear_chunk", "skip_chunk", "attn_chunk", "ve_chunk")
        for text in ("12:0", "5:5", "5", "a:b", "0:257", "-1:3", ":", "3:", "²:3", "0:³")
    ],
    ("ve_own_dims", "257", "model_dim"),
    ("ve_own_dims", "-1", "0"),
    # counts and shares
    *[
        (name, text, "must lie between")
        for name in (
            "vocab_size",
            "head_dim",
            "mlp_ratio",
            "num_steps",
            "max_predict",
            "micro_batches",
            "val_tokens",
            "val_seq_len",
            "final_long_window",
            "epochs",
        )
        for text in ("0", "-5")
    ],
    *[
        (name, "-1", "must lie between 0 and")
        for name in (
            "extra_inputs",
            "bigram_rows",
            "bigram_signs",
            "yarn_limit",
            "val_every",
            "momentum_warmup",
            "momentum_cooldown",
            "save_every",
        )
    ],
    *[
        (name, text, "must lie between")
        for name in (
            "embed_std",
            "value_embed_std",
            "input_embed_std",
            "matrix_std",
            "qkv_std",
            "o_std",
            "x0_lr",
            "skip_gate_lr",
            "muon_lr",
            "muon_wd",
            "adam_lr",
            "adam_wd",
            "adam_eps",
            "softcap",
            "scalar_lr",
        )
        for text in ("-0.1", "nan", "inf")
    ],
    *[
        (name, text, "must lie between")
        for name in ("softmax_scale", "softcap_width", "rotary_base", "rank_timeout", "batch_mul")
        for text in ("0", "-1", "nan", "inf")
    ],
    *[
        (name, text, "between 0 and ")
        for name in (
            "extension_share",
            "cooldown_share",
            "untie_share",
            "rotary_share",
            "momentum_min",
            "momentum_max",
            "muon_beta2",
            "bigram_momentum",
            "embed_beta1",
            "table_beta1",
            "x0_beta1",
            "gate_beta1",
            "gate_beta2",
        )
        for text in ("-0.1", "1.1", "nan")
    ],
    ("extension_share", "1", "num_steps"),
    # sizes that do not fit each other
    ("head_dim", "2", "between 4 and"),
    ("head_dim", "6", "multiple of 4"),
    ("head_dim", "48", "multiple"),
    ("head_dim", "256", "--paired_heads"),
    ("bos_id", "4096", "4096"),
    ("bos_id", "-1", "between 0 and"),
    ("vocab_size", "4095", "4095"),
    ("vocab_size", "65537", "65536"),
    ("spectral", "1e-40", "0.001"),
    ("spectral", "50", "--untie_share"),
    ("momentum_min", "0.96", "--momentum_max 0.9"),
    ("val_tokens", "163841", "8192"),
    ("val_seq_len", "8191", "163840"),
    ("micro_batches", "7", "divide"),
    # choices and types
    ("device", "tpu", "cuda"),
    ("dtype", "float16", "bfloat16"),
    ("activation", "swish", "gelu"),
    ("matrix_optimizer", "sgd", "adamw"),
    ("preset", "shrot", "short"),
    ("num_steps", "1.5", "int"),
    ("num_steps", "", "int"),
    ("muon_lr", "fast", "float"),
]
TOPOLOGY = dict(
    windows="sslssl",
    paired_heads="p...p.",
    value_embeds=".01.23",
    skips=".a..a.",
    backout="...b..",
    model_dim="256",
    head_dim="64",
    vocab_size="4096",
    bos_id="4095",
    untie_share="0.5",
    spectral="0",
    val_tokens="163840",
    val_seq_len="8192",
    micro_batches="1",
)


SCALARS = [f for f in fields(tg.Config) if f.name not in ("preset", "stages") and f.type is not bool]
FREE_TEXTS = {
    "data_dir",
    "log_dir",
    "operators",
    *(f"{part}_chunk" for part in ("smear", "skip", "attn", "ve")),
}
FREE_TEXTS |= {"windows", "paired_heads", "value_embeds", "skips", "backout"}  # refused above


@pytest.mark.parametrize("name", ["num_steps", "device", "log_dir", "preset"])
def test_two_dashes_are_no_value(name):
    with pytest.raises(tg.UserError, match=f"--{name}=--: -- is no value"):
        tg.parse_config(["--preset=cpu", f"--{name}=--"])


@pytest.mark.parametrize("field", SCALARS, ids=lambda f: f.name)
def test_every_field_has_bounds_that_help_shows_and_that_hold(field):
    low, high, choices = (field.metadata[name] for name in ("low", "high", "choices"))
    shown = " ".join(tg.flag_parser().format_help().split())
    if field.type is str:
        assert bool(choices) == (field.name not in FREE_TEXTS)
        assert not choices or f"[{', '.join(choices)}]" in shown
        return
    assert low < high and f"[{low} to {high}]" in shown
    for preset in tg.PRESETS.values():
        assert low <= getattr(preset, field.name) <= high
    outside = [low - 1, high + 1, 10**18 * high, -(10**400)]
    if field.type is float:
        outside = [low - 1e-6, high + 1, math.nan, math.inf, -math.inf]
    for value in outside:
        with pytest.raises(tg.UserError) as refused:
            tg.parse_config(["--preset=cpu", f"--{field.name}={value}"])
        assert f"--{field.name}" in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("flag, value, word", REFUSED, ids=lambda text: text)
def test_a_wrong_value_is_refused_with_one_line_that_names_its_flag(flag, value, word):
    settings = {"preset": "cpu", **TOPOLOGY, flag: value}
    with pytest.raises(tg.UserError) as refused:
        tg.parse_config([f"--{name}={text}" for name, text in settings.items()])
    message = str(refused.value)
    assert len(message.splitlines()) == 1 and word in message, message
    assert word.startswith("--") or f"--{flag}" in message, message


def test_the_same_settings_with_nothing_wrong_pass():
    """Else the test above would say nothing."""
    assert (
        tg.parse_config(["--preset=cpu", *[f"--{name}={text}" for name, text in TOPOLOGY.items()]])[
            0
        ].model_dim
        == 256
    )


def test_the_cpu_preset_has_every_feature_of_the_mission():
    """A real, small form of `short`."""
    cfg = tg.PRESETS["cpu"]
    layers = tg.topology(cfg)
    assert len(layers) >= 4 and all(layer.attends for layer in layers)
    assert {layer.window for layer in layers} == {"short", "long"}
    assert all(stage.windows[0] < stage.windows[1] for stage in cfg.stages)
    assert {layer.paired for layer in layers} == {True, False}
    first, last = layers[0].value_embed, layers[-1].value_embed
    assert first and first == last and len(tg.value_tables(cfg)) > 1, "U-Net: a table early and again late"
    assert any(layer.skip_from is not None for layer in layers) and any(layer.backout for layer in layers)
    chunks = [tg.read_chunk(cfg, f"{gate}_chunk") for gate in ("smear", "skip", "attn", "ve")]
    assert all(chunks) and len({(chunk.start, chunk.stop) for chunk in chunks}) == len(chunks)
    assert cfg.ve_own_dims and cfg.key_offset and cfg.bigram_rows and cfg.bigram_signs and cfg.mudd_layers
    assert cfg.qk_norm and cfg.activation == "relu2" and cfg.matrix_optimizer == "normuon"
    yardstick = tg.PRESETS["cpu-adamw"]
    same = ("model_dim", "head_dim", "vocab_size", "val_tokens", "val_seq_len", "data_dir")
    assert all(getattr(yardstick, name) == getattr(cfg, name) for name in same)
    assert len(yardstick.windows) == len(cfg.windows) and yardstick.mlp_ratio == 4, "a plain GPT-2"


def test_a_vocabulary_smaller_than_the_width_cannot_start_from_counts():
    needs = f"--spectral {tg.PRESETS['cpu'].spectral}: needs a --model_dim of at most --vocab_size 120"
    with pytest.raises(tg.UserError, match=needs):
        tg.parse_config(["--preset=cpu", "--vocab_size=120", "--bos_id=119"])


def test_a_model_without_layers_is_refused():
    with pytest.raises(tg.UserError, match="--windows .*layer"):
        tg.parse_config(
            ["--preset=cpu", "--windows=", "--paired_heads=", "--value_embeds=", "--skips=", "--backout="]
        )


@pytest.mark.parametrize(
    "preset, argv, word",
    [
        ("cpu", ["--model_dim=0"], "model_dim"),
        ("cpu", ["--model_dim=100"], "--model_dim 100"),
        ("short", ["--vocab_size=70000"], "--vocab_size 70000"),
        ("short", ["--micro_batches=7"], "--micro_batches 7"),
        ("cpu", ["--num_stepz", "3"], "--num_stepz"),
        ("cpu", ["--num_step", "3"], "--num_step"),
        ("cpu", ["--stages", "3"], "--stages"),
        ("cpu", ["--num_steps"], "--num_steps"),
        ("cpu", ["seven"], "seven"),
        ("cpu", ["--key_offset=maybe"], "--key_offset"),
    ],
)
def test_a_wrong_flag_is_refused_with_one_line_that_names_it(preset, argv, word):
    with pytest.raises(tg.UserError) as refused:
        tg.parse_config(["--preset", preset, *argv])
    assert word in str(refused.value) and len(str(refused.value).splitlines()) == 1, refused.value


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--num_stepz", "3"], "--num_stepz"),
        (["--skips", "ab"], "--skips"),
        (["--data_dir", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_a_wrong_command_exits_with_2_and_one_line_and_no_log(argv, word, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        tg.sys, "argv", ["train_gpt.py", "--preset", "cpu", "--log_dir", str(tmp_path / "logs"), *argv]
    )
    assert tg.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1 and word in err
    assert not (tmp_path / "logs").exists()
