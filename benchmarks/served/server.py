"""Starts, kills and looks at a server: ``vllm serve`` of the shipped model, or one that runs already."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from flux_attention.names import BACKBONE
from flux_attention.serving.settings import KEY, VARIABLE

#: Seconds that a server has to start.
START = 600


class Server:
    """
    Serves somewhere else; ``Served`` is one that is started and stopped here.

    Parameters
    ----------
    url : str
        Without a path.
    process : int, optional
        The server's process, whose memory is looked at.
    """

    def __init__(self, url: str, process: int | None = None):
        self.url, self.process = url.rstrip("/"), process

    def metrics(self) -> dict[str, float]:
        """Read the sums of ``/metrics`` over their labels."""
        found: dict[str, float] = defaultdict(float)
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            for line in response.read().decode().splitlines():
                if match := re.match(r"([\w:]+)(?:{.*})? (\S+)$", line):
                    found[match[1]] += float(match[2])
        return found

    def version(self) -> str | None:
        """Read vLLM's version; None if the server is gone."""
        try:
            with urllib.request.urlopen(f"{self.url}/version", timeout=30) as response:
                return json.load(response)["version"]
        except OSError:
            return None

    def alive(self) -> bool:
        """Whether it says that it is well: its engine may have died before it."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=30):
                return True
        except OSError:
            return False

    def memory(self) -> int | None:
        """Count the bytes of its own that the server's processes hold; None if it is not known which they are."""
        if self.process is None:
            return None
        found = [_resident(process) for process in _tree(self.process)]
        return None if None in found else sum(found)


class Served(Server):
    """
    Runs ``vllm serve`` with routes.

    Parameters
    ----------
    folder : path
        For its log, and what it needs.
    settings : dict
        What ``--additional-config`` says of routing.
    options : sequence of str
        More arguments of ``vllm serve``.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], options: Sequence[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{port}")
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self.own = folder / "server.log", None
        self.command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(BACKBONE), *options]
        self.command += ["--served-model-name", "shipped", "--host", "127.0.0.1", "--port", str(port)]
        self.command += ["--additional-config", json.dumps({KEY: settings})]
        self.environment = {
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "PYTHONFAULTHANDLER": "1",
            # What oneDNN keeps for each number of tokens, up to 1,024 of them by default, looks like a leak.
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
            **{name: value for name, value in os.environ.items() if name != VARIABLE},
        }  # fmt: skip
        if not entry_points(group="vllm.general_plugins", name=KEY):
            paths = [str(_make_known(folder)), *filter(None, [os.environ.get("PYTHONPATH")])]
            self.environment["PYTHONPATH"] = os.pathsep.join(paths)

    def start(self) -> float:
        """
        Start it, and wait until it answers.

        Returns
        -------
        float
            Seconds.

        Raises
        ------
        RuntimeError
            If it ends, or takes too long.
        """
        began = time.monotonic()
        with self.log.open("a") as log:
            self.own = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.process = self.own.pid
        while True:
            if self.alive():
                return time.monotonic() - began
            if self.own.poll() is not None or time.monotonic() > began + START:
                lines = self.log.read_text(errors="replace").splitlines()
                errors = [line for line in lines if "Error" in line][-12:]
                raise RuntimeError("\n".join(["the server does not start:", *errors, *lines[-12:]]))
            time.sleep(0.5)

    def kill(self) -> None:
        """Kill all its processes by SIGKILL."""
        if self.own is not None:
            os.killpg(self.own.pid, signal.SIGKILL)
            self.own.wait()

    def stop(self) -> int | None:
        """Stop it as one would by hand, and return its exit status; None if it had to be killed."""
        if self.own is None or self.own.poll() is not None:
            return None if self.own is None else self.own.returncode
        self.own.terminate()
        try:
            status = self.own.wait(60)
        except subprocess.TimeoutExpired:
            status = None
        try:
            os.killpg(self.own.pid, signal.SIGKILL)
            self.own.wait()
        except ProcessLookupError:
            pass
        return status


def _make_known(folder: Path) -> Path:
    """Write the entry point of a checkout that is not installed, for vLLM to find the plugin by."""
    made = folder / "plugin" / "flux_attention_checkout-0.dist-info"
    made.mkdir(parents=True, exist_ok=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: flux-attention-checkout\nVersion: 0\n")
    (made / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{KEY} = flux_attention.serving.plugin:register\n")
    return made.parent


def _tree(process: int) -> list[int]:
    """List a process and all that it started."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children[int(fields[1])].append(int(stat.parent.name))
    found = [process]
    for one in found:
        found += children[one]
    return found


def _resident(process: int) -> int | None:
    """
    Count the bytes of a process in memory that no file holds; what it shares with others counts in part.

    Libraries are left out: a process's part of them grows when another program that uses them ends. None where the
    kernel does not tell them apart (before Linux 5.4).
    """
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", text, re.M)
    return 1024 * sum(map(int, found)) if found else None
