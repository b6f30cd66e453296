"""Shares of something limited: in turn, by priority, and none is lost."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs import memory
from cachefs.budget import Budget, Urgency
from cachefs.errors import ConfigError


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Holders:
    """Tasks that hold a share until they are told."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.gates: dict[str, asyncio.Event] = {}

    async def want(self, name: str, size: int, priority: int | Urgency = 0) -> None:
        async def run() -> None:
            async with self.budget.hold(size, priority):
                self.order.append(name)
                await self.gates[name].wait()

        self.gates[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(run())
        await settle()

    async def done(self, name: str) -> None:
        self.gates[name].set()
        await settle()


async def test_a_large_share_is_not_overtaken_by_small_ones():
    holders = Holders(Budget(10))
    await holders.want("a", 6)
    await holders.want("large", 9)
    await holders.want("small", 1)  # would fit beside a
    assert holders.order == ["a"]
    await holders.done("a")
    assert holders.order == ["a", "large", "small"]
    assert holders.budget.used == 10


async def test_who_is_lifted_moves_up_and_takes_its_share_once():
    holders = Holders(Budget(10))
    urgency = Urgency(2)
    await holders.want("a", 10)
    await holders.want("b", 10, 1)
    await holders.want("lifted", 4, urgency)
    await holders.want("c", 6)
    urgency.lift(0)
    urgency.lift(1)  # nobody is put back
    await holders.done("a")
    assert holders.order == ["a", "lifted", "c"]  # it came before
    await holders.done("c")
    await holders.done("lifted")
    assert holders.order == ["a", "lifted", "c", "b"]
    assert holders.budget.used == 10


async def test_who_leaves_after_it_was_lifted_blocks_nobody():
    holders = Holders(Budget(10))
    urgency = Urgency(1)
    await holders.want("a", 10)
    await holders.want("lifted", 10, urgency)
    await holders.want("b", 10, 1)
    urgency.lift(0)
    holders.tasks["lifted"].cancel()
    await settle()
    urgency.lift(-1)
    await holders.done("a")
    assert holders.order == ["a", "b"]
    await holders.done("b")
    assert holders.budget.used == 0


async def test_more_than_there_is_comes_alone():
    holders = Holders(Budget(10))
    await holders.want("a", 1)
    await holders.want("huge", 100)
    await holders.want("b", 1)
    assert holders.order == ["a"]
    await holders.done("a")
    assert holders.order == ["a", "huge"]
    await holders.done("huge")
    assert holders.order == ["a", "huge", "b"]
    assert (holders.budget.used, holders.budget.most) == (1, 100)


async def test_who_gives_up_makes_way():
    holders = Holders(Budget(10))
    await holders.want("a", 6)
    await holders.want("large", 9)
    await holders.want("small", 1)
    holders.tasks["large"].cancel()
    await settle()
    assert holders.order == ["a", "small"]


async def test_who_is_cancelled_as_its_turn_comes_hands_it_on():
    holders = Holders(Budget(1))
    for name in ("a", "b", "c"):
        await holders.want(name, 1)
    holders.gates["a"].set()
    await asyncio.sleep(0)  # a runs to its end, b has its share and has not run
    await asyncio.sleep(0)
    holders.tasks["b"].cancel()
    await settle()
    await holders.done("a")
    assert holders.order[-1] == "c"
    await holders.done("c")
    assert holders.budget.used == 0


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2), st.integers(0, 3), st.booleans()), max_size=40),
    st.integers(1, 10),
)
@settings(max_examples=100)
def test_it_is_never_overdrawn_and_always_given_back(wanted: list[tuple[int, int, int, bool]], limit: int) -> None:
    async def one(budget: Budget, size: int, priority: int, steps: int) -> None:
        async with budget.hold(size, priority):
            assert budget.used <= limit or budget.used == size
            for _ in range(steps):
                await asyncio.sleep(0)

    async def run() -> None:
        budget = Budget(limit)
        tasks = []
        for size, priority, steps, cancel in wanted:
            tasks.append(asyncio.create_task(one(budget, size, priority, steps)))
            await asyncio.sleep(0)
            if cancel:
                tasks[len(tasks) // 2].cancel()
        async with asyncio.timeout(10):
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError)
        assert budget.used == 0
        async with AsyncExitStack() as stack:
            for _ in range(limit):
                await stack.enter_async_context(budget.hold(1))

    asyncio.run(run())


def test_shares_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEFS_MEMORY", "1G")
    assert memory.usable() == 1 << 30
    assert memory.share(16, least=1, most=1 << 40) == 64 << 20
    assert memory.share(16, least=100 << 20, most=1 << 40) == 100 << 20
    assert memory.share(16, least=1, most=10) == 10
    monkeypatch.setenv("CACHEFS_MEMORY", "much")
    with pytest.raises(ConfigError, match="much"):
        memory.usable()
    monkeypatch.delenv("CACHEFS_MEMORY")
    monkeypatch.setattr(memory, "cgroup_limit", lambda: 12345)
    assert memory.usable() == 12345
    monkeypatch.setattr(memory, "cgroup_limit", lambda: None)
    assert memory.usable() > 1 << 28
