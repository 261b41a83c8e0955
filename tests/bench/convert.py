"""`make bench-convert`: merging beside PEFT, beside cp, from bucket to bucket, and in how much memory.

Each run is a process of its own; `shape` and `rounds` can be given: python -m tests.bench.convert disk 3b 3.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from services.finetune.convert.merge import merge
from services.finetune.convert.shards import Stored, header, order, shard_names, to_bytes
from services.finetune.orders import ArtifactRef, MergeReport, MergeTask
from services.finetune.progress import Attempt, raise_fence
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import File, Manifest, Parent, load, materialise, publish
from services.finetune.store.file import FileStore
from services.finetune.store.port import Blob
from tests.seaweed import seaweed
from tests.tiny import tiny_tokenizer

MIB = 1 << 20
SHAPES = {
    "tiny": (256, 512, 2, 4, 2, 1000),
    "1b": (2048, 5632, 22, 32, 4, 32_000),
    "3b": (3200, 8640, 26, 32, 32, 32_000),
    "7b": (4096, 11_008, 32, 32, 32, 32_000),
    "70b": (8192, 28_672, 80, 64, 8, 128_256),
}
"""hidden, intermediate, layers, heads, key-value heads, vocabulary of Llama-shaped models."""
RANK = 16
SHARD_BYTES = 2_000_000_000
BLOCK = torch.randn(1 << 24, generator=torch.Generator().manual_seed(1)).mul_(0.02)


# ---------------------------------------------------------------------------------------------- models


def weights(shape: str) -> list[Stored]:
    """The tensors of a bfloat16 model."""
    hidden, inner, layers, heads, kv, vocab = SHAPES[shape]
    narrow = hidden // heads * kv
    parts = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden)}
    parts |= {"self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden)}
    parts |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden)}
    for n in range(layers):
        found |= {f"model.layers.{n}.{part}": size for part, size in parts.items()}
        found |= {f"model.layers.{n}.{norm}": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    found |= {"model.norm": (hidden,), "lm_head": (vocab, hidden)}
    return [_stored(f"{name}.weight", size, "BF16", 2) for name, size in found.items()]


def _stored(name: str, shape: tuple[int, ...], dtype: str, width: int) -> Stored:
    count = 1
    for side in shape:
        count *= side
    return Stored(name, dtype, shape, 0, count * width)


def adapter_weights(base: Sequence[Stored]) -> list[Stored]:
    """LoRA on every linear layer but the head, float32."""
    found = []
    for t in base:
        if "_proj" in t.name:
            module = f"base_model.model.{t.name.removesuffix('.weight')}"
            found.append(_stored(f"{module}.lora_A.weight", (RANK, t.shape[1]), "F32", 4))
            found.append(_stored(f"{module}.lora_B.weight", (t.shape[0], RANK), "F32", 4))
    return found


def numbers(tensors: Sequence[Stored]) -> Iterator[bytes | memoryview]:
    """The bytes of a file of tensors: random numbers, which repeat after 16 M of them, from another place in each tensor."""
    yield header(tensors)
    blocks = {"BF16": to_bytes(BLOCK.bfloat16()), "F32": to_bytes(BLOCK)}
    for n, t in enumerate(tensors):
        block, left, at = blocks[t.dtype], t.nbytes, n * 4096 % (16 * MIB)
        while left:
            piece = block[at : at + left]
            yield piece
            left, at = left - len(piece), 0


def make(store: Store, shape: str) -> tuple[str, str]:
    """(base, adapter): digests of random ones in a store."""
    tensors, shards, size = weights(shape), [list[Stored]()], 0
    for t in tensors:
        if size + t.nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    files = [_put(store, path, held) for path, held in zip(shard_names(len(shards)), shards, strict=True)]
    if len(shards) > 1:
        where = {t.name: f.path for f, held in zip(files, shards, strict=True) for t in held}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": where}
        files.append(_text(store, "model.safetensors.index.json", json.dumps(index)))
    return _publish(store, shape, files, _put(store, "adapter_model.safetensors", adapter_weights(tensors)))


def _publish(store: Store, shape: str, files: Sequence[File], lora: File) -> tuple[str, str]:
    hidden, inner, layers, heads, kv, vocab = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "dtype": "bfloat16",
        "num_key_value_heads": kv, "tie_word_embeddings": False, "max_position_embeddings": 4096,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        texts = [_text(store, p.name, p.read_text()) for p in tiny_tokenizer(Path(folder)).iterdir()]
    meta = {"architecture": "LlamaForCausalLM", "template": "tokenizer", "system": "", "base_name": "b",
            "generation": {}, "context_length": 4096, "dtype": "bfloat16"}  # fmt: skip
    base = publish(store, Manifest("base", (*files, *texts, _text(store, "config.json", json.dumps(config))), (), meta))
    lora_config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "bias": "none",
                   "task_type": "CAUSAL_LM"}  # fmt: skip
    about = _text(store, "adapter_config.json", json.dumps(lora_config))
    return base, publish(store, Manifest("adapter", (lora, about), (Parent("base", base),), meta))


def _put(store: Store, path: str, tensors: Sequence[Stored]) -> File:
    held = order(tensors)
    size = len(header(held)) + sum(t.nbytes for t in held)
    blob = store.put_stream("bench-" + path.replace(".", "-"), size, numbers(held))
    return File(path, blob.digest, blob.size)


def _text(store: Store, path: str, text: str) -> File:
    blob = store.put_blob(text.encode())
    return File(path, blob.digest, blob.size)


# ---------------------------------------------------------------------------------------------- what is measured


def ours(store: Store, base: str, adapter: str, report: MergeReport = "never") -> str:
    """The merged model's digest, as a worker makes it."""
    job = f"jobs/bench-{time.monotonic_ns()}"
    raise_fence(store, job, 1)
    with Attempt(store, job, 1) as attempt:
        attempt.claim({"pid": 1})
        a, b = ArtifactRef(name="a", digest=adapter), ArtifactRef(name="b", digest=base)
        task = MergeTask(adapter=a, base=b, report=report)
        return merge(task, attempt, threading.Event())


