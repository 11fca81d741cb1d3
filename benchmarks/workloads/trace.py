"""Traces for `vllm bench serve --dataset-name timed_trace`: agents and chats that come back, from a seed.

    python -m benchmarks.workloads.trace OUT.jsonl [--seconds 120] [--sessions-per-second 0.5] [--seed 0]

Shaped like the public ones: a line a request, with its time in milliseconds, lengths in tokens, and a hash
for each 512 tokens of the prompt; equal hashes are equal text. Made here, of nobody's traffic.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import count
from pathlib import Path
from typing import Any

CHUNK = 512  # tokens of a hash: --timed-trace-chunk-hash-size
APPS = 4  # of the sessions, each with a system prompt of its own
SYSTEM_CHUNKS = (1, 8)
TURNS = 4.0  # mean of a session
THINKING = 8.0  # mean seconds between an answer and the next turn
LONGEST = 60  # chunks of a prompt


def make_trace(seconds: float, sessions_per_second: float, seed: int) -> list[dict[str, Any]]:
    """Requests by time: `timestamp`, `input_length`, `output_length`, `hash_ids`."""
    rng = random.Random(seed)
    fresh = count()
    systems = [[next(fresh) for _ in range(rng.randint(*SYSTEM_CHUNKS))] for _ in range(APPS)]
    requests: list[dict[str, Any]] = []
    start = rng.expovariate(sessions_per_second)
    while start < seconds:
        chunks, at = list(rng.choice(systems)), start
        while at < seconds and len(chunks) < LONGEST:
            # What is new in a turn: a document now and then, a few words often.
            chunks += [next(fresh) for _ in range(max(1, round(rng.lognormvariate(0.5, 1.0))))]
            rest = rng.randrange(
                1, CHUNK + 1
            )  # tokens of the last chunk, which the next turn completes
            requests.append(
                {
                    "timestamp": round(1e3 * at),
                    "input_length": (len(chunks) - 1) * CHUNK + rest,
                    "output_length": max(8, round(rng.lognormvariate(5.0, 0.8))),
                    "hash_ids": list(chunks[:LONGEST]),
                }
            )
            if rng.random() < 1 / TURNS:
                break
            at += rng.expovariate(1 / THINKING)
        start += rng.expovariate(sessions_per_second)
    for request in requests:
        request["input_length"] = min(request["input_length"], CHUNK * len(request["hash_ids"]))
    return sorted(requests, key=lambda request: int(request["timestamp"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--sessions-per-second", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = make_trace(args.seconds, args.sessions_per_second, args.seed)
    args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
