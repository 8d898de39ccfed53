"""Read this first: the one place where a recipe becomes a program.

``assemble`` lists the techniques in the order in which they are applied. train, evaluate, inspect and generate all come here.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainwright import flops, losses, metrics, optim, saving
from trainwright.adapt import full, lora
from trainwright.adapt import partial as partial_tuning
from trainwright.data import loader, packing, text
from trainwright.loop import Run, Sample, accumulate
from trainwright.memory import precision
from trainwright.models import decoder, pretrained
from trainwright.models.contract import Change
from trainwright.recipe import InputError, Lora, Partial, Recipe, nearest
from trainwright.sampling import Sampling, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # enough for efficient products on each


@dataclass(frozen=True)
class Built:
    """A model with its techniques applied, and where it came from."""

    model: nn.Module
    changes: list[Change]
    config: dict[str, Any]
    source: pretrained.Source | None
    precision: precision.Precision
    device: torch.device


def assemble(recipe: Recipe, *, progress: Callable[[str, int], None] = lambda what, done: None) -> Run:
    """The whole program of a recipe.

    Args:
        progress: called with what is being prepared and how much of it is done.

    Raises:
        InputError: a setting that is wrong, or has no effect, with these data and this model.
    """
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    built = assemble_model(recipe)
    tokenizer = find_tokenizer(recipe, built.source)
    splits = text.prepare(
        recipe.data,
        tokenizer,
        model_length=built.config.get("max_position_embeddings"),
        seed=recipe.run.seed,
        progress=partial(progress, "tokenised"),
    )
    _check_packing(recipe, built.model)
    batches = _loader(recipe, splits.train, tokenizer, built.device)
    steps = recipe.training.steps or max(1, round((recipe.training.epochs or 1) * batches.steps_per_epoch))
    rate = optim.schedule(recipe.schedule, recipe.optimizer.learning_rate, steps)
    materialise(built, recipe)
    compiled = compile_blocks(built, recipe)
    groups = optim.parameter_groups(built.model.named_parameters(), recipe.optimizer.weight_decay)
    trained = [p for p in built.model.parameters() if p.requires_grad]
    objective = text_objective(built, recipe)
    return Run(
        recipe=recipe,
        model=built.model,
        changes=[*built.changes, compiled],
        device=built.device,
        optimizer=optim.make_optimizer(groups, recipe.optimizer),
        rate=rate,
        steps=steps,
        batch=batches.batch,
        identity=batches.identity,
        objective=objective,
        forward_backward=partial(accumulate, objective),
        clip=partial(optim.clip_, trained, recipe.training.clip_norm),
        held_out=_held_out(recipe, splits.held_out, batches),
        metrics=metrics.language_model,
        flops=flops.counter(flops.decoder_work(built.model, built.model.config)) if _is_decoder(built) else None,
        save=partial(saving.save_model, recipe, built.model, built.config, built.source, tokenizer),
        compute_dtype=compute_dtype(built),
        steps_per_epoch=batches.steps_per_epoch,
        notes=_data_notes(splits, batches),
        samples=_samples(built, tokenizer, splits.held_out) if _is_decoder(built) and splits.held_out else None,
    )


def assemble_model(recipe: Recipe, *, frozen: bool = False) -> Built:
    """The model with its techniques applied, in their order; a decoder still on the meta device, without values.

    Args:
        frozen: nothing will learn, so that everything may be stored in the compute dtype.
    """
    place = choose_device(recipe.run.device)
    source = pretrained.locate(recipe.model.pretrained) if recipe.model.pretrained else None
    model, config = _make(recipe, source)
    kind = precision.choose(recipe.precision, place)
    changes = [_adapt(model, recipe)]  # which parameters learn; new ones (LoRA) appear here
    if frozen:
        model.requires_grad_(False)
    changes.append(precision.apply(model, kind))  # after it, because frozen parameters are stored in less
    return Built(model, changes, config, source, kind, place)


def _make(recipe: Recipe, source: pretrained.Source | None) -> tuple[nn.Module, dict[str, Any]]:
    """The plain model and its config.json; a decoder on the meta device, a user's module where it makes itself."""
    section = recipe.model
    if section.architecture != "decoder":
        return _user_module(section.architecture, section.options, recipe.run.seed), {}
    decoder.check_options(section.options)
    if source is None and not section.options:
        raise InputError("model: give model.pretrained (weights to start from) or model.options (the keys of a config.json)")
    config = {**(pretrained.read_config(source) if source else {"model_type": "llama"}), **section.options}
    with torch.device("meta"):
        return decoder.Decoder(decoder.read_config(config, source.shown if source else "model.options")), config


