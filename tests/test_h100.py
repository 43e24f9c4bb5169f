"""The checks without a GPU, tools/h100: what they read in generated code, what they count, what mistakes they notice.

Most of it runs with any torch. What compiles for the device needs the environment of `make check-h100`.
"""

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import check
import cost_table
import eager_costs
import fake_flash_attention
import fake_gpu
import generated_code
import inductor_backend
import terms
import uses
import verdicts
from contexts import EDGE_KEYS, Context
from helpers import ROOT, SCRIPT, run_command, tg

H100 = ROOT / "tools/h100"


H100_PYTHON = Path(os.environ.get("H100_PYTHON", ROOT / ".venv-h100/bin/python"))
needs_cuda_build = pytest.mark.skipif(
    not H100_PYTHON.exists(),
    reason="torch's CUDA build is not here: `make check-h100` installs it, or H100_PYTHON names its Python",
)

# The form of what Inductor generates, shortened: a fused kernel, a product, an operator, a hand-written kernel.
GENERATED = """
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', '''
import triton
@triton_heuristics.pointwise(
    size_hints={'x': 1024}, triton_meta={'signature': {'in_ptr0': '*bf16'}},
)
@triton.jit
def triton_poi_fused_add_0(in_ptr0, in_ptr1, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    pass
''', device_str='cuda')

mlp_kernel_0 = async_compile.triton('mlp_kernel', '''
@triton.jit
def mlp_kernel(x, up, square, M, N: tl.constexpr):
    pass
''', device_str='cuda')

class Runner:
    def call(self, args):
        primals_1, primals_2, rsqrt = args
        args.clear()
        assert_size_stride(primals_1, (s0, 512), (512, 1))
        with torch.cuda._DeviceGuard(0):
            buf0 = empty_strided_cuda((s0, 512), (512, 1), torch.bfloat16)
            # Topologically Sorted Source Nodes: [add], Original ATen: [aten.add]
            triton_poi_fused_add_0.run(primals_1, rsqrt, buf0, 512*s0, stream=stream0)
            del rsqrt
            buf1 = empty_strided_cuda((s0, 256), (256, 1), torch.float32)
            extern_kernels.mm(reinterpret_tensor(buf0, (s0, 8), (512, 1), 0), primals_2, out=buf1)
            del primals_2
            buf2 = torch.ops.flash.forward.default(reinterpret_tensor(buf0, (s0, 8, 64), (512, 64, 1), 0), 2048, True)
            buf3 = buf2[0]
            assert_size_stride(buf3, (s0, 8, 64), (512, 64, 1), 'torch.ops.flash.forward.default')
            del buf2
            buf4 = reinterpret_tensor(buf0, (s0, 512), (512, 1), 0); del buf0  # reuse
            mlp_kernel_0.run(buf3, buf1, buf4, s0, 1, 1, stream=stream0)
            del buf3
            del buf1
        return (buf4, )
"""
INPUTS = {"primals_1": (100 * 512 * 2, 2), "primals_2": (8 * 256 * 2, 2), "rsqrt": (100 * 512 * 4, 4)}


SHAPE = dict(NUM_LAYERS=2, MODEL_DIM=64, NUM_HEADS=2, NUM_KV_HEADS=1, TRAIN_BATCH_TOKENS=2048, TRAIN_SEQ_LEN=64)


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_the_stand_ins_have_what_a_training_needs(preset):
    """The checks need a CUDA build, which few have: this notices at once when they fall behind the script."""
    settings = dict(SHAPE, PRESET=preset, DEVICE="cpu", ATTENTION="sdpa", COMPILE=0, VOCAB_SIZE=512)
    config = uses.configuration(tg, {name: str(value) for name, value in settings.items()})
    with uses.stand_ins(tg):
        run = tg.Run(0, uses.RANKS, uses.RANKS, torch.device("cpu"))
        loader = tg.TrainLoader(config, run)
        trainer = tg.Trainer(tg.GPT(config.model, tg.runtime_of(config)), loader, config, run)
        for variant in tg.all_step_variants(config):
            loss = trainer.step(tg.Progress(0, 0.0), *variant)  # of any value: what ranks would send is not set
            assert loss.shape == () and loss.dtype == torch.float64


def test_the_stand_ins_let_a_backend_be_chosen_with_windows():
    config = tg.Config(device="cuda", compute_dtype="bfloat16", attention="auto", window_attn_size=16)
    with uses.stand_ins(tg):
        assert tg.choose_attention(config) == ("fa3", "fa3: works")


