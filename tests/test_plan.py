"""`lm plan`: names of topologies, collectives read from programs, memory and what fits."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from experiments import plan as verb
from lm.config import UserError
from lm.models import TransformerConfig, abstract
from lm.plan import compile as compiler
from lm.plan import estimate, hlo, search, topology
from lm.sharding import make_mesh
from lm.train.cell import build_point, cells
from lm.train.program import make_cell_population

GIB = 2**30


def cell(size="7b", rows=1024, length=2048, strategy="fsdp", remat="full", **train):
    """A cell of one replica whose batch is text and recall in equal parts."""
    half = {"rows": rows // 2, "weight": 1.0}
    mapping = {
        "name": size,
        "model": {"size": size, "remat": remat, "base_width": 128},
        "optim": {},
        "train": {"tokens": 10**10, "chunk": 10, "strategy": strategy} | train,
        "data": {
            "length": length,
            "tokenizer": {"kind": "char", "vocab_size": 128},
            "mixture": {
                "text": {"task": "text"} | half,
                "recall": {"task": "recall", "level": "5"} | half,
            },
        },
        "seeds": {"replicas": 1},
    }
    return cells("study", [build_point(mapping)])[0]


@pytest.mark.parametrize(
    "name, devices, fast, limit",
    [
        ("v5e:16x16", 256, 256, 15.75),
        ("2xv5e:16x16", 512, 256, 15.75),
        ("v5p:8x8x8", 512, 512, 95.73),
        ("tpu7x:2x2x1", 8, 8, 94.74),
        ("h100:32x8", 256, 8, 59.32),
    ],
)
def test_names_of_topologies(name, devices, fast, limit):
    """Catches a device count or a memory that is another chip's."""
    place = topology.parse(name)
    assert (place.devices, place.fast_group) == (devices, fast)
    assert place.chip.limit / GIB == pytest.approx(limit, abs=0.01)


@pytest.mark.parametrize(
    "name, words",
    [
        ("v5e:16x17", "larger than v5e:16x16"),
        ("v5e:4x4x4", "write v5e:NxN"),
        ("v5q:8x8x8", "unknown chip 'v5q'; did you mean 'v5p:8x8x8'?"),
        ("h100", "not CHIP:SHAPE; did you mean 'h100:32x8'?"),
        ("h100:32", "write h100:HOSTSxGPUS"),
        ("2xh100:4x8", "write more hosts"),
        ("v5e:0x4", "wrong shape"),
        ("../v5e:2x2", "not CHIP:SHAPE"),
    ],
)
def test_other_names_are_refused(name, words):
    """Catches a name that reaches the compiler's library, whose error has no remedy."""
    with pytest.raises(UserError) as error:
        topology.parse(name)
    assert words in str(error.value) and "\n" not in str(error.value)


TPU = """HloModule step

%piece.1 (p: bf16[4,16]) -> bf16[4,64] {
  ROOT %all-gather.1 = bf16[4,64]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], channel_id=7
}

%piece.2 (p: bf16[4,16]) -> bf16[4,64] {
  ROOT %all-gather.2 = bf16[4,64]{1,0:T(8)} all-gather(%p), replica_groups=[2,4]<=[8], channel_id=7
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5), backend_config={}
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = bf16[4,64] fusion(%x), kind=kCustom, calls=%piece.1
  %b = bf16[4,64] fusion(%y), kind=kOutput, calls=%piece.2
  %sum = f32[8]{0} all-reduce(%z), channel_id=8, replica_groups=mesh['data'=4, 'tensor'=2] {'data'}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %one = (f32[], bf16[2,3]) all-reduce(%u, %v), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}
}
"""
GPU = """HloModule step

%body (p: f32[8]) -> f32[8] {
  %g = ((bf16[2,6]), bf16[16,6]{1,0}) all-gather-start(%p), channel_id=1, replica_groups=[1,8]<=[8]
  %d = bf16[16,6]{1,0} all-gather-done(%g)
  %s = ((f32[16,4], f32[8]), (f32[2,4], f32[1])) reduce-scatter-start(%p), channel_id=2
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = f32[8] while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %r = ((f32[10]), f32[10]) all-reduce-start(%q), channel_id=3, replica_groups=[4,2]<=[2,4]T(1,0)
}
"""


