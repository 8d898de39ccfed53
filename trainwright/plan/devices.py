"""What accelerators can do, from public specifications; the CPU of this machine is measured instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from trainwright.recipe import InputError, nearest

GIB = 2**30
MAKERS = ("nvidia", "amd", "apple", "geforce", "instinct", "tesla")


@dataclass(frozen=True)
class Curves:
    """What ``calibrate`` measured: rates over sizes, each with its dtype in the name. Seconds, bytes and FLOP a second.

    ``products``: for a dtype the sizes along each axis and the rates, (sizes, sizes, sizes) for m, n, k as nested lists.
    ``rates``: for names such as "attention.forward.bfloat16" sizes and the rates there. Attention and "packed": FLOP/s over
    the FLOP of a call; "convolution": FLOP/s over FLOP for each byte; "elementwise.float32", "dear", "copy", "pool": bytes a
    second over the bytes of a call.
    ``together``: for a dtype, how many times as long operators take in a step as by themselves.
    """

    products: Mapping[str, tuple[list[int], list[list[list[float]]]]]
    rates: Mapping[str, tuple[list[float], list[float]]]
    overhead: float
    together: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """One device as torch sees it: bytes, seconds, bytes a second, FLOP a second.

    ``flops`` holds dense matrix products, of each dtype that the hardware has; "tf32" is what float32 convolutions use.
    Links count one direction of one device. ``sustained`` is the share of the peak that large products reach.
    """

    name: str
    aliases: tuple[str, ...]
    memory: int
    flops: Mapping[str, float]
    bandwidth: float
    units: int  # that share the tiles of a product: streaming multiprocessors, compute units, cores
    node_size: int
    node_link: float
    link: float  # between nodes, of one device
    source: str
    sustained: float = 0.7
    launch: float = 6e-6  # of the host for one operator
    node_latency: float = 3e-6
    latency: float = 10e-6  # between nodes
    curves: Curves | None = field(default=None, repr=False)


def find(name: str, say: Callable[[str], None] = lambda text: None) -> Device:
    """A device by its name or what torch calls it: "h100", "A100 40GB", "NVIDIA H100 80GB HBM3"; "cpu" is measured at once.

    Raises:
        InputError: nothing is called that; the nearest names are given.
    """
    wanted = _plain(name)
    if wanted == "cpu":
        from trainwright.plan import this_cpu  # it needs torch, which the table doesn't

        return this_cpu.cpu(say)
    if (found := _by_name().get(wanted)) is not None:
        return found
    known = [word for device in TABLE for word in (device.name, *device.aliases)]
    raise InputError(f"--device {name}: no such device{nearest(name.lower(), [*known, 'cpu'])}; known are {', '.join(names())}")


def names() -> list[str]:
    """Of all devices, in the order of the table."""
    return [*(device.name for device in TABLE), "cpu"]


def _by_name() -> dict[str, Device]:
    return {_plain(alias): device for device in TABLE for alias in (device.name, *device.aliases)}


def _plain(name: str) -> str:
    """Letters and digits alone, without the maker."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "".join(word for word in words if word not in MAKERS)


def _rates(
    half: float, single: float, tf32: float | None = None, bfloat16: bool = True, eight: float | None = None
) -> dict[str, float]:
    """TFLOP/s into FLOP/s by dtype."""
    found = {"float16": half, "bfloat16": half if bfloat16 else None, "float32": single, "tf32": tf32, "float8": eight}
    return {name: rate * 1e12 for name, rate in found.items() if rate is not None}


def _apple(name: str, cores: int, megahertz: int, gibibytes: int, gigabytes_a_second: float) -> Device:
    """Cores x 128 multiply-adds x clock; half precision is no faster. Of the largest memory that is sold, Metal gives 3/4."""
    # Clocks: hmc-tech.com, "GPU" pages of each; sizes and bandwidths: the overview that ``source`` names.
    rate = cores * 128 * 2 * megahertz / 1e6
    return Device(
        name, (), gibibytes * GIB * 3 // 4, _rates(rate, rate), gigabytes_a_second * 1e9, cores, 1, 5e9, 1.25e9, APPLE,
        launch=15e-6, latency=50e-6,
    )  # fmt: skip


def _memory(mebibytes: int) -> int:
    """What the driver shows, which is a little less than what is advertised."""
    return mebibytes * 2**20


NVIDIA = "https://www.nvidia.com/en-us/data-center"
H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
A100 = f"{NVIDIA}/a100"
ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
RTX50 = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
APPLE = "https://akunu.prabod.rathnayaka.me/part1/ch05-chip-generations.html"
AMD = "https://www.amd.com/en/products/accelerators/instinct"

