"""Every knob of mpt_jax, once: frozen dataclasses and their parser.

A config file's ``get_config()`` returns an ``ml_collections.ConfigDict``; the verb
calls ``parse(TrainConfig, config, overrides)`` once, and all else reads the frozen
result. All problems (unknown field, wrong type, impossible combination) come in one
ConfigError. ``knob()`` carries the meaning of each field, which ``--help`` prints.

The model's fields have MosaicML's names, so that their config.json reads here. Source:
llm-foundry@8c8dd48:llmfoundry/models/mpt/configuration_mpt.py and
models/utils/config_defaults.py.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from mpt_jax.errors import ConfigError
from mpt_jax.validate import check, check_model

T = TypeVar("T")


def knob(default: Any, meaning: str) -> Any:
    """A dataclass field with its default and its meaning (unit and source included)."""
    if dataclasses.is_dataclass(default):
        cls = type(default)
        return dataclasses.field(
            default_factory=lambda: cls(), metadata={"meaning": meaning}
        )
    return dataclasses.field(default=default, metadata={"meaning": meaning})


class Override(str):
    """Text from the command line, converted to the field's declared type by parse()."""


# --------------------------------------------------------------------------- model


@dataclasses.dataclass(frozen=True)
class AttnConfig:
    attn_type: Literal[
        "multihead_attention", "multiquery_attention", "grouped_query_attention"
    ] = knob("multihead_attention", "MHA, MQA (one KV head) or GQA (kv_n_heads)")
    kv_n_heads: int | None = knob(None, "KV heads of grouped_query_attention")
    attn_pdrop: float = knob(0.0, "dropout on the attention probabilities")
    qk_ln: bool = knob(False, "LayerNorm over all query (key) features")
    qk_gn: bool = knob(False, "LayerNorm over each head's features")
    clip_qkv: float | None = knob(None, "clamp q, k and v to [-clip, clip]; 0 is off")
    softmax_scale: float | None = knob(
        None, "logit scale; default 1/sqrt(d_model/n_heads), head_dim notwithstanding"
    )
    attn_logit_softcapping: float | None = knob(
        None, "cap * tanh(logits / cap) before the bias"
    )
    attn_uses_sequence_id: bool = knob(
        False, "packed documents do not see each other (segment ids mask attention)"
    )
    sliding_window_size: int = knob(-1, "attend to |i - j| <= size only; -1 is off")
    alibi: bool = knob(False, "linear biases instead of positions (arXiv 2108.12409)")
    alibi_bias_max: float = knob(8, "steepest slope is 2^(-alibi_bias_max / n_heads)")
    prefix_lm: bool = knob(False, "prefix tokens attend both ways (llm-foundry <= 0.6)")


@dataclasses.dataclass(frozen=True)
class ActivationConfig:
    name: Literal[
        "gelu", "quick_gelu", "relu", "silu", "elu", "leaky_relu", "mish", "tanh"
    ] = knob("gelu", "torch.nn.functional name of the activation")
    approximate: Literal["none", "tanh"] = knob("none", "gelu: exact (erf) or tanh")


@dataclasses.dataclass(frozen=True)
class FFNConfig:
    ffn_type: Literal["mptmlp", "mptglu"] = knob(
        "mptmlp", "mptglu is down(act(gate(x)) * up(x))"
    )
    ffn_hidden_size: int | None = knob(None, "default int(d_model * expansion_ratio)")
    ffn_act_fn: ActivationConfig = knob(ActivationConfig(), "activation")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    name: Literal[
        "default_",
        "baseline_",
        "kaiming_normal_",
        "kaiming_uniform_",
        "neox_init_",
        "small_init_",
        "xavier_normal_",
        "xavier_uniform_",
    ] = knob("kaiming_normal_", "scheme (models/init.py has the formulas)")
    fan_mode: Literal["fan_in", "fan_out"] = knob("fan_in", "kaiming fan")
    init_nonlinearity: Literal["relu", "leaky_relu", "linear", "tanh", "sigmoid"] = (
        knob("relu", "kaiming gain")
    )
    init_gain: float = knob(0.0, "xavier gain, or the negative slope of kaiming")
    init_div_is_residual: bool | float | str = knob(
        True, "divide residual projections by: true sqrt(2 n_layers), or a number"
    )
    emb_init_std: float | None = knob(None, "normal embedding init")
    emb_init_uniform_lim: float | tuple[float, ...] | None = knob(
        None, "uniform embedding init: limit, or (low, high)"
    )
    init_std: float | None = knob(None, "std of baseline_")


