"""A real sshd on loopback with a Python 3.10 without torch is the board; connections are really cut."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from crqat.core import typed_json
from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import quiet
from crqat.core.results.benchmark import Results, Settings
from crqat.core.results.device import Device
from crqat.runtime_eval.benchmark import benchmark
from crqat.runtime_eval.board import job, ssh
from crqat.runtime_eval.board.bundle import Bundle, describe
from crqat.runtime_eval.board.ssh import Board, Disconnected, clean, measure
from tests.needs import missing, require
from tests.runtime_eval.conftest import QUICK, Digits, export_writer, pythons

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
HEAVY = ("torch", "onnx", "nncf", "pydantic", "click")


@dataclass
class Server:
    """An sshd of this user's own; whoever logs in finds `home` as the home directory."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    home: Path = field(init=False)
    ssh_config: Path = field(init=False)

    def __post_init__(self) -> None:
        self.home, self.ssh_config = self.folder / "home", self.folder / "ssh_config"
        self.home.mkdir()
        for name in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        host_key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}")
        self._write(
            "sshd_config",
            {
                "Port": self.port,
                "ListenAddress": "127.0.0.1",
                "HostKey": self.folder / "host_key",
                "AuthorizedKeysFile": self.folder / "authorized_keys",
                "PidFile": "none",
                "StrictModes": "no",
                "UsePAM": "no",
                "PermitRootLogin": "prohibit-password",
                "PasswordAuthentication": "no",
                "SetEnv": f"HOME={self.home}",
            },
        )
        self._write(
            "ssh_config",
            {
                "Host": "orin",
                "HostName": "127.0.0.1",
                "Port": self.port,
                "User": getpass.getuser(),
                "IdentityFile": self.folder / "user_key",
                "IdentitiesOnly": "yes",
                "IdentityAgent": "none",
                "UserKnownHostsFile": self.folder / "known_hosts",
                "GlobalKnownHostsFile": "none",
            },
        )

    def _write(self, name: str, options: dict[str, Any]) -> None:
        (self.folder / name).write_text("".join(f"{key} {value}\n" for key, value in options.items()))

    def start(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        log = self.folder / "sshd.log"
        self.process = subprocess.Popen([SSHD, "-D", "-f", self.folder / "sshd_config", "-E", log])
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        pytest.fail(f"sshd does not listen: {log.read_text()}")

    def cut(self) -> int:
        """End every connection, and give their number of processes."""
        assert self.process is not None
        found = [self.process.pid]
        for pid in found:  # grows as it goes
            found += [child for child, (parent, name) in processes().items() if parent == pid and name[:4] == "sshd"]
        found.remove(self.process.pid)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return len(found)

    def stop(self) -> None:
        if self.process is not None:
            self.cut()
            self.process.kill()
            self.process.wait()
            self.process = None

    def jobs(self) -> list[Path]:
        return sorted((self.home / job.JOBS).glob("*"))


def processes() -> dict[int, tuple[int, str]]:
    """Process id to its parent's and its name."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = path.read_text().rpartition(")")
        except OSError:
            continue
        found[int(path.parent.name)] = (int(tail.split()[1]), head.partition("(")[2])
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    require("sshd")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Server(tmp_path_factory.mktemp("sshd"), port)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def orin(server: Server, board: Path) -> Board:
    """The board, reached by an alias of the user's ssh configuration."""
    return Board.parse("ssh://orin", str(board), server.ssh_config)


Contents = tuple[Bundle, dict[str, Path]]


@pytest.fixture(scope="module")
def export(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_writer(digits, tmp_path_factory.mktemp("export"))()


@pytest.fixture
def contents(export: Path) -> Contents:
    return describe(export, asdict(QUICK), "1")


@dataclass
class Heard:
    """A `Progress` that remembers, and wakes who waits for a task."""

    told: list[tuple[str, int, int, str]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        with self.changed:
            self.told.append((task, done, total, note))
            self.changed.notify_all()

    def tasks(self) -> set[str]:
        return {task for task, _, _, _ in self.told}

    def wait_for(self, task: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: task in self.tasks(), timeout=40), self.told


class Call(threading.Thread):
    """`measure` in a thread of its own: what it returned or raised."""

    def __init__(self, board: Board, contents: Contents, anew: bool = False) -> None:
        super().__init__(daemon=True)
        self.heard = Heard()
        self.results: Any = None  # `Results`, of which a test knows what is there
        self.error = ""
        self._arguments = (board, *contents, anew, self.heard)
        self.start()

    def run(self) -> None:
        try:
            self.results = measure(*self._arguments)
        except ToolError as error:
            self.error = str(error)

    def wait(self) -> None:
        self.join(timeout=60)
        assert not self.is_alive()


def test_the_board_has_no_torch(server: Server, orin: Board) -> None:
    program = "import sys, importlib.util as u; print(sys.version[:4], [m for m in sys.argv[1:] if u.find_spec(m)])"
    command = orin.command(orin.python, "-c", program, *HEAVY, "numpy")
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=30)
    assert result.stdout == "3.10 ['numpy']\n"


@pytest.mark.slow
def test_work_goes_on_through_cut_connections_and_gives_the_local_accuracy(
    server: Server, orin: Board, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = describe(export, asdict(replace(QUICK, latency_seconds=3.0)), "1")  # long enough to be looked at
    monkeypatch.setattr(ssh, "RETRIES", (0.1, 0.1))
    first = Call(orin, contents)
    first.heard.wait_for("orin: latency")
    (folder,) = server.jobs()
    process = json.loads((folder / "process.json").read_text())

    # Cut once: the same call connects again.
    assert server.cut() > 0
    first.heard.wait_for("reconnect")
    seen = len(first.heard.told)
    deadline = time.monotonic() + 20
    while not any(task == "orin: latency" for task, *_ in first.heard.told[seen:]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert any(task == "orin: latency" for task, *_ in first.heard.told[seen:])

    # Cut for good: the call gives up, the work does not.
    server.stop()
    first.wait()
    assert re.fullmatch(r"ssh://orin: .*(Connection refused|closed).*; work that was started there .*: .*", first.error)
    assert "\n" not in first.error
    assert job.state(folder).state == "running"
    server.start()
    second = Call(orin, contents)
    second.wait()
    assert second.error == ""
    assert json.loads((folder / "process.json").read_text()) == process
    assert ("orin: job", 1, 1, "runs already and is picked up") in second.heard.told
    local = benchmark(export, QUICK, quiet)
    assert second.results.bundle == contents[0].sha256
    assert second.results.device.python.startswith("3.10.")
    for name, model in local.models.items():
        assert second.results.models[name].accuracy == model.accuracy
        assert second.results.models[name].codes_on_this_cpu == model.codes_on_this_cpu
    assert second.results.models["onnxruntime.onnx"].codes_on_this_cpu.status == "passed"
    latency = second.results.models["float.onnx"].latency
    assert (latency.status, latency.rounds) == ("measured", QUICK.latency_rounds)

    # A job that is finished is only fetched; cleaned, nothing is left.
    monkeypatch.setattr(ssh._Link, "upload", lambda *arguments: pytest.fail("copied again"))
    third = Call(orin, contents)
    third.wait()
    assert (third.error, third.results) == ("", second.results)
    assert ("orin: job", 1, 1, "was finished before") in third.heard.told
    assert json.loads((folder / "process.json").read_text()) == process
    clean(orin, contents[0], quiet)
    assert server.jobs() == []


@pytest.mark.slow
def test_a_job_that_dies_is_told_and_the_next_call_starts_anew(server: Server, orin: Board, contents: Contents) -> None:
    call = Call(orin, contents)
    call.heard.wait_for("orin: accuracy of float.onnx")
    (folder,) = server.jobs()
    recorded = json.loads((folder / "process.json").read_text())
    os.killpg(recorded["pid"], signal.SIGKILL)
    call.wait()
    assert call.error.startswith("ssh://orin: the benchmark there failed (its process is gone); last output: ")
    assert server.jobs() == []

    # One that died while nobody looked.
    folder.mkdir()
    (folder / "process.json").write_text(json.dumps({**recorded, "boot": "another"}))
    assert job.state(folder).reason == "the board was restarted"
    call = Call(orin, contents)
    call.heard.wait_for("orin: accuracy of float.onnx")
    assert ("orin: job", 1, 1, "again, because the previous job was lost: the board was restarted") in call.heard.told

    # Cleaning ends what runs.
    recorded = json.loads((folder / "process.json").read_text())
    clean(orin, contents[0], quiet)
    call.wait()
    assert call.error
    assert job._started(recorded["pid"]) != recorded["started"]
    assert server.jobs() == []


def test_work_that_fails_there_says_why(server: Server, orin: Board, contents: Contents) -> None:
    bundle, paths = contents
    broken = replace(bundle, benchmark={"nonsense": 1})
    call = Call(orin, (broken, paths))
    call.wait()
    assert re.fullmatch(
        r"ssh://orin: the benchmark there failed \(exit code 2\); last output: runtime_eval: .*nonsense.*", call.error
    )
    assert server.jobs() == []


def test_an_interrupted_copy_goes_on_and_a_damaged_one_is_noticed(
    server: Server, orin: Board, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, paths = contents
    link = ssh._Link(orin, bundle, quiet)
    sha256 = link.upload(bundle, paths)
    (folder,) = server.jobs()
    archive = folder / f"{sha256}.tar.gz"
    content = archive.read_bytes()
    archive.write_bytes(content[:1000])
    asked: list[tuple[str, ...]] = []
    ask = ssh._Link.ask

    def spy(self: Any, command: str, *arguments: str, **rest: Any) -> Any:
        asked.append((command, *arguments))
        return ask(self, command, *arguments, **rest)

    monkeypatch.setattr(ssh._Link, "ask", spy)
    link.upload(bundle, paths)
    assert asked == [("received", sha256), ("receive", sha256, "1000")]
    assert archive.read_bytes() == content
    link.upload(bundle, paths)
    assert asked[2:] == [("received", sha256)]
    archive.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(ToolError, match="ssh://orin: the bundle was damaged in transfer"):
        link.ask("start", sha256)
    assert not archive.exists()
    clean(orin, bundle, quiet)


def test_results_of_another_bundle_are_refused(
    server: Server, orin: Board, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Results("run", {}, Settings(1), Device("a CPU", None), bundle="0" * 64)
    texts = {
        typed_json.text(other): "of another bundle",
        "[]": "are damaged",
        '{"run": "run1"}': r"are damaged \(models is missing\)",
        "{": "are damaged",
        '{"bundle": NaN}': "are damaged",
    }
    answers: dict[str, Any] = {"state": {"state": "finished", "code": 0, "missing": []}}
    answers["follow"] = answers["state"]
    monkeypatch.setattr(ssh._Link, "ask", lambda self, command, *arguments, **rest: answers[command])
    for text, message in texts.items():
        answers["fetch"] = text
        with pytest.raises(ToolError, match=message):
            measure(orin, *contents, False, quiet)


def test_a_board_that_cannot_be_reached_is_one_line(server: Server, contents: Contents) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(Disconnected) as caught:
        measure(Board.parse(f"ssh://127.0.0.1:{port}", ssh_config=server.ssh_config), *contents, False, quiet)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert re.fullmatch(rf"ssh://127\.0\.0\.1:{port}: ssh: connect to host .* Connection refused", str(caught.value))


def test_another_host_key_is_refused(server: Server, orin: Board, contents: Contents, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    known, config = tmp_path / "known_hosts", tmp_path / "config"
    config.write_text(server.ssh_config.read_text().replace(str(server.folder / "known_hosts"), str(known)))
    for text in ("", f"[127.0.0.1]:{server.port} {(tmp_path / 'key.pub').read_text()}"):
        known.write_text(text)
        with pytest.raises(Disconnected, match=r"Host key verification failed.*connect once by hand"):
            measure(replace(orin, ssh_config=config), *contents, False, quiet)
        assert known.read_text() == text


def test_a_python_that_will_not_do_is_one_line(server: Server, orin: Board, contents: Contents, tmp_path: Path) -> None:
    subprocess.run([orin.python, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with pytest.raises(ToolError, match=r"ssh://orin: .*/python there has no numpy and no onnxruntime; install"):
        measure(replace(orin, python=str(tmp_path / "bare/bin/python")), *contents, False, quiet)
    with pytest.raises(ToolError, match=r"ssh://orin: .*No such file.*; name the Python there with --python"):
        measure(replace(orin, python=str(tmp_path / "none")), *contents, False, quiet)
    old = pythons("3.8")
    if old is None:
        missing("python3.8")
    with pytest.raises(ToolError, match=r"ssh://orin: the Python there is 3\.8; 3\.10 or newer is needed"):
        measure(replace(orin, python=old), *contents, False, quiet)


def test_silence_is_a_lost_connection(
    server: Server, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "SILENCE_SECONDS", 0.3)
    (tmp_path / "ssh").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    start = time.monotonic()
    with pytest.raises(Disconnected, match="no response"):
        measure(Board.parse("ssh://orin"), *contents, False, quiet)
    assert time.monotonic() - start < 10


def test_what_became_of_a_job(tmp_path: Path) -> None:
    assert job.state(tmp_path / "none").state == "absent"
    with subprocess.Popen(["sleep", "60"]) as process:
        mine = {"pid": process.pid, "started": job._started(process.pid), "boot": job._boot()}
        (tmp_path / "process.json").write_text(json.dumps(mine))
        assert job.state(tmp_path).state == "running"
        # Another process got the number since.
        (tmp_path / "process.json").write_text(json.dumps({**mine, "started": "1"}))
        assert job.state(tmp_path).reason == "its process is gone"
        (tmp_path / "process.json").write_text(json.dumps({**mine, "boot": "another"}))
        assert job.state(tmp_path).reason == "the board was restarted"
        process.kill()
    for started in (mine["started"], None):
        (tmp_path / "process.json").write_text(json.dumps({**mine, "started": started}))
        assert job.state(tmp_path).state == "dead"
    (tmp_path / "code").write_text("0\n")
    assert (job.state(tmp_path).state, job.state(tmp_path).code) == ("finished", 0)


@pytest.mark.parametrize(
    "address",
    [
        "orin",
        "http://orin",
        "ssh://",
        "ssh://-oProxyCommand=id",
        "ssh://-oProxyCommand=id@orin",
        "ssh://user:password@orin",
        "ssh://orin:0",
        "ssh://orin:99999",
        "ssh://orin/path",
        "ssh://orin;id",
        "ssh://or in",
        "ssh://orin\n",
    ],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UsageError, match="write it as ssh://"):
        Board.parse(address)


@pytest.mark.parametrize(
    ("address", "name", "words"),
    [
        ("ssh://orin", "orin", ["--", "orin", "true"]),
        ("ssh://me@Orin.local:2222/", "Orin.local_2222", ["-p", "2222", "-l", "me", "--", "Orin.local", "true"]),
        ("ssh://[fe80::1]:22", "fe80__1_22", ["-p", "22", "--", "fe80::1", "true"]),
    ],
)
def test_addresses_and_commands(address: str, name: str, words: list[str]) -> None:
    board = Board.parse(address)
    assert board.name == name
    assert board.address == address.rstrip("/")
    command = board.command("true")
    assert command[: len(command) - len(words)][-1].startswith("RemoteCommand=")
    assert command[-len(words) :] == words
    assert "BatchMode=yes" in command
    assert not [word for word in command if "StrictHostKeyChecking" in word]


def test_options_that_are_wrong(tmp_path: Path) -> None:
    checks: list[tuple[Callable[[], Board], str]] = [
        (lambda: Board.parse("ssh://orin", ssh_config=tmp_path / "none"), "--ssh-config .*no such file"),
        (lambda: Board.parse("ssh://orin", python="-c"), "--python -c"),
    ]
    for call, message in checks:
        with pytest.raises(UsageError, match=message):
            call()
    command = Board.parse("ssh://orin").command("python $(id)", "a b", "c'd")
    assert subprocess.run(["sh", "-c", f"printf '%s|' {command[-1]}"], capture_output=True, check=True).stdout == (
        b"python $(id)|a b|c'd|"
    )
