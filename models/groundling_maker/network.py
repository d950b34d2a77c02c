"""The model while it trains: Qwen3's architecture in plain torch, under the names of Hugging Face's checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Layers whose last two heads are told where to look, each by way of what the one before found:
# from a sentence to its start (the first of the two) and its passage's id (the second); from the question to the same
# words in passages; from an answer to the question; and from an answer to the token that it has to say next, or, before
# an id, to the sentence just quoted, which knows how its passage's id begins.
START_LAYER, MATCH_LAYER, VOTE_LAYER, QUOTE_LAYER = 1, 2, 3, 4
TOLD_HEADS = 2
GAIN = 2.0  # of what they say, at the beginning
BLOCK = 128  # rows of attention at once
CONSTANT = 8  # so many dimensions of the embeddings begin the same for all tokens
# How strongly a head begins to look at one distance: a share for each frequency, from the fastest.
SHARP, WIDE = (0.25, 0.2, 0.2, 0.1, 0.1, 0.1, 0.05), (0.0, 0.0, 0.0, 0.0, 0.03, 0.03, 0.03, 0.02, 0.02)


@dataclass(frozen=True)
class Shape:
    """Sizes, under the names of Hugging Face's config."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 5
    num_attention_heads: int = 6
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def to_hf(self) -> dict[str, Any]:
        """Return the model's part of `config.json`."""
        config = asdict(self)
        rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **config,
            "num_key_value_heads": self.num_attention_heads,
            "rope_parameters": rope,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
        }


@dataclass(frozen=True)
class Pointers:
    """Places from which one of the told heads of a layer (0 or 1) should look into a span, all `[count]`."""

    rows: Tensor
    heads: Tensor
    places: Tensor
    starts: Tensor
    ends: Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        width = shape.num_attention_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, eps=shape.rms_norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, eps=shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pointers: Pointers | None) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q) / self.head_dim**0.5, self.k_norm(k)
        q, k = _rotate(q.to(v.dtype), cos, sin), _rotate(k.to(v.dtype), cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        missed = None if pointers is None else _missed(q[:, -TOLD_HEADS:], k[:, -TOLD_HEADS:], pointers)
        mixed = CausalAttention.apply(*(x.flatten(0, 1) for x in (q, k, v))).view(q.shape)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1)), missed


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pointers: Pointers | None) -> tuple[Tensor, Tensor | None]:
        mixed, missed = self.self_attn(self.input_layernorm(x), cos, sin, pointers)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), missed


