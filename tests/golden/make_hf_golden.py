"""Writes tests/golden/hf_*.npz: what Hugging Face's MptForCausalLM computes.

    python -m tests.golden.make_hf_golden        # needs torch and transformers

Each file holds one small model in our parameter tree, a batch, and HF's logits, loss
and gradient of every parameter, computed in float64 and stored as float32 (HF itself
casts to float32 around the softmax, so about seven digits are real). With these in the
repository the parity test needs no torch.

Only what HF implements can be here: multi-head attention, ALiBi with alibi_bias_max 8,
no biases, expansion_ratio 4. transformers ignores any other value without an error.

Dims: E embed, H heads, D head_dim, V vocab, N layers.

Source: transformers 5.23.0:models/mpt/modeling_mpt.py.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent
# Fields as in MosaicML's config.json. d_model is small to keep a file under 400 kB.
BASE = {
    "n_layers": 3,
    "vocab_size": 97,
    "learned_pos_emb": False,
    "no_bias": True,
    "attn_config": {"alibi": True},
}
CASES: dict[str, dict[str, Any]] = {
    # A power of two of heads; the sequence is shorter than the ALiBi table.
    "hf_4_heads": {
        "seed": 1,
        "length": 17,
        "config": BASE | {"d_model": 32, "n_heads": 4, "max_seq_len": 24},
    },
    # Six heads take the slopes of eight; a clip that bites; another epsilon.
    "hf_6_heads": {
        "seed": 2,
        "length": 33,
        "config": BASE
        | {"d_model": 36, "n_heads": 6, "max_seq_len": 33, "norm_eps": 1e-3}
        | {"attn_config": {"alibi": True, "clip_qkv": 1.0}},
    },
}


def make_model(config: dict[str, Any], *, seed: int, dtype: str) -> Any:
    """An MptForCausalLM (torch dtype by name) with random weights.

    HF's own initialisation (std 0.02, unit norms) would hide errors: attention would be
    nearly uniform and a wrong norm weight invisible. Weights are multiples of 2^-8, so
    float32 and float64 hold the same numbers and the file compresses.
    """
    import torch
    import transformers

    fields = dict(config)
    fields["layer_norm_epsilon"] = fields.pop("norm_eps", 1e-5)
    hf_config = transformers.MptConfig(**fields)
    hf_config._attn_implementation = "eager"
    model = transformers.MptForCausalLM(hf_config).to(getattr(torch, dtype)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
            if "norm" in name:
                noise = 1 + 0.3 * noise
            elif name.endswith(("wte.weight", "lm_head.weight")):
                noise = 0.5 * noise
            else:
                noise = noise / parameter.shape[-1] ** 0.5
            parameter.copy_((noise * 256).round() / 256)
    return model


def our_tree(tensors: dict[str, Any], *, n_layers: int, n_heads: int) -> dict[str, Any]:
    """Our nested tree from tensors under HF's names: weights, or gradients of them.

    torch stores a linear layer as (out, in); ours is (in, out). The rows of Wqkv are q,
    then k, then v, each with heads outermost.
    """
    arrays = {name: np.asarray(t.detach().numpy()) for name, t in tensors.items()}

    def block(n: int) -> dict[str, Any]:
        get = lambda name: arrays[f"transformer.blocks.{n}.{name}.weight"]  # noqa: E731
        width = get("norm_1").shape[0]
        heads = (n_heads, width // n_heads)
        q_EHD, k_EHD, v_EHD = (
            part.T.reshape(width, *heads) for part in np.split(get("attn.Wqkv"), 3)
        )
        return {
            "norm_1": {"weight": get("norm_1")},
            "attn": {
                "Wq": {"weight": q_EHD},
                "Wk": {"weight": k_EHD},
                "Wv": {"weight": v_EHD},
                "out_proj": {"weight": get("attn.out_proj").T.reshape(*heads, width)},
            },
            "norm_2": {"weight": get("norm_2")},
            "ffn": {
                "up_proj": {"weight": get("ffn.up_proj").T},
                "down_proj": {"weight": get("ffn.down_proj").T},
            },
        }

    def stack(trees: list[Any]) -> Any:
        if isinstance(trees[0], dict):
            return {key: stack([tree[key] for tree in trees]) for key in trees[0]}
        return np.stack(trees)

    tree = {
        "wte": {"weight": arrays["transformer.wte.weight"]},
        "blocks": stack([block(n) for n in range(n_layers)]),
        "norm_f": {"weight": arrays["transformer.norm_f.weight"]},
    }
    if "lm_head.weight" in arrays:
        tree["lm_head"] = {"weight": arrays["lm_head.weight"]}
    return tree


def evaluate(model: Any, tokens: np.ndarray, **inputs: Any) -> dict[str, Any]:
    """HF's logits, mean next-token loss, parameters and gradients, in our layout.

    Args:
      tokens: (B, L).
      inputs: further arguments of the model (attention_mask).
    """
    import torch

    ids = torch.from_numpy(np.asarray(tokens)).long()
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    # Not through labels=: HF casts the logits to float32 there.
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    loss.backward()
    named = dict(model.named_parameters())  # a tied lm_head is not listed
    sizes = {"n_layers": model.config.n_layers, "n_heads": model.config.n_heads}
    return {
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "params": our_tree(named, **sizes),
        "grads": our_tree({name: p.grad for name, p in named.items()}, **sizes),
    }


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Dotted path -> leaf."""
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/golden/{name}.npz, computed anew."""
    case = CASES[name]
    rng = np.random.default_rng(case["seed"])
    shape = (2, case["length"])
    tokens = rng.integers(case["config"]["vocab_size"], size=shape, dtype=np.int32)
    model = make_model(case["config"], seed=case["seed"], dtype="float64")
    results = flatten(evaluate(model, tokens))
    arrays = {path: np.float32(value) for path, value in results.items()}
    return arrays | {"tokens": tokens, "config": np.array(json.dumps(case["config"]))}


def main() -> None:
    for name in CASES:
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, **golden(name))
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