RematPolicy = Literal["none", "attention", "dots", "full", "offload"]
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    d_model: int = knob(2048, "embedding width")
    n_heads: int = knob(16, "query heads")
    n_layers: int = knob(24, "blocks")
    head_dim: int | None = knob(None, "default d_model / n_heads")
    expansion_ratio: float = knob(4, "FFN width / d_model")
    max_seq_len: int = knob(2048, "length in tokens (a hard limit only of learned wpe)")
    vocab_size: int = knob(
        50368, "embedding rows; 50368 = 393.5 * 128 >= 50277 NeoX ids"
    )
    resid_pdrop: float = knob(0.0, "dropout on each branch before the residual add")
    emb_pdrop: float = knob(0.0, "dropout on the embeddings")
    learned_pos_emb: bool = knob(True, "learned positions; inert where alibi is on")
    attn_config: AttnConfig = knob(AttnConfig(), "attention")
    ffn_config: FFNConfig = knob(FFNConfig(), "feed-forward")
    init_config: InitConfig = knob(InitConfig(), "initialisation")
    logit_scale: float | str | None = knob(None, "factor, or 'inv_sqrt_d_model'")
    no_bias: bool = knob(False, "no bias in linear layers and norms")
    attention_bias: bool | None = knob(None, "bias of Wq, Wk, Wv; default not no_bias")
    embedding_fraction: float = knob(1.0, "share of the embedding gradient (GLM-130B)")
    norm_type: Literal[
        "low_precision_layernorm", "layernorm", "low_precision_rmsnorm", "rmsnorm"
    ] = knob("low_precision_layernorm", "low_precision: input cast to compute_dtype")
    norm_eps: float = knob(1e-5, "norm epsilon")
    tie_word_embeddings: bool = knob(True, "the head is wte; untied adds lm_head")
    final_logit_softcapping: float | None = knob(None, "cap * tanh(logits / cap)")
    pad_token_id: int | None = knob(
        None, "wte row that starts at 0; looking it up has no gradient"
    )
    # Ours: how it runs, never what it computes.
    compute_dtype: DType = knob("bfloat16", "activations and matmuls; norms, softmax "
                                "and loss stay float32")  # fmt: skip
    param_dtype: DType = knob("float32", "stored parameters (moments are float32)")
    remat: RematPolicy = knob(
        "none", "backward recomputes: norms and activations; all but attention; all "
        "but attention and matmuls; whole blocks; all but attention, kept on the host"
    )  # fmt: skip
    scan_layers: bool = knob(True, "one compiled block, scanned (compiles 10x faster)")
    attention: Literal["auto", "xla", "tpu", "gpu", "reference"] = knob(
        "auto", "attention kernel; a named one never falls back"
    )
    attention_skip: Literal["auto", "off"] | float = knob(
        "auto", "share of each row's softmax that a kernel may leave out, of keys that "
        "ALiBi has erased; auto: 2^-24 where rows are long, off: none"
    )  # fmt: skip

    @property
    def n_kv_heads(self) -> int:
        kind = self.attn_config.attn_type
        if kind == "multihead_attention":
            return self.n_heads
        if kind == "multiquery_attention":
            return 1
        return self.attn_config.kv_n_heads or self.n_heads

    @property
    def d_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def d_mlp(self) -> int:
        hidden = self.ffn_config.ffn_hidden_size
        return int(self.d_model * self.expansion_ratio) if hidden is None else hidden

    @property
    def softmax_scale(self) -> float:
        scale = self.attn_config.softmax_scale
        return (self.d_model / self.n_heads) ** -0.5 if scale is None else scale

    @property
    def qkv_bias(self) -> bool:
        return not self.no_bias if self.attention_bias is None else self.attention_bias

    @property
    def has_wpe(self) -> bool:
        """Learned positions exist only without ALiBi (MosaicML forces them off)."""
        return self.learned_pos_emb and not self.attn_config.alibi

    @property
    def logit_multiplier(self) -> float:
        if self.logit_scale == "inv_sqrt_d_model":
            return self.d_model**-0.5
        return 1.0 if self.logit_scale is None else float(self.logit_scale)


