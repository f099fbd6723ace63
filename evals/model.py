"""A trained model, from a checkpoint or an export: its logits, its losses. No code of the file is run."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as tg
from cli import UserError, need, note, os_reason, path_flag, shown
from data.bpe import encode, encoding, load_vocab

EXTRAS = "pip install -r evals/requirements.txt"
LOGITS_CHUNK = 1024  # tokens whose float32 logits exist at once


@dataclass
class Trained:
    """A model as it stood after `step` steps."""

    model: tg.GPT
    step: int
    source: Path
    ranks: dict[bytes, int] | None  # the vocabulary; None: there is none beside the file or beside the shards

    @property
    def cfg(self) -> tg.Config:
        return self.model.cfg

    @property
    def windows(self) -> tuple[int, int]:
        """(short, long) that the run validated it with, tokens."""
        return tg.Schedule(self.cfg).val_windows(self.step)

    @property
    def longest(self) -> int:
        """Tokens of the longest stream that it has rotary angles for."""
        places = max(places_of_token(layer.paired) for layer in self.model.layers)
        return len(self.model.rotary_cos) // places

    @property
    def device(self) -> torch.device:
        return self.model.embed.device

    @cached_property
    def vocabulary(self) -> tiktoken.Encoding:
        """UserError where there is none."""
        places = f"beside it or in {tg.find_data(self.cfg)}"
        need(
            self.ranks is not None,
            f"{self.source}: no vocab.tiktoken {places}; give its own with --vocab FILE",
        )
        return encoding(self.ranks, self.cfg.bos_id)

    def encode(self, text: str) -> list[int]:
        """A document: BOS, then the text. What looks like a special token in it is text."""
        return [self.cfg.bos_id, *encode(self.vocabulary, text).tolist()]

    def decode(self, tokens: list[int]) -> str:
        """Half a character becomes U+FFFD; BOS <|endoftext|>."""
        return self.vocabulary.decode(tokens)

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, D), what the head reads. Documents, from one BOS to the next, do not see each other."""
        count = len(tokens)
        fits = count <= self.longest
        need(fits, f"{self.source}: has positions for {self.longest} tokens, not {count}; use a shorter text")
        return self.model.hidden(tokens.to(self.device), self.windows)

    def logits(self, x: Tensor) -> Tensor:
        """x (n, D) -> softcapped logits (n, vocab_size), float32, without the rows that only pad the
        table.
        """
        return self.padded_logits(x)[:, : self.cfg.vocab_size]

    def padded_logits(self, x: Tensor) -> Tensor:
        """(n, vocab_rows): what the trained loss normalizes over."""
        cfg, z = self.cfg, (x @ self.model.lm_head).float()
        if cfg.softcap == 0:
            return z
        return cfg.softcap * torch.sigmoid((z + cfg.softcap_shift) / cfg.softcap_width)

    def losses(self, tokens: Tensor) -> Tensor:
        """(T + 1,) -> (T,), nats for each token but the first, on the CPU."""
        hidden, targets = self.hidden(tokens[:-1]), tokens[1:].to(self.device)
        losses = []
        for x, y in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True):
            losses.append(F.cross_entropy(self.padded_logits(x), y, reduction="none"))
        found = torch.cat(losses).cpu()
        finite = bool(found.isfinite().all())
        need(
            finite,
            f"{self.source}: its losses are not finite; its weights are too large",
        )
        return found


def places_of_token(paired: bool) -> int:
    """Places that a token takes in a layer's attention."""
    return 2 if paired else 1


def pick_device(given: str | None) -> str:
    """As given, else a GPU where there is one. UserError: a GPU is wanted and there is none."""
    there = torch.cuda.is_available()
    need(given != "cuda" or there, "--device cuda: there is no CUDA GPU here; use --device cpu")
    return given or ("cuda" if there else "cpu")