def test_collectives_of_a_tpu_program():
    """Catches pieces of one collective that count twice, and a body that counts once."""
    listed = hlo.collectives(TPU, 8, steps=1)
    found = {(c.kind, c.size): c for c in listed}
    assert len(listed) == len(found)
    assert {k: c.times for k, c in found.items()} == {
        ("all-gather", 512): 5,
        ("all-reduce", 32): 5,
        ("all-reduce", 16): 1,
    }
    assert (found["all-gather", 512].group, found["all-gather", 512].stride) == (4, 1)
    assert (found["all-reduce", 32].group, found["all-reduce", 32].stride) == (4, 2)
    assert found["all-reduce", 32].received == 5 * 2 * 32 * 3 / 4


def test_collectives_of_a_gpu_program():
    """Catches operands of an asynchronous start that count as results, and steps of a dispatch."""
    found = {c.kind: c for c in hlo.collectives(GPU, 8, steps=2)}
    assert {k: (c.times, c.size) for k, c in found.items()} == {
        "all-gather": (3, 192),
        "reduce-scatter": (3, 288),
        "all-reduce": (0.5, 40),
    }
    assert (found["all-reduce"].group, found["all-reduce"].stride) == (2, 4)


def test_collectives_of_a_real_program():
    """Catches a text that this compiler writes in another way: nested loops of 3 and 5 turns."""
    mesh = make_mesh("fsdp", jax.devices()[:8])
    spec = PartitionSpec("data")

    def local(x):
        def inner(x, _):
            return jax.lax.psum(x, "data") * 0.1, None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=5)[0], jax.lax.all_gather(x, "data")

        return jax.lax.scan(outer, x, length=3)[0]

    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, spec))
    text = step.lower(x).compile().as_text()
    found = {c.kind: (c.times, c.size, c.group) for c in hlo.collectives(text, 8)}
    assert found["all-reduce"] == (15, 2 * 4 * 4, 8)
    assert found.get("all-gather", (3, 128, 8)) == (3, 128, 8)  # nobody reads it


def test_slow_links_are_the_ones_that_are_crossed():
    """Catches a host's fast links that are credited to a group of many hosts."""
    place = topology.parse("h100:4x8")
    inside = hlo.Collective("all-gather", 1, 10**9, 8, 1).seconds(place)
    across = hlo.Collective("all-gather", 1, 10**9, 32, 1).seconds(place)
    strided = hlo.Collective("all-gather", 1, 10**9, 4, 8).seconds(place)
    assert inside == pytest.approx(10**9 * 7 / 8 / 450e9)
    assert across == pytest.approx(10**9 * 31 / 32 / 450e9)  # eight slow ones carry nearly as much
    pairs = hlo.Collective("all-reduce", 1, 10**9, 64, 1).seconds(topology.parse("h100:32x2"))
    assert pairs == pytest.approx(2 * 10**9 * (1 - 2 / 64) / (2 * 50e9))
    assert strided == pytest.approx(10**9 * 3 / 4 / 50e9)


@pytest.mark.parametrize("strategy", ["replicated", "fsdp", "fsdp_tp"])
def test_what_rests_is_exact(strategy):
    """Catches a strategy whose parameters or moments rest in another way than the plan says; the
    oracle is the program's own shapes.
    """
    c = cell("2x64", rows=16, strategy=strategy)
    place = topology.parse("h100:1x8")
    states = make_cell_population(c, make_mesh(strategy, jax.devices()[:8])).states
    want = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((states.params, states.opt_state))
    )
    assert estimate.memory(c, place).args == pytest.approx(want, rel=1e-3)