def test_launches_and_bytes_are_read_from_generated_code():
    module = generated_code.parse_module(GENERATED, INPUTS, {"s0": 100})
    assert [c.kind for c in module.calls] == ["fused", "matrix product", "attention", "hand-written"]
    wide, float32 = 100 * 512 * 2, 100 * 256 * 4
    assert [(c.read, c.written) for c in module.calls] == [
        (wide + 100 * 512 * 4, wide),
        (100 * 8 * 2 + 8 * 256 * 2, float32),  # a view of 8 columns is read, not the whole buffer
        (wide, wide),  # what the operator allocates
        (wide + float32, wide),  # a reused buffer is what a hand-written kernel writes
    ]


def test_descriptors_of_buffers_and_views_count_as_these():
    create = "triton.tools.tensor_descriptor.TensorDescriptor.from_tensor"
    launch = f"""buf5 = {create}(reinterpret_tensor(buf3, (s0, 512), (512, 1), 0), [128, 64])
            buf6 = {create}(buf1, [256, 64])
            buf7 = {create}(buf4, [128, 128])
            mlp_kernel_0.run(buf5, buf6, buf7, s0, 132, 1, 1, stream=stream0)
            del buf5
            del buf6
            del buf7"""
    described = GENERATED.replace("mlp_kernel_0.run(buf3, buf1, buf4, s0, 1, 1, stream=stream0)", launch)
    assert described != GENERATED
    expected = generated_code.parse_module(GENERATED, INPUTS, {"s0": 100})
    assert generated_code.parse_module(described, INPUTS, {"s0": 100}) == expected


def test_the_peak_counts_saved_inputs_until_they_are_freed_and_no_weights():
    module = generated_code.parse_module(GENERATED, INPUTS, {"s0": 100})
    saved, wide, float32 = 100 * 512 * 4, 100 * 512 * 2, 100 * 256 * 4
    assert module.peak == max(saved + wide, wide + float32 + wide)


def test_arguments_are_split_outside_of_parentheses():
    assert generated_code.split_arguments("reinterpret_tensor(a, (1, 2), (2, 1), 0), b, stream=s") == [
        "reinterpret_tensor(a, (1, 2), (2, 1), 0)",
        "b",
        "stream=s",
    ]
    assert generated_code.signature_of(GENERATED)[:3] == ("in_ptr0", "in_ptr1", "out_ptr0")


