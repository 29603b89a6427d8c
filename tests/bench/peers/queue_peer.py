"""The queue that Lathe's is compared with: procrastinate, in the database of DATABASE_URL. Answers a line with a line, as
`jobs/benches/queue.rs` does:

    backlog N              how many jobs wait, once at least N do
    rate RUNNERS SECONDS   jobs claimed and ended in a second, by so many workers
    latency N              p50 and p99, in milliseconds, of N times from before the enqueueing to the start of the task
"""

import asyncio
import logging
import math
import os
import sys
import time

from procrastinate import App, PsycopgConnector
from procrastinate.worker import Worker

# Warnings too would be in the way of the table.
logging.disable(logging.WARNING)
# A worker listens on a connection of its own and fetches on another.
app = App(connector=PsycopgConnector(conninfo=os.environ["DATABASE_URL"], min_size=20, max_size=40))
started: list[float] = []
begun = asyncio.Event()


@app.task(name="nothing")
async def nothing(n: int) -> None:
    started.append(time.perf_counter())
    begun.set()


def worker(wait: bool = True) -> Worker:
    return Worker(app=app, concurrency=1, wait=wait, install_signal_handlers=False)


async def one(question: str):
    return next(iter((await app.connector.execute_query_one_async(question)).values()))


async def backlog(least: int) -> int:
    """In one statement, and without the triggers that write an event a job."""
    waiting = await one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'")
    if waiting < least:
        rows = f"""INSERT INTO procrastinate_jobs (queue_name, task_name, args)
                   SELECT 'default', 'nothing', '{{"n": 1}}' FROM generate_series(1, {least - waiting})"""
        async with app.connector.pool.connection() as conn:
            await conn.execute("SET LOCAL session_replication_role = replica")
            await conn.execute(rows)
        async with app.connector.pool.connection() as conn:
            await conn.set_autocommit(True)
            await conn.execute("VACUUM (ANALYZE) procrastinate_jobs")
            await conn.execute("CHECKPOINT")
            await conn.set_autocommit(False)
    return max(waiting, least)


async def rate(runners: int, seconds: float) -> float:
    started.clear()
    begun.clear()
    workers = [worker() for _ in range(runners)]
    running = [asyncio.create_task(one.run()) for one in workers]
    # Signing on is not counted.
    await begun.wait()
    since = started[0]
    await asyncio.sleep(seconds)
    for one_worker in workers:
        one_worker.stop()
    await asyncio.gather(*running)
    return len(started) / (time.perf_counter() - since)


async def latency(jobs: int) -> list[float]:
    waiting = worker()
    running = asyncio.create_task(waiting.run())
    times = []
    # The first ones meet a worker that is still starting.
    for at in range(jobs + 5):
        started.clear()
        begun.clear()
        since = time.perf_counter()
        await nothing.defer_async(n=1)
        await begun.wait()
        if at >= 5:
            times.append((started[0] - since) * 1e3)
        # As long as Lathe's runner is given, to wait again.
        await asyncio.sleep(0.004)
    waiting.stop()
    await running
    return times


def quantile(times: list[float], share: float) -> float:
    return sorted(times)[max(math.ceil(len(times) * share), 1) - 1]


async def answer(question: str) -> str:
    match question.split():
        case ["backlog", jobs]:
            return str(await backlog(int(jobs)))
        case ["rate", runners, seconds]:
            return str(await rate(int(runners), float(seconds)))
        case ["latency", jobs]:
            times = await latency(int(jobs))
            return f"{quantile(times, 0.5)} {quantile(times, 0.99)}"
    raise ValueError(question)


async def main() -> None:
    async with app.open_async():
        if not await one("SELECT to_regclass('procrastinate_jobs') IS NOT NULL"):
            await app.schema_manager.apply_schema_async()
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            print(await answer(line), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
