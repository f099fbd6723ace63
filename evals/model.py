"""A trained model, from a checkpoint or an export: its logits, its losses, and a cache with which it goes on token by token.

The network is train_gpt.py's own GPT.hidden. Only how a cache's tokens come to their q, k and v is written a second time
here, with fewer calls; the tests hold it to the whole pass.
"""

import argparse
import copy
import json
import sys
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from data.bpe import encoding, load_vocab  # noqa: E402
from train_gpt import need  # noqa: E402

EXTRAS = "pip install -r evals/requirements.txt"
LOGITS_CHUNK = 1024  # tokens whose float32 logits exist at once
# tokens that a cache takes at once: their scores are FEED_CHUNK x (window + FEED_CHUNK) a head
FEED_CHUNK = 256
SPAN = 16384  # queries of a long stream that attend at once


@dataclass
class Trained:
    """A model as it stood after `step` steps, with the windows that the run validated it with there."""

    model: tg.GPT
    step: int
    source: Path
    ranks: dict[bytes, int] | None  # the vocabulary; None: there is none beside the file or beside the shards

    @property
    def cfg(self) -> tg.Config:
        return self.model.cfg

    @property
    def windows(self) -> tuple[int, int]:
        return tg.Schedule(self.cfg).val_windows(self.step)

    @property
    def longest(self) -> int:
        """Tokens of the longest stream that it has rotary angles for."""
        return len(self.model.rotary_cos) // max(each(row.paired) for row in self.model.layers)

    @property
    def device(self) -> torch.device:
        return self.model.embed.device

    @cached_property
    def one_by_one(self) -> tg.GPT:
        """The model for a token at a time, when most of the work is to read its matrices: each is scaled once, and lies in
        the long rows that memory delivers fastest, nearly twice as fast on a CPU."""
        model, ready = copy.copy(self.model), {}

        def once(matrix: Tensor, scale: Tensor | float = 1.0) -> Tensor:
            if matrix.data_ptr() not in ready:
                ready[matrix.data_ptr()] = (scale * matrix).T.contiguous().T
            return ready[matrix.data_ptr()]

        def project(
            n: Tensor, qkvo: Tensor, scale: Tensor, head_dim: int, qk_norm: bool
        ) -> tuple[Tensor, ...]:
            """As train_gpt.project, with one norm for q and k."""
            qkv = F.linear(n, once(qkvo[:3].flatten(0, 1), scale)).view(len(n), 3, -1, head_dim)
            return *(tg.norm(qkv[:, :2]) if qk_norm else qkv[:, :2]).unbind(1), qkv[:, 2]

        def mix(streams: list[Tensor], scales: Tensor) -> Tensor:
            return (
                scales.to(streams[0].dtype)[None] @ torch.cat(streams)
                if len(streams[0]) == 1
                else tg.mix(streams, scales)
            )

        model.project, model.mix = project, mix
        model.mlp_block = lambda x, up, down, activation: tg.mlp_block(x, once(up), once(down), activation)
        return model

    @cached_property
    def vocabulary(self) -> tiktoken.Encoding:
        """UserError where there is none."""
        need(
            self.ranks is not None,
            f"{self.source}: no vocab.tiktoken beside it or in {tg.find_data(self.cfg)}; "
            "give its own with --vocab FILE",
        )
        return encoding(self.ranks, self.cfg.bos_id)

    def encode(self, text: str) -> list[int]:
        """A document: BOS, then the text. What looks like a special token in it is text."""
        return [self.cfg.bos_id, *self.vocabulary.encode_ordinary(text)]

    def decode(self, tokens: list[int]) -> str:
        """Half a character becomes U+FFFD; BOS <|endoftext|>."""
        return self.vocabulary.decode(tokens)

    def hidden(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, D), what the head reads. Documents, from one BOS to the next, do not see each other."""
        need(
            len(tokens) <= self.longest,
            f"{self.source}: has positions for {self.longest} tokens, not {len(tokens)}; use a shorter text",
        )
        return self.model.hidden(tokens.to(self.device), self.windows)

    def logits(self, x: Tensor) -> Tensor:
        """x (n, D) -> softcapped logits (n, vocab_size), float32, without the rows that only pad the table."""
        return self.padded_logits(x)[:, : self.cfg.vocab_size]

    def padded_logits(self, x: Tensor) -> Tensor:
        """(n, vocab_rows): what the trained loss normalizes over."""
        cfg, z = self.cfg, (x @ self.model.lm_head).float()
        return cfg.softcap * torch.sigmoid((z + cfg.softcap_shift) / cfg.softcap_width) if cfg.softcap else z

    def losses(self, tokens: Tensor) -> Tensor:
        """(T + 1,) -> (T,), nats for each token but the first, on the CPU."""
        parts = zip(
            self.hidden(tokens[:-1]).split(LOGITS_CHUNK), tokens[1:].to(self.device).split(LOGITS_CHUNK)
        )
        return torch.cat(
            [F.cross_entropy(self.padded_logits(x), targets, reduction="none") for x, targets in parts]
        ).cpu()


class Cache:
    """A stream of tokens that goes on: keys and values of all layers, and the one token that the next looks back at."""

    def __init__(self, trained: Trained, capacity: int):
        """capacity: tokens that the stream may grow to."""
        model, cfg = trained.model, trained.cfg
        need(
            capacity <= trained.longest,
            f"{trained.source}: has positions for {trained.longest} tokens, not {capacity}; "
            "use a shorter prompt or fewer --tokens",
        )
        self.windows, self.capacity, self.scale = trained.windows, capacity, float(model.softmax_scale)
        self.model = trained.one_by_one if trained.device.type == "cpu" else model
        self.length, self.start = 0, 0  # tokens so far; where the last one's document starts
        self.last = torch.empty(0, dtype=torch.int64, device=trained.device)
        shapes = {
            i: (1, 2, cfg.num_heads // each(row.paired), each(row.paired) * capacity, cfg.head_dim)
            for i, row in enumerate(model.layers)
            if row.window != "none"
        }
        self.kept = {
            i: torch.empty(shape, dtype=model.dtype, device=trained.device) for i, shape in shapes.items()
        }
        self.last_key: dict[int, Tensor] = {}  # as it was before the key offset

    def copy(self) -> "Cache":
        """The same past, to go on from in another way."""
        other = object.__new__(Cache)
        other.__dict__ = self.__dict__ | {
            "kept": {i: kept.clone() for i, kept in self.kept.items()},
            "last_key": dict(self.last_key),
        }
        return other

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """The next tokens (n,) -> (n, D), what the head reads: within rounding what hidden says of the whole stream."""
        assert 0 < len(tokens) <= self.capacity - self.length, (
            f"{len(tokens)} tokens after {self.length} of {self.capacity}"
        )
        found = []
        for part in tokens.to(self.last.device).split(FEED_CHUNK):
            stream, self.again = (
                torch.cat((self.last, part)),
                len(self.last),
            )  # smear and bigrams look one token back
            self.starts, self.reached, self.turns = self.document_starts(part.tolist()), {}, {}
            found.append(self.model.hidden(stream, self.windows, self))
            self.length, self.start, self.last = self.length + len(part), self.starts[-1], part[-1:]
        return torch.cat(found)

    def document_starts(self, tokens: list[int]) -> list[int]:
        """Where the document of each new token starts, in places of the whole stream."""
        starts, start = [], self.start
        for place, token in enumerate(tokens, self.length):
            start = place if token == self.model.cfg.bos_id else start
            starts.append(start)
        return starts

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor,
        _starts: Tensor,
        _cos: Tensor,
        _sin: Tensor,
        _scale: Tensor,
        reach: int,
        paired: bool,
        key_offset: bool,
    ) -> Tensor:
        """train_gpt.attend for the next tokens of the stream: q, k, v (n, H, d) -> (n, H, d). With as few calls as it takes:
        they are most of a token's time."""
        m, turning = each(paired), 2 * self.model.rotary_cos.size(1)
        if key_offset:  # the stream's first token has none before it, nor needs one
            before = torch.cat((self.last_key.get(layer, k[:1]), k))[:-1, :, turning:]
            self.last_key[layer] = k[-1:]
            k = torch.cat(
                (k[..., :turning], torch.where(first[:, None, None], k[..., turning:], before)), dim=-1
            )
        x = torch.cat((q, k, v), dim=1)
        x, v = (tg.pair(x) if paired else x).tensor_split((2 * q.size(1) // m,), dim=1)
        q, k = self.rotary(x, m).chunk(2, dim=1)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, H, n, d)
        low, end, visible = self.reach(reach, m)
        keys, values = self.kept[layer].unbind(1)
        keys[:, :, m * self.length : end], values[:, :, m * self.length : end] = k, v
        y = F.scaled_dot_product_attention(
            q, keys[:, :, low:end], values[:, :, low:end], visible, scale=self.scale
        )[0]
        y = y.transpose(0, 1)
        return tg.unpair(y) if paired else y

    def rotary(self, x: Tensor, m: int) -> Tensor:
        """train_gpt.rotary of q and k of the next tokens, x (m n, heads, d); of one token as a product with a matrix."""
        place = slice(m * self.length, m * self.length + len(x))
        cos, sin = self.model.rotary_cos[place], self.model.rotary_sin[place]
        if len(x) > m or x.dtype != torch.float32:
            return tg.rotary(x, cos, sin)
        if m not in self.turns:  # the same in all layers
            self.turns[m] = tg.rotary(torch.eye(x.size(-1), device=x.device).expand(m, -1, -1), cos, sin)
        return x @ self.turns[m]

    def reach(self, reach: int, m: int) -> tuple[int, int, Tensor | None]:
        """The keys low .. end that the new tokens see, m places each, and which of them sees which; None: all see all."""
        if (reach, m) not in self.reached:  # layers are alike in this
            begin, end = m * self.length, m * (self.length + len(self.starts))
            lo = [max(m * self.starts[i // m], begin + i - reach + 1) for i in range(end - begin)]
            visible = None
            if end - begin > 1:
                key, place = (torch.arange(first, end, device=self.last.device) for first in (lo[0], begin))
                visible = (key >= torch.tensor(lo, device=key.device)[:, None]) & (key <= place[:, None])
            self.reached[reach, m] = lo[0], end, visible
        return self.reached[reach, m]


def each(paired: bool) -> int:
    """Places that a token takes in a layer's attention."""
    return 2 if paired else 1


def pick_device(given: str | None) -> str:
    """As given, else a GPU where there is one."""
    return given or ("cuda" if torch.cuda.is_available() else "cpu")


def load(
    path: str | Path,
    vocab: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    val_seq_len: int | None = None,
) -> Trained:
    """A checkpoint (.pt), an export (.safetensors), or a folder: the newest of them in it. No code of the file is run.

    vocab: a vocab.tiktoken, if not the export's own or the one beside the shards. device: a GPU where there
    is one. dtype: of matrices and tables; the one that the model was trained in if not given. val_seq_len:
    tokens of a sequence that losses are measured in, if not the run's. UserError: a file that is missing, not
    whole, of another version of train_gpt.py, or a vocabulary that is not the model's.
    """
    path = newest(Path(path))
    config, step, state = (read_export if path.suffix == ".safetensors" else read_checkpoint)(path)
    cfg = read_config(config, path)
    cfg = replace(cfg, val_seq_len=val_seq_len or cfg.val_seq_len)
    kind = dtype or tg.pick_dtype(cfg)
    with torch.device("meta"):  # only names, shapes and types: the values are in the file
        model = tg.GPT(cfg, getattr(torch, kind) if isinstance(kind, str) else kind)
    model.declare_buffers()
    kinds = {name: t.dtype for name, t in model.state_dict().items()}
    try:
        model.load_state_dict({name: t.to(kinds.get(name)) for name, t in state.items()}, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise tg.UserError(f"{path}: its weights are not those of its configuration ({reason})") from None
    trained = Trained(model.requires_grad_(False).to(pick_device(device)), step, path, None)
    model.turn_rotary()
    if step < cfg.num_steps:  # where a stage begins, the run sets its window before it validates and trains
        model.set_long_window(tg.Schedule(cfg).windows(step)[1])
    model.attend = attend_in_spans
    trained.ranks = read_vocabulary(vocab, path, cfg)
    return trained


def attend_in_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    doc_start: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: Tensor,
    reach: int,
    paired: bool,
    key_offset: bool,
) -> Tensor:
    """train_gpt.attend for long streams: SPAN queries at a time with the keys that they reach, so that the
    scores of a whole stream (for 262,144 tokens and a window of 2,560 some 17 GB a layer) never exist at
    once."""
    q, k, v = tg.placed(q, k, v, first, cos, sin, paired, key_offset)
    doc_start = 2 * doc_start.repeat_interleave(2) if paired else doc_start
    lo = torch.maximum(doc_start, torch.arange(len(q), device=q.device) - reach + 1)
    parts = []
    for start in range(0, len(q), SPAN):
        begin, end = max(0, start - reach + 1), start + SPAN
        seen = slice(begin, end)
        part = tg.IN_USE["attention"](
            q[seen], k[seen], v[seen], (lo[seen] - begin).clamp_min(0), reach, scale
        )
        parts.append(part[start - begin :])
    y = torch.cat(parts)
    return tg.unpair(y) if paired else y


def newest(path: Path) -> Path:
    need(
        path.exists(),
        f"{path}: no such file or folder; a run with --save_every 40 leaves checkpoints in its --log_dir",
    )
    if path.is_file():
        return path
    found = [*tg.by_age(path, "*.step*.pt")[:1], *tg.by_age(path, "*.safetensors")[:1]]
    need(
        len(found) > 0,
        f"{path}: no checkpoint in this folder; a run with --save_every 40 leaves some in its --log_dir",
    )
    return max(found, key=lambda file: file.stat().st_mtime_ns)


Content = tuple[str, int, dict[str, Tensor]]  # configuration, step, state of the model


def read_checkpoint(path: Path) -> Content:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_format(content.get("format"), path)
        return content["config"], int(content["step"]), dict(content["model"])
    except tg.UserError:
        raise
    except Exception as error:  # noqa: BLE001, half a file can fail in many ways
        raise tg.UserError(
            f"{path}: not a whole checkpoint of train_gpt.py ({type(error).__name__})"
        ) from None


def read_export(path: Path) -> Content:
    """What evals/export.py wrote."""
    try:
        import safetensors
    except ImportError:
        raise tg.UserError(f"{path}: reading it needs the package safetensors: {EXTRAS}") from None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata()
            check_format(int(about.get("checkpoint_format", 0)), path)
            return about["config"], int(about["step"]), {name: file.get_tensor(name) for name in file.keys()}
    except tg.UserError:
        raise
    except Exception as error:  # noqa: BLE001, as above
        raise tg.UserError(
            f"{path}: not a whole export of evals/export.py ({type(error).__name__})"
        ) from None


def check_format(written: int | None, path: Path) -> None:
    """UserError: weights of a train_gpt.py whose model computes something else with the same shapes."""
    need(
        written == tg.CHECKPOINT_FORMAT,
        f"{path}: of another version of train_gpt.py, whose model computes something else; "
        "its log begins with the source to use",
    )


def read_config(text: str, path: Path) -> tg.Config:
    """A configuration as train_gpt.settings writes it. A field more or less: the model may not mean the same."""
    try:
        values = json.loads(text)
        differing = (
            {f.name for f in fields(tg.Config)} ^ set(values)
        ) - tg.MAY_DIFFER  # those say nothing of the model
        values = {
            name: value
            for name, value in values.items()
            if name not in tg.MAY_DIFFER or hasattr(tg.SHORT, name)
        }
        need(
            not differing,
            f"{path}: of another version of train_gpt.py (which differs in {', '.join(sorted(differing))}); "
            "its log begins with the source to use",
        )
        rows = [
            row | {"windows": tuple(row["windows"]), "predict": tuple(map(tuple, row["predict"]))}
            for row in values["stages"]
        ]
        cfg = tg.Config(**values | {"stages": tuple(tg.Stage(**row) for row in rows)})
        tg.check_config(cfg)
        return cfg
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise tg.UserError(f"{path}: its configuration cannot be read ({type(error).__name__})") from None


def read_vocabulary(given: str | Path | None, model: Path, cfg: tg.Config) -> dict[bytes, int] | None:
    """The file that is given, else what lies beside the model, else what lies beside its shards."""
    beside = [model.parent / "vocab.tiktoken", tg.find_data(cfg) / "vocab.tiktoken"]
    file = Path(given) if given else next((path for path in beside if path.exists()), None)
    if file is None:
        return None
    ranks = load_vocab(file)
    need(
        len(ranks) == cfg.bos_id == cfg.vocab_size - 1,
        f"{file}: {len(ranks)} tokens and BOS, but the model has {cfg.vocab_size}; give its own with --vocab FILE",
    )
    return ranks


def model_arguments(parser: argparse.ArgumentParser, dtype: str = "the one it was trained in") -> None:
    """What every command needs to load a model. dtype: its default, in words."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a file, or a folder whose newest is taken"
    )
    parser.add_argument(
        "--vocab", type=Path, metavar="FILE", help="if not vocab.tiktoken beside CHECKPOINT or its shards"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help=f"default: {dtype}")
