"""Pixels and image tokens are those of transformers' LlavaProcessor."""

from __future__ import annotations

import io
import json
import random
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from services.finetune.errors import FailedPrecondition
from services.finetune.tokenizer import Tokenizer
from services.finetune.vision import ImageForm, check_token, picture, pixels, read_form
from tests.tiny import tiny_sight

SAVED = [
    ("RGB", "PNG"),
    ("RGB", "JPEG"),
    ("L", "PNG"),
    ("L", "JPEG"),
    ("1", "PNG"),
    ("P", "PNG"),
    ("P", "GIF"),
    ("LA", "PNG"),
    ("RGBA", "PNG"),
    ("RGBA", "WEBP"),
    ("CMYK", "JPEG"),
    ("RGB", "BMP"),
]


def photo(draw: random.Random, number: int) -> bytes:
    """An image file with shapes and noise, of any shape, mode and kind; some are to be turned, some half clear."""
    mode, kind = SAVED[number % len(SAVED)]
    width, height = (draw.choice((1, 7, 28, 29, 60, 200, 333)) for _ in range(2))
    levels = np.random.default_rng(number).integers(0, 256, (height, width, 4), np.uint8)
    levels[: height // 2, :, 0] = 200
    levels[:, width // 3 :, 1] //= 4
    image = Image.fromarray(levels).convert("RGB" if mode in ("P", "CMYK") else mode).convert(mode)
    more: dict[str, Any] = {"transparency": bytes(range(256))} if (mode, kind) == ("P", "PNG") else {}
    if kind == "JPEG":
        exif = Image.Exif()
        exif[0x0112] = draw.randint(1, 8)
        more = {"exif": exif, "quality": 90}
    data = io.BytesIO()
    image.save(data, kind, **more)
    return data.getvalue()


def processor(folder: Path, kind: str) -> Any:
    """transformers' own, of the same files."""
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    classes = {"clip": CLIPImageProcessorPil, "llava": LlavaImageProcessorPil, "siglip": SiglipImageProcessorPil}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    images, config = classes[kind].from_pretrained(folder), json.loads((folder / "config.json").read_text())
    strategy = config["vision_feature_select_strategy"]

    class Processor(LlavaProcessor):
        def check_argument_for_proper_class(self, *_: Any) -> None:
            """It would load all tokenizer classes, one of which needs packages that are not here."""

    return Processor(images, tokenizer, 14, strategy, num_additional_image_tokens=int(kind != "siglip"))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("clip", {}),
        ("clip", {"size": 28, "crop_size": 28, "resample": 2}),
        ("clip", {"size": {"shortest_edge": 33}}),
        ("clip", {"size": {"height": 28, "width": 28}}),
        ("llava", {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.2, 0.3, 0.4]}),
        ("llava", {"size": {"shortest_edge": 33}}),
        ("siglip", {}),
    ],
)
def test_pixels_and_tokens_are_those_of_transformers(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    folder = tiny_sight(tmp_path / "model", kind, **more)
    theirs, form = processor(folder, kind), read_form(folder)
    assert form is not None and form.pad_to_square == (kind == "llava")
    tokenizer, draw = Tokenizer.from_files(folder), random.Random(kind)
    check_token(form, tokenizer)
    for number in range(100):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(photo(draw, number))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of how it makes RGB of a palette's transparency
            said = theirs(text="<|im_start|><image>\nWhat?", images=str(path), return_tensors="np")
        ids = said["input_ids"][0].tolist()
        assert (pixels(path, form) == said["pixel_values"][0]).all(), (number, kind)
        assert ids.count(form.token_id) == form.tokens == 4
        assert ids == [1, *[form.token_id] * form.tokens, *tokenizer.encode("\nWhat?")]
    with path.open("rb") as opened:
        assert pixels(opened, form).shape == (3, 28, 28)


def test_grey_of_16_bits_keeps_its_upper_8(tmp_path: Path) -> None:
    levels = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "16.png")
    Image.fromarray((levels >> 8).astype(np.uint8)).save(tmp_path / "8.png")
    assert picture(tmp_path / "16.png").tobytes() == picture(tmp_path / "8.png").tobytes()


@pytest.mark.parametrize("kind", ["clip", "llava", "siglip"])
@pytest.mark.parametrize("size", [(9000, 50), (50, 9000)])
def test_a_long_thin_image_costs_no_square_of_its_length(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    form = read_form(tiny_sight(tmp_path / "model", kind, 336))
    assert form is not None
    Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "thin.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = pixels(tmp_path / "thin.png", form)
    assert seen.shape == (3, 336, 336)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; a square would be 243 MB


def test_a_model_that_sees_nothing_has_no_form(tmp_path: Path) -> None:
    assert read_form(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_form(tmp_path) is None


def test_the_processor_may_stand_in_processor_config(tmp_path: Path) -> None:
    folder = tiny_sight(tmp_path, "llava")
    expected, file = read_form(folder), folder / "preprocessor_config.json"
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(file.read_text())}))
    file.unlink()
    assert read_form(folder) == expected


def changed(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**data, **values}))

    return change


BAD: dict[str, Callable[[Path], object]] = {
    "no processor": lambda folder: (folder / "preprocessor_config.json").unlink(),
    "no JSON": lambda folder: (folder / "preprocessor_config.json").write_text("{"),
    "another processor": changed("preprocessor_config.json", image_processor_type="PixtralImageProcessor"),
    "another size": changed("preprocessor_config.json", crop_size={"height": 56, "width": 56}),
    "no square": changed("preprocessor_config.json", do_center_crop=False),
    "a list": changed("preprocessor_config.json", size=[28, 28]),
    "two colours": changed("preprocessor_config.json", image_mean=[0.5, 0.5]),
    "a step is off": changed("preprocessor_config.json", do_normalize=False),
    "padded after": changed("preprocessor_config.json", do_pad=True),
    "another tower": changed(
        "config.json", vision_config={"model_type": "pixtral", "patch_size": 14, "image_size": 28}
    ),
    "no tower": changed("config.json", vision_config=None),
    "no token": changed("config.json", image_token_index=None),
}


@pytest.mark.parametrize("case", BAD)
def test_what_would_be_done_otherwise_is_refused(tmp_path: Path, case: str) -> None:
    folder = tiny_sight(tmp_path)
    BAD[case](folder)
    with pytest.raises(FailedPrecondition) as caught:
        read_form(folder)
    assert caught.value.reason == "VISION_UNSUPPORTED" and str(tmp_path) not in caught.value.message


def test_a_class_token_is_counted_where_it_is_kept(tmp_path: Path) -> None:
    folder = tiny_sight(tmp_path)
    changed("config.json", vision_feature_select_strategy="full")(folder)
    form = read_form(folder)
    assert isinstance(form, ImageForm) and form.tokens == 5


def test_a_tokenizer_must_know_the_token(tmp_path: Path) -> None:
    folder = tiny_sight(tmp_path)
    changed("config.json", image_token_index=5)(folder)
    form = read_form(folder)
    assert form is not None
    with pytest.raises(FailedPrecondition) as caught:
        check_token(form, Tokenizer.from_files(folder))
    assert caught.value.reason == "IMAGE_TOKEN_MISSING"
