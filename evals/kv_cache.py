"""A stream of tokens that a trained model goes on with, a few at a time: it remembers keys and values.

Layer by layer this is GPT.hidden of train_gpt.py, whose functions it calls; the tests hold it to the whole
pass, token by token. What differs is attention, over what is remembered, and that each matrix is scaled and
laid out once.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as tg
from cli import need
from evals.model import Trained, places_of_token

FEED_CHUNK = (
    256  # tokens that a cache takes at once: their scores are FEED_CHUNK x (window + FEED_CHUNK) a head
)


@dataclass
class DecodeWeights:
    """A layer's matrices, scaled, in the long rows that memory delivers fastest: nearly twice as fast on
    a CPU.
    """

    qkv: Tensor | None  # (3 D, D)
    o: Tensor | None  # (D, D)
    up: Tensor  # (4 D, D)
    down: Tensor  # (4 D, D)
    mix_scales: Tensor  # (streams,), in the model's dtype


def decode_weights(model: tg.GPT) -> list[DecodeWeights]:
    found = []
    for layer, w in zip(model.layers, model.layer_weights(), strict=True):
        qkv = o = None
        if layer.attends:
            qkv = long_rows(w.qkv_scale * w.qkvo[:3].flatten(0, 1))
            o = long_rows(w.o_scale * w.qkvo[3])
        scales = torch.stack(tg.mix_scales(w)).to(model.dtype)
        found.append(DecodeWeights(qkv, o, long_rows(w.mlp[0]), long_rows(w.mlp[1]), scales))
    return found


def long_rows(matrix: Tensor) -> Tensor:
    """The same matrix, stored by columns."""
    return matrix.T.contiguous().T


class KVCache:
    """Keys and values of all layers of a stream, and the last tokens, which the next looks back at."""

    def __init__(self, trained: Trained, capacity: int):
        """capacity: tokens that the stream may grow to."""
        model, cfg = trained.model, trained.cfg
        advice = "use a shorter prompt or fewer --tokens"
        fits = capacity <= trained.longest
        need(fits, f"{trained.source}: has positions for {trained.longest} tokens, not {capacity}; {advice}")
        self.model, self.windows, self.capacity = model, trained.windows, capacity
        self.decode_weights, self.scale = decode_weights(model), float(model.softmax_scale)
        self.length = 0  # tokens so far
        self.document_start = 0  # where the last one's document starts
        self.last_tokens = torch.empty(0, dtype=torch.int64, device=trained.device)
        self.last_key: dict[int, Tensor] = {}  # of a layer, as it was before the key offset
        empty = partial(torch.empty, dtype=model.dtype, device=trained.device)
        self.keys_values: dict[int, Tensor] = {}  # of a layer: (1, 2, heads, places, d)
        for i, layer in enumerate(model.layers):
            if layer.attends:
                places = places_of_token(layer.paired)
                self.keys_values[i] = empty(1, 2, cfg.num_heads // places, places * capacity, cfg.head_dim)

    def copy(self) -> "KVCache":
        """The same past, to go on from in another way."""
        other = object.__new__(KVCache)
        other.__dict__ = self.__dict__ | {
            "keys_values": {i: kept.clone() for i, kept in self.keys_values.items()},
            "last_key": dict(self.last_key),
        }
        return other

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """The next tokens (n,) -> (n, D), what the head reads: within rounding what hidden says of the
        stream.
        """
        room = self.capacity - self.length
        assert 0 < len(tokens) <= room, f"{len(tokens)} tokens after {self.length} of {self.capacity}"
        return torch.cat(
            [self.feed_chunk(part) for part in tokens.to(self.last_tokens.device).split(FEED_CHUNK)]
        )

    def feed_chunk(self, tokens: Tensor) -> Tensor:
        model, cfg = self.model, self.model.cfg
        # Smear and bigrams look back.
        stream, num_prev = torch.cat((self.last_tokens, tokens)), len(self.last_tokens)
        docs = tg.Documents.find(stream, cfg.bos_id)
        chunk = Chunk(self, tokens, is_first=docs.is_first[num_prev:])
        x = F.embedding(stream, model.embed)
        x0 = tg.smear(x, docs.is_first, model.smear_scale, model.smear_gate, model.chunks["smear_chunk"])[
            num_prev:
        ]
        streams = [x0, *(t[num_prev:] for t in model.extra_streams(stream, docs))]
        x, outputs = x0, []
        for i, (layer, w) in enumerate(zip(model.layers, model.layer_weights(), strict=True)):
            matrices = self.decode_weights[i]
            if layer.skip_from is not None:
                x = tg.skip(
                    x, outputs[layer.skip_from], x0, w.skip_scale, w.skip_gate, model.chunks["skip_chunk"]
                )
            if w.mudd_up is not None:
                x = tg.mudd(x, [x0, *outputs], w.mudd_up, w.mudd_down)
            x = mix([x, *streams], w, matrices.mix_scales)
            if layer.attends:
                n = tg.norm(x)
                q, k, v = project_qkv(n, matrices.qkv, cfg.head_dim, cfg.qk_norm)
                if layer.value_embed is not None:
                    value = F.embedding(tokens, getattr(model, f"value_embed_{layer.value_embed}"))
                    v = v + tg.gate_value(
                        n, value.view_as(v), w.ve_gate, model.chunks["ve_chunk"], cfg.ve_own_dims
                    )
                y = chunk.attend(i, layer, q, k, v)
                if w.exclusive_scale is not None:
                    y = tg.exclude(y, v, w.exclusive_scale)
                if w.attn_gate is not None:
                    y = y * tg.gate(n[:, model.chunks["attn_chunk"]], w.attn_gate).to(y.dtype)[..., None]
                x = x + F.linear(y.flatten(1), matrices.o)
            x = x + tg.mlp(tg.norm(x), matrices.up, matrices.down, cfg.activation)
            outputs.append(x)
        for layer, output in zip(model.layers, outputs, strict=True):
            if layer.backout:
                x = x - model.backout_scale[0] * output
        self.length += len(tokens)
        self.document_start = chunk.document_starts[-1]
        self.last_tokens = stream[1 - cfg.ngrams :]
        return tg.norm(x)


def mix(streams: list[Tensor], w: object, scales: Tensor) -> Tensor:
    """train_gpt.mix; of one token as a product, with fewer calls."""
    if len(streams[0]) == 1:
        return scales[None] @ torch.cat(streams)
    return tg.mix(streams, tg.mix_scales(w))


def project_qkv(n: Tensor, qkv: Tensor, head_dim: int, qk_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """train_gpt.project_qkv of a scaled matrix, with one norm for q and k."""
    heads = F.linear(n, qkv).view(len(n), 3, -1, head_dim)
    q_and_k = tg.norm(heads[:, :2]) if qk_norm else heads[:, :2]
    return q_and_k[:, 0], q_and_k[:, 1], heads[:, 2]


class Chunk:
    """The next few tokens of a stream on their way through the layers, and what layers that are alike
    share.
    """

    def __init__(self, cache: KVCache, tokens: Tensor, is_first: Tensor):
        self.cache, self.is_first = cache, is_first
        self.document_starts: list[int] = []  # of each token, in tokens of the whole stream
        start = cache.document_start
        for place, token in enumerate(tokens.tolist(), cache.length):
            start = place if token == cache.model.cfg.bos_id else start
            self.document_starts.append(start)
        self.rotations: dict[int, Tensor] = {}  # by places of a token
        self.visible: dict[
            tuple[int, int], tuple[int, int, Tensor | None]
        ] = {}  # by window and places of a token

    def attend(self, i: int, layer: tg.Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """train_gpt.attend for these tokens: q, k, v (n, H, d) -> (n, H, d), with few calls: they take
        the time.
        """
        cache, places = self.cache, places_of_token(layer.paired)
        is_long = layer.window == "long"
        if cache.model.cfg.key_offset and is_long:
            k = self.offset_key(i, k)
        x = torch.cat((q, k, v), dim=1)
        if layer.paired:
            x = tg.pair(x)
        heads = q.size(1) // places
        q, k = self.rotary(x[:, : 2 * heads], places).chunk(2, dim=1)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, x[:, 2 * heads :]))  # (1, heads, n, d)
        first, end, mask = self.visible_keys(cache.windows[1] if is_long else cache.windows[0], places)
        keys, values = cache.keys_values[i].unbind(1)
        keys[:, :, places * cache.length : end], values[:, :, places * cache.length : end] = k, v
        keys, values = keys[:, :, first:end], values[:, :, first:end]
        y = F.scaled_dot_product_attention(q, keys, values, mask, scale=cache.scale)[0].transpose(0, 1)
        return tg.unpair(y) if layer.paired else y

    def offset_key(self, i: int, k: Tensor) -> Tensor:
        """The stationary half of k from the token before; the stream's first token has none, nor needs
        one.
        """
        turning = 2 * self.cache.model.rotary_cos.size(1)
        before = torch.cat((self.cache.last_key.get(i, k[:1]), k))[:-1, :, turning:]
        self.cache.last_key[i] = k[-1:]
        still = torch.where(self.is_first[:, None, None], k[..., turning:], before)
        return torch.cat((k[..., :turning], still), dim=-1)

    def rotary(self, x: Tensor, places: int) -> Tensor:
        """train_gpt.rotary of q and k, x (places n, heads, d); of one token as a product with a matrix."""
        begin, model = places * self.cache.length, self.cache.model
        here = slice(begin, begin + len(x))
        cos, sin = model.rotary_cos[here], model.rotary_sin[here]
        if len(x) > places or x.dtype != torch.float32:
            return tg.rotary(x, cos, sin)
        if places not in self.rotations:
            identity = torch.eye(x.size(-1), device=x.device).expand(places, -1, -1)
            self.rotations[places] = tg.rotary(identity, cos, sin)
        return x @ self.rotations[places]

    def visible_keys(self, window: int, places: int) -> tuple[int, int, Tensor | None]:
        """The keys first .. end that these tokens see, and which of them sees which; None: all see all."""
        if (window, places) not in self.visible:
            begin = places * self.cache.length
            end = begin + places * len(self.document_starts)
            first_keys = []
            for place in range(begin, end):
                start = places * self.document_starts[(place - begin) // places]
                first_keys.append(max(start, place - window + 1))
            mask = None
            if end - begin > 1:
                key = torch.arange(first_keys[0], end, device=self.is_first.device)
                query = torch.arange(begin, end, device=key.device)[:, None]
                mask = (key >= torch.tensor(first_keys, device=key.device)[:, None]) & (key <= query)
            self.visible[window, places] = first_keys[0], end, mask
        return self.visible[window, places]
