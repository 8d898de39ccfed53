"""What must be known of a recipe's model to say what a proof may compare: looked up once, on a model without values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trainwright import build, filling, frozen, language
from trainwright.built import Built
from trainwright.models import decoder, pretrained
from trainwright.recipe import TextData
from trainwright.verify import dropping
from trainwright.verify.job import Job


@dataclass(frozen=True)
class Facts:
    """Of the plain model.

    batch_norm  whether a sample's output depends on the others of its micro-batch
    kernels     whether there are operations of our own
    packs       whether documents share rows
    drops       the layers with dropout
    learning    how many numbers learn
    narrow      whether streaming keeps tables in fewer bits than what is computed in, and multiplies by parts of them
    """

    built: Built
    batch_norm: bool
    kernels: bool
    packs: bool
    drops: tuple[str, ...]
    learning: int
    narrow: bool

    def micro_batch(self, job: Job) -> int:
        """Rows at once in a process."""
        training, data = job.recipe.training, job.recipe.parallel.data
        assert data != "auto"
        if isinstance(job.recipe.data, TextData):
            return language.micro_batch_size(job.recipe, self.built.device, data)
        return training.micro_batch_size or training.batch_size // data

    def compiles(self, job: Job) -> bool:
        """Whether a job compiles."""
        return filling.compiles(job.recipe, self.built)

    def precision(self, job: Job) -> str:
        """What ``auto`` means here."""
        return self.built.precision if job.recipe.precision == "auto" else job.recipe.precision


def look(job: Job) -> Facts:
    """Build the model of a recipe, without values, in this process alone.

    Raises:
        InputError: the recipe is refused.
    """
    built = build.assemble_model(job.recipe, build.shape_of(job.recipe))
    source = built.source if job.recipe.memory.frozen == "stream" else None
    text = isinstance(job.recipe.data, TextData)
    return Facts(
        built=built,
        batch_norm=any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in built.model.modules()),
        kernels=isinstance(built.model, decoder.Decoder),
        packs=text and language.text_of(job.recipe).packing,
        drops=tuple(dropping.layers(built.model)),
        learning=sum(p.numel() for p in built.model.parameters() if p.requires_grad),
        narrow=source is not None and bool(frozen.narrow_tables(built.model, pretrained.open_weights(source))),
    )
