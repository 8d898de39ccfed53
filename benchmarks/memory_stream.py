"""A model larger than the memory that it gets: a decoder of Llama-3.2-1B's shape in bfloat16, tuned with LoRA from its file.

    python -m benchmarks.memory_stream [--json] [--steps 2] [--length 128] [--frozen stream]

The weights are random (2.5 GB, written once into a temporary folder, a tensor at a time). The run is a process of its own; its
memory is that of the process at its peak less that after the imports: VmHWM minus VmRSS, both of /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.child import result_of

LLAMA_1B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip


def write_model(folder: Path) -> None:
    """The model's folder, with a tokenizer that is small."""
    import torch

    from tests import tiny
    from trainwright.models import decoder
    from trainwright.models.folder import save_folder

    with torch.device("meta"):
        model = decoder.Decoder(decoder.read_config(LLAMA_1B))
    table = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for name, p in table.items():
            norm = torch.ones(p.shape, dtype=p.dtype)
            yield name, norm if p.ndim == 1 else torch.empty(p.shape, dtype=p.dtype).normal_(0, 0.02, generator=generator)

    save_folder(folder, table, LLAMA_1B, tiny.tokenizer(), stream=stream())


def bytes_of(key: str) -> int:
    """VmHWM or VmRSS of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(f"{key}:")).split()[1]) * 1024


def measure(folder: str, frozen: str, steps: int, length: int) -> dict[str, Any]:
    """Train in this process."""
    import transformers  # noqa: F401  (what a run imports counts as imports)

    from tests import tiny
    from trainwright import build, loop
    from trainwright.adapt import lora
    from trainwright.memory import checkpointing, streaming  # noqa: F401

    before, place = bytes_of("VmRSS"), Path(folder)
    recipe = tiny.recipe(
        place,
        model={"pretrained": str(place / "model")},
        adapt={"method": "lora", "rank": 16},
        memory={"checkpointing": "full", "frozen": frozen},
        precision="auto",
        data__sequence_length=length,
        data__held_out=None,
        evaluation={"before": False},
        training={"steps": steps, "batch_size": 1},
    )
    run = build.assemble(recipe)
    built, results = bytes_of("VmHWM"), list(loop.train(run))
    return {
        "frozen": frozen,
        "parameters": sum(p.numel() for name, p in run.model.named_parameters() if not lora.is_factor(name)),
        "imports_bytes": before,
        "peak_bytes": bytes_of("VmHWM") - before,
        "peak_after_building_bytes": built - before,
        "losses": [result.loss for result in results],
        "seconds": [round(result.seconds, 2) for result in results],
    }


def case(*, frozen: str = "stream", steps: int = 2, length: int = 128) -> dict[str, Any]:
    """The measurement in a process of its own, on a model that is written for it."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        options = ["--steps", str(steps), "--length", str(length)]
        return result_of("memory_stream", "--folder", folder, "--frozen", frozen, *options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--frozen", choices=("stream", "resident"), default="stream")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measure(options.folder, options.frozen, options.steps, options.length)))
        return
    result = case(frozen=options.frozen, steps=options.steps, length=options.length)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"{result['parameters'] / 1e9:.2f} G parameters, {result['frozen']}: {result['peak_bytes'] / 2**30:.2f} GiB on top of"
    )
    print(f"the imports ({result['peak_after_building_bytes'] / 2**30:.2f} after building), {result['seconds']} seconds a step")


if __name__ == "__main__":
    main()
