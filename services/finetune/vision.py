"""What a vision-language model makes of an image: how many tokens it is, and which pixels its vision tower sees.

The base is a model in transformers' LLaVA layout. Pixels are those of transformers' own processors in their Pillow form,
value by value; so whoever trains and whoever answers shows a model the same. A JPEG is decoded at its full size: draft
mode is quicker, and gives other pixels.

Letters in shapes: S pixels a side.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from services.finetune.errors import FailedPrecondition
from services.finetune.formats import IMAGE
from services.finetune.modules import is_llava
from services.finetune.store.artifacts import Manifest, materialise
from services.finetune.store.port import Store
from services.finetune.templates import IMAGE_ID, Encoded
from services.finetune.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
"""What read_form reads of a model."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""The kinds of image files that are opened, as Pillow calls them."""

_OF_CLIP = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
_OF_SIGLIP = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
}
_PROCESSORS = {"CLIP": _OF_CLIP, "Llava": _OF_CLIP, "Bit": _OF_CLIP, "Siglip": _OF_SIGLIP}
"""transformers' image processors, with what their classes say where a file is silent."""
_EXTRA = {"clip_vision_model": 1, "dinov2": 1, "siglip_vision_model": 0}
"""Tokens that a vision tower has beside its patches: the class token."""
_ANY_SIZE = ("dinov2",)
"""Towers that fit their position embeddings to the image."""
_STRIP_PIXELS = 4_000_000


@dataclass(frozen=True, slots=True)
class ImageForm:
    """How a model takes an image in."""

    token_id: int
    """The id that stands for a token of an image."""
    tokens: int
    """Tokens of one image."""
    size: int
    """S."""
    patch: int
    """Pixels a side of what one token sees."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int
    """Pillow's number of the filter: 3 is bicubic."""
    pad_to_square: bool
    """The shorter sides are filled up with the mean colour first, so that nothing is cropped."""
    shortest: int
    """The shorter side is scaled to this and S x S is cut out of the middle; 0 scales both sides to S, as SigLIP does."""
    scale: float
    """What a level of 0 to 255 is multiplied by before mean and std."""


def read_form(directory: Path) -> ImageForm | None:
    """The form of a model's folder, None of a model that sees nothing. FailedPrecondition (VISION_UNSUPPORTED)."""
    config = _json(directory / "config.json")
    if not is_llava(config):
        return None
    # As transformers 5 writes it, and before.
    own = _json(directory / "processor_config.json").get("image_processor") or _json(directory / FILES[1])
    try:
        return _form(config, own)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unsupported(f"a value in {', '.join(FILES)} is not what it should be: {error}") from error


def form_of(store: Store, manifest: Manifest) -> ImageForm | None:
    """As read_form, of a model's artifact."""
    with tempfile.TemporaryDirectory() as folder:
        return read_form(materialise(store, manifest, Path(folder), FILES))


