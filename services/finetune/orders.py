"""What a worker is told to do: whole orders, one JSON file each, which it reads from the store (config.from_json).

Artifacts come by digest, with the name that they were asked for by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.finetune.config import DataConfig, RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactRef:
    """An artifact and the name it was asked for by."""

    name: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRun:
    """An order to train. The worker goes on from the newest checkpoint of earlier attempts, else from `resume`."""

    kind: Literal["train"] = "train"
    job: str
    """Resource name, for messages."""
    config: RunConfig
    base: ArtifactRef
    datasets: tuple[ArtifactRef, ...]
    resume: ArtifactRef | None = None
    validation: tuple[ArtifactRef, ...] = ()
    """Revisions to look at, beside or in place of held-out rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareRun:
    """An order to tokenise, mask and pack. `data.template` is resolved: a named one's, or "tokenizer"."""

    kind: Literal["prepare"] = "prepare"
    job: str
    model: ArtifactRef
    """Whose tokenizer."""
    datasets: tuple[ArtifactRef, ...]
    data: DataConfig
    seed: int = 0
    held_out: float = 0.0
    """ValidationConfig.ratio."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateRun:
    """An order to look at every row of a revision; without a model nothing is said about tokens."""

    kind: Literal["validate"] = "validate"
    job: str
    dataset: ArtifactRef
    model: ArtifactRef | None = None
    template: str = ""
    system: str = ""
    max_length: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportTask:
    """Bring a model in. Exactly one of hub_id, local_path, source is set."""

    hub_id: str = ""
    local_path: str = ""
    source: ArtifactRef | None = None
    file: str = ""
    dtype: str = ""
    template: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class AssembleTask:
    """Make a LLaVA model of a language model and a vision tower, with a fresh projector between them."""

    language_model: ArtifactRef
    vision_tower: ArtifactRef
    seed: int = 0
    """Of the projector's weights."""
    dtype: str = ""
    """"" is the language model's."""
    feature_layer: int = -2
    """Of the tower's hidden states, which begin with the embeddings: the last but one, as LLaVA 1.5."""
    pad_to_square: bool = False
    """Images are padded with the mean colour before they are scaled; else their middle is cut out."""
    max_shard_size_bytes: int = 2_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTask:
    """Turn a training checkpoint into a PEFT adapter: one of ours, or `source`, the files of another trainer's, which was
    trained on `base`."""

    checkpoint: ArtifactRef | None = None
    dtype: str = "float32"
    source: ArtifactRef | None = None
    base: ArtifactRef | None = None
    lora_alpha: float = 0.0
    """For a source that does not say its own; 0 means it does."""
    max_shard_size_bytes: int = 2_000_000_000
    """For a source that was trained whole."""


MergeReport = Literal["", "always", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeTask:
    """Add an adapter into its base."""

    adapter: ArtifactRef
    base: ArtifactRef
    dtype: str = ""
    max_shard_size_bytes: int = 0
    """0 keeps the base's own files."""
    base_dtype: str = ""
    """"nf4" or "nf4-single": into the base as QLoRA sees it."""
    report: MergeReport = ""
    """"always" and "never" measure the result against base and adapter whatever its size; "" does up to 9e9 parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReshardTask:
    """Write the same weights into other files."""

    model: ArtifactRef
    dtype: str = ""
    max_shard_size_bytes: int = 2_000_000_000


GgufType = Literal["", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportTask:
    """Make files for use elsewhere. `destination` is a URI that the service's settings allow, completed by them."""

    model: ArtifactRef
    form: Literal["hf", "safetensors", "gguf", "xtuner", "llava"] = "hf"
    gguf_type: GgufType = ""
    destination: str = ""
    public: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeTask:
    """Make a model with smaller weights; `calibration` is set for gptq alone."""

    model: ArtifactRef
    method: Literal["nf4", "fp4", "int8", "fp8", "int4", "gptq"]
    calibration: ArtifactRef | None = None
    calibration_rows: int = 256
    max_length: int = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertRun:
    """An order to convert. Exactly one task is set."""

    kind: Literal["convert"] = "convert"
    job: str
    import_model: ImportTask | None = None
    assemble: AssembleTask | None = None
    adapter: AdapterTask | None = None
    merge: MergeTask | None = None
    reshard: ReshardTask | None = None
    export: ExportTask | None = None
    quantize: QuantizeTask | None = None
