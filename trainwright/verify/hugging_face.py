"""The same recipe by Hugging Face: models by transformers, LoRA by PEFT, steps by Trainer, and our saved files read by them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GgufConfig, LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from trainwright.models.decoder import Decoder
from trainwright.recipe import AdamW, Constant, Cosine, CrossEntropy, InputError, Linear, Lora, Recipe, TextData
from trainwright.verify import plain_loop
from trainwright.verify.facts import Facts
from trainwright.verify.plain_loop import Kept, Work
from trainwright.verify.plain_losses import IGNORED
from trainwright.verify.tracing import BEGIN, END, FIRST, LAST, SAVED, Trace

Document = tuple[Tensor, Tensor]  # tokens and labels, (length,) int64; a label is the next token, or IGNORED
ELSEWHERE = "use --against torch"


def check(recipe: Recipe, facts: Facts) -> None:
    """Whether Trainer has a twin of the recipe.

    Raises:
        InputError: it hasn't; says what to do instead.
    """
    if not isinstance(recipe.data, TextData):
        raise InputError(f"data.kind: {recipe.data.kind}, for which Trainer has neither model nor data; {ELSEWHERE}")
    if not isinstance(facts.built.model, Decoder):
        raise InputError(f"model.architecture: transformers has no {recipe.model.architecture}; {ELSEWHERE}")
    assert isinstance(recipe.loss, CrossEntropy)
    for key in ("label_smoothing", "z_loss"):
        if value := getattr(recipe.loss, key):
            why = "takes the mean of each micro-batch's mean then" if key == "label_smoothing" else "has none"
            raise InputError(f"loss.{key}: {value:g}, but Trainer {why}; {ELSEWHERE}")

    needs("accelerate", *["peft"] * isinstance(recipe.adapt, Lora))


def needs(*packages: str) -> None:
    """Raises InputError where a package of the extra isn't installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        extra = "pip install 'trainwright[bench]'"
        raise InputError(f"--against: {' and '.join(missing)} must be there for this recipe; install with: {extra}")


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor bars: what a twin says of itself is no news to the user."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()


def decoder(recipe: Recipe, facts: Facts, begin: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A Llama of transformers, with PEFT's factors where the recipe has LoRA, before step 1.

    Pretrained weights are read from their folder or GGUF file by transformers itself; what is random comes from our run, but
    for LoRA's B, which PEFT makes.

    Args:
        begin: our run's weights before step 1.
    """
    with quiet():
        return adapted(_base(recipe, facts, begin).to(dtype), recipe, begin).to(dtype)


def reads_itself(recipe: Recipe, facts: Facts) -> bool:
    """Whether transformers can read the weights by which the recipe starts."""
    source = facts.built.source
    packed = getattr(recipe.adapt, "base", "") == "4bit"
    return source is not None and source.kind in ("folder", "gguf") and not recipe.model.options and not packed


def _base(recipe: Recipe, facts: Facts, begin: Mapping[str, Tensor]) -> nn.Module:
    source = facts.built.source
    if source is not None and reads_itself(recipe, facts):
        if source.kind == "folder":
            return LlamaForCausalLM.from_pretrained(source.path, dtype=torch.float32)
        plain = GgufConfig(dequantize=True)
        folder, name = source.path.parent, source.path.name
        return LlamaForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, quantization_config=plain)
    model = LlamaForCausalLM(LlamaConfig(**facts.built.config))
    copy_values(model, begin)
    return model


@torch.no_grad()
def copy_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a model's parameters and buffers the values of the same plain names."""
    for name, tensor in plain_loop.state(model).items():
        tensor.copy_(values[name])


def adapted(model: nn.Module, recipe: Recipe, begin: Mapping[str, Tensor]) -> nn.Module:
    """The same with what learns: PEFT's factors, or the parameters that the patterns match."""
    section = recipe.adapt
    if isinstance(section, Lora):
        return _with_factors(model, section, begin)
    for name, p in model.named_parameters():
        if section.method == "partial":
            p.requires_grad_(plain_loop.matches(name, section.train))
        else:
            p.requires_grad_(not plain_loop.matches(name, section.freeze))
    return model


def _with_factors(model: nn.Module, section: Lora, begin: Mapping[str, Tensor]) -> nn.Module:
    needs("peft")
    from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict  # NOTE: here, being an extra

    layers = sorted(name.removesuffix(".lora_A") for name in begin if name.endswith(".lora_A"))
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank whatever it is
        use_rslora=section.scaling == "rslora",
        target_modules=layers,
        task_type="CAUSAL_LM" if isinstance(model, LlamaForCausalLM) else None,
    )
    made: nn.Module = get_peft_model(model, config)
    if section.start is not None:
        set_peft_model_state_dict(made, load_peft_weights(section.start, device="cpu"))
        return made
    with torch.no_grad():
        for name, tensor in plain_loop.state(made).items():
            if name.endswith(".lora_A"):
                tensor.copy_(begin[name])
    return made


