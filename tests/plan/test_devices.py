"""The table of devices against those of torch and Lightning, and what finds a name."""

import pytest
import torch

from trainwright.plan import devices
from trainwright.plan.devices import TABLE, find
from trainwright.recipe import InputError

lightning_flops = pytest.importorskip("lightning.fabric.utilities.throughput")._CUDA_FLOPS
torch_devices = pytest.importorskip("torch._inductor.analysis.device_info")._device_mapping


@pytest.mark.parametrize(
    ("name", "torch_name", "sparse"), [("h100", "NVIDIA H100", 2), ("a100", "NVIDIA A100", 1), ("mi300x", "AMD MI300X", 1)]
)
def test_torch_has_the_same_figures(name, torch_name, sparse):
    theirs = torch_devices[torch_name]
    for dtype in (torch.float16, torch.bfloat16):
        ours = find(name).flops[str(dtype).removeprefix("torch.")]
        assert ours == pytest.approx(theirs.tops[dtype] * 1e12 / sparse, rel=0.005)
    assert find(name).flops["float32"] == pytest.approx(theirs.tops[torch.float32] * 1e12, rel=0.005)
    assert find(name).flops["tf32"] == pytest.approx(theirs.tops["torch.tf32"] * 1e12 / sparse, rel=0.005)
    assert find(name).bandwidth == pytest.approx(theirs.dram_bw_gbs * 1e9)
    assert find(name).memory == pytest.approx(theirs.dram_gb * 2**30, rel=0.03)


@pytest.mark.parametrize(
    ("name", "lightning_name"),
    [("h100-sxm", "h100 sxm"), ("h100-pcie", "h100 pcie"), ("a100", "a100"), ("l4", "l4"), ("t4", "t4"), ("a10", "a10g")],
)
def test_lightning_has_the_same_figures(name, lightning_name):
    theirs = lightning_flops[lightning_name]
    for dtype, rate in theirs.items():
        known = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", "tfloat32": "tf32"}
        if dtype in known:
            assert find(name).flops[known[dtype]] == pytest.approx(rate, rel=0.01), dtype
    assert ("bfloat16" in find(name).flops) == (torch.bfloat16 in theirs)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("h100", "h100-sxm"),
        ("H100", "h100-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("a100 80gb", "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Apple M3 Max", "m3-max"),
        ("m3max", "m3-max"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
    ],
)
def test_names_that_people_and_torch_give(said, found):
    assert find(said).name == found


def test_an_unknown_name_says_the_nearest():
    with pytest.raises(InputError) as caught:
        find("h10")
    message = str(caught.value)
    assert message.startswith("--device h10: no such device (did you mean 'h100'?); known are t4, ")
    assert "rtx5090" in message
    assert "cpu" in message
    with pytest.raises(InputError, match=r"--device toaster: no such device; known are"):
        find("toaster")
    with pytest.raises(InputError, match="no such device"):
        find("")


@pytest.mark.parametrize("device", TABLE, ids=lambda device: device.name)
def test_the_table_is_sound(device):
    assert find(device.name) is device
    assert all(find(alias) is device for alias in device.aliases)
    assert device.source.startswith("https://")
    assert 10 * 2**30 < device.memory < 300 * 2**30
    assert device.flops["float16"] >= device.flops["float32"] > 1e12
    assert device.flops.get("bfloat16", device.flops["float16"]) == device.flops["float16"]
    assert 50 < device.flops["float16"] / device.bandwidth * 2 < 1200, (
        "FLOP a number of two bytes: dense, and in the right unit"
    )
    assert device.link <= device.node_link < device.bandwidth
    assert 0.4 <= device.sustained <= 0.8
    assert 1e-6 < device.launch < 1e-4


def test_no_name_means_two_devices():
    owners = {}
    for device in TABLE:
        for word in (device.name, *device.aliases):
            assert owners.setdefault(devices._plain(word), device.name) == device.name
