"""The peers of the image benchmark: the tutorials' PyTorch loop, and Lightning; one run a process.

    python -m benchmarks.peer_images --case vgg16 --steps 14 --warmup 4 --work FOLDER
    python -m benchmarks.peer_images --case mlp_epoch --workers 2 --steps 1876 --warmup 938 --work FOLDER
    python -m benchmarks.peer_images --case mlp_epoch --lightning bf16-mixed --steps 1876 --warmup 938 --work FOLDER

loop       float32; torchvision's FashionMNIST with ToTensor and Normalize through a shuffling DataLoader; for vgg16, batches
           cut from normalised tensors in memory
lightning  all images normalised in memory, whole batches cut from them, fused AdamW, and ``barebones``, which turns off
           logger, checkpoints, progress bar, model summary and sanity checks; with --channels-last the convolutions' layout
           is the one that they are fast in

One JSON document on stdout (see ``images.summary``), everything else on stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from benchmarks.images import BATCH, CLASSES, EPOCH, LEARNING_RATE, SIDE, VGG_FILE, child_parser, summary
from benchmarks.machine import peak_resident_bytes, resident_bytes

MEAN, STD = 0.2860, 0.3530  # of Fashion-MNIST's training images
Batches = list[tuple[Tensor, Tensor]] | DataLoader


def make_model(case: str) -> nn.Module:
    """The model of a case, as one writes it by hand."""
    if case == "vgg16":
        return torchvision.models.vgg16(num_classes=CLASSES)
    if case == "mlp_epoch":
        hidden = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, 10))
    first = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))


def make_optimizer(case: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """SGD with momentum for vgg16, else AdamW."""
    if case == "vgg16":
        return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE[case], momentum=0.9, **options)
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE[case], weight_decay=0.0, **options)


def random_batches(work: Path, size: int) -> Batches:
    """The benchmark's random images, normalised, contiguous (size, 3, 224, 224) float32 and (size,) int64."""
    with np.load(work / VGG_FILE) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    inputs = images.permute(0, 3, 1, 2).float().div_(255)
    mean, std = inputs.mean((0, 2, 3), keepdim=True), inputs.std((0, 2, 3), keepdim=True)
    inputs = inputs.sub_(mean).div_(std).contiguous()
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def usual_loader(work: Path, size: int, workers: int) -> Batches:
    """torchvision's dataset as tutorials load it."""
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    images = torchvision.datasets.FashionMNIST(str(work), train=True, transform=prepare)
    return DataLoader(images, batch_size=size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from batches


def train_loop(options: argparse.Namespace, model: nn.Module) -> tuple[list[float], list[float]]:
    """The clock and the losses of the loop that tutorials show."""
    case, size = options.case, BATCH[options.case]
    batches = random_batches(options.work, size) if case == "vgg16" else usual_loader(options.work, size, options.workers)
    assert case == "vgg16" or len(batches) == EPOCH
    optimizer = make_optimizer(case, model)
    clock, losses = [time.perf_counter()], []
    model.train()
    for _, (inputs, labels) in zip(range(options.steps), endless(batches), strict=False):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        clock.append(time.perf_counter())
    return clock, torch.stack(losses).tolist()


class BatchSlices(Dataset):
    """All images normalised in memory; its items are whole batches."""

    def __init__(self, work: Path, layout: torch.memory_format) -> None:
        images = torchvision.datasets.FashionMNIST(str(work), train=True)
        self.inputs = images.data.float().div_(255).sub_(MEAN).div_(STD).unsqueeze(1)
        self.labels, self.layout = images.targets, layout

    def __getitem__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[ids].contiguous(memory_format=self.layout), self.labels[ids]


class Shuffled(Sampler[Tensor]):
    """The numbers of each batch, in a new order each epoch."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randperm(self.count).split(self.size))


def train_lightning(options: argparse.Namespace, model: nn.Module) -> tuple[list[float], list[float]]:
    """The clock and the losses of Lightning's Trainer."""
    import lightning.pytorch as lightning  # slow to import, and only wanted here

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    clock: list[float] = []
    losses: list[Tensor] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.to(memory_format=layout)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            inputs, labels = batch
            loss = F.cross_entropy(self.model(inputs), labels)
            losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(options.case, self.model, fused=True)

        def on_train_start(self) -> None:
            clock.append(time.perf_counter())

        def on_train_batch_end(self, *_: Any) -> None:
            clock.append(time.perf_counter())

    data = BatchSlices(options.work, layout)
    loader = DataLoader(data, batch_size=None, sampler=Shuffled(len(data.labels), BATCH[options.case]))
    assert len(loader) == EPOCH
    # NOTE: barebones turns off whatever costs time; what it turns off can't be named again beside it.
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, precision=options.lightning, max_epochs=-1, max_steps=options.steps,
        barebones=True, default_root_dir=str(options.work),
    )  # fmt: skip
    trainer.fit(Module(), loader)
    return clock, torch.stack(losses).float().tolist()


def forward_flops() -> int:
    """Operations of vgg16's forward of one image; on the meta device nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        make_model("vgg16")(torch.empty(1, 3, SIDE, SIDE))
    return int(counted.get_total_flops())


def parse_options() -> argparse.Namespace:
    parser = child_parser("Peers of the image benchmark: one JSON on stdout")
    parser.add_argument("--workers", type=int, default=0, help="processes of the loop's DataLoader")
    parser.add_argument("--lightning", choices=["32-true", "bf16-mixed"], help="Lightning in this precision; else the loop")
    parser.add_argument("--channels-last", action="store_true", help="Lightning's model and images in that order")
    options = parser.parse_args()
    if options.lightning and options.case == "vgg16":
        parser.error("--lightning is for the epochs only")
    return options


def main() -> None:
    memory_before = resident_bytes()
    options = parse_options()
    # Libraries print where they like: only the answer goes to stdout.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.manual_seed(0)
    model = make_model(options.case)
    clock, losses = (train_lightning if options.lightning else train_loop)(options, model)
    report = {
        **summary(clock, losses, options.warmup),
        "memory_growth_bytes": peak_resident_bytes() - memory_before,
        "parameters": sum(p.numel() for p in model.parameters()),
        **({"forward_flops": forward_flops()} if options.case == "vgg16" else {}),
    }
    print(json.dumps(report), file=answer, flush=True)


if __name__ == "__main__":
    main()
