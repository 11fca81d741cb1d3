"""Server: no process is left behind, and a failure shows why."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from fourier_vllm.demo import server as module
from fourier_vllm.demo.server import Server, ServerError

# answers /health on the port after "--port"; leaves a child that ignores SIGTERM
HEALTHY = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print("child", child.pid, flush=True)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the `vllm` script; the test writes it."""
    path = tmp_path / "vllm"
    monkeypatch.setattr(module, "vllm_command", lambda: str(path))
    return path


def write(command: Path, code: str) -> None:
    command.write_text(f"#!{sys.executable}\n{code}")
    command.chmod(0o755)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not reaped yet does not count."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_ready_and_gone(command: Path, tmp_path: Path) -> None:
    write(command, HEALTHY)
    log = tmp_path / "log"
    with Server(tmp_path, [], log, timeout=30) as server:
        child = int(log.read_text().split()[1])
        assert alive(child)
    assert server.process.returncode is not None
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_failure_shows_the_log(
    command: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(command, "print('[core.py:1] ValueError: no such model', 'no more', sep='\\n'); exit(3)")
    with (
        pytest.raises(
            ServerError,
            match=r"ended with exit code 3 \(ValueError: no such model\): its last lines",
        ),
        Server(tmp_path, [], tmp_path / "log", timeout=30),
    ):
        pass
    assert "no more" in capsys.readouterr().err


def test_timeout(command: Path, tmp_path: Path) -> None:
    write(command, "import time; time.sleep(600)")
    with (
        pytest.raises(ServerError, match=r"was not ready after 1 s \(--timeout\)"),
        Server(tmp_path, [], tmp_path / "log", timeout=1),
    ):
        pass


def test_no_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    with pytest.raises(ServerError, match=r"install it with \./run install"):
        module.vllm_command()
