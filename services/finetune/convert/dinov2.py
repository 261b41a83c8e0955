"""DINOv2 (Oquab et al. 2023) as a CLIPVisionModel that computes the same, so that every server of LLaVA models has it.

With hidden size d, the CLIP model has N = 2 d + 128, in heads of 64:
1. LayerScale goes into the projections that it follows, the patches' bias into the positions.
2. What is added to the residual stream is brought to mean zero, which LayerNorm takes out anyway, and mirrored: the stream
   is [x, -x, s]. LayerNorm over N of [x, -x, 0] is x / sqrt(2 d / N var(x)): its weight takes the factor, its eps too.
3. CLIP normalises the embeddings once more. The 128 spare channels s carry +-C there, far more than x, so that this is
   a division by a constant; its weight multiplies by the same constant, and makes s zero.
4. The heads beyond DINOv2's own have zeros for values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from services.finetune.convert.shards import Stored
from services.finetune.convert.towers import CLIP, PREFIX, Made, Read, computed, image_side, read
from services.finetune.errors import FailedPrecondition, InvalidArgument

HEAD, SPARE, LARGE = 64, 128, 4096.0


def as_clip(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], tensors: Sequence[Stored]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Made]]:
    """(config.json, preprocessor_config.json, tensors by name) of the CLIP vision model.

    FailedPrecondition (MODEL_UNSUPPORTED), InvalidArgument (WEIGHTS_INCOMPLETE).
    """
    side, patch, d = image_side(preprocessor), config["patch_size"], config["hidden_size"]
    odd = config.get("use_swiglu_ffn") or config.get("hidden_act", "gelu") != "gelu" or not config.get("qkv_bias", True)
    if odd or d != config["num_attention_heads"] * HEAD:
        raise FailedPrecondition(
            "this DINOv2 is not of the small, base or large form, which alone have an equal in CLIP",
            reason="MODEL_UNSUPPORTED",
        )
    width = 2 * d + SPARE
    vision = {
        "model_type": CLIP,
        "hidden_size": width,
        "intermediate_size": int(d * config.get("mlp_ratio", 4)),
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": width // HEAD,
        "image_size": side,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": config.get("layer_norm_eps", 1e-6) * 2 * d / width,
        "projection_dim": width,
    }
    found = {t.name.removeprefix("dinov2."): t for t in tensors}
    made = _Rewritten(found, d).all(config["num_hidden_layers"], patch, side // patch)
    return vision, {**preprocessor, "image_processor_type": "CLIPImageProcessor"}, made


class _Rewritten:
    """The CLIP model's tensors, of DINOv2's."""

    def __init__(self, found: Mapping[str, Stored], d: int) -> None:
        self._found, self._d, self._made = found, d, dict[str, Made]()
        self._width = 2 * d + SPARE
        self._factor = math.sqrt(2 * d / self._width)

    def all(self, layers: int, patch: int, side: int) -> dict[str, Made]:
        n, here = self._width, "embeddings."
        kernel = f"{here}patch_embeddings.projection.weight"
        grid = (side, f"{here}position_embeddings", f"{here}patch_embeddings.projection.bias")
        self._put(f"{here}class_embedding", (n,), lambda: self._mirrored(self._row(f"{here}cls_token")))
        self._put(f"{here}patch_embedding.weight", (n, 3, patch, patch), lambda: self._mirrored(self._read(kernel)))
        self._put(f"{here}position_embedding.weight", (side * side + 1, n), lambda: self._positions(*grid))
        self._put("pre_layrnorm.weight", (n,), self._first_norm)
        self._put("pre_layrnorm.bias", (n,), lambda: self._wide(self._zeros()))
        for layer in range(layers):
            self._layer(f"encoder.layer.{layer}.", f"encoder.layers.{layer}.")
        self._norm("layernorm", "post_layernorm")
        return self._made

    def _layer(self, old: str, new: str) -> None:
        n = self._width
        for ours, theirs in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
            self._norm(f"{old}{ours}", f"{new}{theirs}")
        for word in ("query", "key", "value"):
            source, module = f"{old}attention.attention.{word}", f"{new}self_attn.{word[0]}_proj"
            self._put(f"{module}.weight", (n, n), functools.partial(self._asked, f"{source}.weight"))
            self._put(f"{module}.bias", (n,), functools.partial(self._asked, f"{source}.bias"))
        inner = self._stored(f"{old}mlp.fc1.weight").shape[0]
        self._put(f"{new}mlp.fc1.weight", (inner, n), lambda: self._columns(self._read(f"{old}mlp.fc1.weight")))
        self._put(f"{new}mlp.fc1.bias", (inner,), lambda: self._read(f"{old}mlp.fc1.bias"))
        ends = (
            (f"{old}attention.output.dense", f"{new}self_attn.out_proj", f"{old}layer_scale1.lambda1", n),
            (f"{old}mlp.fc2", f"{new}mlp.fc2", f"{old}layer_scale2.lambda1", inner),
        )
        for source, module, scale, into in ends:
            self._put(f"{module}.weight", (n, into), functools.partial(self._added, f"{source}.weight", scale, into))
            self._put(f"{module}.bias", (n,), functools.partial(self._added, f"{source}.bias", scale, 0))

    # ------------------------------------------------------------------------------------------ parts

    def _put(self, name: str, shape: tuple[int, ...], value: Read) -> None:
        like = self._stored("embeddings.cls_token")
        self._made[PREFIX + name] = computed(PREFIX + name, shape, value, like)

    def _norm(self, old: str, new: str) -> None:
        self._put(f"{new}.weight", (self._width,), lambda: self._wide(self._read(f"{old}.weight") * self._factor))
        self._put(f"{new}.bias", (self._width,), lambda: self._wide(self._read(f"{old}.bias")))

    def _asked(self, source: str) -> Any:
        """A matrix or bias of queries, keys or values: those of the heads beyond DINOv2's are zero."""
        value = self._read(source)
        return self._wide(self._columns(value) if value.ndim == 2 else value)

    def _added(self, source: str, scale: str, into: int) -> Any:
        """A matrix with `into` inputs, or a bias, whose results are added to the stream."""
        value, factors = self._read(source), self._read(scale)
        value = value * (factors[:, None] if value.ndim == 2 else factors)
        return self._mirrored(self._columns(value) if into == self._width else value)

    def _positions(self, side: int, source: str, bias: str) -> Any:
        """The table for `side` squared places, scaled as DINOv2 does it when its images are of another size."""
        import torch

        table = self._read(source)[0]
        own = math.isqrt(len(table) - 1)
        grid = table[1:].reshape(1, own, own, self._d).permute(0, 3, 1, 2)
        if own != side:
            # In single precision, as the original computes it.
            grid = torch.nn.functional.interpolate(
                grid.float(), size=(side, side), mode="bicubic", align_corners=False
            ).double()
        places = grid.permute(0, 2, 3, 1).reshape(-1, self._d) + self._read(bias)
        found = self._mirrored(torch.cat([table[:1], places]).T).T.clone()
        found[:, 2 * self._d :] = torch.tensor([LARGE, -LARGE], dtype=found.dtype).repeat(SPARE // 2)
        return found

    def _first_norm(self) -> Any:
        found = self._wide(self._zeros())
        found[: 2 * self._d] = math.sqrt(SPARE * LARGE**2 / self._width)
        return found

    def _mirrored(self, value: Any) -> Any:
        """[x, -x, 0] of rows [d, ...], of which the mean is taken out."""
        import torch

        centred = value - value.mean(0, keepdim=True)
        return torch.cat([centred, -centred, value.new_zeros(SPARE, *value.shape[1:])])

    def _columns(self, weight: Any) -> Any:
        """A matrix that reads x and nothing else of the stream."""
        import torch

        return torch.cat([weight, weight.new_zeros(len(weight), self._width - weight.shape[1])], 1)

    def _wide(self, value: Any) -> Any:
        """Rows [d, ...] with zeros below."""
        import torch

        return torch.cat([value, value.new_zeros(self._width - len(value), *value.shape[1:])])

    def _zeros(self) -> Any:
        import torch

        return torch.zeros(self._d, dtype=torch.float64)

    def _row(self, name: str) -> Any:
        return self._read(name).reshape(-1)

    def _read(self, name: str) -> Any:
        return read(self._stored(name))

    def _stored(self, name: str) -> Stored:
        if name not in self._found:
            raise InvalidArgument(
                f"{name} is missing; fetch all of the model's files",
                reason="WEIGHTS_INCOMPLETE",
                metadata={"tensor": name},
            )
        return self._found[name]
