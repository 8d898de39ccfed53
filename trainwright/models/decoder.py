"""The Llama family (Touvron et al. 2023): Llama 2, 3, 3.1, 3.2, SmolLM2, from their config.json.

Parameter names are those of Hugging Face, so that files, patterns and adapters mean the same layers here and there.
The forward gives hidden states; the head belongs to the loss, which never makes the logits of a whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.models.attention import attention, cached_attention, masked_attention
from trainwright.models.contract import Stretch, TensorPlan, Vocabulary, apply_all, effective_weight, present
from trainwright.models.rotary import Rotary, read_rotary, rotate
from trainwright.recipe import InputError, nearest


@dataclass(frozen=True)
class DecoderConfig:
    """The keys of a Llama config.json that shape the model, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rotary: Rotary
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Keys of a Llama config.json with no bearing on the architecture; anything else in `model.options` is a mistake.
HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "pretraining_tp", "attention_dropout", "hidden_act", "_name_or_path", "is_llama_config", "rope_interleaved",
    "rope_theta", "rope_scaling", "rope_parameters", "transformers.js_config", "quantization_config",
}  # fmt: skip


def known_options() -> set[str]:
    """Every key that ``model.options`` may hold for a decoder."""
    return ({f.name for f in fields(DecoderConfig)} - {"rotary"}) | HARMLESS


