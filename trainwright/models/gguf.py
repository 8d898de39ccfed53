"""Llama models in GGUF files (llama.cpp): the config from the metadata, the tensors under their Hugging Face names.

Two things differ from a Hugging Face folder and are undone here. llama.cpp interleaves the rows of the query and key
projections for its own form of rotary embedding, and it keeps Llama 3.1's frequency scaling as a tensor of factors.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from trainwright.models.gguf_header import read_header
from trainwright.pieces import Piece
from trainwright.recipe import InputError

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
# llama.cpp's converter writes the factors of these settings; only the factor itself varies between Llama 3.1 and 3.2.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
PLAIN = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
CHUNK = 1 << 22  # elements dequantised at once: gguf's temporaries stay small beside the model


class GGUFWeights:
    """The tensors of a Llama model in a GGUF file, dequantised one at a time, under their Hugging Face names.

    Raises:
        InputError: no GGUF file, a truncated one, another architecture, a tensor or a quantisation that isn't known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shown = str(path)
        self._reader = read_header(path)
        self._check_kind()
        stored = {tensor.name: tensor for tensor in self._reader.tensors}
        self._factors = stored.pop(ROPE_FACTORS, None)
        self._tensors = self._renamed(stored)
        self._check_types()

    def names(self) -> list[str]:
        """Hugging Face names, in the order of the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the stored numbers; float32 for quantised ones."""
        return PLAIN.get(self._tensors[name].tensor_type, torch.float32)

    def load(self, name: str, dtype: torch.dtype | None = None, piece: Piece | None = None) -> Tensor:
        """A new tensor in ``dtype`` (default: as stored), rows in Hugging Face's order, apart from the file.

        Of a piece, the whole tensor is dequantised and let go: blocks and interleaved rows don't end where pieces do.
        """
        out = self._dequantised(name, dtype or self.dtype(name))
        return piece.of(out).clone() if piece and not piece.whole else out

    def kind(self, name: str) -> str:
        """How a tensor is stored: F16, Q4_0, ..."""
        return self._tensors[name].tensor_type.name

    def blocks(self, name: str) -> Tensor:
        """A new uint8 tensor (rows, bytes of a row) with the file's own blocks of a quantised matrix, rows in our order.

        llama.cpp interleaves whole rows, and no block lies in two of them, so that nothing needs to be dequantised.
        """
        tensor, heads = self._tensors[name], self._interleaved_heads(name)
        stored = torch.from_numpy(tensor.data.view(np.ndarray)).view(torch.uint8)
        assert stored.ndim == 2
        return deinterleaved(stored, heads) if heads else stored.clone()

    def _dequantised(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self._tensors[name]
        out = torch.empty(self.shape(name), dtype=dtype)
        data = tensor.data.view(np.ndarray)  # slices of a memmap are slow to make
        flat, data = (out, data) if out.ndim > 1 else (out[None], data[None])
        rows = max(1, CHUNK // flat.shape[-1])
        for start in range(0, len(flat), rows):
            flat[start : start + rows] = numbers(data[start : start + rows], tensor.tensor_type)
        heads = self._interleaved_heads(name)
        return deinterleaved(out, heads) if heads else out

    def config(self) -> dict[str, Any]:
        """The model's config.json in Hugging Face's flat form, with ``rope_theta`` and ``rope_scaling`` at the top.

        Raises:
            InputError: metadata is missing, or asks for something that a Llama config can't say.
        """
        heads = self._whole("attention.head_count")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self._whole("embedding_length"),
            "intermediate_size": self._whole("feed_forward_length"),
            "num_hidden_layers": self._whole("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._whole("attention.head_count_kv", heads),
            "head_dim": self._head_dim(heads),
            "vocab_size": self.shape(TOP["token_embd.weight"])[0],
            "max_position_embeddings": self._whole("context_length"),
            "rms_norm_eps": self._real("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._real("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(heads),
            "tie_word_embeddings": TOP["output.weight"] not in self._tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self._tensors,
            **{key: self.value(f"tokenizer.ggml.{kind}_token_id") for key, kind in TOKEN_IDS.items()},
        }

    def value(self, key: str) -> Any:
        """One entry of the metadata, such as ``tokenizer.ggml.pre``; None where the file doesn't have it."""
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError):
            raise InputError(f"{self.path}: metadata {key} can't be read; the file is damaged") from None

    def _check_kind(self) -> None:
        architecture = self.value("general.architecture")
        if architecture != "llama":
            raise InputError(f"{self.path}: architecture {architecture!r} is not supported; only 'llama' is")
        if self.value("split.count") not in (None, 0, 1):
            raise InputError(f"{self.path}: one part of a split model; join the parts with llama-gguf-split --merge")
        if self.value("llama.expert_count"):
            raise InputError(f"{self.path}: a mixture of experts; only dense Llama models are supported")

    def _renamed(self, stored: dict[str, ReaderTensor]) -> dict[str, ReaderTensor]:
        unknown = [name for name in stored if hugging_face_name(name) is None]
        if unknown:
            raise InputError(f"{self.path}: tensors that no Llama model has: {', '.join(unknown[:5])}")
        if "token_embd.weight" not in stored:
            raise InputError(f"{self.path}: token_embd.weight is missing; it holds no whole model (an adapter?)")
        return {str(hugging_face_name(name)): tensor for name, tensor in stored.items()}

    def _check_types(self) -> None:
        for kind in {tensor.tensor_type for tensor in self._tensors.values()}:
            if not readable(kind):
                name = next(name for name, tensor in self._tensors.items() if tensor.tensor_type == kind)
                raise InputError(
                    f"{self.path}: {name} is stored as {kind.name}, which gguf can't dequantise; "
                    f"use a file in F16, BF16, Q8_0 or another common quantisation"
                )

    def _needed(self, key: str, default: Any) -> Any:
        value = self.value(f"llama.{key}")
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # llama.cpp allows one value a layer; a Llama has the same everywhere
        if value is None:
            value = default
        if not isinstance(value, int | float) or value <= 0:
            problem = "is missing" if value is None else f"is {value!r}, not one positive number for all layers"
            raise InputError(f"{self.path}: metadata llama.{key} {problem}; convert the model to GGUF again")
        return value

    def _whole(self, key: str, default: int | None = None) -> int:
        return int(self._needed(key, default))

    def _real(self, key: str, default: float | None = None) -> float:
        """The shortest decimal with the stored float32's value: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self._needed(key, default))))

    def _head_dim(self, heads: int) -> int:
        size = self._whole("attention.key_length", self._whole("embedding_length") // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (other := self._whole(key, size)) != size:
                raise InputError(f"{self.path}: llama.{key} is {other} but heads have {size}; that is no plain Llama")
        return size

    def _interleaved_heads(self, name: str) -> int:
        """The number of heads whose rows llama.cpp interleaved in this tensor, 0 for those it left alone."""
        if ".q_proj." in name:
            return self._whole("attention.head_count")
        return self._whole("attention.head_count_kv", self._whole("attention.head_count")) if ".k_proj." in name else 0

    def _rope_scaling(self, heads: int) -> dict[str, Any] | None:
        kind = self.value("llama.rope.scaling.type") or "none"
        if self._factors is not None:
            factors = numbers(self._factors.data, self._factors.tensor_type).float()
            return llama3_scaling(factors, self._real("rope.freq_base", 10000.0), self._head_dim(heads), self.shown)
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._real("rope.scaling.factor")}
        if kind != "none":
            raise InputError(f"{self.path}: rope scaling {kind!r} is not supported; linear and Llama 3.1's are")
        return None


def hugging_face_name(name: str) -> str | None:
    """``blk.0.attn_q.weight`` -> ``model.layers.0.self_attn.q_proj.weight``; None for a name that no Llama has."""
    if name in TOP:
        return TOP[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in LAYER or parts[3] not in ("weight", "bias"):
        return None
    return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"


def numbers(data: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> Tensor:
    """Stored rows as a tensor: F16, BF16 and F32 exactly as they are, quantised blocks as float32."""
    if kind == GGMLQuantizationType.BF16:
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data if kind in PLAIN else dequantize(data, kind))


def readable(kind: GGMLQuantizationType) -> bool:
    """Whether tensors stored like this can be turned into numbers, found by trying one block of zeros."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return kind in PLAIN
    return True


def deinterleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads, size/2, 2) of llama.cpp in Hugging Face's order (heads, 2, size/2); weights and biases alike."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def llama3_scaling(factors: Tensor, theta: float, head_dim: int, shown: str) -> dict[str, Any] | None:
    """Llama 3.1's ``rope_scaling`` that gives these (head_dim/2,) float32 factors; None if they are all one.

    Raises:
        InputError: no factor gives them, so that a config can't say what the file means.
    """
    if bool((factors == 1).all()):
        return None
    for factor in (float(factors.max()), 8.0, 32.0):
        if torch.allclose(llama3_factors(theta, head_dim, factor), factors, rtol=1e-5, atol=0.0):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    raise InputError(
        f"{shown}: {ROPE_FACTORS} is not Llama 3.1's scaling (low 1, high 4, original context 8192); "
        f"use the model's Hugging Face folder, whose config.json has the settings"
    )


def llama3_factors(theta: float, head_dim: int, factor: float) -> Tensor:
    """What Llama 3.1's scaling divides each of the head_dim/2 frequencies by, float32."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    turns = LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / ((1 - kept) / factor + kept)
