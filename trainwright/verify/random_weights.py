"""A decoder's folder with random weights, for what reads its weights from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright.models import decoder
from trainwright.models.folder import save_folder

SPREAD = 0.02


def write(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """Weights of a normal distribution in float32, norms of ones, biases of zeros.

    Args:
        config: the keys of a config.json.
    """
    spread = float(config.get("initializer_range", SPREAD))
    with torch.device("meta"):
        model = decoder.Decoder(decoder.read_config({"model_type": "llama", **config}))
    table = {name: parameter.float() for name, parameter in model.named_parameters()}

    def stream() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for name, empty in table.items():
            if empty.ndim > 1:
                yield name, torch.empty(empty.shape).normal_(0, spread, generator=generator)
            else:
                yield name, torch.full(empty.shape, float("norm" in name))

    save_folder(folder, table, {"model_type": "llama", **config}, stream=stream())
    return folder
