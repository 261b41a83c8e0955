"""python -m tests.bench.inference_shape SHAPE TOKENIZER: answers through gRPC beside vLLM's own LLM.generate, on a GPU.

A Llama of random weights, a rank 64 adapter of random weights on all its linear layers; TOKENIZER is a folder with the files
of a tokenizer of at least as many tokens as the shape has. Both keep a model on the GPU and answer in turn.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from services.finetune.progress import attempt_key, dump, raise_fence, run_uri
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import load, materialise, publish_directory
from tests.bench.inference import ask, spread
from tests.bench.train_shapes import SHAPES, VOCABULARY, random_causal

STREAMS = [int(n) for n in os.environ.get("STREAMS", "64,256").split(",")]
PROMPT, TOKENS = 256, 128
ROUNDS = int(os.environ.get("ROUNDS", "5"))
RANK = 64
PART = "0.42"
"""Of the GPU's memory for each of the two."""
META = {"architecture": "LlamaForCausalLM", "template": "chatml", "generation": {"eos_token_id": [2]}}


def prompts(shape: str, streams: int, number: int) -> list[list[int]]:
    """Token ids that no cache has seen: each round has its own."""
    vocabulary = VOCABULARY[shape] - 100
    return [[(7919 * (s + 1000 * number) + 31 * n) % vocabulary + 100 for n in range(PROMPT)] for s in range(streams)]


def make(shape: str, tokenizer: str, home: str) -> None:
    """Publish base and adapter, and print their digests."""
    import torch
    from safetensors.torch import save_file

    store = open_store(Path(home, "store").as_uri())
    base, adapter = Path(home, "base"), Path(home, "adapter")
    model = random_causal(shape, torch.bfloat16)
    model.save_pretrained(base, max_shard_size="4GB")
    for file in Path(tokenizer).iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    adapter.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and not name.endswith("lm_head"):
            a = torch.randn(RANK, module.in_features, dtype=torch.bfloat16) * 0.01
            b = torch.randn(module.out_features, RANK, dtype=torch.bfloat16) * 0.01
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, adapter / "adapter_model.safetensors")
    leaves = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "target_modules": leaves}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    print(publish_directory(store, "base", base, meta=META), publish_directory(store, "adapter", adapter, meta=META))


# ---------------------------------------------------------------------------------------------- ours


def serve(store: Store, base: str, adapter: str) -> tuple[subprocess.Popen[bytes], str]:
    """An engine server as the service starts it, and its address once it answers."""
    key = "jobs/bench"
    raise_fence(store, key, 1)
    order = {
        "endpoint": "workspaces/default/endpoints/e",
        "model": {"name": "base", "digest": base},
        "adapters": [{"alias": "a", "name": "adapter", "digest": adapter}],
        "engine": "vllm",
        "dtype": "bfloat16",
        "bits": 0,
        "token_file": "",
    }
    store.put(f"{attempt_key(key, 1)}/run.json", dump(order))
    process = subprocess.Popen([sys.executable, "-m", "services.inference.engines", run_uri(store.uri, key, 1)])
    while (ready := store.get(f"{attempt_key(key, 1)}/ready.json")) is None:
        if process.poll() is not None:
            raise RuntimeError(f"the engine server ended with {process.returncode}")
        time.sleep(0.5)
    return process, str(json.loads(ready.data)["address"])


async def ours(address: str, asked: Sequence[Sequence[int]], adapter: str) -> float:
    """Tokens a second of all streams together."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceStub(channel)
        began = time.monotonic()
        counts = await asyncio.gather(*(ask(stub, "e", ids, TOKENS, adapter) for ids in asked))
        return sum(n for n, _ in counts) / (time.monotonic() - began)


# ---------------------------------------------------------------------------------------------- the peer


def peer() -> None:
    """LLM.generate, with vLLM's own settings; the first line on stdin names the folders of base and adapter, each further
    one is a round, each on stdout its tokens a second."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM warns on the standard output
    folder, adapter = json.loads(sys.stdin.readline())
    llm = LLM(
        folder,
        dtype="bfloat16",
        enable_lora=True,
        max_lora_rank=RANK,
        max_loras=4,
        gpu_memory_utilization=float(PART),
        skip_tokenizer_init=True,
    )
    params = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True, stop_token_ids=[2])
    known = LoRARequest("a", 1, adapter)
    print("ready", file=said, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        asked: Any = [TokensPrompt(prompt_token_ids=ids) for ids in order["prompts"]]
        began = time.monotonic()
        made = llm.generate(asked, params, use_tqdm=False, lora_request=known if order["adapter"] else None)
        count = sum(len(one.outputs[0].token_ids) for one in made)
        print(json.dumps(count / (time.monotonic() - began)), file=said, flush=True)


def main(shape: str, tokenizer: str) -> None:
    if shape not in SHAPES:
        raise SystemExit(f"no shape {shape}; there are {', '.join(SHAPES)}")
    os.environ |= {"QUARTET_ENGINE_GPU_MEMORY": PART, "VLLM_NO_USAGE_STATS": "1"}
    # Looking for a GPU the other way makes it useless to the process that vLLM forks off.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    me = [sys.executable, "-m", "tests.bench.inference_shape"]
    # It imports vLLM meanwhile; it may not take its part of the GPU before the engine has measured its own.
    other = subprocess.Popen([*me, "peer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None
    with tempfile.TemporaryDirectory() as home:
        made = subprocess.run([*me, "make", shape, tokenizer, home], capture_output=True, text=True, check=True)
        base, adapter = made.stdout.split()[-2:]
        store = open_store(Path(home, "store").as_uri())
        began = time.monotonic()
        server, address = serve(store, base, adapter)
        print(f"the engine server answered {time.monotonic() - began:.0f} s after its start", flush=True)
        folders = [materialise(store, load(store, d), Path(home, f"peer-{n}")) for n, d in enumerate((base, adapter))]
        other.stdin.write(json.dumps([str(folder) for folder in folders]) + "\n")
        other.stdin.flush()
        while other.stdout.readline() != "ready\n":
            if other.poll() is not None:
                raise RuntimeError("the peer ended")
        print(f"the peer was ready after {time.monotonic() - began:.0f} s", flush=True)
        for streams in STREAMS:
            for alias in ("", "a"):
                rates: list[tuple[float, float]] = []
                for n in range(-1, ROUNDS):  # the first warms up
                    number = 10 * len(alias) + 2 * n + 2 + streams
                    mine = asyncio.run(ours(address, prompts(shape, streams, number), alias))
                    other.stdin.write(
                        json.dumps({"prompts": prompts(shape, streams, number + 1), "adapter": bool(alias)}) + "\n"
                    )
                    other.stdin.flush()
                    rates.append((mine, float(other.stdout.readline())))
                    print(f"  round {n + 1}: {rates[-1][0]:,.0f} and {rates[-1][1]:,.0f} tok/s", flush=True)
                ratios = [a / b for a, b in rates[1:]]
                print(
                    f"{shape} bfloat16, {streams} streams, {PROMPT} in, {TOKENS} out, "
                    f"{'one adapter' if alias else 'no adapter'}: LLM.generate {spread([b for _, b in rates[1:]])} tok/s, "
                    f"through gRPC {spread([a for a, _ in rates[1:]])}, ratio {spread(ratios)} "
                    f"(median {statistics.median(ratios):.3f})",
                    flush=True,
                )
        other.stdin.close()
        other.wait()
        server.terminate()
        server.wait()


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(*sys.argv[2:])
    elif sys.argv[1] == "peer":
        peer()
    else:
        main(*sys.argv[1:])
