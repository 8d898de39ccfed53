"""The part of ``build`` that is about text: tokenizer, batches, the objective of a language model, samples."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trainwright import flops, losses, saving
from trainwright.built import Built, Forward, Part
from trainwright.data import loader, packing, sampler, text
from trainwright.loop import Sample
from trainwright.memory import precision
from trainwright.metrics.language import LANGUAGE_MODEL, language_model
from trainwright.models import decoder, pretrained
from trainwright.parallel import collectives
from trainwright.recipe import CrossEntropy, InputError, Recipe, TextData
from trainwright.sampling import Sampling, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # enough for efficient products on each


@dataclass(frozen=True)
class Data:
    """Tokenised documents, and the tokenizer."""

    splits: text.TextSplits
    tokenizer: PreTrainedTokenizerFast


def prepare(recipe: Recipe, built: Built, splits: text.TextSplits | None, progress: Callable[[str, int], None]) -> Data:
    """Tokenise ``recipe.data``, unless ``splits`` are given.

    Raises:
        InputError: the data is wrong, or doesn't suit the model.
    """
    tokenizer = find_tokenizer(recipe, built.source)
    splits = splits or text.prepare(
        text_of(recipe),
        tokenizer,
        model_length=built.config.get("max_position_embeddings"),
        seed=recipe.run.seed,
        progress=partial(progress, "tokenised"),
    )
    check_packing(recipe, built.model)
    return Data(splits, tokenizer)


def join(recipe: Recipe, built: Built, data: Data, compiler: Callable[[Any], Any] | None) -> Part:
    """Batches, objective and metrics of a language model, whose loss ``compiler`` compiles, if there is one."""
    splits, tokenizer, model = data.splits, data.tokenizer, built.model
    batches = make_loader(recipe, splits.train, tokenizer, built)
    held_out = held_out_batches(recipe, splits.held_out, batches)
    sums = sums_of(built, recipe, compiler)
    speaks = isinstance(model, decoder.Decoder)
    return Part(
        batches=batches,
        forward=forward_of(built),
        sums=sums,
        count=lambda batch: batch.supervised,
        splits={"held_out": held_out} if held_out else {},
        measure=partial(_measure, sums, built),
        measures=LANGUAGE_MODEL,
        shape=lambda batch: tuple(batch.tokens.shape),
        save=partial(saving.save_model, recipe, built, saving.Beside(built.config, tokenizer)),
        unit="tokens",
        fingerprint=_fingerprint(splits),
        flops=flops.counter(flops.decoder_work(model, model.config)) if isinstance(model, decoder.Decoder) else None,
        samples=samples(built, tokenizer, splits.held_out) if speaks and splits.held_out else None,
        notes=data_notes(splits, batches),
    )


def _fingerprint(splits: text.TextSplits) -> str:
    """SHA-256 over the lengths of all documents."""
    total = hashlib.sha256()
    for documents in filter(None, (splits.train, splits.held_out)):
        total.update(np.ascontiguousarray(documents.offsets).tobytes())
    return total.hexdigest()


def _measure(
    sums: Callable[[Tensor, Any], Tensor],
    built: Built,
    outputs: Iterable[tuple[loader.TextBatch, Tensor]],
    progress: Callable[[int], None],
) -> dict[str, float]:
    found = torch.zeros(2, dtype=torch.float64)
    for batch, output in outputs:
        found += torch.tensor([sums(output, batch).item(), batch.supervised], dtype=torch.float64)
        progress(batch.size)
    total, count = collectives.sum_(found.to(built.device), built.mesh.data).tolist()
    return language_model(total, int(count))


def text_of(recipe: Recipe) -> TextData:
    """The section ``data`` of a language model's recipe."""
    assert isinstance(recipe.data, TextData)
    return recipe.data


def find_tokenizer(recipe: Recipe, source: pretrained.Source | None) -> PreTrainedTokenizerFast:
    """The tokenizer that the recipe names, else the one beside the weights."""
    if recipe.model.tokenizer:
        return pretrained.load_tokenizer(recipe.model.tokenizer)
    if source is None:
        raise InputError(
            "model.tokenizer: text data need a tokenizer, and without model.pretrained there is none; name a folder"
        )
    return pretrained.load_tokenizer(source)


def forward_of(built: Built) -> Forward:
    """A text batch to a model's hidden states, or to a user's module's logits."""
    takes_documents = _takes_documents(built.model)

    def forward(module: nn.Module, batch: loader.TextBatch, hidden: Tensor | None = None) -> Tensor:
        torch._dynamo.mark_dynamic(batch.documents, 0)  # else each number of documents would be compiled anew
        tokens, positions = (x.to(built.device, non_blocking=True) for x in (batch.tokens, batch.positions))
        first = tokens if hidden is None else hidden
        with precision.context(built.precision, built.device):
            outputs: Tensor = module(first, positions, batch.documents) if takes_documents else module(first)
        return outputs

    return forward


