"""An MPT in EleutherAI's lm-evaluation-harness, as its model ``mpt_jax``.

    python -m mpt_jax.lm_eval run --model mpt_jax --tasks lambada_openai,hellaswag \\
        --model_args checkpoint=$HOME/mpt-7b,int8=true --batch_size 16

runs the harness's own command line with the model registered; ``lm_eval`` itself finds
it, too, in releases that look for plugins (the entry point is in setup.py; 0.4.13 does
not look yet). From Python: ``lm_eval.simple_evaluate(mpt_jax.lm_eval.MptJax(...))``.

Needs the lm-eval extra: pip install -e '.[lm-eval]'. Source of the rules (what is
cut off where, what stands before an empty context, how long texts are windowed):
lm-evaluation-harness@0.4.13:lm_eval/api/model.py and models/huggingface.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax import loading, partitioning
from mpt_jax.config import ModelConfig
from mpt_jax.errors import EXIT_OK, MptError, UserError
from mpt_jax.generation import templates, text
from mpt_jax.generation.engine import Request
from mpt_jax.generation.sampling import Sampling
from mpt_jax.models import mpt

Pair = tuple[Sequence[int], Sequence[int]]  # context and continuation, not empty

MIN_COLUMNS = 32  # lengths are padded to this times a power of two: few programs
LOGIT_COLUMNS = 64  # columns whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Score:
    """log P of a continuation; whether greedy decoding gives each of its tokens."""

    logprob: float
    is_greedy: bool


def score(
    loaded: loading.Loaded, pairs: Sequence[Pair], *, max_length: int, batch_size: int
) -> Iterator[tuple[int, Score]]:
    """Yields (index, score) of each pair, the longest first.

    What does not fit into max_length tokens of input is cut off on the left.

    Raises: UserError: an empty context or continuation, or one that is too long.
    """
    for i, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= max_length:
            raise UserError(
                f"request {i}: {len(context)} tokens of context and "
                f"{len(continuation)} of continuation; expected at least one of each, "
                f"and at most {max_length} of the latter"
            )
    rows = [[*context, *cont][-max_length - 1 :] for context, cont in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    place = partitioning.use(loaded.mesh, batch=()) if loaded.mesh else None
    with place or contextlib.nullcontext():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            scores = _score_batch(
                loaded,
                [rows[i] for i in batch],
                [len(pairs[i][1]) for i in batch],
                batch_size=batch_size,
                max_length=max_length,
            )
            yield from zip(batch, scores, strict=True)


def _score_batch(
    loaded: loading.Loaded,
    rows: Sequence[Sequence[int]],
    counts: Sequence[int],
    *,
    batch_size: int,
    max_length: int,
) -> list[Score]:
    """Scores the last counts[i] tokens of each of the rows, all at once."""
    length = min(_padded(max(map(len, rows)) - 1), max_length)
    columns = _padded(max(counts))
    tokens_BL = np.zeros((batch_size, length + 1), np.int32)
    ends_B, counts_B = np.ones((2, batch_size), np.int32)
    for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
        tokens_BL[b, : len(row)] = row
        ends_B[b], counts_B[b] = len(row) - 1, count
    found = _scores(
        loaded.cfg, loaded.params, tokens_BL, ends_B, counts_B, columns=columns
    )
    logprobs, greedy = (np.asarray(a)[: len(rows)].tolist() for a in found)
    return [Score(*pair) for pair in zip(logprobs, greedy, strict=True)]


def _padded(length: int) -> int:
    """
    >>> [_padded(n) for n in (1, 32, 33, 100)]
    [32, 32, 64, 128]
    """
    return MIN_COLUMNS << max(0, (length - 1) // MIN_COLUMNS).bit_length()


@functools.partial(jax.jit, static_argnums=0, static_argnames="columns")
def _scores(
    cfg: ModelConfig,
    params: mpt.Params,
    tokens_BL: jax.Array,
    ends_B: jax.Array,
    counts_B: jax.Array,
    *,
    columns: int,
) -> tuple[jax.Array, jax.Array]:
    """Scores the counts_B tokens that end at column ends_B of tokens_BL.

    Args: columns: at least the greatest count. Only so many columns have logits.
    Returns: the sum of log P (float32); whether each token is the likeliest (bool).
    Numerics: float32 log-softmax over all rows of the head, as apply() gives them.
    """
    # Each leaf apart, as hidden_states takes it.
    blocks = jax.tree.map(lambda *layers: layers, *params["blocks"])
    cfg = dataclasses.replace(cfg, scan_layers=False)
    x_BLE = mpt.hidden_states(cfg, {**params, "blocks": blocks}, tokens_BL[:, :-1])
    targets_BC = ends_B[:, None] + jnp.arange(1 - columns, 1)[None]
    asked_BC = targets_BC > (ends_B - counts_B)[:, None]
    at_BC = jnp.maximum(targets_BC, 1)
    ids_BC = jnp.take_along_axis(tokens_BL, at_BC, axis=1)
    x_BCE = jnp.take_along_axis(x_BLE, at_BC[..., None] - 1, axis=1)

    def part(of: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BcE, ids_Bc = of
        logits_BcV = mpt.logits(cfg, params, x_BcE)
        logprobs_BcV = jax.nn.log_softmax(logits_BcV)
        logprobs_Bc = jnp.take_along_axis(logprobs_BcV, ids_Bc[..., None], axis=-1)
        return logprobs_Bc[..., 0], jnp.argmax(logits_BcV, axis=-1) == ids_Bc

    n = max(1, columns // LOGIT_COLUMNS)
    split = lambda a: jnp.moveaxis(a.reshape(len(a), n, -1, *a.shape[2:]), 1, 0)  # noqa: E731
    parts = jax.lax.map(part, (split(x_BCE), split(ids_BC)))
    logprobs_BC, greedy_BC = (
        jnp.moveaxis(a, 0, 1).reshape(ids_BC.shape) for a in parts
    )
    return (
        jnp.where(asked_BC, logprobs_BC, 0).sum(axis=1),
        (greedy_BC | ~asked_BC).all(axis=1),
    )


# ---------------------------------------------------------------------- the harness


class Harness:
    """What the harness asks of a model; MptJax is this with the harness's base class.

    Args: as of loading.load(), and
      batch_size: rows scored, or requests continued, at once; "auto" is 16.
      max_length: tokens of context and continuation; default max_seq_len.
      max_gen_toks: tokens to generate where the task does not say.
      template: for --apply_chat_template; default what the model was released with.
      device: without meaning, since the harness says "cuda:0" where nobody said
        anything. JAX_PLATFORMS chooses.
    """

    backend = "causal"

    def __init__(
        self,
        checkpoint: str,
        *,
        dtype: str | None = None,
        int8: bool = False,
        mesh: str | None = None,
        tokenizer: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        template: str | None = None,
        device: str | None = None,
    ):
        super().__init__()
        self.loaded = loading.load(
            checkpoint, dtype=dtype, int8=int8, mesh=mesh, tokenizer=tokenizer
        )
        self.tokenizer = self.loaded.need_tokenizer()
        self.batch_size = 16 if batch_size == "auto" else int(batch_size)
        self.max_length = max_length or self.loaded.cfg.max_seq_len
        self.max_gen_toks = max_gen_toks
        self._template_name = template
        self._chatting = False

    # ------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context."""
        bos = self.loaded.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """The ids of ``string``. Special tokens in it count once apply_chat_template()
        wrote some: the harness hands back one text, questions and all."""
        if self._chatting and hasattr(self.tokenizer, "encode_special"):
            return self.tokenizer.encode_special(string)
        return self.tokenizer.encode(string)

    @functools.cached_property
    def _template(self) -> templates.Template:
        return templates.choose(
            self._template_name, name=self.loaded.name, tokenizer=self.tokenizer
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not add_generation_prompt:
            raise UserError(
                "mpt_jax: gen_prefix, an answer's given start, is not built"
            )
        self._chatting = True
        return templates.render_text(chat_history, self._template)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the harness writes into its results."""
        return json.dumps(dataclasses.asdict(self._template))

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    # ------------------------------------------------------------------------ scoring

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        from tqdm import tqdm

        out: list[Any] = [None] * len(requests)
        scores = score(
            self.loaded,
            [(context, continuation) for _, context, continuation in requests],
            max_length=self.max_length,
            batch_size=self.batch_size,
        )
        for i, found in tqdm(
            scores, "loglikelihood", total=len(requests), disable=disable_tqdm
        ):
            out[i] = found.logprob, found.is_greedy
            if requests[i][0] is not None:  # None: a window of a longer text
                self.cache_hook.add_partial("loglikelihood", requests[i][0], out[i])
        return out

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log P of each whole text, in windows of max_length that predict every token
        once with as much context as there is."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for i, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in map(make_disjoint_window, rolling):
                windows.append((None, *pair))
                owners.append(i)
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (logprob, _) in zip(owners, scores, strict=True):
            sums[i] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    # --------------------------------------------------------------------- generation

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        from tqdm import tqdm

        asked = [self._request(i, *r.args) for i, r in enumerate(requests)]
        engine = self.loaded.engine(n_slots=self.batch_size, capacity=self.max_length)
        out = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm) as progress:
            for delta in text.run(engine, self.tokenizer, asked):
                i = int(delta.id)
                out[i] += delta.text
                if delta.finish_reason is not None:
                    if delta.error:
                        raise UserError(f"request {i}: {delta.error}")
                    self.cache_hook.add_partial(
                        "generate_until", requests[i].args, out[i]
                    )
                    progress.update()
        return out

    def _request(self, i: int, context: str, options: dict[str, Any]) -> Request:
        """Reads the task's options; of a long context the end is kept."""
        from lm_eval.models.utils import normalize_gen_kwargs

        keys = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        max_tokens, stop = keys.pop("max_gen_toks"), tuple(keys.pop("until"))
        temperature = float(keys.pop("temperature", 1.0))
        if not keys.pop("do_sample"):
            temperature = 0.0
        known = {f.name for f in dataclasses.fields(Sampling)}
        if unknown := set(keys) - known:
            raise UserError(f"generation_kwargs: unknown {', '.join(sorted(unknown))}")
        room = self.max_length - max_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks={max_tokens} leaves no room for a prompt in max_length="
                f"{self.max_length}"
            )
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        sampling = Sampling(
            max_tokens=max_tokens, temperature=temperature, stop=stop, **keys
        )
        return Request(str(i), ids, sampling)


@functools.cache
def _model_class() -> type:
    """Harness with the harness's base class, registered as ``mpt_jax``."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        message = "needs the harness: pip install -e '.[lm-eval]'"
        raise UserError(message) from None
    members = {"__doc__": Harness.__doc__, "__module__": __name__}
    return register_model("mpt_jax")(type("MptJax", (Harness, TemplateLM), members))


def __getattr__(name: str) -> Any:
    """``MptJax``: made when asked for, so that this imports without the harness."""
    if name == "MptJax":
        return _model_class()
    raise AttributeError(f"module {__name__} has no attribute {name}")


def main() -> int:
    """The harness's own command line, which knows ``--model mpt_jax``."""

    try:
        _model_class()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()  # reads sys.argv
    except MptError as error:  # others keep the stack that the harness shows
        print(f"{error.kind}: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
