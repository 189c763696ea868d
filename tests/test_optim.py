"""Update rules against float64 numpy, schedules, masks, clipping, state placement."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpt_jax import optim, partitioning
from mpt_jax.config import MeshConfig, OptimConfig, ScheduleConfig, TrainConfig, parse
from mpt_jax.errors import ConfigError, InternalError

# One float64 step rounds a few times at 1e-16; six steps stay far below this.
FLOAT64_TOL = 1e-12
# optax computes adafactor's moment decay 1 - t^-0.8 in float32 even here.
ADAFACTOR_FLOAT64_TOL = 1e-8
# A few float32 roundings of 6e-8 each.
FLOAT32_RTOL = 1e-6
# Schedules are float32 with a peak of 1: a unit in the last place, and cos.
SCHEDULE_ATOL = 2e-7
# Sums over shards (adafactor's means) are taken in another order, in float32.
SHARDED_TOL = 1e-6

NAMES = ("decoupled_adamw", "decoupled_lionw", "adamw", "adafactor")
SHAPES = {
    "wte": {"weight": (5, 4)},
    "blocks": {"ffn": {"weight": (2, 3, 4), "bias": (2, 4)}},
    "lm_head": {"weight": (128, 130)},  # large enough for adafactor to factor
}


def draw(seed, shapes=SHAPES, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def run(config, params, grads, **steps):
    """The parameters after one update with each of ``grads``."""
    tx = optim.make_optimizer(config, params, **steps)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


# ---------------------------------------------------------------------- update rules
# Each reference is written from the published rule, for one parameter, in float64, in
# MosaicML's order: the parameter is decayed first, then moved.


def composer_cosine(t, *, total, warmup, alpha_f):
    if t < warmup:
        return t / warmup
    tau = min(1.0, (t - warmup) / (total - warmup))
    return alpha_f + (1 - alpha_f) * (1 + math.cos(math.pi * tau)) / 2


def reference_adam(p, grads, lrs, decays, *, betas, eps):
    m, v = np.zeros_like(p), np.zeros_like(p)
    for i, (g, lr, decay) in enumerate(zip(grads, lrs, decays, strict=True), start=1):
        p = p * (1 - decay)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        denominator = np.sqrt(v) / math.sqrt(1 - betas[1] ** i) + eps
        p = p - lr / (1 - betas[0] ** i) * m / denominator
    return p


def reference_lion(p, grads, lrs, decays, *, betas, eps):
    m = np.zeros_like(p)
    for g, lr, decay in zip(grads, lrs, decays, strict=True):
        p = p * (1 - decay)
        p = p - lr * np.sign(m + (1 - betas[0]) * (g - m))
        m = m + (1 - betas[1]) * (g - m)
    return p


def rms(x):
    return np.sqrt(np.mean(x * x))


def reference_adafactor(p, grads, lrs, decays, *, betas, eps):
    """Algorithms 2 and 4 of arXiv 1804.04235, with plain decay."""
    factored = p.ndim == 2 and min(p.shape) >= 128
    row, column, full = 0.0, 0.0, 0.0
    for i, (g, lr, decay) in enumerate(zip(grads, lrs, decays, strict=True), start=1):
        keep, square = 1 - i**-0.8, g * g + 1e-30
        if factored:
            row = keep * row + (1 - keep) * square.sum(1, keepdims=True)
            column = keep * column + (1 - keep) * square.sum(0, keepdims=True)
            v = row * column / row.sum()
        else:
            v = full = keep * full + (1 - keep) * square
        u = g / np.sqrt(v)
        # The step is relative to the parameter before it is decayed.
        step = lr * max(1e-3, rms(p)) * u / max(1.0, rms(u))
        p = p * (1 - decay) - step
    return p


REFERENCES = {"decoupled_lionw": reference_lion, "adafactor": reference_adafactor}


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_update_rule_matches_the_published_one_in_float64(name, warmup):
    lr, wd, alpha_f = 0.02, 0.1, 0.2
    # The last of six updates is amid the decay, where a shift by one step shows.
    n_updates, total = 6, 9
    config = OptimConfig(
        name=name,
        lr=lr,
        weight_decay=wd,
        decay_mask=((r".*\.bias", False), (".*", True)),
        schedule=ScheduleConfig("cosine", alpha_f=alpha_f),
        **({} if name == "adafactor" else {"betas": (0.8, 0.97)}),
        **({"eps": 1e-3} if name in ("adamw", "decoupled_adamw") else {}),
    )
    params, *grads = (draw(seed) for seed in range(1 + n_updates))
    with jax.enable_x64(True):
        got = run(config, params, grads, total_steps=total, warmup_steps=warmup)

    factors = [
        composer_cosine(t, total=total, warmup=warmup, alpha_f=alpha_f)
        for t in range(n_updates)
    ]
    scale = wd if name.startswith("decoupled_") else lr * wd
    tolerance = ADAFACTOR_FLOAT64_TOL if name == "adafactor" else FLOAT64_TOL

    def check(path, got, param, *grads):
        decays = path[-1].key != "bias"
        want = REFERENCES.get(name, reference_adam)(
            param,
            grads,
            [lr * factor for factor in factors],
            [scale * factor * decays for factor in factors],
            betas=config.betas,
            eps=config.eps,
        )
        np.testing.assert_allclose(
            got, want, rtol=tolerance, atol=tolerance, err_msg=str(path)
        )

    jax.tree.map_with_path(check, got, params, *grads)


def test_first_update_of_a_warmup_moves_nothing_but_fills_the_moments():
    params, grad = {"w": np.float32([1.0, -2.0])}, {"w": np.float32([3.0, 4.0])}
    config = OptimConfig(weight_decay=0.1)
    tx = optim.make_optimizer(config, params, total_steps=10, warmup_steps=2)
    updates, state = tx.update(grad, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 0)
    mu = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(mu["w"], [0.3, 0.4], rtol=FLOAT32_RTOL)


@pytest.mark.parametrize(
    ("name", "shrink"),
    [
        ("decoupled_adamw", 1 - 0.01),
        ("decoupled_lionw", 1 - 0.01),
        ("adamw", 1 - 0.5 * 0.01),
        ("adafactor", 1 - 0.5 * 0.01),
    ],
)
def test_weight_decay_under_a_zero_gradient_is_what_the_config_says(name, shrink):
    config = OptimConfig(
        name=name, lr=0.5, weight_decay=0.01, schedule=ScheduleConfig("constant")
    )
    params, zero = {"w": np.float32([1.0, -2.0])}, {"w": np.zeros(2, np.float32)}
    after = run(config, params, [zero], total_steps=1, warmup_steps=0)
    np.testing.assert_allclose(after["w"], params["w"] * shrink, rtol=FLOAT32_RTOL)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_parameters_get_float32_moments_and_round_once(name):
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.1)
    steps = {"total_steps": 10, "warmup_steps": 0}
    narrow = {"w": jnp.linspace(-1, 1, 12, dtype=jnp.bfloat16).reshape(3, 4)}
    wide = {"w": narrow["w"].astype(jnp.float32)}
    state = optim.make_optimizer(config, narrow, **steps).init(narrow)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}

    got = run(config, narrow, [narrow], **steps)
    want = run(config, wide, [wide], **steps)
    assert got["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["w"], want["w"].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"name": "decoupled_lionw", "eps": 1e-6}, "optim.eps"),
        ({"name": "adafactor", "betas": (0.9, 0.99)}, "optim.betas"),
        ({"name": "decoupled_adamw", "lr": 0.0, "weight_decay": 1e-5}, "optim.lr"),
    ],
)
def test_a_field_without_meaning_for_the_optimizer_is_refused(values, field):
    config = OptimConfig(**values)
    with pytest.raises(ConfigError, match=f"^{field}: "):
        optim.make_optimizer(config, SHAPES, total_steps=1, warmup_steps=0)


# ------------------------------------------------------------------------- schedules


def schedule(name="cosine", *, total=110, warmup=10, alpha_f=0.1):
    config = OptimConfig(lr=1.0, schedule=ScheduleConfig(name, alpha_f=alpha_f))
    return optim.learning_rate(config, total_steps=total, warmup_steps=warmup)


def assert_schedule(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=SCHEDULE_ATOL)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cosine", {35: 0.55 + 0.45 * 0.5**0.5, 60: 0.55, 110: 0.1, 999: 0.1}),
        ("linear", {35: 0.775, 60: 0.55, 110: 0.1, 999: 0.1}),
        ("inverse_sqrt", {40: 0.5, 90: 1 / 3, 110: 11**-0.5, 1000: 0.1}),
        ("constant", {35: 1.0, 110: 1.0, 999: 1.0}),
    ],
)
def test_schedule_values_at_key_steps(name, values):
    values = {0: 0.0, 1: 0.1, 9: 0.9, 10: 1.0, **values}
    lr = jax.jit(schedule(name))
    assert_schedule([lr(step) for step in values], list(values.values()))


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_cosine_matches_composer_at_every_step(warmup):
    lr = schedule(total=50, warmup=warmup)
    want = [composer_cosine(t, total=50, warmup=warmup, alpha_f=0.1) for t in range(60)]
    assert_schedule(lr(np.arange(60)), want)


def test_inverse_sqrt_without_warmup_starts_at_the_peak():
    lr = schedule("inverse_sqrt", warmup=0)
    assert_schedule(lr(np.arange(4)), [1, 2**-0.5, 3**-0.5, 0.5])


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_run_shorter_than_its_warmup_does_not_decay(name):
    lr = schedule(name, total=5, warmup=10)
    assert_schedule(lr(np.arange(12)), np.minimum(np.arange(12) / 10, 1))


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
    name=st.sampled_from(["cosine", "linear", "inverse_sqrt", "constant"]),
    warmup=st.integers(0, 30),
    total=st.integers(1, 60),
    alpha_f=st.floats(0, 1),
)
def test_schedule_rises_to_the_peak_then_never_rises(name, warmup, total, alpha_f):
    lr = schedule(name, total=total, warmup=warmup, alpha_f=alpha_f)(np.arange(80))
    rise, fall = np.diff(lr[: warmup + 1]), np.diff(lr[warmup:])
    assert lr[warmup] == 1.0
    assert np.all(rise > 0)
    assert np.all(fall <= SCHEDULE_ATOL)


def test_lengths_in_tokens_and_in_steps_give_one_schedule():
    common = {"global_batch_size": 8, "model": {"max_seq_len": 16}}  # 128 tokens a step
    in_steps = {"steps": 40, "optim": {"schedule": {"warmup_steps": 5}}}
    # 39.99 and 4.99 steps: a begun step counts as one.
    in_tokens = {"tokens": 5119, "optim": {"schedule": {"warmup_tokens": 639}}}
    rates = []
    for length in (in_steps, in_tokens):
        config = parse(TrainConfig, common | length)
        lr = optim.learning_rate(
            config.optim,
            total_steps=config.total_steps,
            warmup_steps=config.warmup_steps,
        )
        rates.append(lr(np.arange(41)))
    np.testing.assert_array_equal(rates[0], rates[1])
    assert rates[0].argmax() == 5


@pytest.mark.parametrize("bad", [{"total": 0}, {"warmup": -1}])
def test_impossible_lengths_raise(bad):
    with pytest.raises(ValueError, match=r"total_steps=.*warmup_steps="):
        schedule(**bad)


# ----------------------------------------------------------------------- decay masks

PARAMS = {
    "wte": {"weight": 0},
    "blocks": {"attn": {"Wq": {"weight": 0, "bias": 0}}, "norm_1": {"weight": 0}},
}


def test_decay_mask_first_full_match_wins():
    pairs = ((r".*\.bias", False), (r"blocks\.norm_.*", False), (".*", True))
    assert optim.decay_mask(pairs, PARAMS) == {
        "wte": {"weight": True},
        "blocks": {
            "attn": {"Wq": {"weight": True, "bias": False}},
            "norm_1": {"weight": False},
        },
    }


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (((r"blocks\..*", True),), r"covers wte\.weight;"),
        ((), r"covers blocks\.attn\.Wq\.bias, .*wte\.weight;"),
        # A prefix is no full match.
        ((("blocks", True), (".*", True)), "'blocks' matches no parameter"),
        (((r".*\.bais", False), (".*", True)), "bais' matches no parameter"),
        (((".*", True), (r".*\.bias", False)), "bias' decides nothing: earlier"),
        ((("(", True),), r"'\(' is no regex"),
    ],
)
def test_decay_mask_names_what_is_wrong(pairs, message):
    with pytest.raises(ConfigError, match=message) as caught:
        optim.decay_mask(pairs, PARAMS)
    assert all(p.startswith("optim.decay_mask: ") for p in caught.value.problems)


def test_decay_mask_may_close_with_a_catch_all_that_catches_nothing():
    mask = optim.decay_mask(((r".*\..*", True), (".*", False)), PARAMS)
    assert all(jax.tree.leaves(mask))


# -------------------------------------------------------------------------- clipping


def test_clip_is_torchs():
    grads = {"a": np.float32([3.0, 0.0]), "b": np.float32([[4.0]])}
    clipped, norm = optim.clip_by_global_norm(grads, 0.5)
    assert norm == 5.0
    np.testing.assert_allclose(clipped["a"], [0.3, 0.0], rtol=FLOAT32_RTOL)
    np.testing.assert_allclose(clipped["b"], [[0.4]], rtol=FLOAT32_RTOL)
    # Its 1e-6 shows where the norm is small.
    tiny, _ = optim.clip_by_global_norm({"a": np.float32([1e-6])}, 1e-6)
    np.testing.assert_allclose(tiny["a"], [0.5e-6], rtol=FLOAT32_RTOL)


@pytest.mark.parametrize("max_norm", [None, 0.5, 9.0])
def test_clip_makes_means_of_sums(max_norm):
    mean = {"a": np.float32([3.0, 0.0]), "b": np.float32([[4.0]])}
    total = jax.tree.map(lambda g: 7 * g, mean)
    want, want_norm = optim.clip_by_global_norm(mean, max_norm)
    got, norm = optim.clip_by_global_norm(total, max_norm, divisor=7.0)
    np.testing.assert_allclose(norm, want_norm, rtol=FLOAT32_RTOL)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=FLOAT32_RTOL), got, want
    )


@pytest.mark.parametrize("max_norm", [None, 5.1])
def test_clip_returns_small_gradients_bit_for_bit(max_norm):
    grads = {"a": np.float32([3.0, 4.0])}
    clipped, norm = optim.clip_by_global_norm(grads, max_norm)
    np.testing.assert_array_equal(clipped["a"], grads["a"])
    assert norm == 5.0


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(exponent=st.integers(-30, 36), seed=st.integers(0, 99))
def test_clip_survives_any_float32_magnitude(exponent, seed):
    # Squares leave float32 beyond 1e19 and below 1e-23; the norm must not.
    rng = np.random.default_rng(seed)
    a, b = np.float32(rng.standard_normal((2, 3)) * 10.0**exponent)
    clipped, norm = optim.clip_by_global_norm({"a": a, "b": b}, 1.0)
    both = np.float64([a, b])
    want = np.linalg.norm(both)
    np.testing.assert_allclose(norm, want, rtol=FLOAT32_RTOL)
    np.testing.assert_allclose(
        [clipped["a"], clipped["b"]],
        both * min(1.0, 1.0 / (want + 1e-6)),
        rtol=FLOAT32_RTOL,
    )


def test_clip_keeps_an_update_that_a_plain_float32_norm_would_zero():
    grads = {"a": np.full(4, 1e30, np.float32)}
    zeroed, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    np.testing.assert_array_equal(zeroed["a"], 0)
    clipped, norm = optim.clip_by_global_norm(grads, 1.0)
    np.testing.assert_allclose(norm, 2e30, rtol=FLOAT32_RTOL)
    np.testing.assert_allclose(clipped["a"], 0.5, rtol=FLOAT32_RTOL)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1])
def test_a_non_finite_gradient_shows_in_the_norm(bad, at):
    grads = [np.ones(2, np.float32), np.ones(3, np.float32)]
    grads[at][1] = bad
    _, norm = optim.clip_by_global_norm(grads, 1.0)
    np.testing.assert_equal(float(norm), abs(bad))


def test_clip_of_zero_is_zero():
    clipped, norm = optim.clip_by_global_norm({"a": jnp.zeros(3)}, 1.0)
    assert norm == 0
    np.testing.assert_array_equal(clipped["a"], 0)


def test_norm_of_bfloat16_gradients_is_summed_in_float32():
    ones = jnp.ones(30_000, jnp.bfloat16)  # a bfloat16 sum would stop at 256
    clipped, norm = optim.clip_by_global_norm({"a": ones}, 1.0)
    assert (clipped["a"].dtype, norm.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(norm, math.sqrt(30_000), rtol=FLOAT32_RTOL)


# ------------------------------------------------------------------- state placement

AXES = {
    "wte": {"weight": ("vocab", "embed")},
    "up_proj": {"weight": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
    "norm_f": {"weight": ("norm",)},
}
AXES_SHAPES = {
    "wte": {"weight": (256, 128)},
    "up_proj": {"weight": (2, 128, 256), "bias": (2, 256)},
    "norm_f": {"weight": (128,)},
}


def make(name):
    """The optimizer, parameters for it, its abstract state and that state's axes."""
    params = draw(0, AXES_SHAPES, np.float32)
    config = OptimConfig(name=name, weight_decay=0.01)
    tx = optim.make_optimizer(config, params, total_steps=10, warmup_steps=0)
    state = jax.eval_shape(tx.init, params)
    return tx, params, state, optim.state_axes(state, AXES)


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_state_axes_of_a_moment_are_the_parameters(moment):
    assert optax.tree_utils.tree_get(make("adamw")[3], moment) == AXES