def sums_of(built: Built, recipe: Recipe, compiler: Callable[[Any], Any] | None) -> Callable[[Tensor, Any], Tensor]:
    """What the forward gave of a text batch to the loss, summed over the supervised tokens."""
    assert isinstance(recipe.loss, CrossEntropy)
    section = recipe.loss
    split = compiler(losses.split_softmax) if compiler else losses.split_softmax
    head_weight: Callable[[], Tensor] | None = getattr(built.model, "head_weight", None)
    shard = _shard_of(built)
    plain = recipe.run.kernels == "off" and shard is None

    def sums(outputs: Tensor, batch: loader.TextBatch) -> Tensor:
        labels = batch.labels.to(built.device, non_blocking=True)
        with precision.context(built.precision, built.device):
            if head_weight is not None and plain:
                return losses.logits_cross_entropy(outputs @ head_weight().to(outputs.dtype).T, labels, section)[0]
            if head_weight is not None:
                return losses.token_cross_entropy(outputs, head_weight(), labels, section, split, shard)[0]
            return losses.logits_cross_entropy(outputs, labels, section)[0]

    return sums


def _shard_of(built: Built) -> losses.Shard | None:
    """This process's part of the head, where tensor ranks divide the vocabulary."""
    head, group = built.division.head, built.mesh.tensor.group
    return losses.Shard(head.start[0], head.shape[0], group) if head is not None and group is not None else None


def speaking(built: Built, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[int], Sampling], Iterator[int]]:
    """How the decoder as it stands goes on after a prompt's tokens."""
    assert isinstance(built.model, decoder.Decoder)
    declared = built.config.get("eos_token_id")
    stops = {*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id} - {None}
    context = partial(precision.context, built.precision, built.device)
    return partial(tokens, built.model, stops=stops, dtype=built.compute_dtype, context=context)


def samples(
    built: Built, tokenizer: PreTrainedTokenizerFast, held_out: packing.Documents | None
) -> Callable[[int], list[Sample]]:
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


def check_packing(recipe: Recipe, model: nn.Module) -> None:
    if text_of(recipe).packing and not _takes_documents(model):
        raise InputError(
            f"data.packing: {recipe.model.architecture} takes no documents in its forward, so packed documents would attend to "
            "each other; set data.packing: false, or take (tokens, positions, documents)"
        )


def _rows(recipe: Recipe, documents: packing.Documents) -> list:
    if text_of(recipe).packing:
        return packing.pack(documents.lengths, text_of(recipe).sequence_length)
    return packing.one_per_row(documents.lengths)


def micro_batch_size(recipe: Recipe, device: torch.device, processes: int) -> int:
    """What the recipe says, else the largest divisor of a process's part of the batch with at most ``MICRO_BATCH_TOKENS``."""
    part = recipe.training.batch_size // processes
    if recipe.training.micro_batch_size:
        return recipe.training.micro_batch_size
    fitting = max(1, MICRO_BATCH_TOKENS.get(device.type, 1024) // text_of(recipe).sequence_length)
    return max(n for n in range(1, part + 1) if part % n == 0 and n <= fitting)


def make_loader(
    recipe: Recipe, documents: packing.Documents, tokenizer: PreTrainedTokenizerFast, built: Built
) -> loader.Loader:
    data = built.mesh.data
    return loader.Loader(
        documents,
        _rows(recipe, documents),
        length=text_of(recipe).sequence_length,
        batch_size=recipe.training.batch_size,
        micro_batch_size=micro_batch_size(recipe, built.device, data.size),
        seed=recipe.run.seed,
        pad_id=_pad_id(tokenizer),
        share=sampler.Share(data.index, data.size),
    )


def _pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Any valid id will do: padding is a document of its own and predicts nothing."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def held_out_batches(
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
        share=batches.share,
    )


def data_notes(splits: text.TextSplits, batches: loader.Loader) -> list[str]:
    """What became of the documents, for people."""
    notes = []
    for name, documents in (("train", splits.train), ("held-out", splits.held_out)):
        if documents is not None:
            counts = {key: value for key, value in dataclasses.asdict(documents.counts).items() if value}
            notes.append(f"{name} data: " + ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items()))
    filled = splits.train.counts.tokens / (len(batches.rows) * batches.length)
    return [*notes, f"packed into {len(batches.rows):,} rows of {batches.length} tokens, {filled:.1%} full"]
