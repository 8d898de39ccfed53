"""What the matrix combines: models small enough to train in a second, and the factors of a run with their levels."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.recipe.file import parse
from trainwright.verify import random_weights
from trainwright.verify.covering import Levels
from trainwright.verify.job import Job

MOST_PROCESSES = 4
TOKENIZER, WEIGHTS, DOCUMENTS, CACHE = "tokenizer", "weights", "documents.jsonl", "cache"
VOCABULARY = 320
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model of the matrix.

    sections  of its recipe
    drop      the key of a dropout
    freeze    a pattern of parameters that may be frozen
    text      whether it reads tokens
    kernels   whether it has operations of our own
    file      whether its weights come from a file
    batch     rows a step
    """

    sections: Mapping[str, Any]
    drop: str | None = None
    freeze: str | None = None
    text: bool = True
    kernels: bool = True
    file: bool = False
    batch: int = 16


DIGITS = {"data": {"kind": "images", "source": "digits", "limit": 400, "held_out": 0.2}}
MODELS: dict[str, Subject] = {
    "mlp": Subject(
        {**DIGITS, "model": {"architecture": "mlp", "options": {"hidden": [32, 24, 16, 16]}}, "adapt": {"method": "full"}},
        drop="model.options.dropout", freeze="layers.1.*", text=False, kernels=False,
    ),
    "resnet": Subject(
        # Wide and with a large batch: bfloat16 makes ties where the largest pixel is chosen, which others must outweigh.
        {**DIGITS, "model": {"architecture": "resnet9", "options": {"stem": 8, "channels": [16, 16]}},
         "adapt": {"method": "full"}},
        freeze="stages.0.*", text=False, kernels=False, batch=64,
    ),
    "decoder, full": Subject({"model": {"options": DECODER}, "adapt": {"method": "full"}}, freeze="model.layers.1.*"),
    "decoder, LoRA": Subject(
        {"model": {}, "adapt": {"method": "lora", "rank": 4, "alpha": 8.0}}, drop="adapt.dropout", file=True
    ),
    "decoder, partial": Subject(
        {"model": {"options": DECODER}, "adapt": {"method": "partial", "train": ["*layers.[0123].mlp*", "*norm*", "*embed*"]}}
    ),
    "user module": Subject(
        {"model": {"architecture": "trainwright.verify.example:module", "options": {"vocabulary": VOCABULARY}},
         "adapt": {"method": "full"}},
        drop="model.options.dropout", freeze="layers.1.*", kernels=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Level:
    """A way of doing something: ``keys`` of the recipe, dotted.

    needs   levels of other factors without which it makes no sense
    resume  whether the last step is taken once more from a checkpoint
    """

    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False


@dataclass(frozen=True)
class Factor:
    """What a run may do in one way or another; the first level is plain.

    setting  the plain run has it, too, so no level is a technique
    """

    name: str
    levels: tuple[Level, ...]
    setting: bool = False

    @property
    def techniques(self) -> list[str]:
        """The levels that the plain run doesn't have."""
        return [] if self.setting else [level.name for level in self.levels[1:]]


def _switch(name: str, on: Mapping[str, Any], off: Mapping[str, Any], *, setting: bool = False, plain: str = "") -> Factor:
    return Factor(name, (Level(plain or f"no {name}", off), Level(name, on)), setting)


def _zero(stage: int) -> dict[str, Any]:
    return {"parallel.data": 2, "parallel.zero": stage}


def _pipeline(schedule: str) -> dict[str, Any]:
    return {"parallel.pipeline": 2, "parallel.schedule": schedule}


DEEPSPEED = {"parallel.engine": "deepspeed"}
SGD = {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
EVERYWHERE = (
    Factor("data ranks", (Level("1 rank", {"parallel.data": 1}), Level("DP", {"parallel.data": 2}),
                          *(Level(f"ZeRO-{stage}", _zero(stage)) for stage in (1, 2, 3)))),
    _switch("TP", {"parallel.tensor": 2}, {"parallel.tensor": 1}),
    Factor("pipeline", (Level("no PP", {"parallel.pipeline": 1}), Level("PP 1F1B", _pipeline("1f1b")),
                        Level("PP GPipe", _pipeline("gpipe")), Level("PP interleaved", _pipeline("interleaved")))),
    Factor("engine", (Level("torch"), Level("DeepSpeed", DEEPSPEED, {"data ranks": "DP"}),
                      Level("DS offload", {**DEEPSPEED, "parallel.offload_optimizer": True}, {"data ranks": "ZeRO-1"}))),
    Factor("precision", (Level("fp32", {"precision": "fp32"}), Level("bf16", {"precision": "bf16"}),
                         Level("pure bf16", {"precision": "pure_bf16"}), Level("fp16", {"precision": "fp16"}))),
    _switch("8-bit states", {"memory.optimizer_states": "8bit"}, {}),
    _switch("states on disk", {"memory.optimizer_offload": "disk"}, {}),
    _switch("update in backward", {"memory.optimizer_in_backward": True}, {}),
    _switch("compile", {"run.compile": "on"}, {"run.compile": "off"}),
    Factor("resume", (Level("no resume"), Level("resume", resume=True))),
    Factor("optimizer", (Level("SGD", {"optimizer": SGD}), Level("AdamW", {"optimizer": ADAMW})), setting=True),
    _switch("clipping", {"training.clip_norm": 0.25}, {"training.clip_norm": None}, setting=True),
    _switch("EMA", {"training.ema": {"decay": 0.9}}, {}, setting=True),
)  # fmt: skip
PACKING = _switch("packing", {"data.packing": True}, {"data.packing": False})
KERNELS = _switch("kernels", {"run.kernels": "auto"}, {"run.kernels": "off"})
CHECKPOINTING = Factor("checkpointing", (
    Level("no checkpointing"),
    *(Level(f"ckpt {kind}", {"memory.checkpointing": kind}) for kind in ("full", "selective", "offload")),
))  # fmt: skip
FROZEN = Factor("frozen weights", (Level("kept frozen weights"), Level("streamed", {"memory.frozen": "stream"}),
                                   Level("4-bit base", {"adapt.base": "4bit"})))  # fmt: skip
# Where dropout draws other masks than in the plain run: a batch is divided otherwise, or its kernels draw by themselves.
REDRAWN = {
    "data ranks": "1 rank", "pipeline": "no PP", "accumulation": "no accumulation", "packing": "no packing",
    "compile": "no compile",
}  # fmt: skip
# What continuous integration looks at: factors, and of the larger ones those levels.
SMALL = {
    "data ranks": ("1 rank", "DP", "ZeRO-3"),
    "TP": ("no TP", "TP"),
    "pipeline": ("no PP", "PP 1F1B"),
    "precision": ("fp32", "bf16", "pure bf16"),
    "8-bit states": ("no 8-bit states", "8-bit states"),
    "states on disk": ("no states on disk", "states on disk"),
    "frozen weights": ("kept frozen weights", "streamed", "4-bit base"),
    "accumulation": ("no accumulation", "accumulation"),
    "packing": ("no packing", "packing"),
    "kernels": ("no kernels", "kernels"),
    "resume": ("no resume", "resume"),
    "clipping": ("no clipping", "clipping"),
}


def factors(model: str, *, small: bool = False) -> dict[str, Factor]:
    """Those of a model of ``MODELS``, by name."""
    subject = MODELS[model]
    found = [*EVERYWHERE, _switch("accumulation", {"training.micro_batch_size": subject.batch // 8}, {})]
    if subject.text:
        found.append(PACKING)
    if subject.kernels:
        found.append(KERNELS)
    found.append(CHECKPOINTING)
    if subject.file:
        found.append(FROZEN)
    if subject.drop:
        found.append(_switch("dropout", {subject.drop: 0.1}, {}, setting=True))
    if subject.freeze:
        found.append(_switch("frozen", {"adapt.freeze": [subject.freeze]}, {}, setting=True))
    return {one.name: _fewer(one) if small else one for one in found if not small or one.name in SMALL}


def _fewer(factor: Factor) -> Factor:
    return Factor(factor.name, tuple(one for one in factor.levels if one.name in SMALL[factor.name]), factor.setting)


def draws(combination: Mapping[str, str]) -> bool:
    """Whether a combination's masks of dropout are the plain run's: the factors of ``REDRAWN`` are plain."""
    return all(combination.get(name, plain) == plain for name, plain in REDRAWN.items())


def too_many(factors: Mapping[str, Factor]) -> set[Levels]:
    """Levels that would need more processes than there may be."""
    ranks = {"data ranks": "parallel.data", "TP": "parallel.tensor", "pipeline": "parallel.pipeline"}
    found = set()
    for levels in itertools.product(*(factors[name].levels for name in ranks)):
        data, tensor, pipeline = (level.keys[key] for level, key in zip(levels, ranks.values(), strict=True))
        if data * tensor * pipeline > MOST_PROCESSES:
            found.add(frozenset((name, level.name) for name, level in zip(ranks, levels, strict=True)))
    return found


def completed(factors: Mapping[str, Factor], chosen: Mapping[str, str]) -> dict[str, str]:
    """The smallest combination with these levels: what they need, and plain levels of all other factors."""
    levels = [_level(factors[name], level) for name, level in chosen.items()]
    needed = {name: level for one in levels for name, level in one.needs.items()}
    return {name: factor.levels[0].name for name, factor in factors.items()} | needed | dict(chosen)


def _level(factor: Factor, name: str) -> Level:
    return next(level for level in factor.levels if level.name == name)


def job(model: str, combination: Mapping[str, str], folder: Path, seed: int = 0) -> Job:
    """A whole combination of one of the models.

    Raises:
        InputError: the recipe is refused.
    """
    subject = MODELS[model]
    every = factors(model)
    whole = completed(every, combination)
    levels = [_level(every[name], level) for name, level in whole.items()]
    mapping = json.loads(json.dumps({**_base(subject, folder), **subject.sections}))
    if subject.text:
        mapping["model"]["tokenizer"] = str(folder / TOKENIZER)
    if subject.file:
        mapping["model"]["pretrained"] = str(folder / WEIGHTS)
    for key, value in {"run.seed": seed, **{key: value for level in levels for key, value in level.keys.items()}}.items():
        *path, last = key.split(".")
        section = mapping
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    dropout = whole.get("dropout") == "dropout" and draws(whole)
    return Job(parse(mapping), resume=any(level.resume for level in levels), dropout=dropout)


def _base(subject: Subject, folder: Path) -> dict[str, Any]:
    text = {"source": str(folder / DOCUMENTS), "sequence_length": 64, "cache": str(folder / CACHE), "held_out": 0.1}
    return {
        **({"data": text} if subject.text else {}),
        "schedule": {"name": "linear", "warmup": 0},
        "training": {"steps": 3, "batch_size": subject.batch},
        "tracking": {"tensorboard": False},
        "run": {"folder": str(folder / "run"), "device": "cpu"},
    }


WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box", "with", "liquid",
    "jugs", "of", "ink",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_data(folder: Path) -> None:
    """A tokenizer, a model's weights, and documents of ragged lengths."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / TOKENIZER)
    random_weights.write(folder / WEIGHTS, DECODER)
    rows = []
    for i in range(90):
        words = [WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(3 + i * 11 % 23)]
        rows.append({"prompt": " ".join(words[: 1 + i % 4]), "completion": " " + " ".join(words)})
    (folder / DOCUMENTS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
