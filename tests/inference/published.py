"""A tiny model and adapters on it, published to a store the way that the conversion service does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from services.finetune.store import Store
from services.finetune.store.artifacts import Parent, load, publish_directory, put_ref
from tests.tiny import tiny_model, tiny_tokenizer

WORKSPACE = "workspaces/default"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def meta(**changes: Any) -> dict[str, Any]:
    """What an artifact says of itself. Without an end-of-turn token a random model's answers have the wanted length."""
    described = {
        "architecture": "LlamaForCausalLM",
        "template": "tokenizer",
        "generation": {"eos_token_id": []},
        "dtype": "float32",
        "context_length": 512,
        "parameters": 0,
        "base_name": "tiny",
        "system": "",
    }
    return {**described, **changes}


def tiny_adapter(base: Path, directory: Path, seed: int) -> Path:
    """A LoRA in PEFT layout whose weights are all random: it changes what the base says."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft.get_peft_model(model, config).save_pretrained(str(directory))
    (directory / "README.md").unlink(missing_ok=True)
    for file in TOKENIZER_FILES:
        (directory / file).write_bytes((base / file).read_bytes())
    return directory


def wide_model(directory: Path) -> Path:
    """Like tests.tiny, but 64 wide."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tiny_tokenizer(directory))
    return directory


def model(store: Store, folder: Path, name: str, **changes: Any) -> str:
    """Publish a base; its digest."""
    digest = publish_directory(store, "base", folder, meta=meta(**changes))
    return named(store, name, digest, "base")


def adapter(store: Store, folder: Path, name: str, base: str, **changes: Any) -> str:
    """Publish an adapter on the base of that digest; its own digest."""
    parents = [Parent("base", base, f"{WORKSPACE}/models/tiny")]
    return named(store, name, publish_directory(store, "adapter", folder, parents, meta(**changes)), "adapter")


def named(store: Store, name: str, digest: str, kind: str) -> str:
    load(store, digest)
    put_ref(
        store, f"{WORKSPACE}/models/{name}", {"digest": digest, "kind": kind, "create_time": "2026-01-01T00:00:00Z"}
    )
    return digest


def folders(root: Path) -> tuple[Path, Path, Path]:
    """(base, adapter, another adapter) on disk."""
    base = tiny_model(root / "base")
    return base, tiny_adapter(base, root / "one", 1), tiny_adapter(base, root / "two", 2)