MISTAKES = {
    "item": (lambda x: x.sum().item(), ".item(), float() or bool() of a tensor"),
    "bool": (lambda x: bool(x.sum() > 0), ".item(), float() or bool() of a tensor"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "mask": (lambda x: x[x > 0], "index by a mask of booleans"),
    "unique": (lambda x: x.unique(), "unique"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("fake", [False, True])
def test_what_waits_for_the_device_is_counted_with_its_line(name, fake):
    compute, what = MISTAKES[name]
    if fake and name == "unique":
        pytest.skip("nobody knows the shape of its result")
    with FakeTensorMode() if fake else torch.no_grad():
        x = torch.ones(4, 3)
        with eager_costs.EagerCosts("cpu") as costs:
            compute(x)
    assert [w.what for w in costs.waits] == [what]
    assert costs.waits[0].where.startswith("test_h100.py:")


def test_a_copy_between_devices_waits_unless_it_does_not_block():
    with FakeTensorMode(), eager_costs.EagerCosts() as down:
        x = torch.ones(4, device="cuda")
        x.to(torch.bfloat16)
        x.cpu()
    with eager_costs.EagerCosts("meta") as up:  # stands for the device: a CPU build of torch moves nothing to "cuda"
        torch.ones(4).to("meta", non_blocking=True)
        torch.ones(4).to("meta")
    assert [w.what for w in down.waits] == ["blocking copy from cuda to cpu"]
    assert [w.what for w in up.waits] == ["blocking copy from cpu to meta"]


def test_nothing_waits_in_plain_arithmetic_and_its_cost_is_counted_by_part():
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    with eager_costs.EagerCosts("cpu") as costs:
        with costs.within("product"):
            c = a @ b
        c.view(-1).add_(1)
        with costs.suspended():
            c.mul(2)
    product, rest = costs.costs["product"], costs.costs["step"]
    assert costs.waits == [] and (product.launches, rest.launches) == (1, 1)
    assert product.flops == 2 * 8 * 16 * 4
    assert (product.bytes_read, product.bytes_written) == (4 * (8 * 16 + 16 * 4), 4 * 8 * 4)
    assert (rest.bytes_read, rest.bytes_written) == (4 * 8 * 4, 4 * 8 * 4)


def graph_findings(compute):
    """Findings in the graph of a function of a fake cuda tensor."""
    import inductor_backend

    with FakeTensorMode() as mode:
        x = torch.ones(4, 3, device="cuda")
        graph = make_fx(lambda x: compute(x), tracing_mode="real", _allow_non_fake_inputs=True)(x)
    assert mode is not None
    return list(inductor_backend.findings_of(graph))


def test_float64_and_cpu_tensors_in_a_graph_are_found():
    assert graph_findings(lambda x: (x * 2).sum()) == []
    assert "float64 tensor" in graph_findings(lambda x: x * x.new_full((1,), 0.5, dtype=torch.float64))[0]
    moved = graph_findings(lambda x: (x, torch.zeros(3)))
    assert any("tensor on the CPU" in line for line in moved)


def session_of(**changes):
    """A session in which everything is right, with changes to its result, its graph or its kernel."""
    result = SimpleNamespace(use="training", error="", graphs=1, allowed=1, gradients=[])
    kernel = SimpleNamespace(name="triton_red_3", error="", stack=0, registers=64)
    graph = SimpleNamespace(use="training", part="backward", error="", findings=[], kernels=[kernel])
    for part, name, value in changes.values():
        setattr(dict(result=result, graph=graph, kernel=kernel)[part], name, value)
    costs = SimpleNamespace(waits=[])
    return SimpleNamespace(results=[result], recorder=SimpleNamespace(graphs=[graph]), costs=costs)


@pytest.mark.parametrize(
    "part, name, value, line",
    [
        ("result", "error", "Unsupported: graph break", "does not run: Unsupported"),
        ("result", "graphs", 2, "2 graphs were compiled where 1 should serve"),
        ("result", "graphs", 0, "nothing was compiled"),
        ("result", "gradients", ["bank: torch.bfloat16"], "gradient not contiguous float32: bank"),
        ("graph", "error", "LoweringException", "Inductor fails on the backward graph"),
        ("graph", "findings", ["float64 tensor a"], "in the backward graph: float64 tensor a"),
        ("kernel", "error", "ptxas", "no cubin for triton_red_3"),
        ("kernel", "stack", 248, "248 bytes a thread spilled"),
    ],
)
def test_each_failing_check_is_one_line(part, name, value, line):
    assert verdicts.failures(session_of()) == []
    failed = verdicts.failures(session_of(change=(part, name, value)))
    assert len(failed) == 1 and line in failed[0]


def test_waits_are_counted_by_place_and_known_spills_pass():
    session = session_of(change=("kernel", "stack", 16))
    wait = eager_costs.Wait("training, optimizers", "nonzero", "train_gpt.py:1")
    session.costs.waits = [wait, wait]
    failed = list(verdicts.of_waits(session.costs.waits, []))
    assert failed == ["training: the host waits for the device: nonzero at train_gpt.py:1 (2 times)"]
    assert list(verdicts.of_waits(session.costs.waits, [("nonzero", "on purpose")])) == []
    assert list(verdicts.of_kernels(session.recorder.graphs, [("^triton_red", 16, "known")])) == []
    assert len(list(verdicts.of_kernels(session.recorder.graphs, [("^triton_red", 8, "known")]))) == 1


def test_the_table_adds_up():
    result = SimpleNamespace(use="training", micro_steps=2, standing_bytes=100, gradient_bytes=10)
    graphs = [
        SimpleNamespace(
            use="training",
            part=part,
            launches=Counter(fused=3),
            flops=Counter({"matrix products": 5 * 10**12, "attention": 10**12, "float8": 2 * 10**12}),
            bytes_read=2 * 10**9,
            bytes_written=10**9,
            peak_bytes=peak,
        )
        for part, peak in (("forward", 30), ("backward", 50))
    ]
    eager = {"training, optimizers": eager_costs.Cost(7, 10**9, 0, 10**12), "evaluation": eager_costs.Cost(99)}
    rows = cost_table.table_rows([result], graphs, eager)
    assert [(r.part, r.launches) for r in rows] == [("forward", 6), ("backward", 6), ("optimizers", 7)]
    text = cost_table.report(rows, {"training": dict(standing=10**9, saved=0, peak=2 * 10**9)}, "remark")
    assert "| training | **sum** | 19 | 25.00 | 4.00 | 8.00 | 9.0 | 4.0 | 26.3 | 4.3 |" in text
    assert "| training | 1.00 | 0.00 | 2.00 |" in text
    assert cost_table.peak_memory(result, graphs) == 100 + 10 + 50


SOURCE = """
class Block:
    def attend(self, x):
        return helper(rms_norm(x))

def rms_norm(x):
    return x

def helper(x):
    return x
"""


def test_the_innermost_function_that_has_a_term_decides(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SOURCE)
    frame = f'  File "{path}", line {{}}, in f\n    code\n'
    assert terms.term_of(frame.format(4)) == "attention's projections"
    assert terms.term_of(frame.format(4) + frame.format(7)) == "norms"
    assert terms.term_of(frame.format(4) + frame.format(10)) == "attention's projections"
    assert terms.term_of(frame.format(10)) == terms.term_of("") == terms.OTHER


def test_a_launch_counts_with_its_product_or_with_most_of_its_nodes():
    nodes = {"mul": "norms", "add": "norms", "mm": "MLP", "view": "norms"}
    names = terms.Names(nodes, {"mm": "MLP"}, {"mlp_kernel": "MLP"})

    def term(name, kind, *nodes):
        return names.term(generated_code.Call(name, kind, 0, 0, nodes))

    assert term("triton_poi_3", "fused", "mm", "mul", "add") == "norms"
    assert term("extern_kernels.mm", "matrix product", "mul", "mm", "view") == "MLP"
    assert term("mlp_kernel_12", "hand-written", "mul") == "MLP"
    assert term("triton_poi_3", "fused", "unknown") == terms.OTHER


def test_terms_of_a_use_count_each_part_once_for_each_micro_step():
    result = SimpleNamespace(use="TTT", micro_steps=2, shapes=[(64, 2048, 48, 64)])
    term = inductor_backend.Term("norms", "fused", 3, 5, 7, 11)
    graphs = [SimpleNamespace(use="TTT", part="forward", terms=[term], windows=[((2, 64, 48), [term])])] * 2
    rows = cost_table.term_rows([result], graphs)
    assert [row["window"] for row in rows] == [[64, 2048, 48], [2, 64, 48]]
    assert rows[0]["launches"] == 6 and rows[0]["bytes_written"] == 22 and rows[0]["term"] == "norms"


def test_details_keep_their_counters():
    cost = eager_costs.Cost(operators=Counter(mul=2))
    assert check.plain([cost])[0]["operators"] == {"mul": 2}
    text = check.table_json(dict(rows=[dict(a=1), dict(a=2)], form="x"))
    assert json.loads(text) == dict(rows=[dict(a=1), dict(a=2)], form="x") and text.count("\n") == 7


@pytest.mark.skipif(tg.triton is None, reason="triton is not installed")
def test_hand_written_kernels_that_run_eagerly_are_counted():
    costs = eager_costs.EagerCosts()
    costs.part = "adapting"
    p, grad = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4, 8, dtype=torch.bfloat16)
    with eager_costs.hand_written_launches(costs):
        tg.adapter_step_triton(p, p.clone(), grad, grad.clone(), 0.1, 0.0, 0.9, p.new_ones(1), 1e-10)
    cost, n = costs.costs["adapting"], p.numel()
    assert (cost.launches, cost.bytes_read, cost.bytes_written) == (1, (4 + 4 + 2) * n + 4, (4 + 4 + 2) * n)
    assert p.eq(1).all()  # nothing ran


def test_values_of_settings_may_have_commas():
    options = check.arguments(["--set", "PRESET=frontier,WINDOW_ATTN_LAYERS=0,1,2,NUM_HEADS=4"])
    assert options.settings == ["PRESET=frontier", "WINDOW_ATTN_LAYERS=0,1,2", "NUM_HEADS=4"]


def test_the_mean_of_keys_follows_from_documents_and_windows():
    starts = np.array([[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 1, 1]])
    context = Context.of_starts(starts)
    assert sorted(context.lengths) == [1, 1, 2, 3, 5]
    seen = np.arange(6) - starts + 1
    assert context.keys() == context.keys(5) == pytest.approx(seen.mean())
    edge = EDGE_KEYS * (seen > 3).sum() / seen.size  # of queries whose window begins inside their document
    assert context.keys(2) == pytest.approx(np.minimum(seen, 3).mean() + edge)
    assert Context(np.array([2048.0])).times(0.5).keys() == 1024.5 / 2 + 0.25


def test_attention_is_counted_within_its_window():
    """The stand-in for FlashAttention has the window as its last argument, forward and backward."""

    def passes(q, k, v, bounds):
        found = []
        for window in (0, 100):
            y, lse = fake_flash_attention.attention(q, k, v, bounds, 512, True, window)
            found += fake_flash_attention.attention_backward(y, q, k, v, y, lse, bounds, 512, True, window)
        return found

    q = torch.empty(512, 8, 64, dtype=torch.bfloat16)
    k, v = (torch.empty(512, 4, 64, dtype=torch.bfloat16) for _ in range(2))
    traced = make_fx(passes, tracing_mode="fake")(q, k, v, torch.empty(2, dtype=torch.int32))
    context = Context(np.array([512.0]))
    counted = [count for _, kind, count in inductor_backend.flops_of_nodes(traced, context) if kind == "attention"]
    queries = 512 * 8 * 64
    assert counted == [int(f * queries * context.keys(w)) for w in (0, 100) for f in (4, 10)]


def test_products_of_fp8_numbers_are_counted_apart():
    scaled = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]

    def products(x, w):
        one = torch.ones((), dtype=torch.float32)
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        return x @ w.mT, scaled(x8, w8.mT, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    x, w = torch.zeros(8, 16, dtype=torch.bfloat16), torch.zeros(32, 16, dtype=torch.bfloat16)
    traced = make_fx(products, tracing_mode="fake")(x, w)
    flops = 2 * 8 * 16 * 32
    assert inductor_backend.count_flops(traced, Context(np.ones(1))) == Counter(
        {"matrix products": 2 * flops, "float8": flops}
    )
    row = cost_table.Row("training", "forward", 2, 2 * flops, 0, 0, 0, flops)
    assert row.milliseconds[0] == pytest.approx(1e3 * 1.5 * flops / cost_table.FLOPS_PER_SECOND)


def test_the_fakes_are_compiled_once_and_preloaded(tmp_path, monkeypatch):
    variables = fake_gpu.environment(tmp_path, {"LD_LIBRARY_PATH": "/elsewhere"})
    assert Path(variables["LD_PRELOAD"]).exists() and (tmp_path / "libcuda.so.1").exists()
    assert variables["LD_LIBRARY_PATH"] == f"{tmp_path}{os.pathsep}/elsewhere"
    monkeypatch.setattr(fake_gpu.shutil, "which", lambda _: None)
    with pytest.raises(fake_gpu.NoCompiler, match="C compiler"):
        fake_gpu.build(tmp_path)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert check.main(["--cache", str(tmp_path)]) == 2


# Mistakes planted in the script: what is replaced, by what, and the check that must notice it.
FORWARD = "        hidden = self.trunk(\n"
STEP = "            nll, lse = self.forward(*batch, looped=looped,"
PLANTED = {
    "nothing": ([], ""),
    "graph break": ([(FORWARD, "        torch._dynamo.graph_break()\n" + FORWARD)], "does not run: Unsupported"),
    "float64 constant": (
        [(FORWARD, "        targets = targets + targets.new_full((1,), 0.0, dtype=torch.float64).long()\n" + FORWARD)],
        "float64 tensor",
    ),
    "tensor on the CPU": (
        [(FORWARD, "        targets = targets + torch.zeros(3, dtype=torch.int64).sum(0).to(ids.device)\n" + FORWARD)],
        "tensor on the CPU",
    ),
    "item": ([(STEP, "            nats.item()\n" + STEP)], "the host waits for the device: .item()"),
    "recompilation": (
        [
            (FORWARD, "        targets = targets + self.planted\n" + FORWARD),
            (STEP, "            self.model.planted = p.step\n" + STEP),
        ],
        "2 graphs were compiled where 1 should serve",
    ),
}
# Runs the training step of the script with each set of changes, and prints the lines of the checks that fail.
DRIVER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fake_gpu
fake_gpu.install()
import fake_flash_attention, inductor_backend, uses, verdicts
fake_flash_attention.install()
inductor_backend.configure_inductor()
for name, changes in json.loads(sys.argv[3]).items():
    def changed(text):
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        return text
    script = uses.load_script(Path(sys.argv[2]), changed)
    session = uses.new_session(script, {**uses.SMALL, "NUM_LOOPS": "0"}, inductor=False)
    uses.run_uses(session, ["training"])
    print("RESULT", json.dumps([name, verdicts.failures(session)]), flush=True)
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Lines of the checks for the script as it is, and for each planted mistake."""
    environment = fake_gpu.environment(tmp_path_factory.mktemp("fakes"), os.environ)
    changes = json.dumps({name: replaced for name, (replaced, _) in PLANTED.items()})
    done = run_command([H100_PYTHON, "-c", DRIVER, H100, SCRIPT, changes], env=environment)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(PLANTED), done.stderr[-3000:]
    return dict(map(json.loads, lines))


@needs_cuda_build
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLANTED if name != "nothing"])
def test_a_planted_mistake_is_noticed(planted, name):
    new = set(planted[name]) - set(planted["nothing"])
    assert any(PLANTED[name][1] in line for line in new), planted[name]
