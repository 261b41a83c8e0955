from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    Dinov2Model,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionModel,
)

from services.finetune.errors import Cancelled, FailedPrecondition, InvalidArgument
from services.finetune.orders import AssembleTask, ImportTask, MergeTask, ReshardTask
from services.finetune.store import Store
from services.finetune.store.artifacts import load, materialise
from services.finetune.tokenizer import Tokenizer
from tests.finetune.convert import towers
from tests.finetune.convert.conftest import Convert
from tests.finetune.convert.towers import assembled, ref
from tests.tiny import tiny_model

TOKENS = (towers.SIDE // towers.PATCH) ** 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return towers.clip(tmp_path_factory.mktemp("clip"))


def load_llava(folder: Path) -> Any:
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def pixels(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, towers.SIDE, towers.SIDE, generator=torch.Generator().manual_seed(3))


def of_parts(language: Path, features_ND: torch.Tensor, projector: dict[str, torch.Tensor], ids: list[int]) -> Any:
    """Logits of the language model alone, told what the projector makes of the features in the places of the image."""
    model = AutoModelForCausalLM.from_pretrained(language).eval()
    weights = {k.removeprefix("multi_modal_projector."): v for k, v in projector.items()}
    hidden = torch.nn.functional.linear(features_ND, weights["linear_1.weight"], weights["linear_1.bias"])
    seen = torch.nn.functional.linear(
        torch.nn.functional.gelu(hidden), weights["linear_2.weight"], weights["linear_2.bias"]
    )
    at = ids.index(-1)
    words = model.get_input_embeddings()(torch.tensor([[max(i, 0) for i in ids]]))
    embeds = torch.cat([words[:, :at], seen[None], words[:, at + len(seen) :]], 1)
    return model(inputs_embeds=embeds).logits


def check_forward(folder: Path, language: Path, features_ND: torch.Tensor, atol: float = 1e-5) -> None:
    token = json.loads((folder / "config.json").read_text())["image_token_index"]
    found = [json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]]
    own = {k for k in found[0] if k.startswith("multi_modal_projector.")}
    path = folder / found[0][next(iter(own))]
    projector = load_file(path)
    assert set(projector) == own, "the projector has a file of its own"
    ids = [1, 5, *[-1] * len(features_ND), 7, 8]
    expected = of_parts(language, features_ND, projector, ids)
    with torch.inference_mode():
        got = load_llava(folder)(
            input_ids=torch.tensor([[token if i < 0 else i for i in ids]]), pixel_values=pixels()
        ).logits
    assert torch.allclose(got[..., : expected.shape[-1]], expected, atol=atol)


@pytest.mark.parametrize("source", ["clip", "whole_clip"])
def test_the_whole_computes_what_its_parts_do(
    do: Convert, store: Store, llama: Path, tmp_path: Path, source: str
) -> None:
    tower = getattr(towers, source)(tmp_path / "tower")
    made = load(store, assembled(do, llama, tower))
    folder = materialise(store, made, tmp_path / "out")
    with torch.inference_mode():
        states = CLIPVisionModel.from_pretrained(tower).eval()(pixels(), output_hidden_states=True).hidden_states
    check_forward(folder, llama, states[-2][0, 1:])
    assert made.kind == "base" and made.meta["architecture"] == "LlavaForConditionalGeneration"
    assert [p.role for p in made.parents] == ["language_model", "vision_tower"]
    assert made.meta["template"] == "tokenizer" and made.meta["generation"] == {"eos_token_id": [2]}


def test_a_siglip_tower_has_no_class_token_to_leave_out(do: Convert, store: Store, llama: Path, tmp_path: Path) -> None:
    tower = towers.siglip(tmp_path / "tower")
    folder = materialise(store, load(store, assembled(do, llama, tower)), tmp_path / "out")
    with torch.inference_mode():
        states = SiglipVisionModel.from_pretrained(tower).eval()(pixels(), output_hidden_states=True).hidden_states
    check_forward(folder, llama, states[-2][0])


def test_a_dinov2_tower_becomes_a_clip_tower_that_computes_the_same(
    do: Convert, store: Store, llama: Path, tmp_path: Path
) -> None:
    tower = towers.dinov2(tmp_path / "tower")
    made = load(store, do(import_model=ImportTask(local_path=str(tower))))
    assert made.kind == "vision_tower" and made.meta["architecture"] == "CLIPVisionModel"
    folder = materialise(store, made, tmp_path / "clip")
    loaded: Any = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
    assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]
    with torch.inference_mode():
        own = Dinov2Model.from_pretrained(tower).eval()(pixels(), output_hidden_states=True)
        new = loaded[0].eval()(pixels(), output_hidden_states=True)
    for ours, theirs in zip(new.hidden_states, own.hidden_states, strict=True):
        centred = theirs - theirs.mean(-1, keepdim=True)
        assert torch.allclose(ours[..., :128], centred, rtol=1e-3, atol=1e-3 * float(centred.abs().max()))
    assert torch.allclose(
        new.pooler_output[:, :128], own.pooler_output, atol=1e-3 * float(own.pooler_output.abs().max())
    )


