"""Training on images: trainwright against the plain PyTorch loop and Lightning, processes in turn on one machine.

    python -m benchmarks.images [--json] [--rounds 2] [--steps N] [--warmup N] [--cases vgg16,mlp_epoch,cnn_epoch]

vgg16      random 224x224 images, batch 8, 1000 classes, SGD with momentum; the peer: torchvision's model, the tutorials' loop
mlp_epoch  an epoch of Fashion-MNIST, batch 64, AdamW: 784-512-512-10
cnn_epoch  the same with conv 32 - pool - conv 64 - pool - linear 128 - linear 10

The peers of an epoch are the tutorials' loop (``loop``: the faster of 0 and 2 workers) and Lightning at its best
(``lightning``: the faster of float32 and bf16-mixed); see ``peer_images``. For the convolutions Lightning runs once more with
the model and its images in channels-last order, which its user has to ask for (``lightning_channels_last``).
Ours is what ``trainwright train`` runs, with metrics.jsonl and the progress bar (``seconds``), and beside it ``loop.train``
alone (``seconds_loop``). The second epoch counts, without evaluation; with --steps, the steps after the warm-up, scaled to an
epoch. Every figure is a median over the rounds; a ratio above 1 says that ours is faster, and is taken within a round.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import result_of
from benchmarks.finetune import machine_figures

Found = dict[str, dict[str, Any]]  # what each variant answered in one round

BATCH = {"vgg16": 8, "mlp_epoch": 64, "cnn_epoch": 64}
EPOCH = 938  # steps of 64 that see the 60,000 images
STEPS = {"vgg16": (14, 4), "mlp_epoch": (2 * EPOCH, EPOCH), "cnn_epoch": (2 * EPOCH, EPOCH)}  # (all, of which warm-up)
SHORT_WARMUP = 4  # where --steps cuts an epoch short
LEARNING_RATE = {"vgg16": 1e-3, "mlp_epoch": 1e-3, "cnn_epoch": 1e-3}
CLASSES, SIDE, RANDOM_IMAGES = 1000, 224, 64
VGG_FILE = "vgg16-images.npz"

OURS = {"vgg16": ["loop"], "mlp_epoch": ["fit", "loop"], "cnn_epoch": ["fit", "loop"]}
PLAIN = {"loop_0_workers": ["--workers", "0"], "loop_2_workers": ["--workers", "2"]}
LIGHTNING = {"lightning_fp32": ["--lightning", "32-true"], "lightning_bf16": ["--lightning", "bf16-mixed"]}
CHANNELS_LAST = {f"{name}_channels_last": [*arguments, "--channels-last"] for name, arguments in LIGHTNING.items()}
PEERS: dict[str, dict[str, list[str]]] = {
    "vgg16": {"plain": []},
    "mlp_epoch": PLAIN | LIGHTNING,
    "cnn_epoch": PLAIN | LIGHTNING | CHANNELS_LAST,
}
FORMULA = "operations of an image = 3 * those of the forward of torchvision's vgg16, by torch.utils.flop_counter"


def prepare_data(work: Path) -> None:
    """Random images as a .npz of ours, and the IDX files unpacked where torchvision's FashionMNIST looks for them."""
    from trainwright.data.builtin_images import fashion_folder

    raw = work / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for packed in fashion_folder().glob("*-ubyte.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (RANDOM_IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    names = [str(number) for number in range(CLASSES)]  # so that all classes exist, though few are drawn
    np.savez(work / VGG_FILE, images=images, labels=random.integers(0, CLASSES, RANDOM_IMAGES), classes=names)


def child_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every run takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--case", choices=list(BATCH), required=True)
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps, warm-up included")
    parser.add_argument("--warmup", type=int, required=True, help="first steps that don't count")
    parser.add_argument("--work", type=Path, required=True, help="folder that holds the data; scratch files go there")
    return parser


def summary(clock: Sequence[float], losses: Sequence[float], warmup: int) -> dict[str, Any]:
    """The answer of a run.

    Args:
        clock: seconds at the start of each step, before its batch is fetched, and at the end of the last one.
    """
    assert len(clock) == len(losses) + 1, "a step each between the readings of the clock"
    seconds = np.diff(clock)[warmup:]
    return {
        "counted_steps": len(seconds),
        "mean_step_seconds": float(seconds.mean()),
        "median_step_seconds": float(np.median(seconds)),
        "last_loss": float(np.mean(losses[-100:])),
    }


def run(module: str, case: str, arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One process to its end; its JSON."""
    steps, warmup = plan(case, options)
    shared = ["--case", case, "--steps", str(steps), "--warmup", str(warmup), "--work", str(options.work)]
    result = result_of(module, *shared, *arguments)
    print(f"{module} {case} {' '.join(arguments)}: {1e3 * result['mean_step_seconds']:,.2f} ms a step, "
          f"{result['memory_growth_bytes'] / 2**30:.2f} GiB", file=sys.stderr)  # fmt: skip
    return result


def plan(case: str, options: argparse.Namespace) -> tuple[int, int]:
    """Steps of a case, and how many of them are warm-up."""
    steps, warmup = STEPS[case] if options.steps is None else (options.steps, SHORT_WARMUP)
    warmup = warmup if options.warmup is None else options.warmup
    if not 0 < warmup < steps:
        sys.exit(f"--warmup {warmup} must be above 0 and below the {steps} steps of {case}")
    return steps, warmup


def measure(case: str, options: argparse.Namespace) -> list[Found]:
    """Rounds of ours and each variant of the peers, in turn."""
    rounds = []
    for _ in range(options.rounds):
        found = {f"ours_{caller}": run("own_images", case, ["--caller", caller], options) for caller in OURS[case]}
        found |= {name: run("peer_images", case, arguments, options) for name, arguments in PEERS[case].items()}
        check_parameters(case, found)
        rounds.append(found)
    return rounds


def check_parameters(case: str, found: Found) -> None:
    """The models must be the same ones."""
    counts = {name: result["parameters"] for name, result in found.items()}
    if len(set(counts.values())) > 1:
        sys.exit(f"{case}: the models differ in their number of parameters: {counts}")


def median(rounds: list[Found], variant: str, key: str) -> float:
    return statistics.median(found[variant][key] for found in rounds)


def ratio(rounds: list[Found], above: str, below: str, key: str) -> float:
    return statistics.median(found[above][key] / found[below][key] for found in rounds)


def compare_vgg16(rounds: list[Found], machine: dict[str, Any]) -> dict[str, Any]:
    """The ratio of images a second, and what it comes from."""
    rates = {name: BATCH["vgg16"] / median(rounds, name, "median_step_seconds") for name in rounds[0]}
    operations = 3 * rounds[0]["plain"]["forward_flops"]
    growth = {name: median(rounds, name, "memory_growth_bytes") / 2**30 for name in rounds[0]}
    return {
        "ratio": ratio(rounds, "plain", "ours_loop", "median_step_seconds"),
        "share_of_peak": operations * rates["ours_loop"] / machine["square"],
        "images_per_second": rates["ours_loop"],
        "memory_ratio": ratio(rounds, "ours_loop", "plain", "memory_growth_bytes"),
        "images_per_second_plain": rates["plain"],
        "share_of_peak_plain": operations * rates["plain"] / machine["square"],
        "memory_growth_gib": growth["ours_loop"],
        "memory_growth_gib_plain": growth["plain"],
        **evidence(rounds),
    }


def compare_epoch(rounds: list[Found]) -> dict[str, Any]:
    """Ratios to the faster variant of each peer, and the seconds of an epoch of every variant."""
    seconds = {name: EPOCH * median(rounds, name, "mean_step_seconds") for name in rounds[0]}
    peers = {"loop": PLAIN, "lightning": LIGHTNING, "lightning_channels_last": CHANNELS_LAST}
    measured = {peer: names for peer, names in peers.items() if names.keys() <= seconds.keys()}
    best = {peer: min(names, key=lambda name: seconds[name]) for peer, names in measured.items()}
    counted = rounds[0]["ours_fit"]["counted_steps"]
    return {
        **{f"ratio_{peer}": ratio(rounds, name, "ours_fit", "mean_step_seconds") for peer, name in best.items()},
        "seconds": seconds["ours_fit"],
        "seconds_loop": seconds["ours_loop"],
        "seconds_peers": {name: value for name, value in seconds.items() if not name.startswith("ours_")},
        "best_peers": best,
        "scaled": None if counted == EPOCH else f"from {counted} steps to the {EPOCH} of an epoch",
        **evidence(rounds),
    }


def evidence(rounds: list[Found]) -> dict[str, Any]:
    """That all variants trained the same model, and that it learned."""
    losses = {name: median(rounds, name, "last_loss") for name in rounds[0]}
    return {"parameters": next(iter(rounds[0].values()))["parameters"], "last_losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of each run, warm-up included; default: 14 of vgg16, else two epochs")
    parser.add_argument("--warmup", type=int, help="steps that don't count; default: 4, of two epochs the first")
    parser.add_argument("--cases", default=",".join(BATCH))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "trainwright-bench"))
    options = parser.parse_args()
    cases = options.cases.split(",")
    if unknown := set(cases) - BATCH.keys():
        parser.error(f"--cases: {', '.join(sorted(unknown))} unknown; there are {', '.join(BATCH)}")
    prepare_data(options.work)
    machine = machine_figures()
    results: dict[str, Any] = {}
    for case in cases:
        rounds = measure(case, options)
        results[case] = compare_vgg16(rounds, machine) if case == "vgg16" else compare_epoch(rounds)
    report = {**results, "machine": machine, "formula": FORMULA}
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for name, values in report.items():
        print(name, json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