def _user_module(name: str, options: dict[str, Any], seed: int) -> nn.Module:
    """Call the user's ``module:function``; modules beside the recipe's working folder are found."""
    if ":" not in name:
        raise InputError(
            f"model.architecture: {name!r} is unknown{nearest(name, ['decoder'])}; give 'decoder' or 'module:function'"
        )
    module_name, function_name = name.split(":", 1)
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"model.architecture: {error}; start in the folder that holds {module_name}.py, or install it") from None
    finally:
        sys.path.pop(0)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"model.architecture: {module_name} has no function {function_name!r}{nearest(function_name, dir(module))}")
    torch.manual_seed(seed)
    try:
        made = function(**options)
    except TypeError as error:
        raise InputError(f"model.options don't fit {name}: {error}") from None
    if not isinstance(made, nn.Module):
        raise InputError(f"model.architecture: {name} returned {type(made).__name__}, not an nn.Module")
    return made


def _adapt(model: nn.Module, recipe: Recipe) -> Change:
    section = recipe.adapt
    if isinstance(section, Lora):
        return lora.apply(model, section)
    if isinstance(section, Partial):
        return partial_tuning.apply(model, section)
    return full.apply(model, section)


def choose_device(name: str) -> torch.device:
    """``auto`` is the accelerator that torch finds, else the CPU."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"run.device: {name!r} is no device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"run.device: {name!r}, but torch finds no CUDA device here; use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"run.device: {name!r}, but torch finds no Metal device here; use auto or cpu")
    return device


def load_model(recipe: Recipe) -> Built:
    """The model of a recipe with its values, for use alone: nothing learns, everything is stored in the compute dtype."""
    built = assemble_model(recipe, frozen=True)
    materialise(built, recipe)
    built.model.eval()
    return built


def materialise(built: Built, recipe: Recipe) -> None:
    """Give every parameter its values: the weights', the seed's for what they lack, those of an adapter to go on from."""
    model, device = built.model, built.device
    if built.source is not None:
        report = pretrained.load_into(
            model, pretrained.open_weights(built.source), match=recipe.model.match, device=device, ignore=lora.is_factor
        )
        built.changes.insert(0, Change("pretrained", report.describe()))
    unmade = pretrained.allocate(model, device)
    model.to(device)
    generator = torch.Generator(device).manual_seed(recipe.run.seed)
    if isinstance(model, decoder.Decoder):
        model.initialize({name for name in unmade if not lora.is_factor(name)}, generator)
    lora.initialize(model, generator)
    start = getattr(recipe.adapt, "start", None)
    if start is not None:
        load = lora.load if isinstance(recipe.adapt, Lora) else partial_tuning.load
        load(model, Path(start), pretrained.fingerprint(built.source) if built.source else None)


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether this run compiles: as it says, or where a compiler is found."""
    if recipe.run.compile == "auto":
        return device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None
    return recipe.run.compile == "on"


def compile_blocks(built: Built, recipe: Recipe) -> Change:
    """Compile the forward of each block; equal blocks share one graph. The module and its names stay."""
    if not compiles(recipe, built.device):
        reason = "no C++ compiler found" if recipe.run.compile == "auto" else "run.compile is off"
        return Change("compile", f"not compiled: {reason}")
    blocks = built.model.blocks() if isinstance(built.model, decoder.Decoder) else [built.model]
    # torch warns of a CUDA toolkit without a GPU, which is no news to who trains on the CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for block in blocks:
        block.forward = torch.compile(block.forward)
    return Change("compile", f"{len(blocks)} block{'s' * (len(blocks) > 1)} compiled; equal ones share one graph")


def find_tokenizer(recipe: Recipe, source: pretrained.Source | None) -> PreTrainedTokenizerFast:
    """The tokenizer that the recipe names, else the one beside the weights."""
    if recipe.model.tokenizer:
        return pretrained.load_tokenizer(recipe.model.tokenizer)
    if source is None:
        raise InputError("model.tokenizer: text data need a tokenizer, and without model.pretrained there is none; name a folder")
    return pretrained.load_tokenizer(source)


