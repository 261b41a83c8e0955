"""The token that stands for an image, put into a tokenizer's files; no text's ids change but that of `<image>` itself."""

from __future__ import annotations

import json
from collections.abc import Mapping

from services.finetune.errors import FailedPrecondition

IMAGE_TOKEN = "<image>"
_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"


def add_image_token(files: Mapping[str, bytes]) -> tuple[int, dict[str, bytes]]:
    """(the token's id, the files that change) of a tokenizer's JSON files by name. One that has the token keeps it.

    FailedPrecondition (TOKENIZER_MISSING, TOKENIZER_INVALID).
    """
    from tokenizers import AddedToken, Tokenizer

    if _FILE not in files:
        raise FailedPrecondition(
            "the language model has no tokenizer.json; import it again", reason="TOKENIZER_MISSING"
        )
    backend = Tokenizer.from_str(files[_FILE].decode())
    known = backend.token_to_id(IMAGE_TOKEN)
    if known is not None and known in backend.get_added_tokens_decoder():
        return known, {}
    backend.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    token = backend.token_to_id(IMAGE_TOKEN)
    assert token is not None  # it was put in
    # The file is edited as the data that it is: the library would write much else anew.
    entry = {"id": token, "content": IMAGE_TOKEN, "special": True}
    entry |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data = json.loads(files[_FILE])
    data["added_tokens"] = [*(data.get("added_tokens") or []), entry]
    made = {_FILE: json.dumps(data, ensure_ascii=False).encode()}
    if Tokenizer.from_str(made[_FILE].decode()).token_to_id(IMAGE_TOKEN) != token:
        raise FailedPrecondition(
            f"the tokenizer cannot be given {IMAGE_TOKEN}: its ids have holes", reason="TOKENIZER_INVALID"
        )
    config = json.loads(files.get(_CONFIG, b"{}"))
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        decoder[str(token)] = {k: v for k, v in entry.items() if k != "id"}
        made[_CONFIG] = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True).encode()
    return token, made
