"""Compiled blocks on tensors without values: fewer results are written, the same products are made."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from tests import small, tiny
from trainwright.parallel.mesh import Axis
from trainwright.plan.compiling import Compiler, _key, _sum_in_products
from trainwright.plan.kernels import Kernels
from trainwright.plan.rehearsal import processes, rehearse
from trainwright.plan.tracing import Traced

TEXT = {"training__batch_size": 4, "training__micro_batch_size": 4}
KINDS = ("all_gather", "reduce_scatter")
aten = torch.ops.aten


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("compiled")
    return [rehearse(tiny.recipe(tmp, **TEXT, run__compile=how)) for how in ("off", "on")]


def products(found):
    return sum(w.flops * w.calls for w in found.counts.all_works() if w.kind == "product")


def test_products_stay_and_elementwise_work_joins(pair):
    plain, compiled = pair
    assert products(compiled) == products(plain) > 0
    assert "fused" in {work.operator for work in compiled.counts.all_works()}
    assert "fused" not in {work.operator for work in plain.counts.all_works()}
    calls = [sum(work.calls for work in found.counts.all_works()) for found in pair]
    moved = [sum(work.calls * work.bytes for work in found.counts.all_works()) for found in pair]
    assert calls[1] < 0.8 * calls[0]
    assert moved[1] < moved[0]


def test_a_compiled_step_holds_less(pair):
    plain, compiled = pair
    assert compiled.parts["activations"] < plain.parts["activations"]
    assert abs(compiled.resting - plain.resting) < 2**14, "parameters and states are the same"
    assert {phase for phase, _ in compiled.timeline} >= {"forward", "backward", "optimizer"}


def test_equal_blocks_are_traced_once_and_rehearsals_share(tmp_path):
    compiler = Compiler()
    recipe = tiny.recipe(tmp_path, **TEXT, run__compile="on")
    one = rehearse(recipe, compiler=compiler)
    traced = len(compiler._functions)
    two = rehearse(recipe, compiler=compiler)
    assert len(compiler._functions) == traced
    assert one.peak.total == two.peak.total
    assert one.counts.all_works() == two.counts.all_works()


@pytest.mark.parametrize("layers", ["decoder", "lora"])
def test_one_trace_does_for_each_way_of_checkpointing(tmp_path, layers):
    adapt = {"adapt": {"method": "lora", "rank": 4, "dropout": 0.1}} if layers == "lora" else {}
    shared = Compiler(any_mode=True)
    for mode in ("none", "selective", "full", "offload"):
        recipe = tiny.recipe(tmp_path, **TEXT, run__compile="on", memory__checkpointing=mode, **adapt)
        alone, together = rehearse(recipe, compiler=Compiler()), rehearse(recipe, compiler=shared)
        if mode == "none":
            traced = len(shared._traces)
        assert (together.peak.total, together.parts, together.timeline) == (alone.peak.total, alone.parts, alone.timeline)
        assert together.counts.all_works() == alone.counts.all_works()
    assert len(shared._traces) == traced


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_results_that_nobody_reads_need_not_be_made(tmp_path, monkeypatch, mode):
    recipe = tiny.recipe(tmp_path, **TEXT, run__compile="on", memory={"checkpointing": mode})
    fast = rehearse(recipe)
    monkeypatch.setattr(Kernels, "_known", lambda self: set())
    every = rehearse(recipe)
    assert (fast.peak.total, fast.parts, fast.resting) == (every.peak.total, every.parts, every.resting)
    assert fast.timeline == every.timeline
    assert fast.counts.all_works() == every.counts.all_works()


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_blocks_with_dropout_draw_in_their_kernels(tmp_path, mode):
    keys = {"adapt": {"method": "lora", "rank": 4, "dropout": 0.1}, "memory": {"checkpointing": mode}}
    plain, drawn = (
        rehearse(tiny.recipe(tmp_path, **TEXT, run__compile="on", **{**keys, "adapt": {**keys["adapt"], "dropout": p}}))
        for p in (0.0, 0.1)
    )
    assert drawn.peak.total >= plain.peak.total
    assert drawn.peak.total > plain.peak.total or mode != "none", "dropped inputs are kept"
    assert not drawn.counts.unknown
    fused = [sum(work.calls for work in found.counts.all_works() if work.operator == "fused") for found in (plain, drawn)]
    assert fused[1] > fused[0], "masks are drawn"


def test_recurrent_layers_stay_as_they_are(tmp_path):
    """``torch.compile`` leaves them out of its graphs."""
    keys = {"model": {"architecture": "lstm"}, "data": {"kind": "series"}, "loss": {"name": "mse"}}
    plain, compiled = (rehearse(small.recipe(tmp_path, run__compile=how, **keys)) for how in ("off", "on"))
    recurrent = [
        [work for work in found.counts.all_works() if "rnn" in work.operator or "lstm" in work.operator]
        for found in (plain, compiled)
    ]
    assert recurrent[0] == recurrent[1] != []


def test_what_is_computed_again_is_counted_again(tmp_path, pair):
    full = rehearse(tiny.recipe(tmp_path, **TEXT, run__compile="on", memory={"checkpointing": "full"}))
    assert products(full) > products(pair[1])
    assert full.parts["activations"] < pair[1].parts["activations"]


def selected(tmp):
    return rehearse(tiny.recipe(tmp, **TEXT, run__compile="on", memory={"checkpointing": "selective"}))


def test_a_checkpointed_graph_is_cut_where_the_policy_says(tmp_path, pair):
    """As in a compiled run: products are kept, and what only elementwise work needs is computed again in the backward graph."""
    kept = selected(tmp_path)
    assert products(kept) == products(pair[1])
    assert kept.parts["activations"] < pair[1].parts["activations"]


def test_what_is_shared_between_rehearsals_knows_how_blocks_are_checkpointed(tmp_path):
    compiler, found = Compiler(), []
    for mode in ("full", "selective", "none", "full"):
        recipe = tiny.recipe(tmp_path, **TEXT, run__compile="on", memory={"checkpointing": mode})
        found.append(rehearse(recipe, compiler=compiler).peak.total)
    assert found[0] == found[3] < found[1] < found[2]


@pytest.mark.parametrize("mode", ["none", "full"])
def test_blocks_that_processes_share_send_what_uncompiled_ones_do(tmp_path, mode):
    """A block that is computed again sends again, but for what no gradient needs: its last sum."""
    compiler, sums = Compiler(), []
    for tensor, compile_ in ((2, "off"), (2, "on"), (1, "on")):
        keys = {"parallel__tensor": tensor, "memory": {"checkpointing": mode}, "run__compile": compile_}
        found = rehearse(tiny.recipe(tmp_path, **TEXT, **keys), tensor, compiler=compiler)
        assert not found.counts.unknown
        sums.append({kind: sum(m.calls * m.bytes for m in found.counts.all_messages() if m.kind == kind) for kind in KINDS})
        assert products(found) > 0
    if mode == "none":
        assert sums[0] == sums[1]
    assert 0 < sums[1]["all_gather"] <= sums[0]["all_gather"]
    assert sums[2] == dict.fromkeys(KINDS, 0)


def test_what_reads_the_same_inputs_is_one_kernel():
    """Both results of an input are made before the product that needs the first, as inductor lays them out."""

    def function(x, weight):
        first = x.sin()
        return first @ weight, (x + 1).exp().clone() @ weight

    graph = make_fx(function)(torch.randn(8, 8), torch.randn(8, 8))
    names = [node.name for node in Kernels(graph, Compiler())._nodes if node.op == "call_function"]
    assert names.index("clone") < names.index("mm") < names.index("mm_1")
    assert names.index("sin") < names.index("mm")


def test_what_reads_the_same_inputs_waits_for_what_one_of_them_needs_besides():
    """A result of an input and of a product is made in one kernel with another result of that input, behind the product."""

    def function(x, weight):
        first = (x + 1).exp().clone()
        product = x @ weight
        return first @ weight, (x * product).sin().clone() @ weight

    graph = make_fx(function)(torch.randn(8, 8), torch.randn(8, 8))
    names = [node.name for node in Kernels(graph, Compiler())._nodes if node.op == "call_function"]
    assert names.index("mm") < names.index("clone") < names.index("mm_1")
    assert names.index("clone_1") < names.index("mm_1")


def test_a_graph_serves_any_number_of_documents_but_no_other_shape():
    block, x = torch.nn.Linear(4, 4), torch.zeros(2, 4)
    three, five = (torch.zeros(count, dtype=torch.int32) for count in (3, 5))
    assert _key(block, [], [x, three], []) == _key(block, [], [x, five], [])
    assert _key(block, [], [x, three], []) != _key(block, [], [x[:1], three], [])
    assert _key(block, [], [x, three], []) != _key(block, [], [x, three.long()], [])


def test_a_graph_serves_the_processes_that_it_names():
    x = torch.zeros(2, 4)

    def key(group):
        block = torch.nn.Linear(4, 4)
        block.axis = Axis(2, 0, group)
        return _key(block, [], [x], [])

    with processes(4, 0):
        near, far = dist.new_group([0, 1]), dist.new_group([0, 2])
        assert key(near) == key(near)
        assert key(near) != key(far)


def test_intermediate_work_is_done_again_for_each_product_that_needs_it():
    """A square is no result of its own, though one product needs it before another kernel and one after."""

    def function(x, weight):
        square = x.square()
        first = (square + 1) @ weight
        return first, (square * first) @ weight

    graph = make_fx(function)(torch.randn(8, 8), torch.randn(8, 8))
    laid_out = Kernels(graph, Compiler())
    assert "pow_1" not in {node.name for node in laid_out._written}


def test_what_replaces_an_input_takes_no_memory_of_its_own():
    """As the softmax that is written into its logits."""

    def function(x):
        y = (x - 1).exp()
        sums = y.sum(-1)
        x.copy_(y)
        return sums

    graphs = []
    like = torch.randn(8, 8)
    Traced(function, (like,), {}).cut(lambda node: None, None, lambda graph, inputs: graphs.append(graph) or graph)
    (graph,) = graphs
    assert len(graph.graph.output_node().args[0]) == 1, "the input's new values are no result"
    assert {node.target for node in Kernels(graph, Compiler())._written} == {aten.sum.dim_IntList, aten.copy_.default}


def test_a_sum_of_products_is_one_product():
    def function(a, b, c):
        return a @ b + a @ c, a @ b + 1

    graph = make_fx(function)(*torch.randn(3, 8, 8))
    _sum_in_products(graph.graph)
    names = [node.target._schema.name for node in graph.graph.nodes if node.op == "call_function"]
    assert names.count("aten::addmm") == 1
    assert names.count("aten::mm") == 2
    a, b, c = torch.randn(3, 8, 8)
    graph.recompile()
    for got, wanted in zip(graph(a, b, c), function(a, b, c), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_trace_takes_no_memory(tmp_path, monkeypatch):
    """Whatever a graph gives has no values: a real tensor would be as large as that of the run."""
    kinds, plain = set(), Kernels.run

    def run(self, inputs):
        result = plain(self, inputs)
        kinds.update(type(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result

    monkeypatch.setattr(Kernels, "run", run)
    rehearse(tiny.recipe(tmp_path, **TEXT, run__compile="on"))
    assert kinds == {FakeTensor}
