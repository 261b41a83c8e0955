from __future__ import annotations

from pathlib import Path

import pytest

from services.finetune.tokenizer import Tokenizer
from tests.finetune.goldens import real_tokenizers


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Real tokenizers by name; made once, in seconds."""
    folder: Path = tmp_path_factory.mktemp("tokenizers")
    return {name: Tokenizer.from_files(real_tokenizers.make(name, folder)) for name in real_tokenizers.NAMES}
