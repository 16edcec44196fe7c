"""AsyncLLM over the toy backend: many tasks, cancellation, failures and closing."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_engine import ToyEngine, ToyManifest, greedy, write_tokenizer

from llmlab.errors import EngineError, InputError
from llmlab.runtime.async_llm import AsyncLLM, AsyncStream
from llmlab.runtime.params import SamplingParams
from llmlab.text.tokenizer import Tokenizer

PROMPTS = ["the cat sat", "count to nine", "that was that and", "x"]


@pytest.fixture
def engine(tmp_path: Path) -> ToyEngine:
    write_tokenizer(tmp_path / "engine")
    return ToyEngine(tmp_path / "engine", ToyManifest(max_seq_len=512))


def params(count: int = 12, **values) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **values)


def expected(engine: ToyEngine, text: str, count: int = 12) -> list[int]:
    return greedy(Tokenizer(engine.path).encode(text), count, eos=None)


async def ids_of(stream: AsyncStream) -> list[int]:
    return [i async for delta in stream for i in delta.token_ids]


async def until(condition: Callable[[], object], what: str) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"never: {what}")


async def assert_idle(llm: AsyncLLM) -> None:
    await until(lambda: not llm._frontend.has_work, "the engine is idle")
    llm._frontend.core.check_integrity()


def test_many_streams_at_once(engine: ToyEngine) -> None:
    async def main() -> None:
        async with AsyncLLM(engine, max_num_seqs=16) as llm:
            counts = [5 + 3 * i for i in range(8)]
            prompts = [PROMPTS[i % 4] for i in range(8)]
            streams = [llm.stream(p, params(c)) for p, c in zip(prompts, counts, strict=True)]
            results = await asyncio.gather(*map(ids_of, streams))
            assert results == [expected(engine, p, c) for p, c in zip(prompts, counts, strict=True)]
            assert engine.made.steps < 2 * max(counts), "requests ran one after another"
            assert streams[0].result.text == Tokenizer(engine.path).decode(results[0])
            assert streams[0].result.metrics.output_tokens == 5
            await assert_idle(llm)

    asyncio.run(main())


def test_generate_and_chat(engine: ToyEngine) -> None:
    async def main() -> None:
        async with AsyncLLM(engine, max_num_seqs=4) as llm:
            one = await llm.generate("the cat sat", params())
            assert one.token_ids == expected(engine, "the cat sat")
            several = await llm.generate(["x", [1, 2]], [params(3), params(5, n=2, temperature=1.0, seed=1)])
            assert several[0].token_ids == expected(engine, "x", 3)
            assert [len(c.token_ids) for c in several[1].completions] == [5, 5]
            chat = await llm.chat([{"role": "user", "content": "count"}], params(3))
            assert chat.prompt == "<user>count<assistant>"
            assert await llm.generate([]) == []
            await assert_idle(llm)

    asyncio.run(main())


def test_bad_prompts_queue_nothing(engine: ToyEngine) -> None:
    async def main() -> None:
        async with AsyncLLM(engine, max_num_seqs=4) as llm:
            with pytest.raises(InputError, match="prompt 1: the prompt is empty"):
                await llm.generate(["x", ""])
            with pytest.raises(InputError, match="512"):
                llm.stream([1] * 512)
            with pytest.raises(InputError, match="chat takes"):
                await llm.chat("x")
            assert not llm._frontend.has_work and engine.made.steps == 0

    asyncio.run(main())


def test_outside_of_async_code_it_says_so(engine: ToyEngine) -> None:
    llm = AsyncLLM(engine, max_num_seqs=4)
    with pytest.raises(InputError, match="use LLM instead"):
        llm.stream("x")
    llm.close()


@pytest.mark.parametrize("way", ["task", "timeout", "break", "close", "generate"])
def test_whoever_stops_listening_cancels_the_request(engine: ToyEngine, way: str) -> None:
    async def consume(llm: AsyncLLM) -> None:
        if way == "generate":
            await llm.generate(["the cat", "x"], params(400))
        async for _ in llm.stream("the cat", params(400)):
            if way == "break" and engine.made.steps > 5:
                return

    async def main() -> None:
        async with AsyncLLM(engine, max_num_seqs=4) as llm:
            if way == "timeout":
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(consume(llm), 0.05)
            elif way == "close":
                async with llm.stream("the cat", params(400)) as stream:
                    await anext(stream)
                await until(lambda: stream.result.finish_reason == "cancelled", "cancelled")
                assert [d async for d in stream] == []
            else:
                task = asyncio.create_task(consume(llm))
                await until(lambda: engine.made.steps > 3, "the engine works")
                if way != "break":
                    task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() == (way != "break")
                gc.collect()
            await assert_idle(llm)
            assert engine.made.steps < 390
            assert (await llm.generate("x", params())).token_ids == expected(engine, "x")

    asyncio.run(main())


def test_a_backend_failure_reaches_every_stream_and_later_requests_run(engine: ToyEngine) -> None:
    engine.options = {"fail_at": [4]}

    async def main() -> None:
        async with AsyncLLM(engine, max_num_seqs=8) as llm:
            streams = [llm.stream(prompt, params(30)) for prompt in PROMPTS]
            results = await asyncio.gather(*map(ids_of, streams), return_exceptions=True)
            assert all(isinstance(r, EngineError) and "the toy" in str(r) for r in results), results
            await assert_idle(llm)
            assert (await llm.generate("x", params())).token_ids == expected(engine, "x")

    asyncio.run(main())


def test_a_bug_in_a_step_reaches_every_stream_and_later_requests_run(
    engine: ToyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with AsyncLLM(engine, max_num_seqs=8) as llm:
            streams = [llm.stream(prompt, params(300)) for prompt in PROMPTS]
            with monkeypatch.context() as broken:
                broken.setattr(llm._frontend.core, "step", lambda: 1 / 0)
                results = await asyncio.gather(*map(ids_of, streams), return_exceptions=True)
            assert all(isinstance(r, EngineError) and "ZeroDivisionError" in str(r) for r in results), results
            assert (await llm.generate("x", params())).token_ids == expected(engine, "x")
            await assert_idle(llm)

    asyncio.run(main())


def test_close_cuts_off_streams_and_joins_the_worker(engine: ToyEngine) -> None:
    async def main() -> None:
        llm = AsyncLLM(engine, max_num_seqs=8)
        tasks = [asyncio.create_task(ids_of(llm.stream(prompt, params(400)))) for prompt in PROMPTS]
        await until(lambda: engine.made.steps > 3, "the engine works")
        await llm.aclose()
        assert not llm._worker.is_alive()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, EngineError) and "closed" in str(r) for r in results), results
        with pytest.raises(EngineError, match="closed"):
            llm.stream("x")
        await llm.aclose()

    asyncio.run(main())


def test_close_with_drain_finishes_what_was_begun(engine: ToyEngine) -> None:
    async def main() -> None:
        llm = AsyncLLM(engine, max_num_seqs=2)
        tasks = [asyncio.create_task(ids_of(llm.stream(prompt, params(40)))) for prompt in PROMPTS]
        await until(lambda: engine.made.steps > 1, "the engine works")
        await llm.aclose(drain=True)
        assert not llm._worker.is_alive()
        assert await asyncio.gather(*tasks) == [expected(engine, p, 40) for p in PROMPTS]

    asyncio.run(main())


def test_several_event_loops_share_one_engine(engine: ToyEngine) -> None:
    llm = AsyncLLM(engine, max_num_seqs=8)
    results: dict[str, list[int]] = {}

    def work(prompt: str) -> None:
        results[prompt] = asyncio.run(ids_of_later(prompt))

    async def ids_of_later(prompt: str) -> list[int]:
        return await ids_of(llm.stream(prompt, params(30)))

    workers = [threading.Thread(target=work, args=(prompt,)) for prompt in PROMPTS]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert results == {prompt: expected(engine, prompt, 30) for prompt in PROMPTS}
    llm.close()


def test_a_loop_that_was_closed_does_not_disturb_others(engine: ToyEngine) -> None:
    llm = AsyncLLM(engine, max_num_seqs=8)
    kept: list[AsyncStream] = []

    async def leave() -> None:
        kept.append(llm.stream("the cat", params(200)))
        await anext(kept[0])

    asyncio.run(leave())
    assert asyncio.run(ids_of_one(llm, "x")) == expected(engine, "x")
    llm.close()


async def ids_of_one(llm: AsyncLLM, prompt: str) -> list[int]:
    return await ids_of(llm.stream(prompt, params()))


def test_the_event_loop_stays_free_while_the_engine_works(engine: ToyEngine) -> None:
    async def main() -> None:
        async with AsyncLLM(engine, max_num_seqs=4) as llm:
            execute = engine.made.execute

            def slow(batch):
                time.sleep(0.02)
                return execute(batch)

            engine.made.execute = slow  # type: ignore[method-assign]
            task = asyncio.create_task(ids_of(llm.stream("x", params(10))))
            ticks = 0
            while not task.done():
                await asyncio.sleep(0.002)
                ticks += 1
            assert ticks > 30, "the loop stood still during steps"

    asyncio.run(main())