def peft_merge(base: Path, adapter: Path, out: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    whole: Any = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    whole.save_pretrained(str(out), max_shard_size="2GB")


def measured(*words: str) -> tuple[float, float]:
    """(seconds, peak RSS in MB) of this module in a process of its own."""
    code = "import sys; from tests.bench.convert import alone; alone(*sys.argv[1:])"
    told = subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, size = told.split()[-2:]
    return float(seconds), float(size)


def alone(kind: str, *words: str) -> None:
    """What `measured` runs: imports are not counted in its seconds, but in its memory."""
    if kind == "peft":
        import peft
        import transformers

        assert [peft.PeftModel, transformers.AutoModelForCausalLM]  # loaded at their first use only
    began = time.monotonic()
    if kind in ("ours", "report"):
        store = open_store(words[0])
        made = ours(store, words[1], words[2], "always" if kind == "report" else "never")
        print("report:", load(store, made).meta["report"], file=sys.stderr)
    elif kind == "sparse":
        ours(Dropping(Path(words[0])), words[1], words[2])
    elif kind == "peft":
        peft_merge(Path(words[0]), Path(words[1]), Path(words[2]))
        subprocess.run(["sync", "-f", words[2]], check=True)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{kind}: {used.ru_utime + used.ru_stime:.1f} s of processor time", file=sys.stderr)
    print(time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def forget_pages(folder: Path) -> None:
    """Drop files from the page cache, as far as one may."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as source:
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(do: Callable[[], object]) -> float:
    began = time.monotonic()
    do()
    return time.monotonic() - began


def bench_disk(shape: str, rounds: int, peers: Sequence[str] = ("report", "cp", "peft")) -> None:
    """Goals: 0.35 of PEFT's wall, 0.12 of its RSS, 0.8 of cp's bandwidth. PEFT and cp are not asked to sync in between, but
    all are on the disk at the end. "report" is ours with the merge report."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        store = open_store((folder / "store").as_uri())
        base, adapter = make(store, shape)
        plain = materialise(store, load(store, base), folder / "base")
        lora = materialise(store, load(store, adapter), folder / "adapter")
        size = sum(p.stat().st_size for p in plain.glob("*.safetensors")) / 1e9
        kept = {p: p.stat().st_ino for p in (folder / "store").rglob("*") if p.is_file()}
        found: dict[str, list[tuple[float, float]]] = {"ours": [], **{p: [] for p in peers}}
        for _ in range(rounds):
            for kind, seen in found.items():
                forget_pages(folder)
                if kind == "cp":
                    seen.append((timed(lambda: _copy(plain, folder / "out")), 0.0))
                elif kind == "peft":
                    seen.append(measured("peft", str(plain), str(lora), str(folder / "out")))
                else:
                    seen.append(measured(kind, store.uri, base, adapter))
                shutil.rmtree(folder / "out", ignore_errors=True)
                for path in (folder / "store").rglob("*"):
                    if path.is_file() and path not in kept:
                        path.unlink()
        print(f"merge {shape}: {size:.2f} GB, rank {RANK}, {rounds} rounds in turn", flush=True)
        _tell(found, "report", {"seconds": 1.0, "RSS MB": 1.0})
        _tell(found, "peft", {"seconds": 0.35, "RSS MB": 0.12})
        _tell(found, "cp", {"seconds": 1 / 0.8})


def _copy(plain: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", "--reflink=never", "-L", str(plain), str(out)], check=True)
    subprocess.run(["sync", "-f", str(out)], check=True)


def _tell(found: Mapping[str, Sequence[tuple[float, float]]], peer: str, goals: Mapping[str, float]) -> None:
    if peer not in found:
        return
    for n, (unit, goal) in enumerate(goals.items()):
        mine, theirs = ([seen[n] for seen in found[kind]] for kind in ("ours", peer))
        ratio = [a / b for a, b in zip(mine, theirs, strict=True)]
        print(
            f"  {unit:8} ours {spread(mine)}; {peer} {spread(theirs)}; ratio {spread(ratio)}, goal at most {goal:.2f}"
        )


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def bench_bucket(shape: str, rounds: int) -> None:
    """From bucket to bucket, beside the same client getting all of it and putting as much; goal 0.85 of that bandwidth."""
    with seaweed() as (uri, keys):
        os.environ.update(keys)
        store = open_store(uri)
        base, adapter = make(store, shape)
        files = [f for f in load(store, base).files if f.path.endswith(".safetensors")]
        found: dict[str, list[tuple[float, float]]] = {"ours": [], "get + put": []}
        for n in range(rounds):
            found["ours"].append(measured("ours", uri, base, adapter))
            with tempfile.TemporaryDirectory() as folder:
                seconds = 0.0
                for f in files:
                    path = Path(folder) / "file"
                    seconds += timed(lambda f=f, path=path: store.fetch_blob(f.digest, path))  # type: ignore[misc]
                    path.chmod(0o600)
                    with path.open("ab") as out:
                        out.write(f"{n} {time.monotonic_ns()}".encode())  # else the store has it already
                    seconds += timed(lambda path=path: store.put_file(path))  # type: ignore[misc]
                    path.unlink()
            found["get + put"].append((seconds, 0.0))
        print(f"bucket {shape}: {sum(f.size for f in files) / 1e9:.2f} GB, {rounds} rounds in turn", flush=True)
        _tell(found, "get + put", {"seconds": 1 / 0.85})


class Dropping(FileStore):
    """A store that forgets what is streamed into it."""

    def put_stream(self, stream_id: str, size: int, pieces: Iterable[bytes | memoryview]) -> Blob:
        assert sum(len(piece) for piece in pieces) == size
        return self.put_blob(f"{stream_id} {size}".encode())


def bench_memory(shape: str = "70b") -> None:
    """Peak RSS of a merge of a model of holes, whose result is dropped; goal 4 GiB."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        store = FileStore(Path(name))
        tensors = order(weights(shape))
        files, lora = (
            [_sparse(store, "model.safetensors", tensors)],
            _put(store, "adapter_model.safetensors", adapter_weights(tensors)),
        )
        base, adapter = _publish(store, shape, files, lora)
        seconds, size = measured("sparse", name, base, adapter)
        largest = max(t.nbytes for t in tensors) / 1e6
        total = sum(t.nbytes for t in tensors) / 1e9
        print(f"memory {shape}: {total:.1f} GB in {seconds:.0f} s, peak RSS {size:.0f} MB, goal 4295; "
              f"largest tensor {largest:.0f} MB")  # fmt: skip


def _sparse(store: FileStore, path: str, tensors: Sequence[Stored]) -> File:
    """A blob of zeros that takes no room, under a name that is not its sum: ranges are read unverified."""
    start = header(tensors)
    size = len(start) + sum(t.nbytes for t in tensors)
    digest = "sha256:" + "70" * 32
    blob = store.blob_path(digest)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with blob.open("wb") as out:
        out.write(start)
        out.truncate(size)
    return File(path, digest, size)


def main(words: Sequence[str]) -> None:
    what, shape, rounds = [*words, *("all", "3b", "3")[len(words) :]]
    if what in ("all", "disk"):
        bench_disk(shape, int(rounds))
    if what in ("all", "disk-7b"):
        bench_disk("7b", int(rounds), ("cp",))
    if what in ("all", "bucket"):
        bench_bucket("1b" if what == "all" else shape, int(rounds))
    if what in ("all", "memory"):
        bench_memory("70b" if what == "all" else shape)


if __name__ == "__main__":
    main(sys.argv[1:])
