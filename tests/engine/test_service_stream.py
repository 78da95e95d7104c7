"""The events of a service in asyncio."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import specache
from specache.engine.events import Finished, NewToken, Started
from tests.engine.serving import alone, service_of
from tests.tiny import llama, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def job(model: Any, length: int, new: int, **options: Any) -> specache.Job:
    request = specache.make_request(model, prompt(length), do_sample=False, max_new_tokens=new, **options)
    return specache.Job(request)


def test_a_stream_yields_every_event_up_to_the_last(model):
    async def ask(service: specache.EngineService, length: int) -> list[int]:
        events = [event async for event in service.stream(job(model, length, 6))]
        assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
        return [event.token_id for event in events if isinstance(event, NewToken)]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(ask(service, length) for length in (50, 90, 20)))

    with service_of(model) as service:
        answers = asyncio.run(main())
    assert answers == [alone(model, prompt(length), max_new_tokens=6)[0] for length in (50, 90, 20)]


@pytest.mark.parametrize("how", ["cancel", "leave"])
def test_whoever_leaves_a_stream_aborts_its_request(model, how):
    async def read(service: specache.EngineService, began: asyncio.Event) -> None:
        events = service.stream(job(model, 50, 1900))
        async for event in events:
            if isinstance(event, NewToken):
                began.set()
                if how == "leave":
                    await events.aclose()  # type: ignore[attr-defined]
                    return

    async def main(service: specache.EngineService) -> None:
        began = asyncio.Event()
        task = asyncio.create_task(read(service, began))
        await began.wait()
        if how == "cancel":
            task.cancel()
        await asyncio.wait([task], timeout=60)
        while service.status().running:
            await asyncio.sleep(0.01)

    with service_of(model) as service:
        asyncio.run(main(service))
        assert service.status().aborted == 1 and service.status().slow_bytes == 0


def test_a_stream_raises_the_error_of_its_request(model):
    def fails(input_ids: Any, scores: Any) -> Any:
        raise RuntimeError("from a processor")

    async def main(service: specache.EngineService) -> None:
        async for _ in service.stream(job(model, 50, 9, logits_processor=[fails])):
            pass

    with service_of(model) as service:
        with pytest.raises(RuntimeError, match="from a processor"):
            asyncio.run(main(service))
        service.close()
        with pytest.raises(specache.ServiceClosedError):
            asyncio.run(main(service))
