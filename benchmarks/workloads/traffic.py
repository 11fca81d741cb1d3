"""Requests of each workload: what they ask, when they come, and what follows their answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

WORDS = range(1000, 30000)  # token ids that every vocabulary here has


class Request(NamedTuple):
    """One request.

    Attributes
    ----------
    name : str
        Unique in its traffic.
    ids : list of int
        The prompt.
    new : int
        Tokens of the answer.
    at : float
        Seconds after the start at which it comes, if the traffic has a clock.
    turn : int
        Of its conversation, 0 first.
    """

    name: str
    ids: list[int]
    new: int
    at: float = 0.0
    turn: int = 0


@dataclass
class Traffic:
    """Requests of one workload.

    Attributes
    ----------
    requests : list of Request
        In the order in which they come.
    at_once : int or None
        Requests that are under way, at most; None: as many as come.
    follow : callable
        Gets a request and its answer's tokens; returns the next request of that conversation, or None.
    """

    requests: list[Request]
    at_once: int | None = None
    follow: Callable[[Request, list[int]], Request | None] = field(default=lambda *_: None)


class Sizes(NamedTuple):
    """Of all workloads; `SMALL` is for a try on a CPU."""

    answers: int
    prompt: tuple[int, int]  # shortest, longest
    answer: int
    agents: int
    turns: int
    context: int
    added: int
    reply: int
    agents_at_once: int
    arrivals: int
    decoding: int
    mixed: tuple[int, ...]  # contexts


LARGE = Sizes(128, (4000, 8000), 1000, 64, 4, 16000, 512, 128, 16, 192, 16, (1024, 8192, 32000))
SMALL = Sizes(6, (300, 700), 40, 4, 2, 800, 64, 8, 2, 8, 3, (256, 512))


def tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(WORDS, k=count)


def answers(sizes: Sizes, seed: int) -> Traffic:
    """Prompts of different lengths with long answers, all at once."""
    rng = random.Random(f"answers {seed}")
    return Traffic(
        [
            Request(f"answer-{i}", tokens(rng, rng.randrange(*sizes.prompt)), sizes.answer)
            for i in range(sizes.answers)
        ]
    )


def agents(sizes: Sizes, seed: int) -> Traffic:
    """Conversations over a long context; a turn comes back with the answer and something new."""
    rng = random.Random(f"agents {seed}")

    def follow(request: Request, answer: list[int]) -> Request | None:
        turn = request.turn + 1
        if turn == sizes.turns:
            return None
        ids = request.ids + answer + tokens(rng, sizes.added)
        agent = request.name.rpartition("-")[0]
        return Request(f"{agent}-{turn}", ids, sizes.reply, turn=turn)

    first = [
        Request(f"agent-{i}-0", tokens(rng, sizes.context), sizes.reply)
        for i in range(sizes.agents)
    ]
    return Traffic(first, sizes.agents_at_once, follow)


def arrivals(sizes: Sizes, seed: int, rate: float | None) -> Traffic:
    """Prompts and answers of different lengths, at random times; all at once where `rate` is None.

    Parameters
    ----------
    rate : float or None
        Requests a second, a Poisson process.
    """
    rng, clock = random.Random(f"arrivals {seed}"), random.Random(f"clock {seed}")
    low, high = sizes.prompt
    requests, at = [], 0.0
    for i in range(sizes.arrivals):
        ids = tokens(rng, rng.randrange(low // 4, high))
        requests.append(Request(f"arrival-{i}", ids, rng.randrange(16, sizes.answer // 2), at))
        if rate is not None:
            at += clock.expovariate(rate)
    return Traffic(requests)


def bursts(sizes: Sizes, seed: int, seconds: float = 10.0) -> Traffic:
    """The same requests in four bursts, one every `seconds`."""
    requests = arrivals(sizes, seed, None).requests
    each = -(-len(requests) // 4)
    return Traffic(
        [x._replace(name=f"burst-{i}", at=i // each * seconds) for i, x in enumerate(requests)]
    )


def mixed(sizes: Sizes, seed: int, context: int) -> Traffic:
    """Some requests decode at a context while prompts of that length come one after another."""
    rng = random.Random(f"mixed {context} {seed}")
    decoding = [
        Request(f"decoding-{i}", tokens(rng, context), sizes.answer) for i in range(sizes.decoding)
    ]
    prompts = [Request(f"prompt-{i}", tokens(rng, context), 2) for i in range(2 * sizes.decoding)]
    return Traffic(decoding + prompts, sizes.decoding + 1)


def workloads(sizes: Sizes, names: list[str]) -> Iterator[tuple[str, Callable[[int], Traffic]]]:
    """Name and maker, from a seed, of each workload that needs no other's result."""
    of_name: dict[str, Callable[[int], Traffic]] = {
        "answers": lambda seed: answers(sizes, seed),
        "agents": lambda seed: agents(sizes, seed),
        "bursts": lambda seed: bursts(sizes, seed),
        "limit": lambda seed: arrivals(sizes, seed, None),
    }
    for context in sizes.mixed:
        of_name[f"mixed {context}"] = lambda seed, n=context: mixed(sizes, seed, n)  # type: ignore[misc]
    for name, make in of_name.items():
        if name.split()[0] in names:
            yield name, make
