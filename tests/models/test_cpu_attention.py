"""The CPU kernel against the plain masked definition in float64."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainwright import native
from trainwright.models import cpu_attention
from trainwright.models.attention import masked_attention
from trainwright.models.cpu_attention import packed_attention

Shape = tuple[int, int, int, int, int]
Attention = Callable[..., Tensor]
NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture(scope="module")
def kernel() -> None:
    if not cpu_attention.available():
        pytest.skip(cpu_attention.reason())


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def problem(rows: int, length: int, heads: int, group: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, as the decoder makes them: views of (rows, length, heads, ...)."""
    generator = torch.Generator().manual_seed(rows + length + heads + group + size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).transpose(1, 2)

    wide, narrow = (rows, length, heads, group, size), (rows, length, heads, size)
    return normal(*wide), normal(*narrow), normal(*narrow), normal(*wide)


def run(attention: Attention, inputs: Sequence[Tensor], documents: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v, from these and the output's gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attention(*leaves, documents)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs[3])


def exact(inputs: Sequence[Tensor], documents: Tensor) -> tuple[Tensor, ...]:
    return run(masked_attention, [x.double() for x in inputs], documents)


def assert_close_to_exact(inputs: Sequence[Tensor], documents: Tensor) -> None:
    for name, ours, truth in zip(NAMES, run(packed_attention, inputs, documents), exact(inputs, documents), strict=True):
        # The gradients of q and k vanish in documents of one token: hence the 1.
        bound = 1e-5 * max(1.0, truth.abs().max().item())
        assert (ours - truth).abs().max() <= bound, name


CASES = {
    "dense": ((2, 512, 3, 3, 64), offsets(512, 512)),
    "ragged": ((2, 400, 3, 3, 64), offsets(1, 150, 1, 33, 215, 64, 1, 335)),
    "several chunks": ((1, 1300, 2, 3, 64), offsets(1100, 200)),
    "many chunks and blocks": ((1, 1531, 1, 1, 32), offsets(1531)),
    "one head a group": ((3, 200, 2, 1, 128), offsets(200, 77, 123, 199, 1)),
    "four heads a group": ((2, 300, 2, 4, 80), offsets(300, 129, 171)),
    "one key head": ((1, 280, 1, 9, 64), offsets(31, 249)),
    "smallest head": ((2, 65, 2, 2, 16), offsets(65, 65)),
    "largest head": ((1, 130, 1, 5, 256), offsets(130)),
    "an empty document": ((1, 90, 1, 3, 64), offsets(40, 0, 50)),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", CASES)
def test_float32_is_exact_to_1e_5(case: str) -> None:
    shape, documents = CASES[case]
    assert_close_to_exact(problem(*shape, torch.float32), documents)


def assert_as_good_as_sdpa(inputs: Sequence[Tensor], documents: Tensor) -> None:
    truth = exact(inputs, documents)
    theirs = run(masked_attention, inputs, documents)
    for name, ours, sdpa, x in zip(NAMES, run(packed_attention, inputs, documents), theirs, truth, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - x).norm() <= 2 * (sdpa - x).norm(), name


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_errs_no_more_than_twice_what_sdpa_does(case: str) -> None:
    shape, documents = CASES[case]
    assert_as_good_as_sdpa(problem(*shape, torch.bfloat16), documents)


@pytest.mark.usefixtures("kernel")
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_bfloat16_by_float_products_where_the_machine_has_no_others() -> None:
    shape, documents = CASES["ragged"]
    with torch.backends.mkldnn.flags(enabled=False):
        assert_as_good_as_sdpa(problem(*shape, torch.bfloat16), documents)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Shape, Tensor]:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    cuts = draw(st.sets(st.integers(1, rows * length - 1), max_size=12)) if rows * length > 1 else set()
    shape = (
        rows,
        length,
        draw(st.integers(1, 2)),
        draw(st.sampled_from((1, 2, 3, 4, 6))),
        draw(st.sampled_from((16, 48))),
    )
    bounds = sorted({0, rows * length} | cuts | {row * length for row in range(rows)})
    return shape, torch.tensor(bounds, dtype=torch.int32)


@pytest.mark.usefixtures("kernel")
@settings(max_examples=60, deadline=None)
@given(partitions())
def test_any_partition_into_documents(case: tuple[Shape, Tensor]) -> None:
    shape, documents = case
    assert_close_to_exact(problem(*shape, torch.float32), documents)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_change_the_bits(dtype: torch.dtype) -> None:
    shape, documents = CASES["ragged"]
    inputs = problem(*shape, dtype)
    plain = run(packed_attention, inputs, documents)
    layouts = {
        "heads before tokens": [x.contiguous() for x in inputs],
        "part of a wider row": [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in inputs],
        "head_dim not contiguous": [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs],
        "group not contiguous": [x.transpose(2, -2).contiguous().transpose(2, -2) for x in inputs],
    }
    for name, changed in layouts.items():
        for ours, expected in zip(run(packed_attention, changed, documents), plain, strict=True):
            assert torch.equal(ours, expected), name


@pytest.mark.usefixtures("kernel")
def test_an_expanded_gradient() -> None:
    q, k, v, grad = problem(*CASES["ragged"][0], torch.float32)
    documents = CASES["ragged"][1]
    ours = run(packed_attention, (q, k, v, torch.ones(()).expand_as(grad)), documents)
    expected = run(packed_attention, (q, k, v, torch.ones_like(grad)), documents)
    assert all(map(torch.equal, ours, expected))


@pytest.mark.usefixtures("kernel")
def test_results_lie_token_by_token_in_memory() -> None:
    inputs = [x.contiguous() for x in problem(2, 40, 3, 3, 64, torch.bfloat16)]
    for x in run(packed_attention, inputs, offsets(40, 40)):
        assert x.transpose(1, 2).is_contiguous()


# Which tokens a NaN in token 170 of a document 100..400 must reach: those that see it, and whom these see.
NAN_REACHES = {
    "q": {"out": (170, 171), "dq": (170, 171), "dk": (100, 171), "dv": (100, 171)},
    "k": {"out": (170, 400), "dq": (170, 400), "dk": (100, 400), "dv": (100, 400)},
    "v": {"out": (170, 400), "dq": (170, 400), "dk": (100, 400)},
    "grad": {"dq": (170, 171), "dk": (100, 171), "dv": (100, 171)},
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", NAN_REACHES)
def test_nan_propagates_and_stays_in_its_document(source: str, dtype: torch.dtype) -> None:
    inputs = problem(1, 450, 2, 3, 64, dtype)
    inputs[list(NAN_REACHES).index(source)][:, :, 170] = float("nan")
    results = dict(zip(NAMES, run(packed_attention, inputs, offsets(100, 300, 50)), strict=True))
    for name, x in results.items():
        assert x[:, :, :100].isfinite().all(), name
        assert x[:, :, 400:].isfinite().all(), name
        first, last = NAN_REACHES[source].get(name, (0, 0))
        assert x[:, :, first:last].isnan().all(), name


@pytest.mark.usefixtures("kernel")
def test_infinite_scores_give_nan_not_a_number_from_nowhere() -> None:
    q, k, v, _ = problem(1, 40, 1, 3, 64, torch.float32)
    q[:, :, 7] = float("inf")
    out = packed_attention(q, k, v, offsets(40))
    assert out[:, :, 7].isnan().all()
    assert not out[:, :, :7].isnan().any()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("kernel", "threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_with_any_number_of_threads_and_each_time(dtype: torch.dtype) -> None:
    documents = offsets(1100, 1, 299, 100, 1300)
    inputs = problem(2, 1400, 2, 3, 64, dtype)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(run(packed_attention, inputs, documents))
    for again in results[1:]:
        assert all(map(torch.equal, again, results[0]))


@pytest.mark.usefixtures("kernel")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    documents = offsets(20, 44, 64)
    q, k, v, grad = problem(2, 64, 2, 3, 16, dtype)
    operators = torch.ops.trainwright
    out, lse = operators.packed_attention(q, k, v, documents)
    torch.library.opcheck(operators.packed_attention_backward.default, (grad, q, k, v, out, lse, documents))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(operators.packed_attention.default, (*leaves, documents))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    def block(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        assert cpu_attention.available()
        assert cpu_attention.supports(q)
        out = packed_attention(q * 2, k, v, documents)
        return out.transpose(1, 2).flatten(2) + 1

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length, documents in ((64, offsets(20, 44, 64)), (48, offsets(48, 48))):
        q, k, v, grad = problem(2, length, 2, 3, 64, torch.float32)
        inputs = (q, k, v, grad.transpose(1, 2).flatten(2))
        assert all(map(torch.equal, run(compiled, inputs, documents), run(block, inputs, documents)))


@pytest.mark.usefixtures("kernel")
def test_compiles_with_inductor() -> None:
    def block(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        return packed_attention(q.sin(), k, v, documents).transpose(1, 2).flatten(2).sin()

    torch._dynamo.reset()
    q, k, v, grad = problem(1, 40, 2, 3, 16, torch.float32)
    inputs, documents = (q, k, v, grad.transpose(1, 2).flatten(2)), offsets(15, 25)
    compiled = torch.compile(block, fullgraph=True)
    for ours, expected in zip(run(compiled, inputs, documents), run(block, inputs, documents), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("documents", "said"),
    [
        (offsets(10, 10), "rows \\* length"),
        (offsets(30, 10), "cross"),
        (offsets(20, 20).long(), "int32"),
        (torch.tensor([0, 30, 20, 40], dtype=torch.int32), "cross"),
        (torch.tensor([5, 40], dtype=torch.int32), "from 0"),
        (torch.tensor([], dtype=torch.int32), "from 0"),
    ],
)
def test_refuses_documents_that_would_read_out_of_bounds(documents: Tensor, said: str) -> None:
    q, k, v, _ = problem(2, 20, 1, 3, 16, torch.float32)
    with pytest.raises(ValueError, match=said):
        packed_attention(q, k, v, documents)


def test_refuses_what_does_not_fit() -> None:
    q, k, v, _ = problem(2, 20, 2, 3, 16, torch.float32)
    documents = offsets(20, 20)
    for bad in [(q, k[:, :1], v), (q, k, v[:, :, :10]), (q, k.bfloat16(), v), (q.double(), k, v), (q[..., :8], k, v)]:
        with pytest.raises(ValueError):
            packed_attention(*bad, documents)
    assert not cpu_attention.supports(q[..., :8])
    assert not cpu_attention.supports(q.to("meta"))
    assert cpu_attention.supports(q)


# --- where it can't be built, and for other processors ------------------------


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As on a machine where nothing is built yet; its cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_attention._load.cache_clear()
    yield tmp_path / "trainwright"
    cpu_attention._load.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "why"), [("/nonexistent", "/nonexistent"), ("sh -c 'echo an error: no >&2; exit 1'", "an error: no")]
)
def test_without_a_working_compiler(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str, why: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert not cpu_attention.available()
        assert not cpu_attention.available()
    assert why in cpu_attention.reason()
    assert len(caplog.messages) == 1
    assert "\n" not in caplog.messages[0]
    assert list(unbuilt.iterdir()) == []
    q, k, v, _ = problem(1, 20, 1, 1, 16, torch.float32)
    with pytest.raises(RuntimeError, match="not available"):
        packed_attention(q, k, v, offsets(20))


def test_importing_builds_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    code = "import trainwright.models.cpu_attention"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("kernel")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have other vectors")
@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4"])
def test_processors_with_shorter_vectors_or_no_bfloat16(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feature = {"x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}[level]
    if feature not in native._cpu_flags().split():
        pytest.skip(f"this processor has no {feature}")
    flags = [f"-march={level}" if flag.startswith("-march") else flag for flag in native.FLAGS]
    monkeypatch.setattr(native, "FLAGS", tuple(flags))
    cpu_attention._load.cache_clear()
    try:
        assert cpu_attention.available(), cpu_attention.reason()
        shape, documents = CASES["ragged"]
        assert_close_to_exact(problem(*shape, torch.float32), documents)
        assert_as_good_as_sdpa(problem(*shape, torch.bfloat16), documents)
    finally:
        cpu_attention._load.cache_clear()