# Compiled with jax 0.12.0.1, libtpu 0.0.50.1 and the CUDA 13 plugin: topology, size, rows, length,
# remat, and the compiler's own peak in GiB per device.
COMPILED = (
    ("v5e:16x16", "7b", 256, 2048, "full", 4.172),
    ("v5e:16x16", "7b", 512, 2048, "full", 4.895),
    ("v5e:16x16", "7b", 1024, 2048, "full", 6.582),
    ("v5e:16x16", "7b", 512, 2048, "dots", 13.304),
    ("v5e:16x16", "1b", 512, 2048, "none", 12.051),
    ("v5p:8x8x8", "70b", 1024, 4096, "full", 27.405),
    ("h100:32x8", "7b", 256, 2048, "full", 1.770),
    ("h100:32x8", "7b", 1024, 2048, "full", 4.266),
    ("h100:32x8", "7b", 1024, 2048, "dots", 21.901),
    ("h100:32x8", "7b", 512, 2048, "none", 45.525),
)
# Two slices, and several replicas: side by side with everything on every device, side by side, and
# spread over devices.
OTHERS = (
    ("2xv5e:16x16", "7b", 1024, 2048, 1, {}, 2.607),
    ("v5e:16x16", "125m", 512, 2048, 3, {"strategy": "replicated"}, 9.840),
    ("h100:32x8", "1b", 512, 2048, 2, {}, 1.887),
    ("tpu7x:16x16x36", "70b", 1024, 4096, 18, {"replica_devices": 18}, 15.720),
)


@pytest.mark.parametrize("place, size, rows, length, remat, peak", COMPILED)
def test_the_estimate_is_near_the_compilers_figure(place, size, rows, length, remat, peak):
    """Catches an edit of the estimate that leaves what was compiled by more than 15 %."""
    found = estimate.memory(cell(size, rows, length, remat=remat), topology.parse(place)).total
    assert found / GIB == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("place, size, rows, length, seeds, train, peak", OTHERS)
def test_the_estimate_holds_elsewhere(place, size, rows, length, seeds, train, peak):
    """Catches replicas that count too often or not at all."""
    one = cell(size, rows, length, **train)
    many = dataclasses.replace(one, replicas=one.replicas * seeds)
    found = estimate.memory(many, topology.parse(place)).total
    assert found / GIB == pytest.approx(peak, rel=0.15)


def test_a_backend_that_cannot_run_one_token_is_planned():
    """Catches parameters that are made by running the backend: cuDNN's has no rows of one token,
    and whole plans for GPUs were refused.
    """
    config = TransformerConfig(64, 1, 64, 1, 1, 64, dtype="bfloat16", attention="gpu")
    assert abstract(config)["layers"]["qkv"].value.shape == (1, 64, 192)


def test_remat_orders_memory_and_time():
    """Catches a policy whose price has the wrong sign."""
    place = topology.parse("v5e:16x16")
    found = [cell(remat=r) for r in ("none", "dots", "full")]
    kept = [estimate.memory(c, place).activations for c in found]
    times = [estimate.cost(c, place, []).step[0] for c in found]
    assert kept == sorted(kept, reverse=True) and times == sorted(times)
    assert kept[2] == 32 * 4 * 2048 * 4096 * 2


def test_the_nearest_setting_that_fits():
    """Catches a search that offers what does not fit or divide, or is farther than need be."""
    place = topology.parse("v5e:16x16")
    c = cell("13b", remat="none", rows=1024)
    assert estimate.memory(c, place).total > place.chip.limit
    other = search.nearest(c, place, None)
    assert search.say(c, other) == "model.remat=full"
    assert estimate.memory(other, place).total <= place.chip.limit
    asked = []
    search.nearest(c, place, lambda one: bool(asked.append(search.say(c, one))))
    assert len(asked) == search.CONFIRMATIONS and asked[0] == "model.remat=full"
    assert all(not search._uneven(o, place) for o in search.candidates(c, place))
    small = cell("125m", rows=512, strategy="replicated")  # refused though the estimate fits
    assert small not in list(search.candidates(small, place))
    assert search.nearest(cell("70b", rows=256), topology.parse("v5e:2x2"), None) is None


