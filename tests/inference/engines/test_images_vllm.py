"""What vLLM says about images is what transformers says."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from services.finetune.errors import FailedPrecondition
from services.inference.engines.port import Engine, Picture, Sampling
from tests.inference.engines.seeing import Seeing, photo, tiny_seeing, token_of

pytestmark = pytest.mark.vllm
PROBES, TOKENS = 100, 4
GREEDY = Sampling(0, 1, 0, 8, 1, None, ())


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    return tiny_seeing(tmp_path_factory.mktemp("seeing"))


def probe(seeing: Seeing, n: int) -> tuple[list[int], list[Picture]]:
    """A prompt about one image, or two one after the other."""
    draw = random.Random(n)
    images = [
        Picture(f"{n}-{k}", photo(100 * n + k, draw.randint(20, 80), draw.randint(20, 80))) for k in range(1 + n % 2)
    ]
    text = [draw.randrange(10, 250) for _ in range(draw.randint(1, 30))]
    return [1, *[token_of(seeing.folder)] * TOKENS * len(images), *text], images


async def answers(engine: Engine, seeing: Seeing, adapter: str) -> list[list[int]]:
    async def one(n: int) -> list[int]:
        ids, images = probe(seeing, n)
        return [i async for step in engine.generate(ids, GREEDY, adapter, images) for i in step.ids]

    return await asyncio.gather(*map(one, range(PROBES)))


def test_without_torchvision_vllm_says_so(seeing: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    from services.inference.engines.vllm import VllmEngine

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FailedPrecondition, match="torchvision"):
        asyncio.run(VllmEngine.open(seeing.folder, {}, "float32", 0))


def test_both_engines_see_the_same(seeing: Seeing) -> None:
    pytest.importorskip("torchvision", reason="make install-vllm found no CPU build")
    from services.inference.engines.transformers import TransformersEngine
    from services.inference.engines.vllm import VllmEngine

    adapters = {"language": seeing.adapters["language"]}
    plain = TransformersEngine(seeing.folder, adapters, "float32", 0)
    expected = {name: asyncio.run(answers(plain, seeing, name)) for name in ("", "language")}
    assert expected[""] != expected["language"]

    async def ask() -> None:
        engine = await VllmEngine.open(_copy(seeing.folder), adapters, "float32", 0)
        try:
            for name, wanted in expected.items():
                found = await answers(engine, seeing, name)
                same = sum(a == b for a, b in zip(found, wanted, strict=True))
                assert same >= 0.95 * PROBES, (name, same)
            with pytest.raises(FailedPrecondition, match="merge it"):
                await engine.load_soon("whole", seeing.adapters["whole"])
        finally:
            engine.close()

    asyncio.run(ask())


def _copy(folder: Path) -> Path:
    """vLLM's engine keeps adapters beside the model."""
    import shutil

    return Path(shutil.copytree(folder, folder.parent / "vllm"))
