"""Encoders of sentences in sentence-transformers' layout: a transformer, how its states become one vector, its length.

modules.json names Python classes; they are compared with the ones that are known here, and none is imported.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from services.finetune.convert.shards import NAMES, read_folder
from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.tokenizer import Tokenizer

MODULES, SENTENCES, POOLING = "modules.json", "sentence_bert_config.json", "config.json"
ARCHITECTURES = {
    "bert": "BertModel",
    "distilbert": "DistilBertModel",
    "mpnet": "MPNetModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
}
_RESERVED = {"mpnet": 2, "roberta": 2, "xlm-roberta": 2}
"""Positions that are no token's."""
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}
_KNOWN = ("Transformer", "Pooling", "Normalize")


def is_encoder(source: Path) -> bool:
    return (source / MODULES).is_file()


def write_encoder(source: Path, out: Path) -> dict[str, Any]:
    """Put what says how to pool beside the weights in `out`; the artifact's meta. FailedPrecondition (MODEL_UNSUPPORTED),
    InvalidArgument (CONFIG_MALFORMED, WEIGHTS_*)."""
    modules = _read(source / MODULES, list)
    kinds = [str(m.get("type", "")).rpartition(".")[2] if isinstance(m, dict) else "" for m in modules]
    if kinds[:2] != list(_KNOWN[:2]) or kinds not in (list(_KNOWN), list(_KNOWN[:2])):
        raise _unsupported(f"{MODULES} has {', '.join(kinds)}; known is Transformer, Pooling, and Normalize or nothing")
    config = _read(source / "config.json", dict)
    kind, (architecture,) = config.get("model_type"), [*config.get("architectures", ()), ""][:1]
    if kind not in ARCHITECTURES or architecture != ARCHITECTURES[kind]:
        raise _unsupported(
            f"{architecture or kind} is no encoder that is known; known: {', '.join(ARCHITECTURES.values())}"
        )
    folder = str(modules[1].get("path", ""))
    if folder != Path(folder).name or not folder:
        raise _unsupported(f"the path {folder[:60]!r} of {MODULES} leads elsewhere")
    pooling = _read(source / folder / POOLING, dict)
    on = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
    if len(on) != 1 or on[0] not in _MODES:
        raise _unsupported(f"it pools by {' and '.join(on) or 'nothing'}; known is one of {', '.join(_MODES)}")
    sentences = _read(source / SENTENCES, dict) if (source / SENTENCES).is_file() else {}
    (out / folder).mkdir()
    for name in (MODULES, SENTENCES, f"{folder}/{POOLING}"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    tensors = read_folder(out)
    longest = int(config.get("max_position_embeddings") or 512) - _RESERVED.get(kind, 0)
    dtypes = {NAMES[t.dtype] for t in tensors if t.dtype in NAMES}
    Tokenizer.from_files(out)
    return {
        "architecture": architecture,
        "template": "",
        "system": "",
        "generation": {"eos_token_id": []},
        "dtype": min(dtypes, default="float32"),
        "context_length": min(int(sentences.get("max_seq_length") or longest), longest),
        "parameters": sum(t.count for t in tensors),
        "pooling": _MODES[on[0]],
        "normalize": kinds[-1] == "Normalize",
    }


def _read(path: Path, kind: type) -> Any:
    """A file's JSON. InvalidArgument (CONFIG_MALFORMED)."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path.name} cannot be read: {str(error)[:200]}", reason="CONFIG_MALFORMED") from error
    if not isinstance(value, kind):
        raise InvalidArgument(f"{path.name} is no JSON {kind.__name__}", reason="CONFIG_MALFORMED")
    return value


def _unsupported(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"this encoder cannot be brought in: {why}", reason="MODEL_UNSUPPORTED")
