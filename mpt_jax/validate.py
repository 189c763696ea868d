"""What cannot be: every impossible combination of knobs, named by its path.

config.parse() calls check_model() and check(); check_mesh() is called again with the
device count when it is known. Each returns messages and raises nothing, so that a user
sees all problems of a configuration at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpt_jax.config import DataConfig, InitConfig, ModelConfig, TrainConfig


def _require(problems: list[str], ok: bool, message: str) -> None:
    if not ok:
        problems.append(message)


def check_model(m: ModelConfig) -> list[str]:
    """Every impossible combination inside a model, with the field's name."""
    problems: list[str] = []
    a, need = m.attn_config, functools.partial(_require, problems)
    for name in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size"):
        need(getattr(m, name) > 0, f"{name}: must be > 0, got {getattr(m, name)}")
    if problems:
        return problems
    need(
        m.d_model % m.n_heads == 0,
        f"n_heads: {m.n_heads} does not divide d_model {m.d_model}",
    )
    need(m.head_dim is None or m.head_dim > 0, "head_dim: must be > 0")
    gqa = a.attn_type == "grouped_query_attention"
    need(
        gqa == (a.kv_n_heads is not None) or a.kv_n_heads == m.n_kv_heads,
        f"attn_config.kv_n_heads: {a.kv_n_heads} with attn_type {a.attn_type!r}; give "
        "it with grouped_query_attention and only there",
    )
    kv = a.kv_n_heads or m.n_kv_heads
    need(
        kv > 0 and m.n_heads % max(kv, 1) == 0,
        f"attn_config.kv_n_heads: {kv} does not divide n_heads {m.n_heads}",
    )
    need(not (a.qk_ln and a.qk_gn), "attn_config: only one of qk_ln and qk_gn")
    need(a.clip_qkv is None or a.clip_qkv >= 0, "attn_config.clip_qkv: must be >= 0")
    need(
        a.sliding_window_size == -1 or a.sliding_window_size >= 0,
        "attn_config.sliding_window_size: -1 (off) or >= 0",
    )
    need(a.alibi_bias_max > 0, "attn_config.alibi_bias_max: must be > 0")
    for name, p in (
        ("attn_config.attn_pdrop", a.attn_pdrop),
        ("resid_pdrop", m.resid_pdrop),
        ("emb_pdrop", m.emb_pdrop),
    ):
        need(0 <= p < 1, f"{name}: a probability in [0, 1), got {p}")
    for name, cap in (
        ("attn_config.attn_logit_softcapping", a.attn_logit_softcapping),
        ("final_logit_softcapping", m.final_logit_softcapping),
    ):
        need(cap is None or cap > 0, f"{name}: must be > 0, got {cap}")
    if m.ffn_config.ffn_hidden_size is None:
        width = m.d_model * m.expansion_ratio
        need(
            width == int(width) and width > 0,
            f"expansion_ratio: d_model * expansion_ratio = {width} is not a positive "
            "integer",
        )
    else:
        need(
            m.ffn_config.ffn_hidden_size > 0, "ffn_config.ffn_hidden_size: must be > 0"
        )
    need(
        not isinstance(m.logit_scale, str) or m.logit_scale == "inv_sqrt_d_model",
        f"logit_scale: a number or 'inv_sqrt_d_model', got {m.logit_scale!r}",
    )
    need(0 < m.embedding_fraction <= 1, "embedding_fraction: must be in (0, 1]")
    need(m.norm_eps > 0, "norm_eps: must be > 0")
    share = m.attention_skip
    need(
        isinstance(share, str) or 0 <= share < 1,
        f"attention_skip: 'auto', 'off' or a share in [0, 1), got {share}",
    )
    need(
        m.pad_token_id is None or 0 <= m.pad_token_id < m.vocab_size,
        f"pad_token_id: {m.pad_token_id} is outside the vocabulary",
    )
    return problems + _check_init(m.init_config)