def read_config(config: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """A Hugging Face config as a ``DecoderConfig``.

    Raises:
        InputError: another architecture, a missing key, or a setting this decoder doesn't compute.
    """
    if (kind := config.get("model_type", "llama")) != "llama":
        raise InputError(f"{where}: model_type {kind!r} is not of the Llama family; supported: 'llama'")
    if missing := [key for key in REQUIRED if config.get(key) is None]:
        raise InputError(f"{where}: {', '.join(missing)} missing; a Llama config.json has them")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise InputError(f"{where}: hidden_act {activation!r} is not supported; Llama models use 'silu'")
    if config.get("attention_dropout"):
        raise InputError(f"{where}: attention_dropout {config['attention_dropout']} is not supported; set it to 0")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise InputError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if not config.get("head_dim") and hidden % heads:
        raise InputError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return DecoderConfig(
        **{key: config[key] for key in REQUIRED},
        num_key_value_heads=groups,
        head_dim=config.get("head_dim") or hidden // heads,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rotary=read_rotary(config, where),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        initializer_range=config.get("initializer_range", 0.02),
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse keys of ``model.options`` that no Llama config has."""
    for key in options:
        if key not in known_options():
            raise InputError(f"model.options.{key}: no such key in a Llama config{nearest(key, known_options())}")


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019), computed in float32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * scaled).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // self.kv_heads
        wide, narrow = config.num_attention_heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.attention_bias)
        self.attend = attention

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (rows, KV heads, length, group, head_dim); keys and values (rows, KV heads, length, head_dim)."""
        rows, length, _ = x.shape
        q, k, v = apply_all((self.q_proj, self.k_proj, self.v_proj), x)
        q = q.view(rows, length, self.kv_heads, self.group, self.head_dim)
        k = k.view(rows, length, self.kv_heads, self.head_dim)
        v = v.view(rows, length, self.kv_heads, self.head_dim)
        q = rotate(q, cos[:, :, None, None], sin[:, :, None, None])
        k = rotate(k, cos[:, :, None], sin[:, :, None])
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def merge(self, out: Tensor) -> Tensor:
        """(rows, KV heads, length, group, head_dim) through the output projection, (rows, length, hidden)."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor) -> Tensor:
        return self.merge(self.attend(*self.project(x, cos, sin), documents))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = apply_all((self.gate_proj, self.up_proj), x)
        return self.down_proj(nn.functional.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and around it a residual connection."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, documents)
        return x + self.mlp(self.post_attention_layernorm(x))

    def extend(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, layer: int) -> Tensor:
        """The same for tokens that follow those in the cache; their keys and values are added to it."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos, sin)
        x = x + self.self_attn.merge(cached_attention(q, *cache.append(layer, k, v)))
        return x + self.mlp(self.post_attention_layernorm(x))


def _stretches(block: str) -> tuple[Stretch, Stretch]:
    """Attention and MLP of a block, by its name."""
    attention, mlp = f"{block}.self_attn", f"{block}.mlp"
    return (
        Stretch(
            columns=(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
            row=f"{attention}.o_proj",
            after=f"{block}.input_layernorm",
            counts=((attention, "kv_heads"),),
        ),
        Stretch((f"{mlp}.gate_proj", f"{mlp}.up_proj"), f"{mlp}.down_proj", after=f"{block}.post_attention_layernorm"),
    )


class KVCache:
    """Keys and values of the tokens seen so far, (layers, rows, KV heads, capacity, head_dim) each.

    There is room for all KV heads, and a part is used where processes share them.
    """

    def __init__(self, config: DecoderConfig, rows: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (rows, KV heads, new, head_dim) behind the tokens seen so far; give all of this layer's, new ones included."""
        heads, end = keys.shape[1], self.length + keys.shape[2]
        self.keys[layer, :, :heads, self.length : end] = keys
        self.values[layer, :, :heads, self.length : end] = values
        return self.keys[layer, :, :heads, :end], self.values[layer, :, :heads, :end]


class Body(nn.Module):
    """Embedding, blocks and last norm: the part that Hugging Face names ``model``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A Llama-family language model.

    ``forward(tokens, positions, documents)`` gives hidden states (rows, length, hidden_size) after the last norm, where
    ``tokens`` and ``positions`` are (rows, length) int64 and ``documents`` the (n + 1,) int32 offsets, on the CPU, of the
    documents in the flattened tokens. Under autocast the residual stream has autocast's dtype.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def blocks(self) -> list[nn.Module]:
        """The repeated layers that are here, in order: the units of compiling, checkpointing and sharding."""
        return present(self.model.layers)

    def parts(self) -> dict[str, int]:
        """What a pipeline cuts between, as ``contract.Chain`` has it."""
        layers = {f"model.layers.{place}": 1 for place in range(len(self.model.layers))}
        return {"model.embed_tokens": 0, **layers, "model.norm": 1, "lm_head": 1}

    def tensor_plan(self) -> TensorPlan:
        """Attention by KV heads, each with its group of query heads; MLPs by inner features; the vocabulary by rows."""
        numbers = {"num_key_value_heads": self.config.num_key_value_heads, "intermediate_size": self.config.intermediate_size}
        stretches = [
            stretch for name, _ in self.model.layers.named_children() for stretch in _stretches(f"model.layers.{name}")
        ]
        vocabulary = Vocabulary("model.embed_tokens", "model.norm", "lm_head", alone=("extend",))
        return TensorPlan(numbers, tuple(stretches), vocabulary)

    def forward(self, tokens: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        x = self.embed(tokens)
        cos, sin = self.config.rotary.tables(positions, self.config.head_dim)
        for block in self.model.layers:
            x = block(x, cos, sin, documents)
        return self.model.norm(x)

    def extend(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Hidden states of (rows, new) tokens that follow those in the cache."""
        x = self.embed(tokens)
        positions = torch.arange(cache.length, cache.length + tokens.shape[1], device=tokens.device).expand_as(tokens)
        cos, sin = self.config.rotary.tables(positions, self.config.head_dim)
        for layer, block in enumerate(self.model.layers):
            assert isinstance(block, Block)
            x = block.extend(x, cos, sin, cache, layer)
        cache.length += tokens.shape[1]
        return self.model.norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

    def without_kernels(self) -> None:
        """From now on, attention is what PyTorch's plain operations make of its definition."""
        for block in self.blocks():
            assert isinstance(block, Block)
            block.self_attn.attend = masked_attention

    def head_weight(self) -> Tensor:
        """The weight (vocab_size, hidden_size) that turns hidden states into logits."""
        return effective_weight(self.lm_head)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., vocab_size)."""
        return self.lm_head(hidden)

    def published_start(self, name: str, layer: nn.Module) -> None:
        """Matrices normal(0, initializer_range), biases zero; norms have set themselves to one."""
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, 0.0, self.config.initializer_range)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
