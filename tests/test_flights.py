"""One flight per object, whatever waiters do."""

import asyncio
from functools import partial

import pytest

from cachefs.budget import Urgency
from cachefs.fetcher.flights import Flights
from cachefs.fetcher.lanes import AHEAD, BACKGROUND, FOREGROUND, Lanes


async def test_many_waiters_cause_one_flight():
    flights: Flights[int] = Flights()
    started = []
    gate = asyncio.Event()

    async def fetch(_: Urgency) -> int:
        started.append(1)
        await gate.wait()
        return 7

    waiters = [asyncio.create_task(flights.join("a", fetch)) for _ in range(50)]
    await asyncio.sleep(0)
    waiters[0].cancel()  # the one that started it
    gate.set()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [7] * 49
    assert (len(started), len(flights)) == (1, 0)


async def test_a_flight_nobody_waits_for_is_cancelled_and_a_newcomer_starts_afresh():
    flights: Flights[str] = Flights()
    cancelled = asyncio.Event()

    async def hang(_: Urgency) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return "never"

    async def quick(_: Urgency) -> str:
        return "fresh"

    waiter = asyncio.create_task(flights.join("a", hang))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert await flights.join("a", quick) == "fresh"
    assert cancelled.is_set()


async def test_an_error_reaches_every_waiter_and_is_not_remembered():
    flights: Flights[int] = Flights()
    attempts = []

    async def fetch(_: Urgency) -> int:
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("origin")
        return 1

    results = await asyncio.gather(*(flights.join("a", fetch) for _ in range(3)), return_exceptions=True)
    assert [str(r) for r in results] == ["origin"] * 3
    assert await flights.join("a", fetch) == 1


async def test_foreground_overtakes_and_no_lane_is_lost():
    lanes = Lanes(1)
    order = []
    gate = asyncio.Event()

    async def go(name: str, priority: int) -> None:
        async with lanes.lane(priority):
            order.append(name)
            await gate.wait()

    first = asyncio.create_task(go("first", BACKGROUND))
    await asyncio.sleep(0)
    rest = [asyncio.create_task(go(f"warm{i}", BACKGROUND)) for i in range(3)]
    await asyncio.sleep(0)
    rest.append(asyncio.create_task(go("read", FOREGROUND)))
    await asyncio.sleep(0)
    rest[0].cancel()
    gate.set()
    await asyncio.gather(first, *rest, return_exceptions=True)
    assert order == ["first", "read", "warm1", "warm2"]
    async with asyncio.timeout(1), lanes.lane():
        order.append("free again")


async def test_a_reader_that_joins_what_was_begun_ahead_of_time_lifts_it():
    lanes, flights, order, gate = Lanes(1), Flights[None](), [], asyncio.Event()

    async def fetch(name: str, urgency: Urgency) -> None:
        async with lanes.lane(urgency):
            order.append(name)
            await gate.wait()

    async def want(name: str, level: int) -> asyncio.Task[None]:
        task = asyncio.create_task(flights.join(name, partial(fetch, name), level))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return task

    tasks = [await want(name, AHEAD) for name in "abcd"]
    tasks += [await want("d", FOREGROUND), await want("c", BACKGROUND)]  # who is in less of a hurry changes nothing
    gate.set()
    await asyncio.gather(*tasks)
    assert order == ["a", "d", "b", "c"]