def _check_init(init: InitConfig) -> list[str]:
    problems: list[str] = []
    need = functools.partial(_require, problems)
    need(
        init.name != "baseline_" or init.init_std is not None,
        "init_config.init_std: baseline_ needs it",
    )
    need(
        not (init.emb_init_std is not None and init.emb_init_uniform_lim is not None),
        "init_config: only one of emb_init_std and emb_init_uniform_lim",
    )
    need(
        not init.name.startswith("xavier") or init.init_gain > 0,
        "init_config.init_gain: xavier multiplies by it; must be > 0",
    )
    lim = init.emb_init_uniform_lim
    need(
        not isinstance(lim, tuple) or len(lim) == 2,
        f"init_config.emb_init_uniform_lim: a limit or (low, high), got {lim}",
    )
    div = init.init_div_is_residual
    if isinstance(div, str):
        ok = div.replace(".", "", 1).isdigit() and float(div) > 0
        need(ok, f"init_config.init_div_is_residual: {div!r} is not a number > 0")
    elif not isinstance(div, bool):
        need(div > 0, "init_config.init_div_is_residual: must be > 0")
    return problems


def check(c: TrainConfig) -> list[str]:
    """Every impossible combination outside the model that needs no device to see."""
    problems: list[str] = []
    need = functools.partial(_require, problems)
    need(
        (c.steps is None) != (c.tokens is None),
        f"steps, tokens: give exactly one, got steps={c.steps}, tokens={c.tokens}",
    )
    for name in ("steps", "tokens"):
        value = getattr(c, name)
        need(value is None or value > 0, f"{name}: must be > 0, got {value}")
    s = c.optim.schedule
    need(
        s.warmup_steps is None or s.warmup_tokens is None,
        "optim.schedule: only one of warmup_steps and warmup_tokens",
    )
    for path, low in (
        ("global_batch_size", 1),
        ("microbatches", 1),
        ("seed", 0),
        ("watchdog_seconds", 0),
        ("optim.lr", 0),
        ("optim.eps", 0),
        ("optim.weight_decay", 0),
        ("optim.schedule.warmup_steps", 0),
        ("optim.schedule.warmup_tokens", 0),
        ("optim.schedule.alpha_f", 0),
        ("loss.z_loss", 0),
        ("loss.chunk_tokens", 1),
        ("data.seq_len", 2),
        ("data.shuffle_buffer", 0),
        ("data.tokenizer_vocab_size", 400),
        ("checkpoint.every_steps", 1),
        ("checkpoint.keep", 1),
        ("eval.every_steps", 1),
        ("eval.batches", 0),
        ("log.every_steps", 1),
        ("stability.max_skips", 0),
        ("stability.spike_window", 1),
        ("stability.spike_patience", 0),
        ("stability.max_rollbacks", 0),
        ("sample.max_tokens", 0),
        ("sample.temperature", 0),
        ("supervise.max_failures", 0),
        ("supervise.backoff_seconds", 0),
        ("supervise.grace_seconds", 0),
        ("processes.arrival_seconds", 1),
        ("processes.silence_seconds", 2),
    ):
        value = functools.reduce(getattr, path.split("."), c)
        need(value is None or value >= low, f"{path}: must be >= {low}, got {value}")
    need(
        c.sample.max_tokens == 0 or c.data.source != "synthetic",
        "sample.max_tokens: synthetic tokens have no text to sample; set it to 0",
    )
    every = c.checkpoint.every_minutes
    need(every is None or every > 0, "checkpoint.every_minutes: must be > 0")
    need(
        c.optim.clip_norm is None or c.optim.clip_norm > 0,
        "optim.clip_norm: must be > 0, or none",
    )
    need(
        len(c.optim.betas) == 2 and all(0 <= b < 1 for b in c.optim.betas),
        f"optim.betas: two numbers in [0, 1), got {c.optim.betas}",
    )
    problems += check_data(c.data)
    need(
        not c.model.has_wpe or c.seq_len <= c.model.max_seq_len,
        f"data.seq_len: {c.seq_len} > model.max_seq_len {c.model.max_seq_len}, where "
        "learned positions end",
    )
    need(
        max(c.microbatches, 1) and c.global_batch_size % max(c.microbatches, 1) == 0,
        f"microbatches: {c.microbatches} does not divide global_batch_size "
        f"{c.global_batch_size}",
    )
    problems += check_mesh(c)
    return problems


