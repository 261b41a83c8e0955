"""Quantised models as stock transformers loads them."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from services.finetune.convert.compressed import group_of
from services.finetune.errors import Cancelled, FailedPrecondition
from services.finetune.orders import ArtifactRef, ImportTask, QuantizeTask
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, load, materialise, publish
from tests.finetune.convert.conftest import Convert
from tests.finetune.convert.test_export import files, ref
from tests.tiny import tiny_model

ROWS = [{"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n} " * 20}]}
        for n in range(24)]  # fmt: skip
IDS = torch.tensor([[1, 70, 80, 90, 100, 110, 120, 30, 31, 32]])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "wide", hidden_size=128)


@pytest.fixture
def base(do: Convert, wide: Path) -> str:
    return do(import_model=ImportTask(local_path=str(wide), dtype="bfloat16"))


def logits(folder: Path, **options: Any) -> torch.Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return torch.as_tensor(model(IDS).logits.float())


def calibration(store: Store) -> ArtifactRef:
    blob = store.put_blob("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    file = File("rows.jsonl", blob.digest, blob.size)
    digest = publish(
        store,
        Manifest("dataset", (file,), (), {"format": "openai", "rows": len(ROWS), "skipped_rows": 0, "skipped": []}),
    )
    return ArtifactRef(name="workspaces/w/datasets/d/revisions/r", digest=digest)


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_bitsandbytes_as_it_quantises_in_loading(
    do: Convert, store: Store, base: str, method: Any, tmp_path: Path
) -> None:
    made = load(store, do(quantize=QuantizeTask(model=ref(base), method=method)))
    source = load(store, base)
    assert made.kind == "quantized" and made.meta == {**source.meta, "quantization": method}
    assert [(p.role, p.digest) for p in made.parents] == [("source", base)] and made.size < source.size * 0.75
    plain = materialise(store, source, tmp_path / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=method != "int8",
        load_in_8bit=method == "int8",
        bnb_4bit_quant_type=method if method != "int8" else "nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    wanted = logits(plain, quantization_config=config, dtype=torch.bfloat16)
    assert torch.equal(logits(materialise(store, made, tmp_path / "made")), wanted)


@pytest.mark.parametrize(("method", "error"), [("fp8", 0.06), ("int4", 0.25)])
def test_compressed_tensors_load_and_answer_alike(
    do: Convert, store: Store, base: str, method: Any, error: float, tmp_path: Path
) -> None:
    made = load(store, do(quantize=QuantizeTask(model=ref(base), method=method)))
    source = load(store, base)
    kept = {p: d for p, d in files(source).items() if p not in ("config.json", "model.safetensors")}
    assert kept.items() <= files(made).items() and made.size < source.size * 0.75
    wanted, found = logits(materialise(store, source, tmp_path / "s")), logits(materialise(store, made, tmp_path / "m"))
    assert 0 < (found - wanted).norm() / wanted.norm() < error


def test_gptq_keeps_outputs_better_than_rounding(do: Convert, store: Store, base: str, tmp_path: Path) -> None:
    rows = calibration(store)
    task = QuantizeTask(model=ref(base), method="gptq", calibration=rows, calibration_rows=16, max_length=64)
    made = load(store, do(quantize=task))
    assert [(p.role, p.digest) for p in made.parents] == [("source", base), ("dataset", rows.digest)]
    rounded = load(store, do(quantize=QuantizeTask(model=ref(base), method="int4")))
    places = {
        n: materialise(store, m, tmp_path / n) for n, m in (("b", load(store, base)), ("g", made), ("r", rounded))
    }
    assert (places["g"] / "config.json").read_bytes() == (places["r"] / "config.json").read_bytes()
    wanted = logits(places["b"])
    near, far = ((logits(places[n]) - wanted).norm() for n in "gr")
    assert near < far


def test_what_is_missing_or_stopped(
    do: Convert, store: Store, base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {e.key for e in store.list("manifests/")}
    stop = threading.Event()
    stop.set()
    for method in ("nf4", "fp8", "int4"):
        with pytest.raises(Cancelled):
            do(stop, quantize=QuantizeTask(model=ref(base), method=method))
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(FailedPrecondition, match=r"quartet\[quantize\]") as caught:
        do(quantize=QuantizeTask(model=ref(base), method="fp8"))
    assert caught.value.reason == "LIBRARY_MISSING" and {e.key for e in store.list("manifests/")} == before
    done = do(quantize=QuantizeTask(model=ref(base), method="nf4"))
    with pytest.raises(FailedPrecondition) as caught:
        do(quantize=QuantizeTask(model=ref(done), method="nf4"))
    assert caught.value.reason == "MODEL_NOT_WHOLE"


@pytest.mark.parametrize(("width", "group"), [(4096, 128), (576, 64), (96, 32), (130, 2)])
def test_groups(width: int, group: int) -> None:
    assert group_of(width) == group
