"""The Triton kernels against the shared suite, interpreted, and lowered for real GPUs.

Marked aot: machine code from the CUDA plugin and ptxas, without a GPU. Marked gpu: the
same suite on one.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from mpt_jax.kernels import skip, tiles
from mpt_jax.kernels.attention import Operands, Rule
from mpt_jax.kernels.attention_gpu import attention_gpu
from mpt_jax.kernels.tiles import GpuTile, GpuTiles
from tests.kernels import suite
from tests.kernels.suite import Case, arrays, call

# jax >= 0.11 warns of Triton's end wherever a kernel is lowered.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Triton.*:DeprecationWarning", "ignore:.*Pallas.*:DeprecationWarning"
)

# Every kernel has another tile; neither divides most lengths.
SMALL = GpuTiles(GpuTile(32, 16, 4, 2), GpuTile(16, 32, 4, 2), GpuTile(32, 32, 4, 2))
LONG = GpuTiles(*[GpuTile(16, 128, 4, 2)] * 3)  # as wide as any in use
KINDS = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3")
# Each of these compiles what the others do not; the rest are as many features again.
QUICK = (
    "one_token",
    "mha_bf16_head_112",
    "no_slopes_softcap",
    "bidirectional",
    "everything",
)


def cases(quick: bool) -> list[Case]:
    return [c for c in suite.CASES if (c.name in QUICK) == quick]


class TestInterpreted(suite.AttentionSuite):
    @staticmethod
    def attend(q, k, v, **options):
        sizes = SMALL if k.shape[1] < 1000 else LONG
        return call(attention_gpu, q, k, v, tiles=sizes, interpret=True, **options)

    @pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: case.name)
    def test_outputs_and_gradients_match_float64(self, case):
        self.check(case)

    @pytest.mark.slow
    @pytest.mark.parametrize("case", cases(quick=False), ids=lambda case: case.name)
    def test_outputs_and_gradients_match_float64_more(self, case):
        self.check(case)

    @pytest.mark.parametrize("feature", ["dropout", "float64"])
    def test_unsupported_raises_not_implemented(self, feature):
        (q, k, v, *_), options = arrays(Case(feature, L=4))
        if feature == "dropout":
            options |= {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
        else:
            q = k = v = jax.ShapeDtypeStruct(q.shape, jnp.float64)
        with pytest.raises(NotImplementedError, match=f"no {feature}"):
            self.attend(q, k, v, **options)

    test_dropout_drops_weights_and_its_gradient_is_that_of_the_mask = None
    test_dropout_averages_to_no_dropout_over_keys = None


@pytest.mark.gpu
class TestCompiled(suite.AttentionSuite):
    attend = staticmethod(lambda *a, **options: call(attention_gpu, *a, **options))

    @pytest.fixture(autouse=True)
    def gpu(self):
        """`-m slow` alone selects some of these, too."""
        if jax.default_backend() != "gpu":
            pytest.skip("needs an NVIDIA GPU")

    test_dropout_drops_weights_and_its_gradient_is_that_of_the_mask = None
    test_dropout_averages_to_no_dropout_over_keys = None


def skipping_case() -> tuple[list[jax.Array], dict[str, object]]:
    tensors, options = arrays(Case("skip", L=160, H=2, D=16))
    options["slopes_H"] = jnp.asarray([2.0, 2.0**-6])
    return tensors, options


def test_skipping_leaves_out_blocks_and_changes_nothing_that_counts():
    tensors, options = skipping_case()
    suite_ = TestInterpreted()
    every = suite_.value_and_grads(tensors, options | {"skip": "off"})
    options["skip"] = skip.DEFAULT_EPS
    some = suite_.value_and_grads(tensors, options)
    for full, skipped in zip(every, some, strict=True):
        limit = 2**-22 * np.abs(np.asarray(full)).max()
        np.testing.assert_allclose(skipped, full, rtol=0, atol=max(limit, 2**-22))

    q, k, v, *_ = tensors
    rule = Rule(options["softmax_scale"])
    operands = Operands(slopes_H=options["slopes_H"])
    lower_BHI = skip.lower_key_blocks(q, k, rule, operands, block_q=32, block_k=16)
    erased = 16 * int(lower_BHI[0, 0, -1])
    assert erased >= 64
    assert int(lower_BHI[0, 1, -1]) == 0
    # The last block of rows of the steep head never reads the erased keys.
    spoiled = v.at[:, :erased, 0].set(jnp.nan)
    out, _ = jax.jit(lambda *a: suite_.attend(*a, **options))(q, k, spoiled)
    assert jnp.isfinite(out[:, 128:]).all()
    assert jnp.isnan(out[:, :32, 0]).all()


def test_without_a_gpu_it_raises_and_never_interprets_by_itself():
    (q, k, v, *_), options = arrays(Case("cpu", L=4))
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, got cpu"):
        call(attention_gpu, q, k, v, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("head_dim", "dtype", "options"),
    [
        (64, "bfloat16", {"window": 300}),
        (112, "bfloat16", {"logit_softcap": 30.0}),
        (128, "float16", {}),
        (128, "float32", {"causal": False}),
    ],
)
def test_forward_and_backward_lower_for_gpus(kind, head_dim, dtype, options):
    """To Triton's IR: names, shapes and types that it refuses show here."""
    struct = jax.ShapeDtypeStruct
    q = struct((2, 1000, 6, head_dim), dtype)
    k = struct((2, 1000, 2, head_dim), dtype)
    slopes, ids = struct((6,), "float32"), struct((2, 1000), "int32")

    def run(q, k, v, slopes, ids, offset):
        more = {"q_segment_ids_BL": ids, "kv_segment_ids_BS": ids, "q_offset": offset}
        if options.get("causal", True):
            more["prefix_mask_BS"] = ids > 3
        more |= {"slopes_H": slopes, "softmax_scale": 0.1, **options}
        results, pull = jax.vjp(lambda *a: call(attention_gpu, *a, **more), q, k, v)
        return pull(results)

    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), abstract_device=device)
    ):
        traced = jax.jit(run).trace(q, k, k, slopes, ids, struct((), "int32"))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 3


def test_tiles_follow_the_device_and_never_far_exceed_the_rows():
    assert tiles.gpu_tiles(KINDS[1], 2, 128) == tiles.GPU["hopper"][128]
    assert tiles.gpu_tiles("NVIDIA L4", 2, 64) == tiles.GPU["ampere"][64]
    assert tiles.gpu_tiles(KINDS[0], 2, 16) == tiles.GPU["ampere"][64]
    assert tiles.gpu_tiles(KINDS[0], 4, 128) == tiles.GPU_FLOAT32
    fitted = tiles.GPU["hopper"][128].fitted(1, 100, 16)
    assert fitted.forward == GpuTile(16, 128, 8, 2)
    assert fitted.dq == GpuTile(16, 64, 8, 2)


@pytest.mark.aot
def test_machine_code_has_no_spills_and_few_instructions():
    static_gpu = pytest.importorskip("mpt_jax.bench.static_gpu")
    if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        pytest.skip("needs jax-cuda12-plugin and the wheels that bench names")
    rows = static_gpu.measure()
    ours = [row for row in rows if row["kernel"] in static_gpu.KERNELS]
    assert len(ours) == len(static_gpu.CHIPS) * len(static_gpu.CASES) * 3
    missed = [gate for gate in static_gpu.gates(rows) if gate[1] > gate[2]]
    assert not missed
    names = {f.name for f in dataclasses.fields(static_gpu.Case)}
    assert names == {"name", "head_dim", "alibi", "packed"}
