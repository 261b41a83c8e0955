"""`make bench-llava`: our step over rows with images and Hugging Face's Trainer, in turn on the same weights in one process.

The seed's finetune: a language model in NF4 with LoRA of rank 512, a vision tower with LoRA of rank 64, a projector trained
whole; on a GPU InternLM2-1.8B's shape (as a Llama) and CLIP-L/336's, without one a tiny pair, to see that it works. The peer
is transformers' LlavaForConditionalGeneration with the same PEFT adapters, fed by LlavaProcessor in worker processes, its
rows grouped by length. A sample is one JPEG of 640 x 480 and some text. `--stage zero2` takes steps through DeepSpeed's
ZeRO-2 instead, `--json FILE` keeps all numbers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from services.finetune import packing
from services.finetune.config import RunConfig, override
from services.finetune.store import open_store
from services.finetune.templates import Encoded
from services.finetune.train.engine import Engine, choose
from services.finetune.train.images import Images, Look
from services.finetune.train.methods import adapt
from services.finetune.train.model import causal_of, trainable
from services.finetune.train.parallel import ALONE
from services.finetune.train.step import Stepper
from services.finetune.vision import ImageForm, read_form
from tests.bench.train import GIB, free_all, held_gib, peak_gib, reset_peak, spread, synchronize
from tests.bench.train_shapes import DEVICE, _quantised, twin
from tests.tiny import tiny_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "1.8B": {
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vocab_size": 92608,
        },
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    },
    "tiny": {
        "text": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
        },
        "vision": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    },
}
FINETUNE: dict[str, Any] = {
    "method": "qlora",
    "quant.bits": 4,
    "lora.rank": 512,
    "lora.alpha": 256,
    "lora.dropout": 0.05,
    "lora.targets": ["all-linear", "model.vision_tower.*"],
    "lora.rank_pattern": {"model.vision_tower.*": 64},
    "lora.alpha_pattern": {"model.vision_tower.*": 16},
    "lora.modules_to_save": ["multi_modal_projector"],
    "optim.name": "adamw",
    "optim.lr": 2e-4,
    "schedule.accumulate": 1,
    "schedule.max_steps": 10_000,
}
"""llava_internlm2_chat_1_8b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune, but for the length of a run."""
IMAGE = 259
"""The first id after those of the tokenizer of bytes."""


def random_llava(shape: str, dtype: torch.dtype) -> Any:
    """Weights as transformers draws them; the language model's linear layers in NF4."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text: dict[str, Any] = {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SHAPES[shape]["vision"], projection_dim=64),
        text_config=LlamaConfig(**SHAPES[shape]["text"], **text),
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            model: Any = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    for layer in model.model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in [(n, m) for n, m in block.named_children() if type(m) is torch.nn.Linear]:
                setattr(block, name, _quantised(linear))
    model.is_loaded_in_4bit = True
    return model


