"""What every attention backend must do, and the float64 oracle it is held to.

A backend's test class derives from AttentionSuite and defines ``attend``. The oracle is
NumPy, one head at a time, written from the papers' formulas (arXiv: ALiBi 2108.12409,
softmax attention and its gradient 1706.03762 and 2205.14135 appendix B, grouped queries
2305.13245) and shares nothing with mpt_jax.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.kernels.attention import RESIDUAL_NAMES, Operands, Rule

# Relative L2 errors against float64. float32: a few roundings of 6e-8 per sum of D and
# of S terms, more in gradients. bfloat16: its unit roundoff 3.9e-3 / 2 for the rounded
# output; gradients also contract softmax weights that were rounded.
FORWARD_RTOL = {"float32": 3e-6, "bfloat16": 4e-3}
GRADIENT_RTOL = {"float32": 5e-6, "bfloat16": 1e-2}
# One row over 65,536 keys, worst element: slope * column in float32 errs by 9e-4 there.
LONG_ROW_ATOL = 2e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. packed: two documents per row and padding; prefix: tokens all see."""

    name: str
    L: int = 64
    S: int | None = None
    B: int = 1
    H: int = 4
    K: int | None = None
    D: int = 16
    dtype: str = "float32"
    slopes: bool = True
    packed: bool = False
    prefix: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = (
    Case("one_token", L=1, H=3, D=112),
    Case("one_token_bf16", L=1, K=1, D=64, dtype="bfloat16", packed=True),
    Case("short_heads_12", L=7, B=2, H=12, D=64, packed=True),
    Case("heads_3_mqa", L=130, H=3, K=1, D=112),
    Case("gqa_bf16", L=130, B=2, K=2, D=64, dtype="bfloat16"),
    Case("mha_bf16_head_112", H=3, D=112, dtype="bfloat16", packed=True),
    Case("packed_gqa", L=130, B=2, K=2, packed=True),
    Case("no_slopes_softcap", slopes=False, options={"logit_softcap": 3.0}),
    Case("softcap_bf16", B=2, dtype="bfloat16", options={"logit_softcap": 3.0}),
    Case("window", L=130, K=2, options={"window": 20}),
    Case("window_bidirectional", L=64, options={"window": 9, "causal": False}),
    Case("bidirectional", L=64, S=130, D=64, options={"causal": False}),
    Case("prefix", L=130, B=2, prefix=True),
    Case("prefix_packed_window", B=2, prefix=True, packed=True, options={"window": 40}),
    Case("later_rows", L=7, S=130, B=2, K=2, options={"q_offset": 123}),
    Case("later_keys", S=130, options={"q_offset": 100, "kv_offset": 33}),
    Case(
        "everything",
        L=50,
        S=130,
        B=2,
        H=12,
        K=4,
        packed=True,
        prefix=True,
        options={
            "window": 60,
            "logit_softcap": 5.0,
            "q_offset": 1090,
            "kv_offset": 1000,
        },
    ),
)

