"""Tokens per second of the input pipelines, ours and others', doing the same work.

    python -m mpt_jax.bench.data --text '/data/c4_en.*.json.gz' \\
        --tokenizer 20B_tokenizer.json --tokenizer spm.model --out result.json

The work: documents of JSON lines to host batches of packed rows. "raw" reads, tokenises
and packs; "prepared" has the tokens on disk. Every case is a process of its own on
--cores cores; the cases take turns, and the medians of the rounds are reported. On a
machine that others use tokens per CPU second says more than tokens per second.

The peers run where they are installed: Hugging Face ``datasets`` with the same
tokenizer and the usual concatenation, MosaicML ``streaming`` over MDS shards of the
rows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import gzip
import importlib
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mpt_jax.bench.common import provenance, save
from mpt_jax.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from mpt_jax.errors import EXIT_OK, UserError, run_verb
from mpt_jax.tokenizer import Tokenizer, load

CASES = ("raw", "prepared", "hf", "mosaic")
PEERS = {"hf": "datasets", "mosaic": "streaming"}
ROWS = 16  # of a batch


@dataclasses.dataclass(frozen=True)
class Case:
    """One pipeline: ``name`` of CASES, how it packs, with what, on how many cores."""

    name: str
    packing: str
    tokenizer: str
    cores: int

    def label(self) -> str:
        kind = pathlib.Path(self.tokenizer).name
        return f"{self.name}, {self.packing}, {kind}, {self.cores} core(s)"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mpt_jax.bench.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--text", required=True, metavar="GLOB", help="JSON lines with a text field")
    add("--tokenizer", action="append", required=True, help="repeat for more")
    add("--seq_len", type=int, default=2048, help="tokens per row")
    add("--seconds", type=float, default=5.0, help="measured of each case and round")
    add("--rounds", type=int, default=3, help="of which the median is reported")
    add("--cores", type=int, nargs="+", default=[1], help="for each case")
    add("--out", metavar="FILE.json", help="also write the result here")
    add("--case", help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    add("--traceback", action="store_true", help="show the stack of an error")

    def run() -> int:
        flags = parser.parse_args(argv)
        if flags.case:
            case = Case(**json.loads(flags.case))
            print(json.dumps(_measure(case, flags)))
            return EXIT_OK
        result = provenance("data", argv) | bench(flags)
        print(json.dumps(result, indent=1))
        save(result, flags.out)
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def bench(flags: argparse.Namespace) -> dict[str, Any]:
    """Medians of every case that can run here.

    Raises: UserError: no such text, or a case that failed (with its last line).
    """
    if not glob.glob(flags.text):
        raise UserError("no file matches", location=f"--text {flags.text}")
    cases = [
        Case(name, packing, tokenizer, cores)
        for tokenizer in flags.tokenizer
        for cores in flags.cores
        for name in CASES
        for packing in ("mpt", "bins")
        if (name not in PEERS or (packing == "mpt" and _installed(PEERS[name])))
    ]
    samples: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for tokenizer in flags.tokenizer:
            _prepare(flags, pathlib.Path(folder), tokenizer)
        for _ in range(flags.rounds):
            for case in cases:
                samples[case].append(_in_a_process(case, flags, folder))
    return {
        "seq_len": flags.seq_len,
        "missing": [n for n, module in PEERS.items() if not _installed(module)],
        "cases": {case.label(): _median(found) for case, found in samples.items()},
    }


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _median(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        name: round(statistics.median(sample[name] for sample in samples), 3)
        for name in samples[0]
    }


def _in_a_process(case: Case, flags: argparse.Namespace, folder: str) -> dict:
    command = [
        sys.executable, "-m", "mpt_jax.bench.data", f"--text={flags.text}",
        f"--tokenizer={case.tokenizer}", f"--seq_len={flags.seq_len}",
        f"--seconds={flags.seconds}", f"--folder={folder}",
        f"--case={json.dumps(dataclasses.asdict(case))}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"exit {done.returncode}: {last}", location=case.label())
    return json.loads(done.stdout.splitlines()[-1])


def _measure(case: Case, flags: argparse.Namespace) -> dict[str, float]:
    """Tokens, padding aside, per second and per CPU second, after a warm-up."""
    # Before TensorFlow or a tokenizer starts its threads: they count the cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.cores])
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if case.cores > 1 else "false"
    tokenizer = load(case.tokenizer)
    folder = _folder(flags.folder, case.tokenizer)
    open_case = {"raw": _ours, "prepared": _ours, "hf": _hf, "mosaic": _mosaic}
    with contextlib.closing(
        open_case[case.name](case, flags, tokenizer, folder)
    ) as batches:
        for _ in range(2):
            next(batches)
        tokens, begin, cpu = 0, time.perf_counter(), _cpu_seconds()
        while time.perf_counter() - begin < flags.seconds:
            tokens += next(batches)
        seconds, cpu = time.perf_counter() - begin, _cpu_seconds() - cpu
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / max(cpu, 1e-3),
        "cores_busy": cpu / seconds,
    }


def _cpu_seconds() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(kind) for kind in kinds]
    return sum(u.ru_utime + u.ru_stime for u in used)


# ---------------------------------------------------------------------------- cases


def _ours(
    case: Case, flags: argparse.Namespace, tokenizer: Tokenizer, folder: pathlib.Path
) -> Iterator[int]:
    from mpt_jax.data import feed

    raw = case.name == "raw"
    config = TrainConfig(
        steps=1,
        global_batch_size=ROWS,
        eval=EvalConfig(batches=0),
        model=ModelConfig(vocab_size=tokenizer.vocab_size),
        data=DataConfig(
            source="seqio" if raw else "prepared",
            tasks=(f"jsonl:{flags.text}?name=bench",) if raw else ("bench",),
            rates=(),
            prepared="" if raw else str(folder / "prepared"),
            tokenizer=case.tokenizer,
            seq_len=flags.seq_len,
            packing=case.packing,
            shuffle_buffer=256,
        ),
    )
    host = {"process_index": 0, "process_count": 1}
    source = feed.open_source(config, tokenizer=tokenizer, **host)
    with contextlib.closing(source):
        for batch in source:
            yield int(np.count_nonzero(batch["segment_ids"]))


def _hf(
    case: Case, flags: argparse.Namespace, tokenizer: Tokenizer, folder: pathlib.Path
) -> Iterator[int]:
    """The usual recipe: map(tokenize) and map(group_texts), both batched, streamed."""
    datasets = importlib.import_module("datasets")
    length = flags.seq_len

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        ids = tokenizer.encode_batch(rows["text"])
        return {"ids": [[*i, tokenizer.eos_id] for i in ids]}

    def group(rows: dict[str, list]) -> dict[str, list]:
        joined = [i for ids in rows["ids"] for i in ids]
        starts = range(0, len(joined) // length * length, length)
        return {"ids": [joined[start : start + length] for start in starts]}

    files = sorted(glob.glob(flags.text))
    rows = datasets.load_dataset(
        "json", data_files=files, split="train", streaming=True
    )
    columns = list(next(iter(rows)))
    rows = rows.map(tokenize, batched=True, remove_columns=columns)
    rows = rows.map(group, batched=True)
    while True:
        for batch in rows.iter(batch_size=ROWS):
            yield np.asarray(batch["ids"], np.int32).size


def _mosaic(
    case: Case, flags: argparse.Namespace, tokenizer: Tokenizer, folder: pathlib.Path
) -> Iterator[int]:
    """The rows of StreamingDataset from MDS shards, as LLM Foundry reads them."""
    streaming = importlib.import_module("streaming")
    streaming.base.util.clean_stale_shared_memory()
    rows = streaming.StreamingDataset(
        local=str(folder / "mds"), shuffle=True, batch_size=ROWS
    )
    while True:
        batch = []
        for row in rows:
            batch.append(np.frombuffer(row["tokens"], np.int32))
            if len(batch) == ROWS:
                yield np.stack(batch).size
                batch = []


# ------------------------------------------------------------- what the cases read


def _folder(root: str | pathlib.Path, tokenizer: str) -> pathlib.Path:
    return pathlib.Path(root, pathlib.Path(tokenizer).name)


def _prepare(flags: argparse.Namespace, root: pathlib.Path, name: str) -> None:
    """Writes the tokens once, in our format and, where it is installed, as MDS."""
    from mpt_jax.data import prepared

    tokenizer, folder = load(name), _folder(root, name)
    documents = [
        np.array([*ids, tokenizer.eos_id], np.int32)
        for texts in _texts(flags.text)
        for ids in tokenizer.encode_batch(texts)
    ]
    dtype = prepared.token_dtype(tokenizer.vocab_size)
    out = folder / "prepared"
    path = "bench/train-00000-of-00001"
    shard = prepared.write_shard(out, path, documents, dtype=dtype)
    about = {
        "name": name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
    }
    shards = {"bench": {"train": (shard,)}}
    prepared.write_manifest(out, prepared.Manifest(dtype, about, {}, shards, {}))
    if _installed(PEERS["mosaic"]):
        streaming = importlib.import_module("streaming")
        stream = np.concatenate(documents)
        n = stream.size // flags.seq_len
        with streaming.MDSWriter(
            out=str(folder / "mds"), columns={"tokens": "bytes"}
        ) as writer:
            for row in stream[: n * flags.seq_len].reshape(n, -1):
                writer.write({"tokens": row.tobytes()})


def _texts(pattern: str, at_once: int = 256) -> Iterator[list[str]]:
    texts: list[str] = []
    for file in sorted(glob.glob(pattern)):
        read: Callable[..., Any] = gzip.open if file.endswith(".gz") else open
        with read(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                texts.append(json.loads(line)["text"])
                if len(texts) == at_once:
                    yield texts
                    texts = []
    if texts:
        yield texts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