@pytest.mark.parametrize(("pad", "side"), [(False, (40, 60)), (True, (60, 40))])
def test_stock_processor_reads_it(
    do: Convert, store: Store, llama: Path, clip: Path, tmp_path: Path, pad: bool, side: tuple[int, int]
) -> None:
    from PIL import Image

    folder = materialise(store, load(store, assembled(do, llama, clip, pad_to_square=pad)), tmp_path / "out")

    class Processor(LlavaProcessor):
        def check_argument_for_proper_class(self, *_: Any) -> None:
            """It would load all tokenizer classes, one of which needs packages that are not here."""

    about = json.loads((folder / "processor_config.json").read_text())
    images: Any = AutoImageProcessor.from_pretrained(folder)
    processor: Any = Processor(images, AutoTokenizer.from_pretrained(folder), **about)
    inputs = processor(images=Image.new("RGB", side, "red"), text="a<image>b", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, towers.SIDE, towers.SIDE)
    config = json.loads((folder / "config.json").read_text())
    assert inputs["input_ids"][0].tolist().count(config["image_token_index"]) == TOKENS == config["image_seq_length"]
    corner = inputs["pixel_values"][0, :, 0, 0].abs().max()
    assert (corner < 0.05) == pad, "padding has the mean colour"
    with torch.inference_mode():
        load_llava(folder)(**inputs)


def test_texts_keep_their_ids_and_embeddings_grow_by_their_mean(
    do: Convert, store: Store, llama: Path, clip: Path, tmp_path: Path
) -> None:
    folder = materialise(store, load(store, assembled(do, llama, clip)), tmp_path / "out")
    old, new = Tokenizer.from_files(llama), Tokenizer.from_files(folder)
    for text in ("Hello <|im_start|> \n\t äöü 你好", "<imag", "image>", "< image >"):
        assert old.encode(text) == new.encode(text) and old.encode_plain(text) == new.encode_plain(text)
    assert new.encode("<image>") == [259] and new.encode_plain("<image>") == old.encode("<image>")
    config = json.loads((folder / "config.json").read_text())
    assert config["image_token_index"] == 259 and config["text_config"]["vocab_size"] == 320
    language: Any = AutoModelForCausalLM.from_pretrained(llama)
    model = load_llava(folder)
    for got, was in (
        (model.get_input_embeddings().weight, language.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, language.get_output_embeddings().weight),
    ):
        assert torch.equal(got[:259], was) and got.shape == (320, 32)
        assert torch.allclose(got[259:], was.mean(0).expand(61, -1), atol=1e-7)


def test_no_row_is_added_where_there_is_room(do: Convert, store: Store, clip: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    language = tiny_model(tmp_path / "roomy")
    config = LlamaConfig.from_pretrained(language, vocab_size=320, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(language)
    folder = materialise(store, load(store, assembled(do, language, clip)), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"] == 320
    model = load_llava(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any("lm_head" in name for path in folder.glob("*.safetensors") for name in load_file(path))


def test_a_seed_makes_a_projector_and_nothing_else(do: Convert, store: Store, llama: Path, clip: Path) -> None:
    first, again, other = (load(store, assembled(do, llama, clip, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    differs = [f.path for f, g in zip(first.files, other.files, strict=True) if f.digest != g.digest]
    assert differs == ["model-00003-of-00003.safetensors"]


def test_small_files_and_another_dtype(do: Convert, store: Store, llama: Path, clip: Path, tmp_path: Path) -> None:
    made = load(store, assembled(do, llama, clip, dtype="bfloat16", max_shard_size_bytes=40_000))
    folder = materialise(store, made, tmp_path / "out")
    whole = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    assert {v.dtype for v in whole.values()} == {torch.bfloat16} and made.meta["dtype"] == "bfloat16"
    assert len(list(folder.glob("*.safetensors"))) > 4
    load_llava(folder)
    again = do(reshard=ReshardTask(model=ref(do(import_model=ImportTask(local_path=str(folder))))))
    load_llava(materialise(store, load(store, again), tmp_path / "one"))


def test_an_assembled_model_is_imported_again(
    do: Convert, store: Store, llama: Path, clip: Path, tmp_path: Path
) -> None:
    made = load(store, assembled(do, llama, clip))
    folder = materialise(store, made, tmp_path / "out")
    again = load(store, do(import_model=ImportTask(local_path=str(folder))))
    assert again.meta == made.meta and {f.digest for f in again.files} == {f.digest for f in made.files}


def test_what_cannot_be_assembled_is_refused(do: Convert, llama: Path, clip: Path, tmp_path: Path) -> None:
    language, tower = (ref(do(import_model=ImportTask(local_path=str(p)))) for p in (llama, clip))
    whole = ref(do(assemble=AssembleTask(language_model=language, vision_tower=tower)))
    for one, two, reason in ((tower, tower, "MODEL_NOT_WHOLE"), (language, language, "MODEL_NOT_TOWER")):
        with pytest.raises(FailedPrecondition) as error:
            do(assemble=AssembleTask(language_model=one, vision_tower=two))
        assert error.value.reason == reason
    with pytest.raises(FailedPrecondition, match="no whole language model"):
        do(assemble=AssembleTask(language_model=whole, vision_tower=tower))
    with pytest.raises(InvalidArgument) as wrong:
        do(assemble=AssembleTask(language_model=language, vision_tower=tower, feature_layer=9))
    assert wrong.value.reason == "FEATURE_LAYER_INVALID"
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        do(stop, assemble=AssembleTask(language_model=language, vision_tower=tower))
    with pytest.raises(FailedPrecondition, match="of kind vision_tower"):
        do(merge=MergeTask(adapter=tower, base=language))


@pytest.mark.parametrize(
    ("changes", "gone", "why"),
    [
        ({}, "preprocessor_config.json", "preprocessor_config.json"),
        ({"image_size": 42}, "", "42, in patches of 14"),
        ({"num_hidden_layers": 4}, "", "missing"),
        ({"hidden_size": 64}, "", "does not say"),
    ],
)
def test_a_tower_that_does_not_fit_is_refused(
    do: Convert, tmp_path: Path, changes: dict[str, int], gone: str, why: str
) -> None:
    folder = towers.clip(tmp_path / "tower")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if gone:
        (folder / gone).unlink()
    with pytest.raises((FailedPrecondition, InvalidArgument), match=why):
        do(import_model=ImportTask(local_path=str(folder)))