WIDE_CASES = random.Random(0).sample(
    [
        Case(
            f"L{L}_H{H}_K{K}_D{D}_{dtype}_packed{packed:d}_prefix{prefix:d}_{window}",
            L=L,
            H=H,
            K=K,
            D=D,
            dtype=dtype,
            packed=packed,
            prefix=prefix,
            options={"window": window},
        )
        for L, H, D, dtype, packed, prefix, window in itertools.product(
            (1, 7, 64, 130),
            (4, 3, 12),
            (16, 64, 112),
            ("float32", "bfloat16"),
            (False, True),
            (False, True),
            (None, 17),
        )
        for K in ((1, H) if H == 3 else (1, H // 2, H))
    ],
    96,
)


def arrays(case: Case, seed: int = 0) -> tuple[list[jax.Array], dict[str, Any]]:
    """([q, k, v, dout, dlse], every other argument) of a case."""
    rng = np.random.default_rng(seed)
    B, L, H, D = case.B, case.L, case.H, case.D
    S, K = case.S or L, case.K or H
    shapes = (B, L, H, D), (B, S, K, D), (B, S, K, D), (B, L, H, D)
    tensors = [jnp.asarray(rng.standard_normal(s), case.dtype) for s in shapes]
    dlse_BLH = jnp.asarray(rng.standard_normal((B, L, H)), jnp.float32)
    options: dict[str, Any] = {"softmax_scale": D**-0.5, **case.options}
    if case.slopes:
        options["slopes_H"] = jnp.asarray(2.0 ** -np.arange(1, H + 1), jnp.float32)
    if case.packed:  # two documents, then padding: 1 1 1 2 2 2 2 0
        starts = rng.integers(0, S // 2 + 1, (B, 1)), S - rng.integers(0, 3, (B, 1))
        column = np.arange(S)[None]
        ids_BS = np.where(column < starts[1], 1 + (column >= starts[0]), 0)
        options["kv_segment_ids_BS"] = jnp.asarray(ids_BS, jnp.int32)
        options["q_segment_ids_BL"] = jnp.asarray(ids_BS[:, S - L :], jnp.int32)
    if case.prefix:  # the start of the row, and a lone token far behind the diagonal
        prefix_BS = np.zeros((B, S), bool)
        prefix_BS[:, : S // 5] = True
        prefix_BS[:, max(0, S - 4)] = True
        options["prefix_mask_BS"] = jnp.asarray(prefix_BS)
    return [*tensors, dlse_BLH], options


def oracle(
    tensors: list[jax.Array], options: dict[str, Any], keep_BHLS: Any = None
) -> tuple[np.ndarray, ...]:
    """(out, lse, dq, dk, dv) in float64; rows that see nothing are 0, lse -inf.

    keep_BHLS multiplies the softmax: dropout's mask over 1 - rate.
    """
    q, k, v, dout, dlse = (np.asarray(t).astype(np.float64) for t in tensors)
    B, L, H, _ = q.shape
    S, K = k.shape[1:3]
    i = options.get("q_offset", 0) + np.arange(L)[:, None]
    j = options.get("kv_offset", 0) + np.arange(S)[None, :]
    scale, cap = options["softmax_scale"], options.get("logit_softcap")
    slopes = np.asarray(options.get("slopes_H", np.zeros(H)), np.float64)

    out, lse = np.zeros_like(q), np.full((B, L, H), -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, h in itertools.product(range(B), range(H)):
        kv = h // (H // K)
        visible = np.full((L, S), True)
        if options.get("causal", True):
            visible = j <= i
            if "prefix_mask_BS" in options:
                visible = visible | np.asarray(options["prefix_mask_BS"])[b][None, :]
        if options.get("window") is not None:
            visible = visible & (np.abs(i - j) <= options["window"])
        if "q_segment_ids_BL" in options:
            of_q = np.asarray(options["q_segment_ids_BL"])[b][:, None]
            of_k = np.asarray(options["kv_segment_ids_BS"])[b][None, :]
            visible = visible & (of_q == of_k) & (of_q != 0)

        capped = scale * q[b, :, h] @ k[b, :, kv].T
        if cap is not None:
            capped = cap * np.tanh(capped / cap)
        logits = np.where(visible, capped - slopes[h] * np.abs(i - j), -np.inf)
        some = visible.any(1)
        top = np.where(some, logits.max(1), 0)[:, None]
        weights = np.exp(logits - top)
        total = weights.sum(1, keepdims=True)
        p = weights / np.where(total > 0, total, 1)
        keep = 1 if keep_BHLS is None else keep_BHLS[b, h]
        out[b, :, h] = (p * keep) @ v[b, :, kv]
        lse[b, some, h] = (top + np.log(np.where(total > 0, total, 1)))[some, 0]

        dp = dout[b, :, h] @ v[b, :, kv].T * keep
        ds = p * (dp - (p * dp).sum(1, keepdims=True) + dlse[b, :, h][:, None])
        if cap is not None:
            ds = ds * (1 - (capped / cap) ** 2)
        dq[b, :, h] = scale * ds @ k[b, :, kv]
        dk[b, :, kv] += scale * ds.T @ q[b, :, h]
        dv[b, :, kv] += (p * keep).T @ dout[b, :, h]
    return out, lse, dq, dk, dv


def call(backend: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    """A backend called as attention() calls it, from the public keyword arguments."""
    static = {f.name for f in dataclasses.fields(Rule)}
    rule = Rule(**{n: x for n, x in options.items() if n in static})
    operands = Operands(**{n: x for n, x in options.items() if n in Operands._fields})
    rest = {n: options[n] for n in options.keys() - static - set(Operands._fields)}
    return backend(q, k, v, rule, operands, **rest)


def assert_close(got: Any, want: Any, rtol: float, what: str) -> None:
    """Relative L2 distance within rtol, and -inf in the same places."""
    got, want = (np.asarray(a).astype(np.float64) for a in (got, want))
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want), err_msg=what)
    got, want = (np.where(np.isneginf(a), 0, a) for a in (got, want))
    error, size = np.linalg.norm(got - want), np.linalg.norm(want)
    if not error <= rtol * size:
        raise AssertionError(f"{what}: relative L2 error {error / size:.2e} > {rtol}")


class AttentionSuite:
    """Derive, define attend: attention as the public op, returning (out, lse)."""

    @staticmethod
    def attend(q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def value_and_grads(
        self, tensors: list[jax.Array], options: dict[str, Any]
    ) -> tuple[jax.Array, ...]:
        """(out, lse, dq, dk, dv) under jit; out and lse both pull."""
        q, k, v, dout, dlse = tensors

        @jax.jit
        def run(q, k, v, dout, dlse):
            results, pull = jax.vjp(lambda *a: self.attend(*a, **options), q, k, v)
            return *results, *pull((dout, dlse))

        return run(q, k, v, dout, dlse)

    def check(self, case: Case) -> None:
        tensors, options = arrays(case)
        got = self.value_and_grads(tensors, options)
        want = oracle(tensors, options)
        # A sum of products that all cancel has no relative accuracy: with one key the
        # softmax is 1 whatever q and k are, and their gradients are dlse's alone.
        for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
            limits = FORWARD_RTOL if name in ("out", "lse") else GRADIENT_RTOL
            assert_close(g, w, limits[case.dtype], f"{case.name} {name}")
        assert got[0].dtype == got[2].dtype == case.dtype
        assert got[1].dtype == jnp.float32

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_outputs_and_gradients_match_float64(self, case):
        self.check(case)

    @pytest.mark.slow
    @pytest.mark.parametrize("case", WIDE_CASES, ids=lambda case: case.name)
    def test_outputs_and_gradients_match_float64_wide(self, case):
        self.check(case)

    def test_rows_that_see_nothing_are_zero_with_zero_gradients(self):
        tensors, options = arrays(Case("blind", L=20, B=2))
        # Row 0 of the batch: padding. Row 1: every key lies after every query.
        options |= {
            "q_segment_ids_BL": jnp.zeros((2, 20), jnp.int32).at[1].set(1),
            "kv_segment_ids_BS": jnp.zeros((2, 20), jnp.int32).at[1].set(1),
            "kv_offset": 20,
        }
        out, lse, *grads = self.value_and_grads(tensors, options)
        np.testing.assert_array_equal(lse, -np.inf)
        for array in (out, *grads):
            np.testing.assert_array_equal(array, 0)

    def test_gradients_reach_visible_keys_only(self):
        """Exactly zero beyond the diagonal and the document, but for a prefix token."""
        tensors, options = arrays(Case("seen", L=33))
        q, k, v, dout, _ = tensors
        ids_BL = jnp.asarray([[1] * 12 + [2] * 21], jnp.int32)
        options |= {"q_segment_ids_BL": ids_BL, "kv_segment_ids_BS": ids_BL}
        options["prefix_mask_BS"] = jnp.zeros((1, 33), bool).at[0, 29].set(True)

        @jax.jit
        def influence(row):
            _, pull = jax.vjp(lambda k, v: self.attend(q, k, v, **options)[0], k, v)
            dk, dv = pull(jnp.zeros_like(dout).at[:, row].set(dout[:, row]))
            return (jnp.abs(dk) + jnp.abs(dv)).sum((0, 2, 3))

        j = np.arange(33)
        for i in (0, 11, 12, 20, 32):
            visible = ((j <= i) | (j == 29)) & ((i < 12) == (j < 12))
            np.testing.assert_array_equal(influence(i) > 0, visible, f"row {i}")

    def test_parts_of_the_keys_merge_to_the_whole(self):
        """The ring's rule: weights exp(lse_part - lse), positions by traced offsets."""
        tensors, options = arrays(Case("parts", L=48, S=96, B=2, K=2))
        q, k, v, dout, dlse = tensors
        options["q_offset"] = 48

        def merged(q, k, v):
            halves = [a.reshape(2, 2, 48, 2, 16).swapaxes(0, 1) for a in (k, v)]
            out, lse = jax.vmap(
                lambda k, v, at: self.attend(q, k, v, kv_offset=at, **options)
            )(*halves, jnp.asarray([0, 48], jnp.int32))
            weights = jax.nn.softmax(lse, axis=0)[..., None]
            return (weights * out).sum(0), jax.nn.logsumexp(lse, axis=0)

        got = jax.jit(
            lambda q, k, v: (merged(q, k, v), jax.vjp(merged, q, k, v)[1]((dout, dlse)))
        )(q, k, v)
        want = oracle(tensors, options)
        for g, w in zip(jax.tree.leaves(got), want, strict=True):
            assert_close(g, w, GRADIENT_RTOL["float32"], "merged")

    def test_a_row_over_65536_keys_is_precise(self):
        S = 65_536
        tensors, options = arrays(Case("long", L=1, S=S, H=4, D=32))
        options["q_offset"] = S - 1
        options["slopes_H"] = jnp.asarray([2**-0.25, 0.5, 2.0**-8, 2.0**-16])
        out, lse = jax.jit(lambda *a: self.attend(*a, **options))(*tensors[:3])
        want = oracle(tensors, options)
        np.testing.assert_allclose(out, want[0], rtol=0, atol=LONG_ROW_ATOL)
        np.testing.assert_allclose(lse, want[1], rtol=0, atol=LONG_ROW_ATOL)

    def test_checkpoint_that_saves_the_residuals_runs_attention_once(self):
        (q, k, v, *_), options = arrays(Case("remat", L=64))

        def loops(wrap):
            loss = wrap(lambda *a: self.attend(*a, **options)[0].sum())
            step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
            text = step.lower(q, k, v).as_text()
            return text.count("stablehlo.while") + text.count("stablehlo.custom_call")

        save = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
        forget = jax.checkpoint_policies.nothing_saveable
        once = loops(lambda f: f)
        assert loops(lambda f: jax.checkpoint(f, policy=save)) == once
        assert loops(lambda f: jax.checkpoint(f, policy=forget)) > once

    def test_dropout_drops_weights_and_its_gradient_is_that_of_the_mask(self):
        """With v = identity the output is the dropped softmax: its zeros, the mask."""
        rate, case = 0.4, Case("dropout", L=32, D=32, B=2, K=2)
        tensors, options = arrays(case)
        options |= {"dropout_rate": rate, "dropout_key": jax.random.key(3, impl="rbg")}
        q, k, v, *_ = tensors
        identity = jnp.broadcast_to(jnp.eye(32)[None, :, None], v.shape)
        shown = jax.jit(lambda *a: self.attend(*a, **options)[0])(q, k, identity)
        kept_BHLS = np.asarray(shown != 0).swapaxes(1, 2)
        visible = np.tri(32).sum() * 8
        assert abs(kept_BHLS.sum() / visible - (1 - rate)) < 0.03  # 4 std

        want = oracle(tensors, options, kept_BHLS / (1 - rate))
        for g, w in zip(self.value_and_grads(tensors, options), want, strict=True):
            assert_close(g, w, GRADIENT_RTOL["float32"], "dropout")

    def test_dropout_averages_to_no_dropout_over_keys(self):
        (q, k, v, *_), options = arrays(Case("dropout", L=16, H=2))
        options["dropout_rate"] = 0.2

        def draw(key):
            return self.attend(q, k, v, dropout_key=key, **options)[0]

        keys = jax.random.split(jax.random.key(0), 256)
        draws = np.asarray(jax.jit(jax.vmap(draw))(keys))
        options["dropout_rate"] = 0.0
        want = np.asarray(jax.jit(draw)(keys[0]))
        error_of_mean = draws.std(0) / 16  # 16 = sqrt(256)
        assert (np.abs(draws.mean(0) - want) <= 5 * error_of_mean + 1e-6).all()
        assert draws.std(0).max() > 0.1
