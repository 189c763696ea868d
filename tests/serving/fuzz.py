"""Random bodies: fields with values that belong elsewhere, and torn JSON."""

from __future__ import annotations

import json
import random

from mpt_jax.serving.protocol import FIELDS

NAMES = [*sorted(FIELDS["completion"] | FIELDS["chat"]), "tools", "user", "x", "\ud800"]
JUNK = [
    None, True, False, 0, -1, 1, 7, 1.5, -0.0, 1e308, 10**4000, "", "x", "\ud800",
    "a" * 10_000, [], [[]], {}, [None], [0], [50], [-1], [True], [1.0], ["x"], ["x", 1],
    [[1], "x"], {"a": 1}, {"include_usage": 1}, {"1": 1}, {"99": 1}, {"1": "x"},
    [{"role": "user", "content": "x"}], [{"role": "user"}], [{"role": {}}], [7],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}], [["x"] * 20],
]  # fmt: skip


def body(rng: random.Random) -> bytes:
    fields = {rng.choice(NAMES): rng.choice(JUNK) for _ in range(rng.randrange(5))}
    if rng.random() < 0.5:
        fields["prompt"] = "x"
    text = json.dumps(fields)
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["", "\0", "NaN", "}", '"']) + text[at + 1 :]
    return text.encode()