def load(
    path: str | Path,
    vocab: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    val_seq_len: int | None = None,
) -> Trained:
    """A checkpoint (.pt), an export (.safetensors), or a folder: the newest of them in it.

    vocab: a vocab.tiktoken, if not the export's own or the one beside the shards. device: a GPU where there
    is one. dtype: of matrices and tables; the one that the model was trained in if not given. val_seq_len:
    tokens of a sequence that losses are measured in, if not the run's. UserError: a file that is missing, not
    whole, of another version of train_gpt.py, with weights that are not finite, or another vocabulary.
    """
    device = pick_device(device)
    path = newest(Path(path))
    config, step, state = read_export(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    cfg = read_config(config, path)
    need(0 <= step <= cfg.num_steps, f"{path}: stands at step {step} of {cfg.num_steps}; not a file of a run")
    cfg = replace(cfg, val_seq_len=val_seq_len or cfg.val_seq_len)
    kind = getattr(torch, dtype) if dtype else tg.pick_dtype(cfg)
    with torch.device("meta"):  # only names, shapes and types: the values are in the file
        model = tg.GPT(cfg, kind)
    model.add_buffers()
    load_weights(model, state, path)
    check_window(model, step, path)
    trained = Trained(model.requires_grad_(False).to(device), step, path, None)
    model.update_rotary()
    # A checkpoint is written before its step's change.
    model.set_long_window(tg.Schedule(cfg).windows(step)[1])
    trained.ranks = read_vocabulary(vocab, path, cfg)
    return trained


def load_weights(model: tg.GPT, state: dict[str, Tensor], path: Path) -> None:
    """UserError for other names or shapes than the model's, and for values that are not finite."""
    expected = model.state_dict()
    named = all(isinstance(name, str) for name in state)
    need(named, f"{path}: its weights have keys that are no names; use an older checkpoint")
    shapes = {name: (t.shape, t.is_floating_point()) for name, t in expected.items()}
    found = {name: (t.shape, t.is_floating_point()) for name, t in state.items() if tg.is_plain(t)}
    different = [name for name in sorted({*shapes, *found}) if shapes.get(name) != found.get(name)]
    names = ", ".join(different[:5])
    need(not different, f"{path}: its weights are not those of its configuration ({names})")
    for name, t in state.items():
        finite = not t.is_floating_point() or bool(t.isfinite().all())
        need(finite, f"{path}: {name} holds values that are not finite; use an older checkpoint")
    model.load_state_dict({name: t.to(expected[name].dtype) for name, t in state.items()}, assign=True)


def check_window(model: tg.GPT, step: int, path: Path) -> None:
    """UserError for a long window that no run has there: a checkpoint's is its step's, an export's the
    next's.
    """
    schedule = tg.Schedule(model.cfg)
    known = {schedule.windows(n)[1] for n in (max(step - 1, 0), step)}
    window = int(model.long_window)
    need(window in known, f"{path}: its long window is {window}, which no run has at step {step}")


def newest(path: Path) -> Path:
    """A file as it is; of a folder the newest checkpoint, by what they say of their time, else its export."""
    advice = "a run with --save_every 40 leaves checkpoints in its --log_dir"
    try:
        need(path.exists(), f"{shown(path)}: no such file or folder; {advice}")
        if not path.is_dir():
            need(path.is_file(), f"{shown(path)}: not a file that can be read")
            return path
        checkpoints = [file for file in path.glob("*.step*.pt") if tg.step_of(file) >= 0]
        exports = sorted(path.glob("*.safetensors"))
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({os_reason(error)})") from None
    need(checkpoints or exports, f"{path}: no checkpoint in this folder; {advice}")
    if not checkpoints:
        need(len(exports) == 1, f"{path}: holds {len(exports)} exports; give the file")
        return exports[0]
    passed_over: list[str] = []
    _, newest_file = tg.newest_of(checkpoints, passed_over)
    need(newest_file, f"{path}: none of its {len(checkpoints)} checkpoints is whole; {advice}")
    for line in passed_over:
        note(f"note: {line.removeprefix('resume: ')}")
    return newest_file


Content = tuple[str, int, dict[str, Tensor]]  # configuration, step, state of the model


def read_checkpoint(path: Path) -> Content:
    try:
        content = tg.load_whole(path)
        text, step, state, version = (content.get(name) for name in ("config", "step", "model", "format"))
    except Exception as error:  # noqa: BLE001, half a file can fail in many ways
        kind = type(error).__name__
        raise UserError(f"{path}: not a whole checkpoint of train_gpt.py ({kind})") from None
    check_format(version, path)
    right = isinstance(text, str) and type(step) is int and isinstance(state, dict)
    need(right, f"{path}: not a whole checkpoint of train_gpt.py")
    return text, step, dict(state)


def read_export(path: Path) -> Content:
    """What evals/export.py wrote."""
    try:
        import safetensors
    except ImportError:
        raise UserError(f"{path}: reading it needs the package safetensors: {EXTRAS}") from None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata()
            check_format(int(about.get("checkpoint_format", 0)), path)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
            return about["config"], int(about["step"]), state
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001, as above
        raise UserError(f"{path}: not a whole export of evals/export.py ({type(error).__name__})") from None


def check_format(written: object, path: Path) -> None:
    """UserError: weights of a train_gpt.py whose model computes something else with the same shapes."""
    other = f"{path}: of another version of train_gpt.py, whose model computes something else"
    need(written == tg.CHECKPOINT_FORMAT, f"{other}; its log begins with the source to use")


def read_config(text: str, path: Path) -> tg.Config:
    """A configuration as train_gpt.settings writes it. A field more or less: the model may not mean the
    same.
    """
    try:
        values = json.loads(text)
        known = {f.name for f in fields(tg.Config)}
        differing = sorted((known ^ set(values)) - tg.MAY_DIFFER)  # those say nothing of the model
        names = ", ".join(map(str, differing[:5]))
        need(
            not differing,
            f"{path}: of another version of train_gpt.py (which differs in {names}); use that one",
        )
        values = {name: value for name, value in values.items() if name in known}
        for f in fields(tg.Config):
            if f.name in values and f.name != "stages":
                right = has_type(values[f.name], f.type)
                need(right, f"{path}: its configuration cannot be read ({f.name} {values[f.name]!r})")
        values["stages"] = tuple(read_stage(row, path) for row in values["stages"])
        need(values["stages"], f"{path}: its configuration has no stages")
        cfg = tg.Config(**values)
        tg.check_config(cfg)
    except tg.UserError as error:
        raise UserError(f"{path}: no run can have its configuration ({error})") from None
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its configuration cannot be read ({type(error).__name__})") from None
    return cfg


def has_type(value: object, kind: type) -> bool:
    """As a value of JSON: true is no number, and a number may stand for a fraction."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def read_stage(row: dict, path: Path) -> tg.Stage:
    """UserError or TypeError for what no stage can be."""
    predict = tuple((float(start), float(end)) for start, end in row["predict"])
    short, long = row["windows"]
    whole = all(
        has_type(n, int) and 0 < n <= 2**40 for n in (short, long, row["batch_tokens"], row["max_doc_len"])
    )
    shares = all(has_type(row[name], float) and 0 <= row[name] <= 1e9 for name in ("until", "lr_mul"))
    need(whole and shares, f"{path}: its configuration cannot be read (a stage's numbers)")
    return tg.Stage(**row | {"windows": (short, long), "predict": predict})


def read_vocabulary(given: str | Path | None, model: Path, cfg: tg.Config) -> dict[bytes, int] | None:
    """The file that is given, else what lies beside the model, else what lies beside its shards."""
    beside = [model.parent / "vocab.tiktoken", tg.find_data(cfg) / "vocab.tiktoken"]
    file = Path(given) if given else next((path for path in beside if path.exists()), None)
    if file is None:
        return None
    ranks = load_vocab(file)
    fits = len(ranks) == cfg.bos_id == cfg.vocab_size - 1
    has = f"{len(ranks)} tokens and BOS, but the model has {cfg.vocab_size}"
    need(fits, f"{file}: {has}; give its own with --vocab FILE")
    return ranks


def sequences(tokens: np.ndarray, length: int) -> Iterator[Tensor]:
    """tokens (N,) in sequences of at most `length` targets, as validation cuts them; each with one token
    more.
    """
    for start in range(0, len(tokens) - 1, length):
        yield torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))


def model_arguments(parser: argparse.ArgumentParser, dtype: str = "the one it was trained in") -> None:
    """What every command needs to load a model. dtype: its default, in words."""
    checkpoint = "a file, or a folder whose newest is taken"
    vocab = "if not vocab.tiktoken beside CHECKPOINT or its shards"
    parser.add_argument("checkpoint", type=path_flag, metavar="CHECKPOINT", help=checkpoint)
    parser.add_argument("--vocab", type=path_flag, metavar="FILE", help=vocab)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help=f"default: {dtype}")
