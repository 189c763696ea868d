"""The mixture of MPT-7B in miniature: ten sources in their published proportions.

The model of configs/tiny.py, GPT-NeoX-20B's tokenizer, and ten small files in a folder
that you name after the colon:

    python -m mpt_jax.train --config configs/tiny_mixture.py:DIR --workdir runs/mixture

DIR holds NAME.jsonl.gz for each of SOURCES (rows {"text": ...}), and the tokenizer as
tokenizer.json. One filter of the ten runs, mC4's; the others want fields of their data
sets. Reproduces nothing published; no loss is promised, the text is yours. Hardware:
any two CPU cores.
"""

from ml_collections import ConfigDict

from mpt_jax import presets

# File, the source of MPT-7B that it stands for, its share of the tokens.
SOURCES = (
    ("web_gov", "mC4 English", 0.33),
    ("c4_en", "C4 English, SemDeDup", 0.299),
    ("cc_web", "RedPajama CommonCrawl", 0.10),
    ("latex_book", "The Stack, 18 languages", 0.10),
    ("wikipedia", "RedPajama Wikipedia", 0.04),
    ("markdown", "The Stack, Markdown", 0.035),
    ("papers_s2", "S2ORC", 0.033),
    ("books", "RedPajama Books", 0.03),
    ("arxiv", "RedPajama arXiv", 0.019),
    ("stackexchange", "RedPajama StackExchange", 0.014),
)
FILTERS = {"web_gov": "&filter=mc4"}


def get_config(directory: str = ".") -> ConfigDict:
    config = presets.config()
    config.model.update(
        d_model=96,
        n_heads=6,
        n_layers=4,
        max_seq_len=256,
        vocab_size=50304,  # 393 * 128 >= 50277 GPT-NeoX tokens
        no_bias=True,
        compute_dtype="float32",
    )
    config.model.attn_config.alibi = True
    config.steps = 100
    config.global_batch_size = 8
    config.optim.lr = 2e-3
    config.optim.schedule.warmup_steps = 10
    config.eval.every_steps = 50
    config.data.tasks = tuple(
        f"jsonl:{directory}/{name}.jsonl.gz?holdout=0.2{FILTERS.get(name, '')}"
        for name, _, _ in SOURCES
    )
    config.data.rates = tuple(share for _, _, share in SOURCES)
    config.data.tokenizer = f"{directory}/tokenizer.json"
    config.data.shuffle_buffer = 256
    return config
