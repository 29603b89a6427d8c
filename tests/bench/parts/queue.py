"""The queue beside procrastinate, both in one PostgreSQL that writes through to the disk, with its default settings.

One job at a time on both sides. Each claimer has a connection of its own; procrastinate's are spread over as many
processes as there are cores, since one Python process uses one.
"""

import os

import with_postgres  # .ci/with_postgres.py
from report import Figure
from sides import Side, bench_binary, packages, python_side

ROUNDS = 6
MANY = 1_000_000
SECONDS = 1.5


def run() -> list[Figure]:
    program, _ = bench_binary("lathe-jobs", "queue"), packages("queue")
    with with_postgres.server(durable=True) as (port, tool):
        urls = {name: f"postgres://postgres@127.0.0.1:{port}/{name}" for name in ("few", "many", "peer")}
        for name in urls:
            tool("psql", "-q", "-h", "127.0.0.1", "-p", port, "-U", "postgres", "-c", f"CREATE DATABASE {name}")
        few, many = (Side([program], {"DATABASE_URL": urls[name]}) for name in ("few", "many"))
        peers = [python_side("queue_peer.py", "queue", {"DATABASE_URL": urls["peer"]})]
        latencies = [(few.ask("latency 100"), peers[0].ask("latency 100")) for _ in range(ROUNDS)]
        few.ask("backlog 10")
        for side in (many, peers[0]):
            side.ask(f"backlog {MANY}")
        # Its tables are there, and procrastinate's other processes find them.
        peers += [python_side("queue_peer.py", "queue", {"DATABASE_URL": urls["peer"]}) for _ in range((os.cpu_count() or 1) - 1)]
        claims = [(many.ask("claim 200")[0], few.ask("claim 200")[0]) for _ in range(ROUNDS)]
        rates = {runners: [(many.ask(f"rate {runners} {SECONDS}")[0], peer_rate(peers, runners)) for _ in range(ROUNDS)]
                 for runners in (1, 4, 16)}
        for side in (few, many, *peers):
            side.close()
    return [*latency_figures(latencies), claim_figure(claims), *(rate_figure(runners, rounds) for runners, rounds in rates.items())]


def peer_rate(peers: list[Side], runners: int) -> float:
    used = peers[:runners]
    for at, peer in enumerate(used):
        peer.tell(f"rate {len(range(at, runners, len(used)))} {SECONDS}")
    return sum(peer.hear()[0] for peer in used)


def latency_figures(rounds) -> list[Figure]:
    p50, p99 = ([ours[at] for ours, _ in rounds] for at in (0, 1))
    peer50, peer99 = ([theirs[at] for _, theirs in rounds] for at in (0, 1))
    return [
        Figure("queue/latency-p50", "ms", p50, goal=10, at_most=True, expected="5 ms"),
        Figure("queue/latency-p50-ratio", "ms", p50, peer50, expected="1 ×"),
        Figure("queue/latency-p99-ratio", "ms", p99, peer99, expected="1 ×"),
    ]


def claim_figure(rounds) -> Figure:
    return Figure("queue/claim-time", "ms", [many for many, _ in rounds], [few for _, few in rounds], goal=1.25, at_most=True,
                  expected="1.1 ×", note="the claim with a million jobs waiting, over the same with ten")


def rate_figure(runners: int, rounds) -> Figure:
    expected = {1: "1.0 ×", 4: "1.2 ×", 16: "1.5 ×"}[runners]
    return Figure(f"queue/rate-{runners}", "jobs/s", [ours for ours, _ in rounds], [theirs for _, theirs in rounds], goal=1.0, expected=expected)