def _form(config: Mapping[str, Any], own: Mapping[str, Any]) -> ImageForm:
    tower = config["vision_config"]
    kind, patch = tower["model_type"], int(tower["patch_size"])
    if kind not in _EXTRA:
        raise _unsupported(f"its vision tower is of the kind {kind!r}, not one of {', '.join(_EXTRA)}")
    size, shortest, values = _sizes(own)
    if size != tower["image_size"] and kind not in _ANY_SIZE:
        raise _unsupported(f"its images have {size} pixels a side, but its vision tower takes {tower['image_size']}")
    (mean, std) = ((float(r), float(g), float(b)) for r, g, b in (values["image_mean"], values["image_std"]))
    return ImageForm(
        token_id=int(config["image_token_index"]),
        tokens=(size // patch) ** 2 + _EXTRA[kind] - (config.get("vision_feature_select_strategy") != "full"),
        size=size,
        patch=patch,
        mean=mean,
        std=std,
        resample=int(values["resample"]),
        pad_to_square=bool(values.get("do_pad")),
        shortest=shortest,
        scale=float(values.get("rescale_factor", 1 / 255)),
    )


def check_token(form: ImageForm, tokenizer: Tokenizer) -> None:
    """FailedPrecondition (IMAGE_TOKEN_MISSING) unless <image> is the special token that the model's config names."""
    if IMAGE not in tokenizer.special_texts or tokenizer.encode(IMAGE) != [form.token_id]:
        raise FailedPrecondition(
            f"the model's tokenizer does not make the special token {form.token_id} of {IMAGE}, as its config.json says; "
            "assemble or import it again",
            reason="IMAGE_TOKEN_MISSING",
        )


def expand(ids: Sequence[int], form: ImageForm) -> list[int]:
    """`ids` with the tokens of a whole image in place of each IMAGE_ID."""
    whole = [form.token_id] * form.tokens
    return [token for i in ids for token in (whole if i == IMAGE_ID else (i,))]


def spread(encoded: Encoded, form: ImageForm, most: int = 0) -> Encoded:
    """A row as training sees it: each IMAGE_ID as the ids of a whole image, cut at `most` tokens (0 cuts nothing), and
    before an image rather than within it."""
    ids: list[int] = []
    mask: list[bool] = []
    end = most
    for token, learned in zip(encoded.ids, encoded.mask, strict=True):
        times = form.tokens if token == IMAGE_ID else 1
        if most and len(ids) < most < len(ids) + times:
            end = len(ids)
        ids += [form.token_id if token == IMAGE_ID else token] * times
        mask += [learned] * times
    return Encoded(ids[:end], mask[:end]) if most else Encoded(ids, mask)


def pixels(source: Path | IO[bytes], form: ImageForm) -> NDArray[np.float32]:
    """What the vision tower sees of an image file, [3, S, S]. The file is one that prepare.images.check_image let pass."""
    import numpy as np

    levels = np.arange(256)[:, None].astype(np.float64) * form.scale
    table = (levels.astype(np.float32) - np.array(form.mean, np.float32)) / np.array(form.std, np.float32)
    seen = np.asarray(_fitted(picture(source), form))
    return np.stack([table[seen[..., n], n] for n in range(3)])


def picture(source: Path | IO[bytes]) -> Image:
    """An image file's first picture in RGB, turned as its EXIF data say.

    Transparency is dropped, not laid on a colour, as transformers does. Grey of 16 bits loses its lower 8; Pillow alone
    would make all but the darkest 256 levels white.
    """
    import numpy as np
    from PIL import Image as Pillow
    from PIL import ImageOps

    with Pillow.open(source, formats=FORMATS) as opened:
        ImageOps.exif_transpose(opened, in_place=True)
        if opened.mode == "I" or opened.mode.startswith("I;16"):
            return Pillow.fromarray((np.asarray(opened) >> 8).astype(np.uint8)).convert("RGB")
        if opened.mode == "RGB":
            opened.load()
            return opened
        # Pillow warns of a palette's transparency on any other way to RGB.
        return (opened.convert("RGBA") if opened.mode == "P" else opened).convert("RGB")


def _fitted(image: Image, form: ImageForm) -> Image:
    """S x S."""
    width = height = form.shortest or form.size
    if form.pad_to_square:
        image = _squared(image, width, form)
    elif form.shortest:
        long = int(form.shortest * max(image.size) / min(image.size))
        width, height = (form.shortest, long) if image.width <= image.height else (long, form.shortest)
    left, top = (width - form.size) // 2, (height - form.size) // 2
    return image.resize((width, height), form.resample).crop((left, top, left + form.size, top + form.size))


def _squared(image: Image, width: int, form: ImageForm) -> Image:
    """The image in the middle of a square of the mean colour, already scaled to its later width.

    Pillow scales rows first, then columns. So done in two steps it is the same, and only some rows at a time need to be
    as wide as the square: of a long thin image all would be gigabytes.
    """
    from PIL import Image as Pillow

    if image.width == image.height:
        return image
    side, colour = max(image.size), tuple(int(part * 255) for part in form.mean)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    square = Pillow.new("RGB", (width, side), colour)
    rows = max(1, _STRIP_PIXELS // side)
    for at in range(0, image.height, rows):
        part = image.crop((0, at, image.width, min(at + rows, image.height)))
        strip = Pillow.new("RGB", (side, part.height), colour)
        strip.paste(part, (left, 0))
        square.paste(strip.resize((width, part.height), form.resample), (0, top + at))
    return square


def _sizes(own: Mapping[str, Any]) -> tuple[int, int, Mapping[str, Any]]:
    """(S, shortest, all values, the class's own where the file is silent) of an image processor."""
    kind = str(own.get("image_processor_type") or own.get("feature_extractor_type") or "")
    name = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", kind)
    if name not in _PROCESSORS:
        raise _unsupported(f"its image processor is {kind or 'missing'}, not that of CLIP, SigLIP, DINOv2 or LLaVA")
    values = {**_PROCESSORS[name], **{k: v for k, v in own.items() if v is not None}}
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not values.get(step, True):
            raise _unsupported(f"{step} of its image processor is off")
    pads, crops = bool(values.get("do_pad")), values["do_center_crop"]
    if pads and name != "Llava":
        raise _unsupported(f"do_pad of an image processor of {name} is not known")
    shortest, both = _edge(values["size"])
    size = _edge(values["crop_size"])[1] if crops else both or (shortest if pads else 0)
    if not size or not (both == size or shortest >= size):
        raise _unsupported(f"its images come out in no one size: {values['size']}, cut to {values.get('crop_size')}")
    return size, shortest if crops else 0, values


def _edge(size: Any) -> tuple[int, int]:
    """(the shorter side, 0 if that is not what is said; both sides, 0 if they are not said or not equal)."""
    if isinstance(size, int):  # as in CLIP's first files
        return size, size
    height, width = size.get("height", 0), size.get("width", 0)
    return size.get("shortest_edge", 0), height if height == width else 0


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}
    except (ValueError, TypeError, RecursionError) as error:
        raise _unsupported(f"its {path.name} cannot be read") from error


def _unsupported(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"the model's images cannot be made ready: {why}", reason="VISION_UNSUPPORTED")
