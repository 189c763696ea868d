"""MPT-7B as released.

1T tokens, 440 x A100-40GB for 9.5 days. The model is the checkpoint's, to the last
parameter (6,649,286,656). Published: Lion, 1,760 sequences of 2,048 tokens, 1T tokens,
FSDP only; the ten sources, their shares and filters (SOURCES below). Never published,
so not claimed here: learning rate, betas, decay, warmup, schedule (the values below are
LLM Foundry's class defaults), and the text itself, which is not ours to give.

Without an argument ``data`` is the embedded corpus, to try the shape with. With one, it
is the mixture in that folder (or bucket), a folder per source:

    python -m mpt_jax.train --config configs/released/mpt_7b.py:gs://mpt --dry_run
    python -m mpt_jax.train --config configs/released/mpt_7b.py --dry_run

Not in SOURCES: C4 comes deduplicated by SemDeDup (80 % kept), and language and open
access of S2ORC as fields; they are found before the text is here.
"""

from ml_collections import ConfigDict

from mpt_jax import presets

# (what to read, share of the tokens): 330B tokens of mC4, 0.14 of its epoch, 40B
# of Wikipedia 8.21. Source: model card of MPT-7B. Holding out by the text's hash keeps
# a validation split of about 1 in 10,000 documents that no other copy gives away.
SOURCES = (
    ("jsonl:{root}/mc4_en?filter=mc4", 0.33),
    ("jsonl:{root}/c4_en_semdedup", 0.299),
    ("jsonl:{root}/redpajama_commoncrawl", 0.10),
    ("parquet:{root}/stack?field=content&filter=stack", 0.10),
    ("jsonl:{root}/redpajama_wikipedia_en", 0.04),
    ("parquet:{root}/stack_markdown?field=content&filter=stack_markdown", 0.035),
    ("jsonl:{root}/s2orc?filter=s2orc", 0.033),
    ("jsonl:{root}/redpajama_books", 0.03),
    ("jsonl:{root}/redpajama_arxiv", 0.019),
    ("jsonl:{root}/redpajama_stackexchange", 0.014),
)


def get_config(root: str = "") -> ConfigDict:
    config = presets.config("mpt-7b")
    config.global_batch_size = 1760
    config.tokens = 1_000_000_000_000
    config.optim.name = "decoupled_lionw"
    config.optim.betas = (0.9, 0.99)
    config.optim.lr = 0.0001
    config.model.remat = "full"
    if root:
        specs = [spec.format(root=root.rstrip("/")) for spec, _ in SOURCES]
        config.data.tasks = tuple(
            f"{spec}{'&' if '?' in spec else '?'}holdout=0.0001" for spec in specs
        )
        config.data.rates = tuple(share for _, share in SOURCES)
        config.data.tokenizer = "EleutherAI/gpt-neox-20b"
        # Of a trillion tokens some rows are not text; each is reported.
        config.data.max_bad_fraction = 1e-4
    return config
