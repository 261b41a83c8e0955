"""Make the golden files by running XTuner 0.2.0 itself, in a virtual environment of its own.

    python -m tests.finetune.goldens.real_tokenizers ../tokenizers
    python3.11 -m venv ../xtuner && . ../xtuner/bin/activate
    pip install torch==2.13.0 transformers==4.48.0 datasets==5.0.1 'numpy<2.3' Pillow requests sentencepiece protobuf
    pip install addict yapf termcolor rich pyyaml
    pip install --no-deps mmengine==0.10.6 xtuner==0.2.0
    python tests/finetune/goldens/make_goldens.py ../tokenizers

XTuner's dataset package imports more than its tokenisation needs (torchvision, matplotlib, ...): those are left out and
stand-ins imported in their place. What runs is XTuner's own: its map functions, templates, encode_fn, MOSSSFTDataset and
Packer. The tokenizers are those of the folders, apart from mistral's, which transformers 4.48 makes of tokenizer.model.

One file a tokenizer, gzipped JSON: {"framed": {template: {format: [[ids, learned], ...]}}, "unframed": {format: ...},
"corrected": {template: {difference: ...}}, "theirs": {template: {difference: ...}}, "steering": ...,
"bos": ..., "packed": {"chunk", "lengths", "borders"}}; `learned` are [start, end) runs of tokens with a label.
"""

from __future__ import annotations

import copy
import gzip
import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
import types
from itertools import groupby
from pathlib import Path
from typing import Any

ABSENT = {"torchvision", "matplotlib", "skimage", "pycocotools", "modelscope", "peft", "bitsandbytes", "einops"}
CHUNK = 96
PACKED = ("internlm2_chat", "openai", "alpaca", "wizardlm", "sql")
FEW = ("default", "internlm2_chat", "llama2_chat", "gemma")
MARKED = ("llava", "llava_image_only")


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] in ABSENT else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _tokenizer(folder: Path) -> Any:
    """As XTuner would load it. XTuner asks for the class's name to know whether a text begins with BOS."""
    from transformers import (  # type: ignore[attr-defined]  # of transformers 4
        LlamaTokenizerFast,
        PreTrainedTokenizerFast,
        Qwen2TokenizerFast,
    )

    if folder.name == "mistral":
        return LlamaTokenizerFast(vocab_file=str(folder / "tokenizer.model"), add_prefix_space=True)
    file = str(folder / "tokenizer.json")
    if folder.name == "qwen":
        return Qwen2TokenizerFast(tokenizer_file=file, eos_token="<|im_end|>")
    return PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<|im_start|>", eos_token="<|im_end|>")


class Golden:
    """XTuner with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, format: str, row: dict[str, Any], template: str) -> Any:
        """[ids, learned], or the name of what XTuner raises; null for a row that it drops."""
        from xtuner.dataset.map_fns import DATASET_FORMAT_MAPPING, template_map_fn
        from xtuner.dataset.utils import encode_fn
        from xtuner.utils import PROMPT_TEMPLATE

        if format == "moss_sft":
            return self._moss(row)
        row = copy.deepcopy(row)
        if "conversation" not in row:
            row = DATASET_FORMAT_MAPPING["crime_kg_assitan" if format == "crime_kg_assitant" else format](row)
        if template:
            row = template_map_fn(row, PROMPT_TEMPLATE[template])
        found = encode_fn(row, self._tokenizer, 1 << 20, with_image_token=format in MARKED)
        return _golden(found["input_ids"], found["labels"])

    def _moss(self, row: dict[str, Any]) -> Any:
        from xtuner.dataset.moss_sft import MOSSSFTDataset

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "moss.jsonl"
            path.write_text(json.dumps(row))
            found = MOSSSFTDataset(str(path), self._tokenizer, 1 << 20)[0]
        return _golden(found["input_ids"], found["labels"])

    def tried(self, format: str, row: dict[str, Any], template: str) -> Any:
        try:
            return self.encode(format, row, template)
        except Exception as error:
            return type(error).__name__


def _golden(ids: list[int], labels: list[int]) -> Any:
    learned, at = [], 0
    for is_learned, run in groupby(labels, key=lambda label: label >= 0):
        size = len(list(run))
        if is_learned:
            learned.append([at, at + size])
        at += size
    assert all(label in (-100, id) for id, label in zip(ids, labels, strict=True))
    return [ids, learned] if learned else None


def _packed(samples: dict[str, list[Any]], golden: Golden) -> dict[str, Any]:
    from xtuner.dataset.utils import Packer

    template, *formats = PACKED
    found = [golden.encode(f, row, template)[0] for f in formats for row in samples[f]]
    packer = Packer(CHUNK, use_varlen_attn=True)
    chunks = packer({"input_ids": found, "labels": found})
    return {"chunk": CHUNK, "lengths": [len(ids) for ids in found], "borders": chunks["cumulative_len"]}


def main(folder: Path) -> None:
    import datasets  # noqa: F401  before the stand-ins: it looks for some of them
    import transformers  # noqa: F401

    sys.meta_path.append(_Absent())
    from samples import DIFFERENCES, SAMPLES, STEERING, UNFRAMED  # type: ignore[import-not-found]
    from xtuner.dataset.map_fns import DATASET_FORMAT_MAPPING
    from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE

    for name in ("smollm2", "mistral", "qwen"):
        tokenizer = _tokenizer(folder / name)
        chat = {"input": STEERING, "output": "No."}
        bos = Golden(tokenizer).tried("default", {"input": "Hi", "output": "Hello"}, "internlm2_chat")
        if name == "smollm2":
            # It has a BOS that it does not put before texts; XTuner puts it there for every class but Qwen's.
            tokenizer.__class__ = type("Qwen2TokenizerFast", (tokenizer.__class__,), {})
        golden = Golden(tokenizer)
        framed = {
            template: {
                format: [golden.tried(format, r, template) for n, r in enumerate(rows) if (format, n) not in UNFRAMED]
                for format, rows in SAMPLES.items()
            }
            for template in PROMPT_TEMPLATE
        }
        unframed = {f"{f}[{n}]": golden.encode(f, SAMPLES[f][n], "") for f, n in sorted(UNFRAMED)}
        texts = {"text-with-a-template"}
        out = {
            "framed": framed,
            "unframed": unframed,
            "corrected": {
                template: {
                    key: golden.encode("default", d.corrected, "" if key in texts else template)
                    for key, d in DIFFERENCES.items()
                    if d.corrected
                }
                for template in FEW
            },
            "theirs": {
                template: {key: golden.tried(d.format, d.row, template) for key, d in DIFFERENCES.items()}
                for template in FEW
            },
            "steering": {template: golden.encode("default", chat, template) for template in FEW},
            "bos": bos,
            "packed": _packed(SAMPLES, golden),
        }
        text = json.dumps(out, separators=(",", ":"))
        # No time in the header: the same goldens are the same bytes.
        Path(__file__).with_name(f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    tables = {
        "formats": sorted(DATASET_FORMAT_MAPPING),
        "templates": PROMPT_TEMPLATE.to_dict(),
        "systems": SYSTEM_TEMPLATE.to_dict(),
    }
    Path(__file__).with_name("tables.json").write_text(json.dumps(tables, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