def check_data(d: DataConfig) -> list[str]:
    """Every impossible combination of the data knobs that needs no file to see."""
    problems: list[str] = []
    need = functools.partial(_require, problems)
    need(len(d.tasks) > 0, "data.tasks: name at least one")
    need(
        len(d.rates) in (0, len(d.tasks)),
        f"data.rates: {len(d.rates)} rates for {len(d.tasks)} tasks",
    )
    for name in ("rates", "epochs"):
        values = getattr(d, name)
        ok = all(v > 0 and math.isfinite(v) for v in values)
        need(ok, f"data.{name}: must be > 0, got {values}")
    prepared = d.source == "prepared"
    need(
        prepared == bool(d.prepared),
        "data.prepared: a directory for data.source 'prepared', and only there; got "
        f"{d.prepared!r} for {d.source!r}",
    )
    if d.epochs:
        need(prepared, "data.epochs: only prepared data knows its size; use data.rates")
        need(
            len(d.epochs) == len(d.tasks),
            f"data.epochs: {len(d.epochs)} epochs for {len(d.tasks)} tasks",
        )
        need(not d.rates, "data.epochs: epochs or rates; set data.rates to ()")
    need(
        0 <= d.max_bad_fraction < 1,
        f"data.max_bad_fraction: a share in [0, 1), got {d.max_bad_fraction}",
    )
    return problems


def check_mesh(c: TrainConfig, n_devices: int | None = None) -> list[str]:
    """Divisibility of the mesh; with ``n_devices`` also whether it can be built."""
    problems: list[str] = []
    need = functools.partial(_require, problems)
    sizes = dataclasses.asdict(c.mesh)
    for name, size in sizes.items():
        need(size > 0 or size == -1, f"mesh.{name}: must be > 0, or -1, got {size}")
    need(list(sizes.values()).count(-1) <= 1, "mesh: at most one axis can be -1")
    if problems:
        return problems
    known = math.prod(s for s in sizes.values() if s > 0)
    if n_devices is not None:
        fill = -1 in sizes.values()
        ok = n_devices % known == 0 if fill else n_devices == known
        shape = " x ".join(f"{k}={v}" for k, v in sizes.items())
        need(
            ok,
            f"mesh: {shape} does not fit {n_devices} devices; the product must be "
            f"{n_devices} (set one axis to -1 to fill)",
        )
        if problems:
            return problems
        sizes = {k: n_devices // known if v == -1 else v for k, v in sizes.items()}
    t, m = sizes["tensor"], c.model
    if t > 1:
        for name, size in (
            ("n_heads", m.n_heads),
            ("vocab_size", m.vocab_size),
            ("d_mlp", m.d_mlp),
        ):
            need(size % t == 0, f"mesh.tensor: {t} does not divide model.{name} {size}")
        kv = m.n_kv_heads
        need(
            kv == 1 or kv % t == 0,
            f"mesh.tensor: {t} does not divide the {kv} KV heads (one KV head is "
            "replicated)",
        )
    problems += _check_context(c, sizes["context"])
    f, n = sizes["fsdp"], max(sizes["context"], 1)
    need(
        f < 1 or m.d_model % (f * n) == 0,
        f"mesh.fsdp: {f}{f' x context {n}' if n > 1 else ''} does not divide "
        f"model.d_model {m.d_model}",
    )
    shards = max(f, 1) * max(sizes["data"], 1)
    rows = c.global_batch_size // max(c.microbatches, 1)
    if -1 not in sizes.values() and rows % shards:
        near = max(rows // shards, 1) * shards * c.microbatches
        problems.append(
            f"global_batch_size: {c.global_batch_size} / {c.microbatches} microbatches "
            f"is {rows} rows, not divisible by data * fsdp = {shards}; nearest: {near}"
        )
    return problems


def _check_context(c: TrainConfig, n: int) -> list[str]:
    """What rows cut into ``n`` parts of their length cannot have."""
    problems: list[str] = []
    need = functools.partial(_require, problems)
    if n <= 1:
        return problems
    length = c.seq_len
    need(
        length % n == 0,
        f"mesh.context: {n} does not divide data.seq_len {length}; nearest: "
        f"{max(length // n, 1) * n}",
    )
    need(
        not c.model.attn_config.attn_pdrop,
        f"mesh.context: {n} parts of a row have no attention dropout; set "
        "model.attn_config.attn_pdrop to 0 or mesh.context to 1",
    )
    need(
        c.model.attention != "reference",
        "mesh.context: model.attention 'reference' has no parts of a row; use 'auto'",
    )
    return problems
