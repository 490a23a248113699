from __future__ import annotations

import asyncio
import threading
import time

import pytest

from frostline.emulator.virtual_time import run_in_virtual_time


def now() -> float:
    return asyncio.get_running_loop().time()


def test_an_hour_passes_in_no_time() -> None:
    async def sleep() -> tuple[float, float]:
        before = now()
        await asyncio.sleep(3600)
        return before, now()

    started = time.perf_counter()
    assert run_in_virtual_time(sleep()) == (0, pytest.approx(3600))
    assert time.perf_counter() - started < 5


def test_days_pass_too() -> None:
    # The loop never waits longer than a day at once.
    async def sleep() -> float:
        await asyncio.sleep(10**6)
        return now()

    assert run_in_virtual_time(sleep()) == pytest.approx(10**6)


def test_timers_fire_in_the_order_of_their_times() -> None:
    seen: list[tuple[str, float]] = []

    async def wait(name: str, *pauses: float) -> None:
        for pause in pauses:
            await asyncio.sleep(pause)
            seen.append((name, now()))

    async def main() -> None:
        await asyncio.gather(wait("slow", 30), wait("quick", 10, 10, 20), wait("middle", 15))

    run_in_virtual_time(main())
    assert [name for name, _ in seen] == ["quick", "middle", "quick", "slow", "quick"]
    assert [at for _, at in seen] == pytest.approx([10, 15, 20, 30, 40])


def test_what_sleeps_at_the_same_time_does_not_add_up() -> None:
    async def main() -> float:
        await asyncio.gather(*(asyncio.sleep(100) for _ in range(50)))
        return now()

    assert run_in_virtual_time(main()) == pytest.approx(100)


def test_timeouts_fire() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7):
                await asyncio.Event().wait()
        async with asyncio.timeout(7):
            await asyncio.sleep(6)
        return now()

    assert run_in_virtual_time(main()) == pytest.approx(13)


def test_a_timer_wakes_whoever_waits_for_an_event() -> None:
    async def main() -> float:
        event = asyncio.Event()
        asyncio.get_running_loop().call_later(42, event.set)
        await event.wait()
        return now()

    assert run_in_virtual_time(main()) == pytest.approx(42)


def test_threads_are_not_used_and_take_no_simulated_time() -> None:
    def work(seconds: float) -> tuple[int, str]:
        time.sleep(seconds)
        return threading.get_ident(), "done"

    async def main() -> tuple[tuple[int, str], float]:
        return await asyncio.to_thread(work, 0.05), now()

    assert run_in_virtual_time(main()) == ((threading.get_ident(), "done"), 0)


def test_errors_come_out_of_to_thread() -> None:
    def fail() -> None:
        raise OSError("disk full")

    async def main() -> None:
        with pytest.raises(OSError, match="disk full"):
            await asyncio.to_thread(fail)

    run_in_virtual_time(main())


def test_to_thread_passes_an_interrupt_on() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        await asyncio.to_thread(interrupt)

    with pytest.raises(KeyboardInterrupt):
        run_in_virtual_time(main())


def test_the_result_and_the_error_are_the_coroutine_s() -> None:
    async def succeed() -> str:
        return "value"

    async def fail() -> None:
        await asyncio.sleep(1)
        raise ValueError("no")

    assert run_in_virtual_time(succeed()) == "value"
    with pytest.raises(ValueError, match="no"):
        run_in_virtual_time(fail())


def test_every_loop_begins_at_0() -> None:
    async def sleep() -> float:
        before = now()
        await asyncio.sleep(5)
        return before

    assert [run_in_virtual_time(sleep()) for _ in range(2)] == [0, 0]