# Peaks are dense: datasheets that give "with sparsity" are halved. ``sustained``: nine tenths of the best product that was
# measured (github.com/stas00/ml-engineering, compute/accelerator, "Maximum Achievable Matmul FLOPS"): A100 87%, H100 80%,
# MI250X 77%, MI325X 60%, MI300X 51 to 60%; 0.7 where nobody measured. Links between nodes: those of DGX and HGX systems, of
# usual cloud machines for single cards.
TABLE: tuple[Device, ...] = (
    Device("t4", ("tesla t4",), _memory(15360), _rates(65, 8.1, bfloat16=False), 320e9, 40, 4, 16e9, 3.1e9,
           f"{NVIDIA}/tesla-t4"),
    Device("v100-16gb", ("v100", "v100-sxm2-16gb"), _memory(16160), _rates(125, 15.7, bfloat16=False), 900e9, 80, 8, 150e9,
           6.25e9, f"{NVIDIA}/v100"),
    Device("v100-32gb", ("v100-sxm2-32gb",), _memory(32510), _rates(125, 15.7, bfloat16=False), 900e9, 80, 8, 150e9, 6.25e9,
           f"{NVIDIA}/v100"),
    Device("a10", (), _memory(23028), _rates(125, 31.2, 62.5), 600e9, 72, 8, 32e9, 6.25e9, f"{NVIDIA}/products/a10-gpu"),
    Device("a10g", (), _memory(23028), _rates(70, 35, 35), 600e9, 80, 8, 32e9, 6.25e9,
           "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"),
    Device("l4", (), _memory(23034), _rates(121, 30.3, 60, eight=242.5), 300e9, 58, 8, 32e9, 6.25e9, f"{NVIDIA}/l4"),
    Device("l40s", (), _memory(46068), _rates(362, 91.6, 183, eight=733), 864e9, 142, 8, 32e9, 25e9, f"{NVIDIA}/l40s"),
    Device("a100-40gb", ("a100-sxm4-40gb",), _memory(40960), _rates(312, 19.5, 156), 1555e9, 108, 8, 300e9, 25e9, A100, 0.78),
    Device("a100-80gb", ("a100", "a100-sxm4-80gb"), _memory(81920), _rates(312, 19.5, 156), 2039e9, 108, 8, 300e9, 25e9,
           A100, 0.78),
    Device("h100-sxm", ("h100", "h100-80gb", "h100-80gb-hbm3", "h100-sxm5"), _memory(81559), _rates(989.4, 66.9, 494.7,
           eight=1978.9), 3350e9, 132, 8, 450e9, 50e9, H100, 0.72),
    Device("h100-pcie", (), _memory(81559), _rates(756, 51, 378, eight=1513), 2039e9, 114, 8, 64e9, 50e9, H100),
    Device("h200", ("h200-sxm",), _memory(143771), _rates(989.4, 66.9, 494.7, eight=1978.9), 4800e9, 132, 8, 450e9, 50e9,
           f"{NVIDIA}/h200", 0.72),
    Device("b200", ("b200-sxm",), _memory(183359), _rates(2250, 75, 1125, eight=4500), 7700e9, 148, 8, 900e9, 50e9,
           f"{NVIDIA}/hgx"),
    Device("gb200", ("gb200-nvl72",), _memory(189471), _rates(2500, 80, 1250, eight=5000), 8000e9, 148, 72, 900e9, 50e9,
           f"{NVIDIA}/gb200-nvl72"),
    Device("rtx3090", ("3090",), _memory(24576), _rates(71, 35.6, 35.6), 936e9, 82, 4, 32e9, 1.25e9, AMPERE),
    Device("rtx4090", ("4090",), _memory(24564), _rates(165.2, 82.6, 82.6, eight=330.3), 1008e9, 128, 4, 32e9, 1.25e9, ADA),
    Device("rtx5090", ("5090",), _memory(32607), _rates(209.5, 104.8, 104.8, eight=419), 1792e9, 170, 4, 64e9, 1.25e9, RTX50),
    # Of the two dies of a card: each is a device of its own to torch, and there are eight in a node.
    Device("mi250x", ("mi250x-gcd",), _memory(65520), _rates(191.5, 47.9), 1638e9, 110, 8, 100e9, 12.5e9,
           f"{AMD}/mi200/mi250x.html", 0.69, 8e-6),
    Device("mi300x", (), _memory(196592), _rates(1307.4, 163.4, 653.7, eight=2614.9), 5300e9, 304, 8, 448e9, 50e9,
           f"{AMD}/mi300/mi300x.html", 0.5, 8e-6),
    Device("mi325x", (), _memory(262128), _rates(1307.4, 163.4, 653.7, eight=2614.9), 6000e9, 304, 8, 448e9, 50e9,
           f"{AMD}/mi300/mi325x.html", 0.54, 8e-6),
    Device("mi355x", (), _memory(294896), _rates(2516.6, 157.3, eight=5033.2), 8000e9, 256, 8, 537e9, 50e9,
           f"{AMD}/mi350/mi355x.html", 0.6, 8e-6),
    _apple("m1", 8, 1296, 16, 68.3),
    _apple("m1-pro", 16, 1296, 32, 200),
    _apple("m1-max", 32, 1296, 64, 400),
    _apple("m2", 10, 1398, 24, 100),
    _apple("m2-pro", 19, 1398, 32, 200),
    _apple("m2-max", 38, 1398, 96, 400),
    _apple("m3", 10, 1398, 24, 100),
    _apple("m3-pro", 18, 1398, 36, 150),
    _apple("m3-max", 40, 1398, 128, 400),
    _apple("m4", 10, 1578, 32, 120),
    _apple("m4-pro", 20, 1578, 64, 273),
    _apple("m4-max", 40, 1678, 128, 546),
)  # fmt: skip
