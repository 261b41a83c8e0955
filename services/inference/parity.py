"""Whether an endpoint would chat in the tokens that its models were trained on."""

from __future__ import annotations

from services.finetune.prepare.certificate import META, certify, check
from services.finetune.store import Store
from services.finetune.store.artifacts import load
from services.finetune.templates import load_template
from services.finetune.tokenizer import Tokenizer


def check_parity(store: Store, name: str, digest: str, base: str) -> None:
    """FailedPrecondition (PARITY_MISMATCH) if the tokenizer of the artifact `base` makes other tokens than the artifact
    `digest`, known as `name`, was trained on. What carries no certificate is not checked."""
    meta = load(store, digest).meta
    if META in meta:
        tokenizer = Tokenizer.from_artifact(store, load(store, base))
        check(meta[META], certify(tokenizer, load_template(meta["template"], tokenizer)), name)
