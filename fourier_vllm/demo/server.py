"""Start `vllm serve` on a free loopback port, wait for it, and end it whatever happens."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

LOG_TAIL = 30  # lines shown when the server fails
FIRST_ERROR = re.compile(
    r"(?:^|\] )(\w*Error: .+)", re.MULTILINE
)  # the cause; others follow from it
STOP_SECONDS = 10.0
POLL_SECONDS = 0.5

# a local model needs no network, and nobody should wait for a host that does not answer
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class ServerError(ValueError):
    """The server did not come up; the message says what to do."""


class Server:
    """A `vllm serve` process group, used as a context manager.

    Parameters
    ----------
    model
        Model folder.
    arguments
        Further arguments of `vllm serve`.
    log
        File that takes the server's output.
    timeout
        Seconds until /health must answer.

    Examples
    --------
    >>> with Server(folder, ["--max-model-len", "8192"], Path("vllm.log")) as server:
    ...     requests.get(server.url + "/v1/models")
    """

    def __init__(
        self, model: Path, arguments: Sequence[str], log: Path, timeout: float = 600
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.timeout = timeout
        self.command = [vllm_command(), "serve", str(model), "--host", "127.0.0.1"]
        self.command += ["--port", str(self.port), *arguments]

    def __enter__(self) -> Server:
        # the default of these signals would end Python without ending the server
        self._handlers = {
            number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **QUIET},
                start_new_session=True,  # one group to signal; Ctrl-C reaches only us
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the whole process group: politely, then for certain."""
        try:
            _signal_group(self.process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        finally:
            _signal_group(self.process.pid, signal.SIGKILL)  # also what the leader left behind
            self.process.wait()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _wait_until_ready(self) -> None:
        import requests
        from tqdm import tqdm

        session = requests.Session()
        session.trust_env = False  # no proxy between us and loopback
        start = time.monotonic()
        print(f"starting vLLM on {self.url} (log: {self.log})", file=sys.stderr)
        with tqdm(bar_format="waiting {elapsed}", leave=False, disable=None) as clock:
            while time.monotonic() - start < self.timeout:
                clock.update(0)
                clock.refresh()
                if self.process.poll() is not None:
                    raise self._failure(f"ended with exit code {self.process.returncode}")
                try:
                    if session.get(f"{self.url}/health", timeout=POLL_SECONDS).ok:
                        break
                except requests.RequestException:
                    time.sleep(POLL_SECONDS)
            else:
                raise self._failure(f"was not ready after {self.timeout:.0f} s (--timeout)")
        print(f"ready after {time.monotonic() - start:.0f} s", file=sys.stderr)

    def _failure(self, what: str) -> ServerError:
        text = self.log.read_text(errors="replace")
        print(*text.splitlines()[-LOG_TAIL:], sep="\n", file=sys.stderr)
        cause = FIRST_ERROR.search(text)
        reason = f" ({cause[1]})" if cause else ""
        return ServerError(f"vLLM {what}{reason}: its last lines are above, all in {self.log}.")


def vllm_command() -> str:
    """The `vllm` script of this environment."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise ServerError("there is no `vllm` command here: install it with ./run install.")
    return found


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
