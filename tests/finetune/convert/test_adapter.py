"""Our checkpoints become adapters: what is equal is the same blob, casts are those of torch, and no torch is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from services.finetune.config import to_json
from services.finetune.convert.adapter import WEIGHTS
from services.finetune.convert.shards import DTYPES, recast
from services.finetune.errors import InvalidArgument
from services.finetune.orders import AdapterTask, ArtifactRef, ConvertRun, ImportTask
from services.finetune.progress import attempt_key, dump, raise_fence, read_outcome, run_uri
from services.finetune.store import Store
from services.finetune.store.artifacts import Parent, load, materialise, publish_directory
from tests.finetune.convert.conftest import Convert
from tests.finetune.convert.test_variants import adapter

BASE = "workspaces/w/models/base"


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return adapter(llama, tmp_path / "adapter", target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"])


@pytest.fixture
def checkpoint(do: Convert, store: Store, llama: Path, folder: Path) -> ArtifactRef:
    base = do(import_model=ImportTask(local_path=str(llama)))
    meta: dict[str, Any] = {"method": "lora", "architecture": "LlamaForCausalLM", "template": "chatml", "system": ""}
    (folder / "README.md").unlink()
    digest = publish_directory(store, "checkpoint", folder, [Parent("base", base, BASE)], {**meta, "base_name": BASE})
    return ArtifactRef(name="workspaces/w/trainingJobs/j/checkpoints/1", digest=digest)


def test_an_equal_file_is_the_same_blob(do: Convert, store: Store, checkpoint: ArtifactRef) -> None:
    made = load(store, do(adapter=AdapterTask(checkpoint=checkpoint)))
    assert made.file(WEIGHTS) == load(store, checkpoint.digest).file(WEIGHTS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_file_holds_what_torch_makes(
    do: Convert, store: Store, checkpoint: ArtifactRef, folder: Path, tmp_path: Path, dtype: str
) -> None:
    made = load(store, do(adapter=AdapterTask(checkpoint=checkpoint, dtype=dtype)))
    found = load_file(materialise(store, made, tmp_path / "made") / WEIGHTS)
    own = load_file(folder / WEIGHTS)
    assert found.keys() == own.keys()
    for name, value in found.items():
        assert torch.equal(value, own[name].to(getattr(torch, dtype))), name
    assert made.meta["parameters"] == sum(v.numel() for v in own.values())


@given(st.lists(st.floats(width=32), max_size=50), st.sampled_from(sorted(DTYPES)), st.sampled_from(sorted(DTYPES)))
def test_numbers_are_rounded_as_torch_rounds(numbers: list[float], source: str, dtype: str) -> None:
    given_numbers = torch.tensor(numbers, dtype=torch.float32).to(getattr(torch, source))
    raw = given_numbers.view(torch.uint8).numpy().tobytes() if numbers else b""
    expected = given_numbers.to(getattr(torch, dtype)).float().numpy()
    made = recast(raw, DTYPES[source][0], DTYPES[dtype][0])
    found = torch.frombuffer(bytearray(made), dtype=getattr(torch, dtype)).float().numpy() if made else expected
    assert len(made) == DTYPES[dtype][1] * len(numbers)
    np.testing.assert_array_equal(found, expected)


def test_a_torn_file_is_refused(do: Convert, store: Store, checkpoint: ArtifactRef, folder: Path) -> None:
    whole = load(store, checkpoint.digest)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    torn = publish_directory(store, "checkpoint", folder, whole.parents, whole.meta)
    with pytest.raises(InvalidArgument, match="no whole tensor") as error:
        do(adapter=AdapterTask(checkpoint=ArtifactRef(name="c", digest=torn)))
    assert error.value.reason == "ADAPTER_INCOMPLETE"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_torch_is_loaded(store: Store, checkpoint: ArtifactRef, dtype: str) -> None:
    """Its start takes longer than the whole conversion, and a new adapter is waited for."""
    key = "jobs/quick"
    raise_fence(store, key, 1)
    order = ConvertRun(job="workspaces/w/conversionJobs/quick", adapter=AdapterTask(checkpoint=checkpoint, dtype=dtype))
    store.put(f"{attempt_key(key, 1)}/run.json", dump(to_json(order)))
    code = """if True:
        import sys
        from services.finetune.__main__ import main
        sys.argv = ["worker", "convert", sys.argv[1]]
        status = main()
        sys.exit(status or ("torch" in sys.modules and "torch was loaded") or 0)
    """
    ran = subprocess.run([sys.executable, "-c", code, run_uri(store.uri, key, 1)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    told = read_outcome(store, key)
    assert told is not None and told[1].state == "SUCCEEDED", json.dumps(told[1].error if told else None)
