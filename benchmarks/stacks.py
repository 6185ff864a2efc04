"""Speech models of published sizes with random weights: what the model benchmark trains and decodes with.

The OWSM shapes follow OWSM v3.1 (arXiv 2401.16658): an E-Branchformer encoder (a feed-forward layer before and after,
self-attention beside a convolutional gate) and a Transformer decoder; "owsm-2b" is the same at a width of 1536.
"whisper-large" has Whisper's plain blocks. Positions and the audio front end are left out: input is what follows them.
Names are ESPnet's, so `apply_ssvdo` finds the feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Stack:
    """A model's sizes; `frames` of one utterance are encoded, `labels` decoded. The feed-forward size is 4 * width."""

    width: int
    encoder: int
    decoder: int
    heads: int
    branchformer: bool
    frames: int
    labels: int = 64
    vocabulary: int = 50_000


STACKS = {
    "owsm-0.1b": Stack(384, 6, 6, 6, True, 750),
    "owsm-1b": Stack(1024, 18, 18, 16, True, 750),
    "owsm-2b": Stack(1536, 18, 18, 24, True, 750),
    "whisper-large": Stack(1280, 32, 32, 20, False, 1500),
}


class FeedForward(nn.Module):
    """w_2(gelu(w_1 x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(functional.gelu(self.w_1(x)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention; keys and values may be given, as a decoder's cache gives them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(width, width) for _ in range(4))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, heads, time, width / heads) of each."""
        return self._split(self.linear_k(x)), self._split(self.linear_v(x))

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], causal: bool = False) -> Tensor:
        q = self._split(self.linear_q(x))
        y = functional.scaled_dot_product_attention(q, *memory, is_causal=causal)
        return self.linear_out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ConvolutionalGate(nn.Module):
    """Half of the channels, convolved along time, gate the other half."""

    def __init__(self, width: int, kernel: int = 31) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(2 * width)
        self.convolution = nn.Conv1d(2 * width, 2 * width, kernel, padding=kernel // 2, groups=2 * width)

    def forward(self, x: Tensor) -> Tensor:
        kept, gate = functional.gelu(self.up(x)).chunk(2, -1)
        return self.down(kept * self.convolution(self.norm(gate).mT).mT)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """One encoder block."""

    def __init__(self, s: Stack) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(s.width) for _ in range(3))
        self.self_attn, self.feed_forward = Attention(s.width, s.heads), FeedForward(s.width)
        self.feed_forward_macaron = FeedForward(s.width) if s.branchformer else None
        self.cgmlp = ConvolutionalGate(s.width) if s.branchformer else None
        self.merge = nn.Linear(2 * s.width, s.width) if s.branchformer else None

    def forward(self, x: Tensor) -> Tensor:
        if self.feed_forward_macaron is not None:
            x = x + 0.5 * self.feed_forward_macaron(self.norms[2](x))
        h = self.norms[0](x)
        y = self.self_attn(h, self.self_attn.keys_and_values(h))
        if self.cgmlp is not None and self.merge is not None:
            y = self.merge(torch.cat([y, self.cgmlp(h)], -1))
        x = x + y
        return x + (0.5 if self.cgmlp is not None else 1.0) * self.feed_forward(self.norms[1](x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """One decoder block."""

    def __init__(self, s: Stack) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(s.width) for _ in range(3))
        self.self_attn, self.src_attn = Attention(s.width, s.heads), Attention(s.width, s.heads)
        self.feed_forward = FeedForward(s.width)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], past: list[Tensor] | None = None) -> Tensor:
        """past: keys and values of the tokens before x, to which x's are added; None: x is a whole sequence."""
        h = self.norms[0](x)
        own = self.self_attn.keys_and_values(h)
        if past is not None:
            past[:] = [torch.cat([old, new], 2) for old, new in zip(past, own, strict=True)] if past else list(own)
            own = (past[0], past[1])
        x = x + self.self_attn(h, own, causal=past is None)
        x = x + self.src_attn(self.norms[1](x), memory)
        return x + self.feed_forward(self.norms[2](x))  # type: ignore[no-any-return]


class Recogniser(nn.Module):
    """Encoder, decoder and output layer. Every feed-forward weight of one shape is the same, so that the benchmark
    factorises each shape once: times do not depend on the numbers."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack
        self.encoder = nn.ModuleList(Encoder(stack) for _ in range(stack.encoder))
        self.decoder = nn.ModuleList(Decoder(stack) for _ in range(stack.decoder))
        self.embed, self.norm = nn.Embedding(stack.vocabulary, stack.width), nn.LayerNorm(stack.width)
        self.output = nn.Linear(stack.width, stack.vocabulary)
        layers = [m for m in self.modules() if isinstance(m, FeedForward)]
        for layer in layers[1:]:
            layer.load_state_dict(layers[0].state_dict())

    def encode(self, frames: Tensor) -> Tensor:
        """frames: (batch, time, width); returns the same shape."""
        for block in self.encoder:
            frames = block(frames)
        return frames

    def forward(self, frames: Tensor, tokens: Tensor) -> Tensor:
        """The mean cross-entropy of each of `tokens` (batch, labels) but the first, given those before it."""
        memory, x = self.encode(frames), self.embed(tokens[:, :-1])
        for block in self.decoder:
            x = block(x, block.src_attn.keys_and_values(memory))
        scores = self.output(self.norm(x))
        return functional.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def decode(self, memories: list[tuple[Tensor, Tensor]], start: Tensor, steps: int) -> Iterator[Tensor]:
        """The most likely token after each, greedily, one at a time. memories: keys and values of the encoded speech, a
        pair for each block; start: (batch, 1) tokens."""
        pasts: list[list[Tensor]] = [[] for _ in self.decoder]
        token = start
        for _ in range(steps):
            x = self.embed(token)
            for block, memory, past in zip(self.decoder, memories, pasts, strict=True):
                x = block(x, memory, past)
            token = self.output(self.norm(x)).argmax(-1)
            yield token