def text_objective(built: Built, recipe: Recipe) -> Callable[[Any], tuple[Tensor, int]]:
    """A text batch to its summed loss and the number of supervised tokens."""
    model, takes_documents = built.model, _takes_documents(built.model)
    split = torch.compile(losses.split_softmax, dynamic=True) if compiles(recipe, built.device) else losses.split_softmax
    head_weight: Callable[[], Tensor] | None = getattr(model, "head_weight", None)

    def objective(batch: loader.TextBatch) -> tuple[Tensor, int]:
        batch = batch.to(built.device)
        torch._dynamo.mark_dynamic(batch.documents, 0)  # else each number of documents would be compiled anew
        with precision.context(built.precision, built.device):
            inputs = (batch.tokens, batch.positions, batch.documents) if takes_documents else (batch.tokens,)
            out = model(*inputs)
            if head_weight is not None:
                return losses.token_cross_entropy(out, head_weight(), batch.labels, recipe.loss, split)
            return losses.logits_cross_entropy(out, batch.labels, recipe.loss)

    return objective


def speaking(built: Built, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[int], Sampling], Iterator[int]]:
    """How the decoder as it stands goes on after a prompt's tokens."""
    assert isinstance(built.model, decoder.Decoder)
    declared = built.config.get("eos_token_id")
    stops = {*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id} - {None}
    context = partial(precision.context, built.precision, built.device)
    return partial(tokens, built.model, stops=stops, dtype=compute_dtype(built), context=context)


def compute_dtype(built: Built) -> torch.dtype:
    """What products are made in."""
    return torch.bfloat16 if built.precision == "bf16" else torch.float32


def _samples(built: Built, tokenizer: PreTrainedTokenizerFast, held_out: packing.Documents | None) -> Callable[[int], list[Sample]]:
    """The likeliest answers to the first held-out prompts."""

    def sample(count: int) -> list[Sample]:
        assert held_out is not None
        going_on = speaking(built, tokenizer)
        found = []
        for prompt, expected in held_out.prompts(count):
            answer = list(going_on(prompt, Sampling(max_tokens=96, temperature=0.0)))
            found.append(Sample(*(str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt, expected, answer))))
        return found

    return sample


def _takes_documents(model: nn.Module) -> bool:
    return "documents" in inspect.signature(type(model).forward).parameters


def _check_packing(recipe: Recipe, model: nn.Module) -> None:
    if recipe.data.packing and not _takes_documents(model):
        raise InputError(
            f"data.packing: {recipe.model.architecture} takes no documents in its forward, so packed documents would attend to "
            "each other; set data.packing: false, or take (tokens, positions, documents)"
        )


def _rows(recipe: Recipe, documents: packing.Documents) -> list:
    if recipe.data.packing:
        return packing.pack(documents.lengths, recipe.data.sequence_length)
    return packing.one_per_row(documents.lengths)


def micro_batch_size(recipe: Recipe, device: torch.device) -> int:
    """What the recipe says, else the largest divisor of the batch size with at most ``MICRO_BATCH_TOKENS``."""
    training = recipe.training
    if training.micro_batch_size:
        return training.micro_batch_size
    fitting = max(1, MICRO_BATCH_TOKENS.get(device.type, 1024) // recipe.data.sequence_length)
    return max(n for n in range(1, training.batch_size + 1) if training.batch_size % n == 0 and n <= fitting)


def _loader(
    recipe: Recipe, documents: packing.Documents, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> loader.Loader:
    return loader.Loader(
        documents,
        _rows(recipe, documents),
        length=recipe.data.sequence_length,
        batch_size=recipe.training.batch_size,
        micro_batch_size=micro_batch_size(recipe, device),
        seed=recipe.run.seed,
        pad_id=_pad_id(tokenizer),
    )


def _pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Any valid id will do: padding is a document of its own and predicts nothing."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _held_out(
    recipe: Recipe, documents: packing.Documents | None, batches: loader.Loader
) -> Callable[[], Iterable[loader.TextBatch]] | None:
    if documents is None:
        return None
    return partial(
        loader.in_order,
        documents,
        _rows(recipe, documents),
        batches.micro_batch_size,
        length=batches.length,
        pad_id=batches.pad_id,
    )


def _is_decoder(built: Built) -> bool:
    return isinstance(built.model, decoder.Decoder)


def _data_notes(splits: text.TextSplits, batches: loader.Loader) -> list[str]:
    """What became of the documents, for people."""
    notes = []
    for name, documents in (("train", splits.train), ("held-out", splits.held_out)):
        if documents is not None:
            counts = {key: value for key, value in dataclasses.asdict(documents.counts).items() if value}
            notes.append(f"{name} data: " + ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items()))
    filled = splits.train.counts.tokens / (len(batches.rows) * batches.length)
    return [*notes, f"packed into {len(batches.rows):,} rows of {batches.length} tokens, {filled:.1%} full"]