def write_processor(folder: Path, shape: str) -> Any:
    """A folder with tokenizer and image processor, as a model's; transformers' LlavaProcessor over them."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    tiny_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    vision = SHAPES[shape]["vision"]
    size = vision["image_size"]
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    images.save_pretrained(folder)
    config = {
        "model_type": "llava",
        "image_token_index": IMAGE,
        "vision_config": vision | {"model_type": "clip_vision_model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|im_end|>")

    class Plain(LlavaProcessor):
        def check_argument_for_proper_class(self, *_: Any) -> type:
            """Not made: it imports every tokenizer there is, one of which wants a package that is not there."""
            return object

    return Plain(
        images,
        fast,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def jpegs(folder: Path, count: int) -> list[Path]:
    """Photographs' sizes and detail, in nothing else like them: smooth noise."""
    found = []
    for n in range(count):
        coarse = np.random.default_rng(n).integers(0, 256, (60, 80, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(out, "JPEG", quality=88)
        found.append(folder / f"{n}.jpg")
        found[-1].write_bytes(out.getvalue())
    return found


def texts(count: int, longest: int, median: int = 200) -> list[str]:
    """Log-normal lengths; a letter is a token."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(median), 0.8, count).astype(int), 8, longest)
    return ["".join(chr(97 + c) for c in draw.integers(0, 26, n)) for n in lengths]


class Ours:
    """Our trainer's engine and optimizer, and the samples that it has read."""

    def __init__(
        self, model: Any, config: RunConfig, rows: list[tuple[str, Path]], form: ImageForm, home: Path, stage: str
    ):
        store = open_store(f"file://{home}/store")
        files = {path: store.put_file(path).digest for path in dict.fromkeys(path for _, path in rows)}
        numbers = {path: n for n, path in enumerate(files)}
        letters = _letters(home)
        samples = [Encoded([IMAGE] * form.tokens + [letters[c] for c in text], [False] * form.tokens + [True] * len(text))
                   for text, _ in rows]  # fmt: skip
        shown = np.array([numbers[path] for _, path in rows], np.int32)
        pictures = packing.Pictures(tuple(files.values()), shown, np.arange(len(rows) + 1))
        blocks = packing.pack(samples, config.data.max_length, True)
        self.blocks = replace(blocks, flat=replace(blocks.flat, pictures=pictures))
        dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
        self.model = adapt(model, config)
        self.parameters = trainable(self.model)
        look = Look(DEVICE, dtype, fixed=False, again=False)
        self.images = Images(causal_of(self.model), form, store, home / "images", look)
        self.notes: list[str] = []
        self.engine, self.why = self._engine(config, dtype, stage)
        self.samples = 0
        self.steps = Stepper(
            config, self.model, self.parameters, self.blocks, self.engine, self._tell,
            lambda text, _: self.notes.append(text), dtype, dealt=bool(stage),
        )  # fmt: skip
        if stage:
            zero: Any = self.engine
            self.steps.optimizer = zero.start(self.steps.optimizer)
        self.images.expect(self.blocks, self.steps.ahead())

    def _engine(self, config: RunConfig, dtype: torch.dtype, stage: str) -> tuple[Engine, str]:
        if not stage:
            return choose(self.model, self.blocks, DEVICE, dtype, config.model, images=self.images)
        from services.finetune.train.memory import recompute
        from services.finetune.train.zero import Zero, settings_of

        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, and one process has none
        settings = settings_of(f"deepspeed_{stage}", 1.0, sum(p.numel() for p in self.parameters.values()))
        zero = Zero(self.model, self.blocks, DEVICE, ALONE, settings, dtype, self.images)
        return zero, f"{stage} in one process; {recompute(causal_of(self.model), config.model, DEVICE)}"

    def _tell(self, told: Any) -> None:
        self.samples += told.taken.images
        self.loss = told.loss

    def window(self, steps: int) -> tuple[float, float]:
        """(samples a second, peak GiB) of so many steps."""
        self.samples = 0
        reset_peak()
        synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            self.steps.take()
        self.steps.settle()
        synchronize()
        return self.samples / (time.perf_counter() - began), peak_gib()


def _letters(home: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(home / "processor/tokenizer.json")).get_vocab()
    return {chr(97 + n): vocabulary[chr(97 + n)] for n in range(26)}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """What the peer's workers read."""

    def __init__(self, rows: list[tuple[str, Path]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> dict[str, Any]:
        return {"text": self.rows[n][0], "path": str(self.rows[n][1])}


class Collate:
    """LlavaProcessor on a batch, labels on the text alone."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [Image.open(row["path"]).convert("RGB") for row in rows]
        asked = ["<image>" + row["text"] for row in rows]
        batch = self.processor(images=images, text=asked, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[(labels == IMAGE) | (batch["attention_mask"] == 0)] = -100
        return {**{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}, "labels": labels}


def peer(
    model: Any, config: RunConfig, rows: list[tuple[str, Path]], processor: Any, batch: int, steps: int,
    on_step: Callable[[int], None], workers: int, checkpointing: bool,
) -> Any:  # fmt: skip
    """Hugging Face's Trainer. Its rows come in batches of like lengths, the batches in random order."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            on_step(state.global_step)

    class Ordered(Trainer):
        train_dataset: Any

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    by_length = sorted(rows, key=lambda row: len(row[0]))
    batches = [by_length[at : at + batch] for at in range(0, len(rows) - batch + 1, batch)]
    order = np.random.default_rng(0).permutation(len(batches))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=config.optim.lr,
        max_grad_norm=config.optim.clip_norm,
        optim="adamw_torch_fused" if DEVICE.type == "cuda" else "adamw_torch",
        bf16=DEVICE.type == "cuda",
        use_cpu=DEVICE.type != "cuda",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=workers,
        dataloader_pin_memory=DEVICE.type == "cuda",
        remove_unused_columns=False,
        logging_steps=10_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return Ordered(
        model=adapt(model, config),
        args=arguments,
        train_dataset=Rows([row for n in order for row in batches[n]]),
        data_collator=Collate(processor),
        callbacks=[Steps()],
    )


def versus(shape: str, home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Windows of both in turn, after `warm` steps of each. Peaks leave out what only the other one holds."""
    warm, each, windows = options.warm, options.steps, options.windows
    changes = {"schedule.batch_size": options.blocks, "data.max_length": 2048 if shape == "1.8B" else 256}
    if shape == "tiny":
        changes |= {"lora.rank": 16, "lora.alpha": 8, "lora.rank_pattern": {"model.vision_tower.*": 4}}
    config = override(RunConfig(), {**FINETUNE, **changes})
    processor = write_processor(home / "processor", shape)
    form = read_form(home / "processor")
    assert form is not None
    per_step = max(options.batch, options.blocks * (config.data.max_length // form.tokens))
    count = per_step * (warm + each * windows + 2)
    words = texts(count, config.data.max_length - form.tokens - 1, 200 if shape == "1.8B" else 60)
    pictures = jpegs(home, min(count, 400 if shape == "1.8B" else 8))
    rows = [(text, pictures[n % len(pictures)]) for n, text in enumerate(words)]
    held = {"before": held_gib()}
    model = random_llava(shape, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    other = None if options.stage else twin(model)
    held["base"] = held_gib() - held["before"]
    ours = Ours(model, config, rows, form, home, options.stage)
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "Trainer": []}
    ours.window(warm)
    held["ours"] = held_gib() - held["base"] - held["before"]
    if other is None:
        found["ours"] = [ours.window(each) for _ in range(windows)]
        tell(f"{shape} LLaVA by {ours.why}", found, ours)
        return {"ours": found["ours"], "loss": ours.loss}
    state = {"began": 0.0}

    def on_step(step: int) -> None:
        if step < warm or (step - warm) % each:
            return
        synchronize()
        if state["began"]:
            rate = options.batch * each / (time.perf_counter() - state["began"])
            found["Trainer"].append((rate, peak_gib() - held["ours"]))
            apart = held_gib() - held["base"] - held["ours"]
            rate, peak = ours.window(each)
            found["ours"].append((rate, peak - apart))
        reset_peak()
        synchronize()
        state["began"] = time.perf_counter()

    arguments = (options.batch, warm + each * windows, on_step, options.workers, options.checkpointing)
    peer(other, config, rows, processor, *arguments).train()
    tell(f"{shape} LLaVA beside Trainer, batch {options.batch} and {options.blocks} blocks: {ours.why}", found, ours)
    ours.images.close()
    return {name: [list(r) for r in values] for name, values in found.items()}


def tell(title: str, found: dict[str, list[tuple[float, float]]], ours: Ours) -> None:
    print(f"{title}; {'; '.join(ours.notes)}; loss {ours.loss:.3f}")
    for name, values in found.items():
        if values:
            peak = max(p for _, p in values)
            print(f"  {name:8} {spread([r for r, _ in values], 2)} samples/s  {peak:.1f} GiB")
    if found["Trainer"]:
        ratios = [a / b for (a, _), (b, _) in zip(found["ours"], found["Trainer"], strict=True)]
        print(f"  ratio    {spread(ratios, 2)}  goal 1.5")
    print(end="", flush=True)


def main() -> None:
    cuda = DEVICE.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1.8B" if cuda else "tiny", choices=list(SHAPES))
    parser.add_argument("--stage", default="", choices=["", "zero2"])
    parser.add_argument("--batch", type=int, default=8 if cuda else 2, help="the peer's samples a step")
    parser.add_argument("--blocks", type=int, default=4 if cuda else 1, help="our blocks a step")
    parser.add_argument("--workers", type=int, default=8 if cuda else 1, help="the peer's processes that read")
    parser.add_argument("--warm", type=int, default=6 if cuda else 1)
    parser.add_argument("--steps", type=int, default=6 if cuda else 2, help="in a window")
    parser.add_argument("--windows", type=int, default=5 if cuda else 2)
    parser.add_argument("--checkpointing", action="store_true", help="the peer runs its layers twice")
    parser.add_argument("--json", default="", help="a file for all numbers")
    options = parser.parse_args()
    free_all()
    with tempfile.TemporaryDirectory() as home:
        found = versus(options.shape, Path(home), options)
    if options.json:
        Path(options.json).write_text(json.dumps({**found, "device": str(DEVICE), "GiB": GIB}, default=str))


if __name__ == "__main__":
    main()