def test_state_axes_of_factored_statistics_are_replicated():
    axes = make("adafactor")[3]
    v, v_row, v_col = (
        optax.tree_utils.tree_get(axes, field) for field in ("v", "v_row", "v_col")
    )
    assert v["norm_f"]["weight"] == ("norm",)
    assert v["up_proj"]["bias"] == ("layers", "mlp")
    assert v["wte"]["weight"] == (None,)
    assert v_row["up_proj"]["weight"] == (None, None)
    assert v_col["norm_f"]["weight"] == (None,)


@pytest.mark.parametrize(
    "state",
    [
        {"unknown": {"weight": np.zeros((2, 2))}},
        {"wte": {"weight": np.zeros((1, 2, 3))}},
        (np.zeros(3),),
    ],
)
def test_state_axes_refuses_a_leaf_without_a_place(state):
    with pytest.raises(InternalError, match="has no place"):
        optim.state_axes(state, AXES)


@pytest.mark.parametrize("name", NAMES)
def test_sharded_donated_update_matches_one_device(name):
    tx, params, abstract, axes = make(name)
    grads = draw(1, AXES_SHAPES, np.float32)
    mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def place(leaf, leaf_axes):
        return partitioning.sharding(mesh, leaf_axes, leaf.shape)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    shardings = jax.tree.map(place, params, AXES), jax.tree.map(place, abstract, axes)
    sharded = jax.device_put(params, shardings[0])
    state = jax.jit(tx.init, out_shardings=shardings[1])(sharded)
    update = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    got, new_state = update(sharded, state, jax.device_put(grads, shardings[0]))
    want, _ = jax.jit(step)(params, tx.init(params), grads)

    def check(got, want):
        np.testing.assert_allclose(got, want, rtol=SHARDED_TOL, atol=SHARDED_TOL)

    jax.tree.map(check, got, want)
    # jit drops the (1,) placeholders of adafactor, which nothing reads.
    leaves = [x for x in jax.tree.leaves((sharded, state)) if x.shape != (1,)]
    assert all(leaf.is_deleted() for leaf in leaves)
    moment = {"adafactor": "v", "decoupled_lionw": "mu"}.get(name, "nu")
    bias = optax.tree_utils.tree_get(new_state, moment)["up_proj"]["bias"]
    assert bias.sharding.shard_shape(bias.shape) == (2, 128)