# MosaicML fields that are not ours: (values that change nothing here, what to say of
# any other value). None for the values means that any value is inert.
FOREIGN_FIELDS: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "attn_config.rope": ((False,), "rotary positions are not supported; use alibi"),
    "attn_config.rope_theta": (None, ""),
    "attn_config.rope_impl": (None, ""),
    "attn_config.rope_dail_config": (None, ""),
    "attn_config.rope_hf_config": (None, ""),
    "attn_config.nope": ((False,), "only exists in block_overrides; not supported"),
    "attn_config.kv_dim": ((None,), "cross-attention is not supported"),
    "attn_config.reuse_kv_layer_idx": ((None,), "KV reuse is not supported"),
    "attn_config.reuse_kv_x_layer_idx": ((None,), "KV reuse is not supported"),
    "attn_config.attn_impl": (
        ("torch", "flash", "triton"),
        "picks a torch kernel; here model.attention picks ours",
    ),
    "attn_config.fused_qkv": ((True, False), "Wq, Wk, Wv are always separate here"),
    "attn_config.seq_parallel_world_size": ((None, 1), "use mesh.context"),
    "attn_config.verbose": (None, ""),
    "ffn_config.fc_type": (None, ""),
    "init_config.verbose": (None, ""),
    "block_overrides": ((None,), "per-block overrides are not supported"),
    "fuse_norm_attn_norm": ((False,), "not supported: XLA fuses without it"),
    "init_device": (None, ""),
    "use_cache": (None, ""),
    "use_pad_tok_in_ffn": ((True, False), "real tokens come out the same"),
    "activation_checkpointing_target": ((None,), "use model.remat"),
    "verbose": (None, ""),
    "fc_type": (("torch", {"name": "torch"}, None), "Transformer Engine layers are "
                "not supported"),
}  # fmt: skip
for _moe in ("moe_num_experts", "moe_top_k", "moe_loss_weight", "moe_jitter_eps",
             "moe_normalize_expert_weights", "moe_world_size", "moe_weight_parallelism",
             "uniform_expert_assignment", "mlp_type", "mlp_impl",
             "glu_impl"):  # fmt: skip
    FOREIGN_FIELDS[f"ffn_config.{_moe}"] = ((), "mixture of experts is not supported")
FOREIGN_VALUES = {
    ("ffn_config.ffn_type", "te_ln_mlp"): "Transformer Engine is not supported",
    ("ffn_config.ffn_type", "torch_dmoe"): "mixture of experts is not supported",
    ("ffn_config.ffn_type", "mb_moe"): "mixture of experts is not supported",
    ("ffn_config.ffn_type", "mb_dmoe"): "mixture of experts is not supported",
    ("norm_type", "triton_rmsnorm"): "not supported: rmsnorm computes the same",
}

