"""Model FLOPs utilisation: the arithmetic that a step needs, over what the device could do in that time.

Counted are the matrix products of the model and of attention (Chowdhery et al. 2022, appendix B), with two differences
that fine-tuning makes: a frozen weight has no gradient of its own, so a token costs it 4 operations where a trained one
costs 6; and the output head is counted for learned tokens only. Layers that run forward twice count once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.finetune.towers import image_flops
from services.finetune.train.memory import tower_of, trained_beside
from services.finetune.train.model import causal_of
from services.finetune.train.seeing import in_language

PEAKS = (
    # Dense 16-bit tensor operations a second, by a part of the device's name; the makers' data sheets. Longer names first.
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("H20", 148e12),
    ("H800", 989e12),
    ("A800", 312e12),
    ("A100", 312e12),
    ("A40", 150e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 6000 Ada", 364e12),
    ("RTX A6000", 155e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("V100", 125e12),
    ("T4", 65e12),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a token costs."""

    frozen: int
    """Weights that are multiplied by and not trained."""
    trained: int
    head: int
    """FLOPs of the output head for a learned token."""
    attention: int
    """FLOPs for each token pair that attention sees as a square: 6 * layers * heads * size of a head, causal."""
    image: int = 0
    """FLOPs of tower and projector for an image."""

    def flops(self, tokens: int, learned: int, squares: int, images: int = 0) -> int:
        """Of a step: its tokens, its learned tokens, the sum of its documents' squared lengths, its images."""
        language = tokens * (4 * self.frozen + 6 * self.trained) + learned * self.head + squares * self.attention
        return language + images * self.image


def cost(model: Any, kept: bool = False) -> Cost | None:
    """The cost of a token; None where it is not known, as with experts, of which a token sees some only. `kept` features of
    a frozen tower cost nothing, as in every epoch but the first."""
    causal = causal_of(model)
    config = causal.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    head, frozen, trained, heads = causal.get_output_embeddings(), 0, 0, 0
    for name, layer in causal.named_modules():
        if not isinstance(layer, torch.nn.Linear) or not in_language(causal, name):
            continue
        # By its features: a quantised weight has another shape.
        size, learns = layer.in_features * layer.out_features, layer.weight.requires_grad
        if layer is head:
            heads = size * (6 if learns else 4)
        elif learns:
            trained += size
        else:
            frozen += size
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * width
    return Cost(frozen, trained, heads, attention, _image(causal, kept))


def _image(causal: Any, kept: bool) -> int:
    tower = tower_of(causal)
    if tower is None:
        return 0
    beside = trained_beside(causal)
    return image_flops(tower, beside.tower > 0 or not kept, beside.tower > 0, beside.projector > 0)


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that a device can do in a dtype; None where nobody says, as of a CPU."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS if part in name), None)


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use at once: tensors on a GPU, else all of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Not ru_maxrss: that begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