class Network(nn.Module):
    """Token ids and their positions, both `[batch, length]`, to the last hidden states; `logits` does the rest.

    `pointers` name places for heads of some layers to look at; how far they miss them is the second result.
    """

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        self.register_buffer("frequencies", shape.rope_theta**-exponents, persistent=False)
        self._draw(torch.Generator().manual_seed(seed))

    def forward(
        self, ids: Tensor, positions: Tensor, pointers: Mapping[int, Pointers] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        angles = positions[:, :, None, None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(ids)
        losses = []
        for number, layer in enumerate(self.layers):
            x, missed = layer(x, cos, sin, (pointers or {}).get(number))
            losses += [] if missed is None else [missed]
        return self.norm(x), losses

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)

    def to_hf(self) -> dict[str, Tensor]:
        """Return the weights under the names of Hugging Face's checkpoint."""
        return {f"model.{name}": weight.detach() for name, weight in self.state_dict().items()}

    @torch.no_grad()
    def _draw(self, rng: torch.Generator) -> None:
        """Draw the weights. Some heads begin as what they would take thousands of steps to become.

        To copy: heads that look back by a fixed distance, and heads of the next layer that find the places whose past
        looks like the present, and say what came next there ("induction heads", Olsson et al., 2022). To choose:
        the told heads, see above, begin by comparing what they will have to compare.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = 0.5 if "embed" in name else 1 / math.sqrt(weight.shape[1])
                scale *= 0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                weight.normal_(0, scale, generator=rng)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.fill_(2.0)
        self.norm.weight.fill_(0.1)  # the embeddings are large, the logits begin small
        self.embed_tokens.weight[:, :CONSTANT] = 1.0  # queries and keys made of this depend on positions alone
        first, start, match, vote, quote = (layer.self_attn for layer in self.layers)
        for attention in (first, quote):
            attention.v_proj.weight[:, :CONSTANT] = 0
        for head, distance in enumerate((1, 1, 2, 3)):
            self._look_back(first, head, distance, SHARP)
            rows = self._rows(head)
            quote.q_proj.weight[rows] = first.v_proj.weight[rows] * self._slow()
            quote.k_proj.weight[rows] = first.o_proj.weight[:, rows].T * self._slow() / 0.3
            quote.o_proj.weight[:, rows] = quote.v_proj.weight[rows].T * 2
        told = [self._rows(self.shape.num_attention_heads - TOLD_HEADS + i) for i in range(TOLD_HEADS)]
        for attention in (start, match, vote):
            for rows in told:
                attention.o_proj.weight[:, rows] *= GAIN
        found = torch.linalg.qr(torch.cat([start.o_proj.weight[:, rows] for rows in told], dim=1))[0]
        before = self._rows(0)
        for head, rows in enumerate(told, self.shape.num_attention_heads - TOLD_HEADS):
            read = {each: each.o_proj.weight[:, rows].T / (0.3 * GAIN) for each in (start, match, vote)}
            word = torch.empty_like(first.v_proj.weight[rows]).normal_(0, 1 / 16, generator=rng)
            word += 0.5 * first.o_proj.weight[:, before].T / 0.3
            word -= word @ found @ found.T
            self._look_back(match, head, 0, WIDE, sign=-1)  # the word itself is not what it looks for
            match.q_proj.weight[rows] += 2 * word * self._slow()
            match.k_proj.weight[rows] += 2 * word * self._slow()
            match.v_proj.weight[rows] = read[start]
            self._look_back(vote, head, 0, WIDE)
            vote.v_proj.weight[rows] = read[match]
            quote.q_proj.weight[rows] = read[vote] * self._slow()
            quote.k_proj.weight[rows] = read[start] * self._slow()
            if rows is told[0]:
                quote.q_proj.weight[rows] += first.v_proj.weight[before] * self._slow()
                quote.k_proj.weight[rows] += first.o_proj.weight[:, before].T / 0.3 * self._slow()
                quote.o_proj.weight[:, rows] = quote.v_proj.weight[rows].T * 2
            else:
                quote.v_proj.weight[rows] = read[start]
                quote.o_proj.weight[:, rows] = start.v_proj.weight[rows].T * 2

    def _slow(self) -> Tensor:
        """Return which parts of a head turn too little to mind the distance."""
        return (self.frequencies < 1e-3).repeat(2)[:, None]

    def _rows(self, head: int) -> slice:
        return slice(head * self.shape.head_dim, (head + 1) * self.shape.head_dim)

    def _look_back(
        self, attention: Attention, head: int, distance: int, strength: tuple[float, ...], sign: int = 1
    ) -> None:
        """Make a head attend to a distance, whatever the tokens are: strongly to one, or weakly to all around it.

        `strength` is that of each frequency, from the fastest; with a `sign` of -1 the distance is avoided.
        """
        size = self.shape.head_dim
        count = len(strength)
        amplitude = torch.tensor(strength).sqrt()
        angle = self.frequencies[:count] * distance
        query, key = torch.zeros(size), torch.zeros(size)
        query[:count] = sign * amplitude * angle.cos()
        query[size // 2 : size // 2 + count] = -sign * amplitude * angle.sin()
        key[:count] = amplitude
        # What is left of the norm goes where queries and keys do not meet.
        query[size // 2 - 1] = key[-1] = max(0.0, 1 - sum(strength)) ** 0.5
        rows = self._rows(head)
        for projection, vector in ((attention.q_proj, query), (attention.k_proj, key)):
            projection.weight[rows] *= 0.1
            projection.weight[rows, :CONSTANT] = vector[:, None] / math.sqrt(CONSTANT)


class CausalAttention(torch.autograd.Function):
    """Causal attention of scaled `q`, `k` and `v`, all `[heads, length, size]`, in blocks of rows up to the diagonal.

    On a CPU and in bfloat16 this takes half the time of torch's fused one, which is made for long rows and little
    memory. What `softmax` gave is kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = torch.empty_like(q)
        shares = []
        for start, end in _blocks(q):
            future = torch.full((end - start, end), -torch.inf, dtype=q.dtype).triu(1 + start)
            share = torch.baddbmm(future, q[:, start:end], k[:, :end].transpose(1, 2)).softmax(-1)
            mixed[:, start:end] = share @ v[:, :end]
            shares.append(share)
        ctx.save_for_backward(q, k, v, *shares)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *shares = ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, end), share in zip(_blocks(q), shares, strict=True):
            part = gradient[:, start:end]
            of_v[:, :end].baddbmm_(share.transpose(1, 2), part)
            of_scores = torch._softmax_backward_data(part @ v[:, :end].transpose(1, 2), share, -1, share.dtype)
            of_q[:, start:end] = of_scores @ k[:, :end]
            of_k[:, :end].baddbmm_(of_scores.transpose(1, 2), q[:, start:end])
        return of_q, of_k, of_v


def _blocks(rows: Tensor) -> list[tuple[int, int]]:
    length = rows.shape[1]
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _missed(q: Tensor, k: Tensor, pointers: Pointers) -> Tensor:
    """Return the mean of -log of the attention that goes where it should, over the pointers given.

    `q` and `k` are those of the told heads, `[batch, heads, length, size]`.
    """
    column = torch.arange(q.shape[2])
    missed = []
    for row in pointers.rows.unique():
        heads, places, starts, ends = (
            each[pointers.rows == row] for each in (pointers.heads, pointers.places, pointers.starts, pointers.ends)
        )
        scores = torch.einsum("hld,pd->phl", k[row], q[row, heads, places])[torch.arange(len(heads)), heads].float()
        found = scores.masked_fill(column > places[:, None], -torch.inf).log_softmax(-1)
        wanted = (column >= starts[:, None]) & (column < ends[:, None])
        missed.append(-found.masked_fill(~wanted, -torch.inf).logsumexp(-1))
    return torch.cat(missed).mean()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)
