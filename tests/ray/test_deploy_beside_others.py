"""`fourier-vllm deploy` on a cluster where Serve runs something else: that goes on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fourier_vllm.demo.server import free_port

# Runs in a process of its own; arguments: port, another port, result file. Applications without an
# engine take the place of ours: what is tested is what happens to the others.
SCRIPT = """
import json, os, signal, sys, threading, time, urllib.request

import ray
from ray import serve

from fourier_vllm.distributed import deploy

port, elsewhere, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options=serve.HTTPOptions(host="127.0.0.1", port=port))


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Says:
    def __init__(self, text, seconds=0):
        time.sleep(seconds)
        if text is None:
            raise ValueError("no such model")
        self.text = text

    def __call__(self, request):
        return self.text


def ask(path):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20).read().decode()
    except OSError:
        return None


def interrupt_when(condition, *numbers):
    def watch():
        while not condition():
            time.sleep(0.1)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    threading.Thread(target=watch, daemon=True).start()


def run(application, port=port):
    deploy._application = lambda *_: application
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        end = f"code {deploy.run(deploy.Options(model='m', port=port))}"
    except ValueError as error:
        end = str(error)
    except KeyboardInterrupt:
        end = "interrupted"
    return {"end": end, "applications": sorted(serve.status().applications), "old": ask(old)}


paused, pause = threading.Event(), signal.pause
signal.pause = lambda: (paused.set(), pause())


def starts():
    return any(name.startswith("fourier-") for name in serve.status().applications)


results = {}
old = "/old"
serve.run(Says.bind("old"), name="fourier", route_prefix="/old")
results["fails"] = run(Says.options(max_constructor_retry_count=1).bind(None))
interrupt_when(starts, signal.SIGINT)
results["interrupted"] = run(Says.bind("new", 600))
interrupt_when(paused.is_set, signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
results["ends"] = run(Says.bind("new"))
results["port"] = run(Says.bind("new"), elsewhere)
old = "/"
serve.run(Says.bind("old"), name="fourier")
results["second"] = run(Says.bind("new"))
json.dump(results, open(out, "w"))
serve.shutdown()
"""


@pytest.fixture(scope="module")
def results(root, environment, tmp_path_factory):
    folder, ports = tmp_path_factory.mktemp("beside"), (free_port(), free_port())
    script, out = folder / "script.py", folder / "out.json"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script), *map(str, ports), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(out.read_text()) | {"ports": ports}


@pytest.mark.parametrize("case", ["fails", "interrupted", "ends", "port", "second"])
def test_what_others_serve_goes_on(results, case):
    assert results[case]["applications"] == ["fourier"]
    assert results[case]["old"] == "old"


def test_how_it_ends(results):
    ends = {case: results[case]["end"] for case in results if case != "ports"}
    assert ends["fails"] == "the replicas did not start: no such model"
    assert ends["interrupted"] == "interrupted"
    assert ends["ends"] == "code 0"
    here, elsewhere = results["ports"]
    assert f"listens at 127.0.0.1:{here} already" in ends["port"]
    assert f"--port {here}" in ends["port"]
    assert str(elsewhere) not in ends["port"]
    assert 'being used by application "fourier"' in ends["second"]
    assert "end that deploy first" in ends["second"]
