"""The section ``data``: text, images, tables, series or arrays, and how they become batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainwright.recipe.base import AtLeastZero, Fraction, Positive, Section

Part = Annotated[float, Field(gt=0.0, lt=1.0)]


class Fields(Section):
    """Names of the columns; by default they are found."""

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None


class TextData(Section):
    """Text for a language model."""

    kind: Literal["text"] = "text"
    source: str = Field(
        description="python-docstrings, or a .jsonl .json .csv .parquet .txt file, or a folder saved by Hugging Face datasets"
    )
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "txt", "datasets"] = "auto"
    fields: Fields = Field(default_factory=Fields)
    supervise: Literal["completions", "all"] = Field(
        "completions", description="which tokens count in the loss; raw text is always supervised whole"
    )
    sequence_length: Positive = 512
    too_long: Literal["truncate", "drop", "split"] = "truncate"
    packing: bool = Field(True, description="several documents in a row; each attends to itself and restarts its positions")
    held_out: Part | str | None = Field(0.05, description="fraction of the documents, or a file, that is never trained on")
    limit: Positive | None = Field(None, description="use at most so many documents of each source")
    cache: str | None = Field(None, description="folder of tokenised data; default ~/.cache/trainwright")


class Augment(Section):
    """Random changes of training images, drawn from (seed, position) for each image of each step."""

    pad_crop: Annotated[int, Field(ge=0)] = Field(0, description="pad by so many pixels, then crop back at a random place")
    resized_crop: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="crop a random part of at least this share of the area, and resize it back"
    )
    flip: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="probability of mirroring left to right")
    flip_vertical: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="probability of mirroring top to bottom")
    translate: Fraction = Field(0.0, description="shift by at most this fraction of each side")
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="turn by at most so many degrees")
    scale: Fraction = Field(0.0, description="enlarge or shrink by at most this fraction")
    brightness: Fraction = Field(0.0, description="factor from 1 - b to 1 + b; likewise contrast and saturation")
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.0, description="shift by at most this fraction of the colour circle")
    erase: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="probability of blanking a box (Zhong et al. 2017)")
    mixup: AtLeastZero = Field(0.0, description="alpha of the Beta distribution (Zhang et al. 2018); 0: off")
    cutmix: AtLeastZero = Field(0.0, description="alpha of the Beta distribution (Yun et al. 2019); 0: off")


class ArrayBase(Section):
    """What images, tables, series and arrays have in common."""

    held_out: Part | str | None = Field(
        "auto",
        description="fraction of the data, or a file or folder, that is never trained on and chooses the best; "
        "auto: the source's own validation split, else 0.1",
    )
    test: Part | str | None = Field(
        "auto",
        description="fraction, file or folder that neither trains nor chooses; auto: the source's own, if any",
    )
    limit: Positive | None = Field(None, description="use at most so many training samples")
    normalize: bool = Field(True, description="to mean 0 and standard deviation 1, fitted on the training split")


class ImageData(ArrayBase):
    """Images with a class each, or with a mask each."""

    kind: Literal["images"]
    source: str = Field(
        "digits",
        description="digits, digit-strokes (segmentation), fashion-mnist, a folder (a folder a class, or images/ and masks/), "
        "a folder of IDX files, or a .npz file",
    )
    size: Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = Field(
        None, description="resize to so many pixels (a side, or [height, width]); null: as they are"
    )
    colour: Literal["auto", "gray", "rgb"] = Field("auto", description="auto: as the first image is")
    unreadable: Literal["error", "skip"] = Field("error", description="what to do with a damaged image")
    augment: Augment = Field(default_factory=Augment)
    workers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="processes that decode what doesn't fit in memory; default: what the machine allows"
    )
    in_memory: Literal["auto", "yes", "no"] = Field("auto", description="auto: where all images take less than a third of it")


class TableData(ArrayBase):
    """Rows of a table: typed columns, one of which is to be predicted."""

    kind: Literal["table"]
    source: str = Field(description="diabetes, breast-cancer, wine, iris, or a .csv .parquet or .npz file")
    target: str | None = Field(None, description="the column to predict; built-in sources know theirs")
    columns: list[str] | None = Field(None, description="the columns to predict from; default: all others")
    types: dict[str, Literal["number", "category"]] = Field(
        default_factory=dict, description="of columns; by default numbers where every cell is one"
    )
    missing: Literal["error", "mean", "drop"] = Field("error", description="what to do with empty cells")


class SeriesData(ArrayBase):
    """Windows of a time series: the past predicts what follows. The splits follow each other in time."""

    kind: Literal["series"]
    source: str = Field("sunspots", description="sunspots, or a .csv .parquet or .npz file, in order of time")
    columns: list[str] | None = Field(None, description="the columns to look at; default: all numbers")
    target: list[str] | str | None = Field(None, description="what to forecast; default: all columns")
    window: Positive = Field(24, description="steps of the past that the model sees")
    horizon: Positive = Field(1, description="steps ahead that it forecasts")


class ArrayData(ArrayBase):
    """NumPy arrays of any shape: one sample a row."""

    kind: Literal["arrays"]
    source: str = Field(description="a .npz file, with the arrays inputs and targets, or x and y")


Data = Annotated[TextData | ImageData | TableData | SeriesData | ArrayData, Field(discriminator="kind")]
