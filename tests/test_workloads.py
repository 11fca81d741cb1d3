"""Traffic of benchmarks/workloads: who comes when, what follows, and traces that repeat themselves."""

from __future__ import annotations

from types import SimpleNamespace

from benchmarks.workloads.drive import drive, percentiles, summary
from benchmarks.workloads.trace import CHUNK, make_trace
from benchmarks.workloads.traffic import SMALL, Request, Traffic, agents, arrivals, bursts


class Engine:
    """Answers every request with one token a step, the number of the step."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.prompts: dict[str, list[int]] = {}
        self.most = self.steps = 0

    def add_request(self, name, prompt, params):
        self.left[name] = params.max_tokens
        self.prompts[name] = prompt["prompt_token_ids"]
        self.most = max(self.most, len(self.left))

    def step(self):
        self.steps += 1
        outputs = []
        for name in list(self.left):
            self.left[name] -= 1
            finished = not self.left[name]
            if finished:
                del self.left[name]
            answer = [SimpleNamespace(token_ids=[self.steps])]
            outputs.append(SimpleNamespace(request_id=name, outputs=answer, finished=finished))
        return outputs


def test_agents_come_back_with_their_answers():
    engine = Engine()
    seconds, done = drive(SimpleNamespace(llm_engine=engine), agents(SMALL, seed=1))
    assert len(done) == SMALL.agents * SMALL.turns
    assert engine.most == SMALL.agents_at_once
    first = {x.request.name: x for x in done}["agent-2-0"]
    start = first.request.ids + first.answer
    later = engine.prompts["agent-2-1"]
    assert later[: len(start)] == start
    assert len(later) == len(start) + SMALL.added
    row = summary(seconds, done)
    assert row["requests"] == len(done)
    assert row["ttft_later_ms"] is not None
    assert all(len(x.answer) == SMALL.reply and len(x.gaps) == SMALL.reply - 1 for x in done)


def test_nobody_comes_early():
    at = [0.0, 0.03, 0.06]
    traffic = Traffic([Request(str(i), [1], 1, x) for i, x in enumerate(at)])
    seconds, done = drive(SimpleNamespace(llm_engine=Engine()), traffic)
    assert seconds >= at[-1]
    assert [x.came for x in done] == at
    assert all(x.first is not None and x.first >= 0 for x in done)


def test_all_engines_get_the_same():
    assert arrivals(SMALL, 3, 2.0).requests == arrivals(SMALL, 3, 2.0).requests
    slow, fast = arrivals(SMALL, 3, 1.0).requests, arrivals(SMALL, 3, 10.0).requests
    assert [x.ids for x in slow] == [x.ids for x in arrivals(SMALL, 3, None).requests]
    assert slow[-1].at > fast[-1].at > 0
    assert len({x.at for x in bursts(SMALL, 0).requests}) == 4


def test_a_trace_repeats_prefixes():
    trace = make_trace(60, 1.0, seed=2)
    assert trace == make_trace(60, 1.0, seed=2)
    assert [x["timestamp"] for x in trace] == sorted(x["timestamp"] for x in trace)
    known: set[tuple[int, ...]] = set()
    repeated = total = 0
    for x in trace:
        assert -(-x["input_length"] // CHUNK) == len(x["hash_ids"])
        for end in range(1, len(x["hash_ids"]) + 1):
            prefix = tuple(x["hash_ids"][:end])
            repeated, total = repeated + (prefix in known), total + 1
            known.add(prefix)
    assert 0.4 < repeated / total < 0.95


def test_percentiles():
    assert percentiles([]) is None
    assert percentiles([0.001 * x for x in range(1, 101)]) == [50.5, 100.0]
