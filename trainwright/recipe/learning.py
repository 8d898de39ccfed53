"""The sections ``loss``, ``optimizer`` and ``schedule``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from trainwright.recipe.base import AboveZero, AtLeastZero, Fraction, Positive, Section


class CrossEntropy(Section):
    """Of classes: of a sample, a pixel, or the next token."""

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Fraction = 0.0
    z_loss: AtLeastZero = Field(0.0, description="weight of logsumexp squared (PaLM, section 5)")
    weights: list[AtLeastZero] | Literal["balanced"] | None = Field(
        None, description="one a class; balanced: n / (classes * n of the class), from the training split"
    )
    ignore_index: int | None = Field(None, description="a class that doesn't count")


class BinaryCrossEntropy(Section):
    """Of two classes, with one output; the second class is the positive one."""

    name: Literal["bce"]
    pos_weight: AboveZero | Literal["balanced"] | None = Field(None, description="of class 1; balanced: negatives / positives")
    label_smoothing: Fraction = 0.0


class Focal(Section):
    """Cross-entropy that turns to what is hard (Lin et al. 2017)."""

    name: Literal["focal"]
    gamma: AtLeastZero = 2.0
    weights: list[AtLeastZero] | Literal["balanced"] | None = None


class Mse(Section):
    """Squared error."""

    name: Literal["mse"]


class L1(Section):
    """Absolute error."""

    name: Literal["l1"]


class Huber(Section):
    """Squared near zero, absolute beyond ``delta``."""

    name: Literal["huber"]
    delta: AboveZero = 1.0


class Dice(Section):
    """1 - (2 |A B| + smooth) / (|A| + |B| + smooth) for each image and class, on probabilities."""

    name: Literal["dice"]
    smooth: AtLeastZero = 1.0
    background: bool = Field(True, description="whether class 0 counts, where there are more than two")


class CustomLoss(Section):
    """A loss of one's own: function(outputs, targets, **options) -> one value for each sample, (n,)."""

    name: Literal["custom"]
    function: str = Field(description="module:function")
    predicts: Literal["classes", "binary", "values", "masks"] = Field(description="what the targets are")
    options: dict[str, Any] = Field(default_factory=dict)


Term = Annotated[CrossEntropy | BinaryCrossEntropy | Focal | Mse | L1 | Huber | Dice | CustomLoss, Field(discriminator="name")]


class Weighted(Section):
    """A term of a sum."""

    weight: AboveZero = 1.0
    loss: Term


class SumLoss(Section):
    """A weighted sum of losses; each is a mean of its own."""

    name: Literal["sum"]
    terms: Annotated[list[Weighted], Field(min_length=2)]


Loss = Annotated[
    CrossEntropy | BinaryCrossEntropy | Focal | Mse | L1 | Huber | Dice | CustomLoss | SumLoss, Field(discriminator="name")
]


class Group(Section):
    """Settings of the parameters whose names match; the first group that matches counts."""

    match: Annotated[list[str], Field(min_length=1)]
    learning_rate: AtLeastZero | None = Field(None, description="the peak; follows the same schedule")
    weight_decay: AtLeastZero | None = None


class OptimizerBase(Section):
    """Weight decay is not on norms and biases, unless a group says so."""

    learning_rate: AtLeastZero = 1e-3
    weight_decay: AtLeastZero = 0.0
    groups: list[Group] = Field(default_factory=list)


class AdamW(OptimizerBase):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    learning_rate: AtLeastZero = 2e-4
    weight_decay: AtLeastZero = 0.01
    # YAML has lists only, and a strict tuple would refuse them.
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    eps: AboveZero = 1e-8


class Adam(OptimizerBase):
    """Adam (Kingma and Ba 2015); its weight decay is added to the gradient."""

    name: Literal["adam"]
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    eps: AboveZero = 1e-8


class SGD(OptimizerBase):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"]
    learning_rate: AtLeastZero = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class RMSProp(OptimizerBase):
    """Gradients divided by a running root mean square (Tieleman and Hinton 2012)."""

    name: Literal["rmsprop"]
    alpha: Fraction = 0.99
    momentum: Fraction = 0.0
    centered: bool = False
    eps: AboveZero = 1e-8


class Adagrad(OptimizerBase):
    """Gradients divided by the root of the sum of all squares so far (Duchi et al. 2011)."""

    name: Literal["adagrad"]
    learning_rate: AtLeastZero = 1e-2
    lr_decay: AtLeastZero = 0.0
    initial_accumulator_value: AtLeastZero = 0.0
    eps: AboveZero = 1e-10


class Adadelta(OptimizerBase):
    """Updates in the units of the parameters (Zeiler 2012)."""

    name: Literal["adadelta"]
    learning_rate: AtLeastZero = 1.0
    rho: Fraction = 0.9
    eps: AboveZero = 1e-6


class TorchOptimizer(OptimizerBase):
    """Any other class of torch.optim, by its name."""

    WHOLE_MATRICES: ClassVar = ("Muon", "Adafactor")  # classes that look at more than one number of a parameter at a time

    name: Literal["torch"]
    type: str = Field(description="such as NAdam, RAdam or Adamax")
    arguments: dict[str, Any] = Field(default_factory=dict)


Optimizer = Annotated[AdamW | Adam | SGD | RMSProp | Adagrad | Adadelta | TorchOptimizer, Field(discriminator="name")]

Final = Annotated[float, Field(ge=0, le=1)]


class ScheduleBase(Section):
    """The learning rate as a function of the step alone."""

    warmup: AtLeastZero = Field(0.03, description="below 1 a fraction of all steps, else a number of steps")


class Constant(ScheduleBase):
    name: Literal["constant"]


class Linear(ScheduleBase):
    name: Literal["linear"]
    final: Final = Field(0.0, description="what the rate falls to, as a fraction of the peak")


class Cosine(ScheduleBase):
    name: Literal["cosine"] = "cosine"
    final: Final = Field(0.0, description="what the rate falls to, as a fraction of the peak")


class CosineRestarts(ScheduleBase):
    """SGDR (Loshchilov and Hutter 2017)."""

    name: Literal["cosine_restarts"]
    cycles: Positive = Field(3, description="how many, of which each is longer by growth")
    growth: Annotated[float, Field(ge=1)] = 1.0
    final: Final = 0.0


class StepDecay(ScheduleBase):
    """Times ``factor`` at each milestone."""

    name: Literal["step"]
    milestones: Annotated[list[AboveZero], Field(min_length=1)] = Field(
        [0.5, 0.75], description="below 1 fractions of all steps, else numbers of steps"
    )
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1


class Exponential(ScheduleBase):
    """An even fall in logarithm, to ``final`` times the peak."""

    name: Literal["exponential"]
    final: Annotated[float, Field(gt=0, le=1)] = 0.01


class OneCycle(ScheduleBase):
    """Up and down once by cosines (Smith 2018); its warmup is its rise."""

    name: Literal["one_cycle"]
    warmup: AtLeastZero = 0.3
    start: Annotated[float, Field(gt=0, le=1)] = Field(0.04, description="the first rate, as a fraction of the peak")
    final: Final = Field(4e-6, description="what the rate falls to, as a fraction of the peak")


class InverseSqrt(ScheduleBase):
    """Falls as 1 / sqrt(step) from the end of the warmup (Vaswani et al. 2017)."""

    name: Literal["inverse_sqrt"]


Schedule = Annotated[
    Cosine | Linear | Constant | CosineRestarts | StepDecay | Exponential | OneCycle | InverseSqrt, Field(discriminator="name")
]