# ----------------------------------------------------------------------- the rest


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: Literal["seqio", "prepared", "synthetic"] = knob(
        "seqio", "SeqIO tasks, what the prepare verb wrote, or seeded random tokens "
        "(no TensorFlow needed)"
    )  # fmt: skip
    tasks: tuple[str, ...] = knob(
        ("stdlib_code", "stdlib_prose"),
        "names in mpt_jax/data/tasks.py, or FORMAT:PATH?key=value&... of "
        "mpt_jax/data/sources.py; of prepared data, the names of its sources",
    )
    rates: tuple[float, ...] = knob(
        (), "share of each task in the tokens, relative; () is equal shares"
    )
    epochs: tuple[float, ...] = knob(
        (), "epochs of each source over the run, instead of rates (prepared data only)"
    )
    prepared: str = knob("", "directory that the prepare verb wrote")
    tokenizer: str = knob(
        "stdlib",
        "'stdlib' (SentencePiece trained once on the embedded corpus, cached), "
        "'bytes', a SentencePiece .model, a tokenizer.json of Hugging Face (GPT-NeoX) "
        "or its hub name; '+chatml' at the end appends <|im_start|> and <|im_end|>",
    )
    tokenizer_vocab_size: int = knob(2048, "size of the 'stdlib' tokenizer")
    seq_len: int | None = knob(None, "tokens per row; default model.max_seq_len")
    packing: Literal["mpt", "bins"] = knob(
        "mpt", "documents of one task end to end, cut every seq_len tokens; or whole "
        "documents into the rows where they fit best"
    )  # fmt: skip
    on_long: Literal["split", "truncate"] = knob(
        "split", "a document longer than a row: goes on in the next, or is cut off"
    )
    max_bad_fraction: float = knob(
        0.0, "share of rows that are not text (bad JSON, not UTF-8, empty ...) past "
        "which reading stops; those below it are skipped and reported"
    )  # fmt: skip
    shuffle_buffer: int = knob(
        1024, "rows shuffled in memory per task; 0: neither rows nor documents are"
    )
    cache_dir: str = knob("", "tokenizer cache; default $XDG_CACHE_HOME/mpt_jax")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    name: Literal["cosine", "linear", "inverse_sqrt", "constant"] = knob(
        "cosine", "decay after the warmup"
    )
    warmup_steps: int | None = knob(None, "linear warmup; or warmup_tokens")
    warmup_tokens: int | None = knob(None, "linear warmup; or warmup_steps")
    alpha_f: float = knob(0.1, "final learning rate / peak (cosine, linear)")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: Literal["decoupled_adamw", "decoupled_lionw", "adamw", "adafactor"] = knob(
        "decoupled_adamw", "decoupled_*: MosaicML's decay rule; others optax's"
    )
    lr: float = knob(1e-3, "peak learning rate; adafactor: relative to the RMS")
    betas: tuple[float, ...] = knob((0.9, 0.95), "decay of both moments")
    eps: float = knob(1e-8, "Adam epsilon")
    weight_decay: float = knob(
        0.0, "decoupled_*: p *= 1 - (lr/peak) * wd; adamw, adafactor: p *= 1 - lr * wd"
    )
    decay_mask: tuple[tuple[str, bool], ...] = knob(
        ((".*", True),),
        "(regex, decays) pairs, first match wins, must cover everything",
    )
    clip_norm: float | None = knob(1.0, "global gradient-norm clip; none is off")
    schedule: ScheduleConfig = knob(ScheduleConfig(), "learning-rate schedule")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    z_loss: float = knob(0.0, "weight of log(Z)^2 (PaLM); 0 is off")
    chunk_tokens: int = knob(1024, "tokens per device whose logits exist at once")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = knob(1, "replicas; batch is split, parameters are copied")
    fsdp: int = knob(-1, "batch and parameters are split; -1 takes the devices left")
    tensor: int = knob(1, "heads, mlp and vocab are split")
    context: int = knob(
        1, "sequence and parameters are split; keys go round a ring of these devices"
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int | None = knob(None, "save every so many steps")
    every_minutes: float | None = knob(10.0, "and every so many minutes")
    keep: int = knob(2, "newest checkpoints kept")
    init_from: str = knob("", "checkpoint directory to take parameters (only) from")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every_steps: int | None = knob(
        None, "validation every so many steps, and at the end"
    )
    batches: int = knob(8, "validation batches, the same ones each time; 0 is off")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every_steps: int = knob(10, "log (and write metrics) every so many steps")
    tensorboard: bool = knob(True, "write TensorBoard events")
    plot: bool = knob(True, "draw the loss curve (PNG) at the end")


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    nonfinite: Literal["stop", "skip", "rollback"] = knob(
        "skip", "what to do when loss or gradient is not finite (never applied)"
    )
    max_skips: int = knob(5, "consecutive skipped steps before stopping")
    spike: Literal["ignore", "stop", "rollback"] = knob(
        "ignore", "what to do on a loss spike"
    )
    spike_factor: float = knob(2.0, "a spike is a loss over factor * running mean")
    spike_window: int = knob(100, "losses in the running mean (all must be there)")
    spike_patience: int = knob(4, "outliers in a row before it counts")
    max_rollbacks: int = knob(3, "rollbacks before stopping")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    prompt: str = knob("", "text to continue when training ends")
    max_tokens: int = knob(0, "tokens to generate; 0 is off")
    temperature: float = knob(0.8, "0 is greedy")


@dataclasses.dataclass(frozen=True)
class SuperviseConfig:
    max_failures: int = knob(3, "failures without a new checkpoint before giving up")
    backoff_seconds: float = knob(1.0, "pause before a restart, doubled each failure")
    grace_seconds: float = knob(60.0, "from SIGTERM to SIGKILL")


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    arrival_seconds: float = knob(
        300.0, "until all processes of a job must have come (a pod's hosts boot within "
        "minutes of each other)"
    )  # fmt: skip
    silence_seconds: float = knob(
        20.0, "without a word from a process until it is lost (a live migration, or a "
        "long hold of Python's lock, takes a few)"
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    seed: int = knob(17, "parameters, data order and dropout")
    steps: int | None = knob(None, "training length; or tokens")
    tokens: int | None = knob(None, "training length; or steps")
    global_batch_size: int = knob(32, "sequences per step over all devices")
    microbatches: int = knob(1, "gradient-accumulation parts of a batch")
    watchdog_seconds: float = knob(
        1800.0, "no step for so long: dump the stacks, exit 75; 0 is off"
    )
    compilation_cache: str = knob(
        "auto", "directory where compiled programs are kept for the next start; auto: "
        "WORKDIR/compiled, but for CPUs, whose programs fit one model only; '': none"
    )  # fmt: skip
    model: ModelConfig = knob(ModelConfig(), "the model")
    data: DataConfig = knob(DataConfig(), "the data")
    optim: OptimConfig = knob(OptimConfig(), "the optimizer")
    loss: LossConfig = knob(LossConfig(), "the objective")
    mesh: MeshConfig = knob(MeshConfig(), "the devices")
    checkpoint: CheckpointConfig = knob(CheckpointConfig(), "checkpoints")
    eval: EvalConfig = knob(EvalConfig(), "validation")
    log: LogConfig = knob(LogConfig(), "metrics")
    stability: StabilityConfig = knob(StabilityConfig(), "divergence")
    sample: SampleConfig = knob(SampleConfig(), "the sample at the end")
    supervise: SuperviseConfig = knob(SuperviseConfig(), "--supervise")
    processes: ProcessesConfig = knob(ProcessesConfig(), "a job of several processes")

    @property
    def seq_len(self) -> int:
        return self.data.seq_len or self.model.max_seq_len

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    @property
    def total_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        return -(-(self.tokens or 0) // self.tokens_per_step)

    @property
    def warmup_steps(self) -> int:
        schedule = self.optim.schedule
        if schedule.warmup_tokens is not None:
            return -(-schedule.warmup_tokens // self.tokens_per_step)
        return schedule.warmup_steps or 0


# Fields that may differ between a run and its resumption. Any other difference is
# refused: it would change the model, the data order or the optimizer's meaning.
RESUME_FREE = (
    "steps", "tokens", "watchdog_seconds", "compilation_cache", "mesh", "checkpoint",
    "eval", "log", "stability", "sample", "supervise", "processes", "data.cache_dir",
    "microbatches", "data.prepared", "data.max_bad_fraction",
    "model.remat", "model.scan_layers", "model.attention", "model.attention_skip",
    "loss.chunk_tokens",
)  # fmt: skip

# ------------------------------------------------------------------------- parsing


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(a) for a in typing.get_args(hint))
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _convert(hint: Any, value: Any) -> Any:
    """``value`` as ``hint``; raises ValueError when it is not one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Override):
        # "none" is a word of some Literals, and no value to them.
        word = origin is Literal and str(value) in args
        value = str(value) if word else _from_text(hint, value)
    if origin in (types.UnionType, typing.Union):
        for option in sorted(args, key=lambda a: a is str):  # str takes anything: last
            try:
                return _convert(option, value)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise ValueError
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v) for v in value)
        if len(value) != len(args):
            raise ValueError
        return tuple(_convert(a, v) for a, v in zip(args, value, strict=True))
    if hint is type(None):
        if value is None:
            return None
        raise ValueError
    if hint is bool and isinstance(value, bool):
        return value
    if isinstance(value, bool):
        raise ValueError
    if hint is int and isinstance(value, (int, float)) and value == int(value):
        return int(value)
    if hint is float and isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    if hint is str and isinstance(value, str):
        return str(value)
    raise ValueError


def _from_text(hint: Any, text: str) -> Any:
    if hint is str:
        return str(text)
    word = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in word:
        return word[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(_from_text(inner, t.strip()) for t in text.split(",") if t.strip())
    return str(text)


def suggest(name: str, names: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def _is_foreign(path: str, value: Any, problems: list[str], prefix: str) -> bool:
    """Whether ``path`` (within ModelConfig) is a MosaicML field that we do not have."""
    if path == "attn_config.attn_temperature_tuning":
        if isinstance(value, Mapping) and value.get("attn_scale", 0.0) != 0.0:
            problems.append(f"{prefix}{path}.attn_scale: not supported (only 0.0)")
        return True
    if path not in FOREIGN_FIELDS:
        return False
    inert, reason = FOREIGN_FIELDS[path]
    if isinstance(value, Override):
        value = _from_text(object, value)
    if inert is not None and value not in inert:
        problems.append(f"{prefix}{path}={value!r}: {reason}")
    return True


def _build(
    cls: type,
    values: Mapping,
    *,
    path: str,
    model_path: str | None,
    problems: list[str],
) -> Any:
    """``cls`` from nested mappings; problems are appended, not raised."""
    if model_path is None and cls is ModelConfig:
        model_path = path
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints, out = _hints(cls), {}
    for name, value in values.items():
        full = f"{path}{name}"
        in_model = full.removeprefix(model_path) if model_path is not None else ""
        if name not in fields:
            if not _is_foreign(in_model, value, problems, model_path or ""):
                problems.append(f"{full}: unknown field{suggest(name, fields)}")
            continue
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if isinstance(value, Override):
                value = _from_text(hint, value)
            if value is None or isinstance(value, hint):
                out[name] = hint() if value is None else value
            elif isinstance(value, Mapping):
                out[name] = _build(
                    hint,
                    value,
                    path=f"{full}.",
                    model_path=model_path,
                    problems=problems,
                )
            else:
                problems.append(f"{full}: expected fields, got {value!r}")
            continue
        if reason := FOREIGN_VALUES.get((in_model, value)) if _hashable(value) else "":
            problems.append(f"{full}={value!r}: {reason}")
            continue
        try:
            out[name] = _convert(hint, value)
        except ValueError:
            problems.append(f"{full}: expected {_type_name(hint)}, got {value!r}")
    return cls(**out)


def _hashable(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def nest(overrides: Mapping[str, Any], base: Mapping | None = None) -> dict:
    """``{'a.b': 1}`` laid over nested mappings: ``{'a': {'b': 1}}``.

    >>> nest({"optim.lr": 2}, {"optim": {"lr": 1, "eps": 3}, "seed": 4})
    {'optim': {'lr': 2, 'eps': 3}, 'seed': 4}
    """
    tree = {
        k: nest({}, v) if isinstance(v, Mapping) else v for k, v in (base or {}).items()
    }
    for path, value in overrides.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            child = node.get(parent)
            node[parent] = child if isinstance(child, dict) else {}
            node = node[parent]
        node[leaf] = value
    return tree


def parse(
    cls: type[T],
    values: Mapping,
    overrides: Mapping[str, str] | None = None,
    *,
    location: str = "",
) -> T:
    """The frozen ``cls`` from ``values`` with command-line ``overrides`` on top.

    Args:
      values: nested mappings (ConfigDict, config.json); absent fields keep defaults.
      overrides: dotted path -> text, converted to the declared type ("1e4" is an int).
    Raises:
      ConfigError: with every unknown field, wrong type and impossible combination.
    """
    problems: list[str] = []
    texts = {path: Override(text) for path, text in (overrides or {}).items()}
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    config = _build(
        cls, nest(texts, values), path="", model_path=None, problems=problems
    )
    if cls is ModelConfig:
        problems += [f"{p}" for p in check_model(config)]
    elif cls is TrainConfig:
        problems += [f"model.{p}" for p in check_model(config.model)] + check(config)
    if problems:
        raise ConfigError(problems, location=location)
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of every knob, in declaration order."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[f"{prefix}{field.name}"] = value
    return flat


def meanings(cls: type, prefix: str = "") -> dict[str, tuple[str, Any, str]]:
    """Dotted path -> (type, default, meaning) of every knob, for --help."""
    out: dict[str, tuple[str, Any, str]] = {}
    defaults = cls()
    for field in dataclasses.fields(cls):
        hint, default = _hints(cls)[field.name], getattr(defaults, field.name)
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            out |= meanings(hint, f"{path}.")
        else:
            out[path] = (_type_name(hint), default, field.metadata["meaning"])
    return out


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def resume_differences(saved: Mapping, config: TrainConfig) -> list[str]:
    """Fields of ``saved`` (a parsed JSON) that forbid resuming with ``config``."""
    old = flatten(parse(TrainConfig, saved))
    new = flatten(config)
    free = lambda path: any(path == f or path.startswith(f + ".") for f in RESUME_FREE)  # noqa: E731
    return [
        f"{path}: checkpoint has {old[path]!r}, this run has {new[path]!r}"
        for path in new
        if old[path] != new[path] and not free(path)
    ]
