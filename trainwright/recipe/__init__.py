"""What the user says: typed sections. ``recipe.file`` reads and writes them.

Nothing heavy is imported here, so that ``trainwright --help`` and ``trainwright schema`` answer at once.
"""

from trainwright.recipe.base import InputError, RunError, Section, nearest
from trainwright.recipe.data import (
    ArrayBase, ArrayData, Augment, Data, Fields, ImageData, SeriesData, TableData, TextData,
)  # fmt: skip
from trainwright.recipe.learning import (
    SGD, Adadelta, Adagrad, Adam, AdamW, BinaryCrossEntropy, Constant, Cosine, CosineRestarts, CrossEntropy, CustomLoss, Dice,
    Exponential, Focal, Group, Huber, InverseSqrt, L1, Linear, Loss, Mse, OneCycle, Optimizer, RMSProp, Schedule, StepDecay,
    SumLoss, Term, TorchOptimizer, Weighted,
)  # fmt: skip
from trainwright.recipe.model import Adapt, Full, Init, Lora, Model, Partial, Scheme
from trainwright.recipe.running import (
    Best, Checkpoint, EarlyStop, Ema, Evaluation, RunOptions, Tracking, Training,
)  # fmt: skip
from trainwright.recipe.task import Task
from trainwright.recipe.whole import Recipe

__all__ = [
    "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adapt", "ArrayBase", "ArrayData", "Augment", "Best", "BinaryCrossEntropy",
    "Checkpoint", "Constant", "Cosine", "CosineRestarts", "CrossEntropy", "CustomLoss", "Data", "Dice", "EarlyStop", "Ema",
    "Evaluation", "Exponential", "Fields", "Focal", "Full", "Group", "Huber", "ImageData", "Init", "InputError", "InverseSqrt",
    "L1", "Linear", "Lora", "Loss", "Model", "Mse", "OneCycle", "Optimizer", "Partial", "RMSProp", "Recipe", "RunError",
    "RunOptions", "Schedule", "Scheme", "Section", "SeriesData", "StepDecay", "SumLoss", "TableData", "Task", "Term",
    "TextData", "TorchOptimizer", "Tracking", "Training", "Weighted", "nearest",
]  # fmt: skip