def test_a_batch_that_does_not_divide_is_a_sentence():
    """Catches a misfit that the compiler would find after minutes."""
    with pytest.raises(UserError, match="point 7b on v5e:16x16: batch 500 .* use 256 or 512"):
        compiler.check(cell(rows=500), topology.parse("v5e:16x16"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return tiny.write_study(tmp_path_factory.mktemp("study"))


def test_the_verb(lm, study):
    """Catches a field that a script reads and is not there, and a table wider than a terminal."""
    arguments = ("plan", study, "--topology=h100:1x8", "--estimate")
    done = lm(*arguments, "--json")
    rows = json.loads(done.out)
    assert done.code == 0 and [r["point"] for r in rows] == ["1x4", "2x4"]
    assert set(rows[0]["hbm_gib"]) == {"args", "temp", "peak", "limit"}
    fields = {"params", "flops_per_step", "hbm_gib", "fits", "collectives", "compile_s"}
    assert fields <= set(rows[0]) and rows[0]["compile_s"] is None
    assert rows[1]["collectives"] == {"all-reduce": 1}
    assert done.err == "lm plan: nothing was compiled, as asked\n"
    done = lm(*arguments, "--point=2x4")
    assert "1x4" not in done.out and max(map(len, done.out.splitlines())) <= 100
    assert "did you mean '2x4'?" in lm(*arguments, "--point=2x5").refusal
    assert "did you mean 'h100:32x8'" in lm("plan", study, "--topology=h10:32x8").refusal
    assert "--topology" in lm("plan", study).refusal
    assert "choose its point" in lm(*arguments, "--text=step.hlo").refusal
    large = ("--config.train.strategy=replicated", "--config.data.length=400000000")
    assert lm(*arguments, *large).code == 1  # a script stops where a point does not fit
    assert "use 16" in lm("plan", study, "--topology=h100:2x8", "--estimate").refusal


def test_without_the_compiler_one_sentence_says_so(lm, study, monkeypatch):
    """Catches a traceback, or figures that pass for the compiler's."""
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    done = lm("plan", study, "--topology=v5e:2x4")
    assert done.code == 0 and "estimated" in done.out
    assert done.err.startswith("lm plan: nothing was compiled: ") and done.err.count("\n") == 1
    assert "pip install 'onset-lm[tpu]'" in done.err


def test_what_does_not_fit_has_a_remedy():
    """Catches a remedy that is not the nearest, and a line that leaves the terminal."""
    c = cell("7b", rows=8, strategy="replicated", length=2048)
    (row,) = verb.plan([c], topology.parse("h100:1x8"), False)
    assert not row["fits"] and row["nearest"] == "train.strategy=fsdp"
    row["collectives"] = {"all-gather": 99_999, "all-reduce": 99_999, "reduce-scatter": 99_999}
    row["estimated_gib"] = dict.fromkeys(row["estimated_gib"], 99.99)
    row |= {"dollars": (1e6 + 1, 9.99e6), "step_s": (1234.5, 4567.8), "compile_s": 99.0}
    text = verb.table([row | {"compiled": True}], topology.parse("h100:1x8"))
    assert max(map(len, text.splitlines())) <= 100
    assert "does not fit; the nearest that does: train.strategy=fsdp" in text


def test_short_numbers():
    """Catches 1e+03k."""
    assert [verb._short(n) for n in (999.6, 999_600, 1.234e12, 3)] == ["1k", "1M", "1.23T", "3"]


@pytest.mark.slow
@pytest.mark.skipif(
    not topology.find_spec("libtpu"), reason="compiling for a TPU needs the extra 'tpu'"
)
def test_a_tpu_runs_our_kernel(tmp_path):
    """Catches a plan of another attention than the one that would train: ours has three calls,
    forward, the forward that remat repeats, and the gradient.
    """
    file = tmp_path / "step.hlo"
    code = (
        "from lm.plan import topology; place = topology.parse('v5e:2x4');"
        "topology.set_environment(place);"
        "from test_plan import cell; from lm.plan import compile;"
        "import dataclasses; c = cell('125m', rows=8, length=512);"
        f"made = compile.compile_step(c, place, text={str(file)!r});"
        "print(made.kernels, made.fits, made.peak)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=tiny.ROOT / "tests",
        env=tiny.environment(PYTHONPATH=str(tiny.ROOT)),
    )
    assert done.returncode == 0, done.stderr
    assert "'tpu_custom_call': 3" in done.stdout and "True" in done.stdout


def test_cells_are_planned_as_they_are():
    """Catches a plan that changes what it measures: only the backend's name is written down."""
    c = cell()
    placed = compiler.placed(c, topology.parse("v5e:16x16"))
    assert placed.model.attention == "tpu"
    model = dataclasses.replace(placed.model, attention="auto")
    assert dataclasses.replace(placed, model=model) == c