class _Twin(Trainer):
    """Trainer, with batches that are given, gradients before clipping kept, and a schedule of ours where it has none."""

    batches: Sequence[Mapping[str, Tensor]]
    kept: Kept
    last: int
    rate: Callable[[int], float] | None = None

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None, shuffle=False)  # type: ignore[arg-type]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.rate is None:
            return super().create_scheduler(num_training_steps, optimizer)
        assert self.optimizer is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.rate)
        return self.lr_scheduler

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss = super().training_step(*arguments, **options)
        step = self.state.global_step
        self.kept.losses[step:] = [sum(self.kept.losses[step:]) + loss.item()]
        if step == 0:
            self.kept.gradients(FIRST)
        if step == self.last:
            self.kept.gradients(LAST)
        return loss


@dataclass
class _Watch(TrainerCallback):
    """Notes rates and norms, and stops after the last step that is wanted."""

    kept: Kept
    steps: int

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        self.kept.rates.append(found["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **found: Any) -> None:
        if "grad_norm" in (logs or {}):
            self.kept.norms.append(float(logs["grad_norm"]))


def train(
    work: Work, documents: Callable[[int], list[Document]], recipe: Recipe, steps: int, folder: Path, *, bf16: bool
) -> tuple[Trace, list[str]]:
    """The first steps by Trainer; gives the trace that it leaves in ``folder``, and what isn't Trainer's own.

    Args:
        documents: of a step.
        bf16: products under autocast.
    """
    kept, notes = Kept(work.model), []
    kept.weights(BEGIN)
    portions = 2 if all(len(documents(step)) > 1 for step in range(steps)) else 1
    with quiet():
        arguments = _arguments(recipe, work.steps_in_all, folder, portions, bf16)
        optimizer = None if own_optimizer(recipe) else plain_loop.make_optimizer(work.model, recipe.optimizer)
        twin = _Twin(model=work.model, args=arguments, callbacks=[_Watch(kept, steps)], optimizers=(optimizer, None))
        twin.remove_callback(PrinterCallback)
        twin.batches = [one for step in range(steps) for one in _portions(documents(step), portions)]
        twin.kept, twin.last = kept, steps - 1
        if not own_schedule(recipe):
            twin.rate = plain_loop.rates(recipe, work.steps_in_all)
            notes.append("the learning rate's schedule, which Trainer defines otherwise, is the plain loop's")
        if optimizer is not None:
            notes.append("the optimizer is torch's own, because Trainer has no such groups or no such optimizer")
        twin.train()
        kept.weights(END)
        kept.values(SAVED, _saved(work.model, folder / "model"))
    return kept.leave(folder, work, {}, notes), notes


def own_schedule(recipe: Recipe) -> bool:
    """Whether Trainer's schedule of this name means the same: its warmup begins with a rate of 0, ours ends with the peak."""
    section = recipe.schedule
    return section.warmup == 0 and isinstance(section, Constant | Linear | Cosine) and not getattr(section, "final", 0.0)


def own_optimizer(recipe: Recipe) -> bool:
    """Whether Trainer makes this optimizer by itself."""
    return isinstance(recipe.optimizer, AdamW) and not recipe.optimizer.groups


def _arguments(recipe: Recipe, steps_in_all: int, folder: Path, portions: int, bf16: bool) -> TrainingArguments:
    section = recipe.optimizer
    adam: dict[str, Any] = {}
    if isinstance(section, AdamW):
        adam = {"adam_beta1": section.betas[0], "adam_beta2": section.betas[1], "adam_epsilon": section.eps}
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps_in_all,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=portions,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        max_grad_norm=recipe.training.clip_norm or 0.0,
        lr_scheduler_type=recipe.schedule.name if own_schedule(recipe) else "constant",
        optim="adamw_torch",
        bf16=bf16,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        **adam,
    )


def _portions(documents: list[Document], count: int) -> list[dict[str, Tensor]]:
    """So many micro-batches of successive documents, one a row."""
    edges = [round(len(documents) * part / count) for part in range(count + 1)]
    return [_batch(documents[first:end]) for first, end in pairwise(edges)]


def _batch(documents: list[Document]) -> dict[str, Tensor]:
    """As Trainer's collators make them: labels stand where their tokens do, padding behind."""
    length = max(len(tokens) for tokens, _ in documents)

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return torch.stack([nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])

    return {
        "input_ids": padded([tokens for tokens, _ in documents], 0),
        "attention_mask": padded([torch.ones_like(tokens) for tokens, _ in documents], 0),
        "labels": padded([labels.roll(1) for _, labels in documents], IGNORED),
    }


def _saved(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What their ``save_pretrained`` writes."""
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
def logits_of_saved(recipe: Recipe, facts: Facts, saved: Path, begin: Mapping[str, Tensor], document: Tensor) -> Tensor:
    """What transformers, with PEFT, makes of a document by the model that our run saved, (length, vocabulary) float32."""
    with quiet():
        if isinstance(recipe.adapt, Lora):
            from peft import PeftModel

            base = _base(recipe, facts, {name: value for name, value in begin.items() if "lora_" not in name})
            model: nn.Module = PeftModel.from_pretrained(base, str(saved))
        else:
            model = LlamaForCausalLM.from_pretrained(saved, dtype=torch.float32)
        return model.eval().float()(input_ids=document[None]).logits[0]
