"""The command line: exit codes, one line for an error, and nothing heavy before it is needed."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from crqat.core.errors import ToolError, UsageError
from crqat.core.results.benchmark import Int8Layers, Results
from crqat.core.results.export import ExportPayload
from crqat.core.results.verification import Verification
from crqat.core.run_directory import manifest_hash
from crqat.core.typed_json import from_json
from crqat.pipeline import cli, console
from crqat.pipeline.recipe import recipe

if TYPE_CHECKING:
    from tests.pipeline.conftest import Fakes

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "onnx", "nncf", "onnxruntime", "tensorrt", "tensorrt_rtx", "sklearn")


def crqat(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["crqat", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["--version"], 0),
        (["init", "new.yaml"], 0),
        (["check", "--syntax", str(ROOT / "recipes" / "digits.yaml")], 0),
        (["train", str(ROOT / "recipes" / "digits.yaml"), "--set", "qat.epoch=1"], 2),
        (["gate", str(ROOT / "recipes" / "digits.yaml")], 2),
    ],
)
def test_nothing_heavy_is_imported_without_need(tmp_path: Path, arguments: list[str], code: int) -> None:
    program = (
        "import sys\n"
        "from crqat.pipeline import cli\n"
        f"sys.argv = {['crqat', *arguments]!r}\n"
        "try:\n    cli.main()\n"
        f"finally:\n    print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == code, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train"], "Missing argument 'RECIPE'; see crqat train --help"),
        (["nonsense"], "No such command 'nonsense'; see crqat --help"),
        (["train", "r.yaml", "--nonsense"], "No such option '--nonsense'; see crqat train --help"),
        (["run", "--set"], "Option '--set' requires an argument; see crqat --help"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert crqat(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err == f"crqat: error: {line}\n"


def test_run_ends_with_table_and_verdict(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert crqat(monkeypatch, "run", "recipe.yaml") == 0
    assert fakes.calls == ["train", "export", "benchmark"]
    out = capsys.readouterr().out
    assert "A [fast] CPU" in out
    assert re.search(r"onnxruntime\.onnx.*95\.00.*0\.20 \[0\.10, 0\.30\].*99\.00.*0\.500 \[0\.480, 0\.520\]", out)
    assert "\ntensorrt.onnx: latency not run: no CUDA device\n" in out
    assert re.search(r"\npass +onnxruntime\.onnx  accuracy_drop: .*600.*allowed 1", out)
    assert "\nwarning: training made the network worse\n" in out
    assert out.endswith("\ngate: PASS\n")


def test_unsafe_says_what_is_broken(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    crqat(monkeypatch, "train", "recipe.yaml")
    crqat(monkeypatch, "export", "recipe.yaml")
    assert "breaks a rule" not in capsys.readouterr().out
    assert crqat(monkeypatch, "export", "recipe.yaml", "--unsafe") == 0
    assert "export/onnxruntime.onnx: breaks a rule: conv1: a rule; a fix\n" in capsys.readouterr().out


def test_bisect_looks_at_the_file_for_tensorrt(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        "crqat.pipeline.commands.inspect_engine.inspect",
        lambda path, options, bisect, out: seen.append((path.name, bisect)),
    )
    crqat(monkeypatch, "train", "recipe.yaml")
    assert crqat(monkeypatch, "export", "recipe.yaml", "--bisect") == 0
    assert seen == [("tensorrt.onnx", True)]


def test_an_engine_is_a_line_below_the_table(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = {
        "status": "built",
        "builder": {"name": "tensorrt_rtx", "version": "1.7"},
        "remarks": [],
        "coverage": {"by_macs": 1.0, "nodes": 20, "int8_nodes": 20},
        "uncovered": [],
        "counts": {"layers": 42, "pointwise": 21, "reformat": 0},
    }
    fakes.results["models"]["tensorrt.onnx"]["engine"] = engine
    assert crqat(monkeypatch, "run", "recipe.yaml") == 0
    line = "built by tensorrt_rtx 1.7: 100.00 % of the MACs in INT8, 42 layers, 21 pointwise, 0 reformat"
    out = capsys.readouterr().out
    assert f"\ntensorrt.onnx: engine {line}\n" in out
    assert "pass          tensorrt.onnx  int8_coverage: 100.00 % of the MACs" in out
    fakes.results["models"]["tensorrt.onnx"]["engine"] = {"status": "not run: no builder"}
    assert crqat(monkeypatch, "benchmark", "recipe.yaml", "--force") == 0
    assert "\ntensorrt.onnx: engine not run: no builder\n" in capsys.readouterr().out


def test_what_float_layers_cost_is_a_line_below_the_table(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"macs": {"conv1": 5, "layer1.conv1": 9, "layer1.conv2": 8, "fc": 1}, "share": 0.0291}
    fakes.results["models"]["tensorrt.onnx"]["float_layers"] = kept
    assert crqat(monkeypatch, "run", "recipe.yaml") == 0
    names = "layer1.conv1, layer1.conv2, conv1 and 1 more"
    line = f"tensorrt.onnx: kept in float by float_layers: {names}, 2.91 % of the MACs"
    assert line in capsys.readouterr().out.splitlines()


def test_steps_say_what_came_out(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert crqat(monkeypatch, "train", "recipe.yaml", "--runs", "elsewhere") == 0
    captured = capsys.readouterr()
    assert "best: teacher" in captured.out
    assert "  student: 89.00 %" in captured.out
    assert captured.out.endswith("\nwarning: training made the network worse\n")
    assert "train: 1/1  loss 0.1" in captured.err
    assert crqat(monkeypatch, "export", "recipe.yaml", "--runs", "elsewhere") == 0
    assert "elsewhere/run1/export/onnxruntime.onnx: passed" in capsys.readouterr().out
    assert crqat(monkeypatch, "benchmark", "recipe.yaml", "--runs", "elsewhere") == 0
    assert "written: elsewhere/run1/benchmark/results.json" in capsys.readouterr().out
    assert crqat(monkeypatch, "gate", "recipe.yaml", "--runs", "elsewhere") == 0
    assert not Path("runs").exists()


@pytest.mark.parametrize(("limit", "code", "verdict"), [(0.01, 1, "FAIL"), (0.2, 4, "INCONCLUSIVE"), (0.31, 0, "PASS")])
def test_verdict_is_the_exit_code_of_gate_and_run_but_not_of_benchmark(
    fakes: Fakes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: float,
    code: int,
    verdict: str,
) -> None:
    arguments = ["recipe.yaml", "--set", f"gate.max_accuracy_drop={limit}"]
    assert crqat(monkeypatch, "run", *arguments) == code
    assert crqat(monkeypatch, "benchmark", *arguments) == 0
    capsys.readouterr()
    assert crqat(monkeypatch, "gate", *arguments) == code
    assert capsys.readouterr().out.endswith(f"gate: {verdict}\n")


def measured_on(fakes: Fakes, path: str, p50: float, **changes: Any) -> None:
    """Results as those of the fake benchmark, of another time or device."""
    data = copy.deepcopy(fakes.results)
    data["device"] |= changes
    for model in data["models"].values():
        if model["latency"]["status"] == "measured":
            model["latency"] |= {"p50_ms": p50, "round_p50_ms": [p50] * 10}
    Path(path).write_text(json.dumps(data))


def test_gate_of_results_that_were_carried_here(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert crqat(monkeypatch, "run", "recipe.yaml") == 0
    how = json.loads(json.dumps(asdict(recipe.load(fakes.recipe, []).benchmark)))
    results = {**fakes.results, "parent": manifest_hash(Path("runs/run1/export")), "config": how}
    Path("orin.json").write_text(json.dumps(results))
    capsys.readouterr()
    assert crqat(monkeypatch, "gate", "recipe.yaml", "--results", "orin.json") == 0
    assert capsys.readouterr().out.endswith("\ngate: PASS\n")
    assert (Path("runs/run1/benchmark@orin") / "junit.xml").is_file()
    assert crqat(monkeypatch, "gate", "recipe.yaml", "--results", "none.json") == 2
    assert "none.json" in capsys.readouterr().err
    assert crqat(monkeypatch, "gate", "recipe.yaml", "--results", "orin.json", "--on", "ssh://orin") == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_gate_with_a_baseline(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_on(fakes, "same.json", 1.0)
    measured_on(fakes, "faster.json", 0.5)
    measured_on(fakes, "elsewhere.json", 0.5, cpu="Another CPU")
    fakes.results = json.loads(Path("same.json").read_text())
    arguments = ["recipe.yaml", "--set", "gate.max_latency_regression=1.1"]
    assert crqat(monkeypatch, "run", *arguments) == 0
    assert "latency_regression: not run: no --baseline was given" in capsys.readouterr().out
    assert crqat(monkeypatch, "gate", *arguments, "--baseline", "same.json") == 0
    junit = Path("runs/run1/benchmark/junit.xml")
    assert 'name="latency_regression"' in junit.read_text()
    assert crqat(monkeypatch, "gate", *arguments, "--baseline", "faster.json") == 1
    assert "latency_regression: 2.000 [2.000, 2.000] of the baseline over 10 rounds" in capsys.readouterr().out
    assert '<failure type="fail" message="2.000' in junit.read_text()
    assert crqat(monkeypatch, "gate", *arguments, "--baseline", "elsewhere.json") == 0
    assert "not run: the baseline has another device (Another CPU, here A [fast] CPU)" in capsys.readouterr().out
    assert crqat(monkeypatch, "gate", *arguments, "--baseline", "none.json") == 2
    capsys.readouterr()
    assert crqat(monkeypatch, "benchmark", "recipe.yaml") == 0
    assert crqat(monkeypatch, "gate", "recipe.yaml", "--baseline", "same.json") == 2
    assert "set gate.max_latency_regression" in capsys.readouterr().err


def test_gate_of_a_required_runtime_that_did_not_run_exits_3(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.results["config"]["require"] = ["tensorrt"]
    assert crqat(monkeypatch, "run", "recipe.yaml") == 3
    out = capsys.readouterr().out
    assert "error         tensorrt.onnx  required: not run: no CUDA device, and benchmark.require names tensorrt" in out


def test_what_an_engine_adds_is_shown(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fakes.results["models"]["tensorrt.onnx"]
    model["latency"] = {"status": "measured", "p50_ms": 0.6, "rounds": 10, "unstable": False}
    model["latency"] |= {"round_p50_ms": [0.6] * 10, "compute_p50_ms": 0.4}
    model |= {
        "accuracy_batch_1": {"n": 600, "top1": 0.94, "top1_interval": [0.92, 0.96]},
        "builds": [
            {"plan_sha256": "a", "round_p50_ms": [0.5, 9.0, 0.5]},
            {"plan_sha256": "b", "round_p50_ms": [0.7]},
        ],
    }
    assert crqat(monkeypatch, "run", "recipe.yaml") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tensorrt.onnx: 0.400 ms of the latency is the device's computation" in lines
    assert "tensorrt.onnx: 2 builds, p50 from 0.500 to 0.700 ms" in lines
    assert "tensorrt.onnx: top-1 at batch 1: 94.00 %" in lines


def test_layers_that_openvino_runs_in_float_are_named() -> None:
    from crqat.pipeline.report import tables as results
    from tests.pipeline.conftest import measured

    models = from_json(Results, measured(0.2, (0.1, 0.3))).models
    layers = Int8Layers(19, 20, ["fc"])
    fast = replace(models["onnxruntime.onnx"], target="openvino", int8_layers=layers)
    base = replace(models["float.onnx"], target="float_openvino", int8_layers=replace(layers, int8=0))
    assert list(results._lines({"a@openvino": fast, "b@openvino": base})) == [
        "a@openvino: 19 of 20 layers that multiply are INT8; in float: fc"
    ]


def test_devices_stand_side_by_side(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_on(fakes, "pc.json", 1.0, governor="performance")
    measured_on(fakes, "board.json", 2.0, jetson={"model": "Jetson Orin NX", "power_mode": "25W"})
    data = json.loads(Path("board.json").read_text())
    data["models"]["onnxruntime.onnx"]["latency"]["unstable"] = "clocks not locked (GPU 306 to 625 MHz)"
    data["models"]["other.onnx"] = {**data["models"]["float.onnx"], "target": "x", "status": "failed: killed"}
    Path("board.json").write_text(json.dumps(data))
    assert crqat(monkeypatch, "compare", "pc.json", "board.json") == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if re.search(r"\w\.onnx", line)]
    assert [re.findall(r"(\w+\.onnx)", line)[0] for line in found] == [
        *["float.onnx"] * 2,
        *["onnxruntime.onnx"] * 2,
        *["tensorrt.onnx"] * 2,
        "other.onnx",
    ]
    assert re.search(r"A \[fast\] CPU.*performance.*600.*95\.00.*0\.20 \[0\.10, 0\.30\].*1\.000.*stable", found[2])
    assert re.search(r"Jetson Orin NX.*25W.*2\.000.*unstable: clocks not locked \(GPU 306 to 625 MHz\)", found[3])
    assert "not run: no CUDA device" in found[4]
    assert "failed: killed" in found[6]
    assert lines[-1] == "2: board.json: run1, Jetson Orin NX"


@pytest.mark.parametrize(
    ("trouble", "code", "line"),
    [
        (UsageError("loss is NaN;\nlower qat.lr"), 2, "crqat: error: loss is NaN; lower qat.lr\n"),
        (ToolError("no compiler"), 3, "crqat: error: no compiler\n"),
        (KeyboardInterrupt(), 130, f"crqat: error: interrupted; {cli._KEPT}\n"),
    ],
)
def test_errors_are_one_line(
    fakes: Fakes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: BaseException,
    code: int,
    line: str,
) -> None:
    fakes.trouble["train"] = trouble
    assert crqat(monkeypatch, "run", "recipe.yaml") == code
    assert capsys.readouterr().err.lstrip("\n") == line
    assert [path.name for path in Path("runs/run1").iterdir()] == [".lock"]


def test_bundle_and_a_board_that_cannot_be_reached(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("train", "export"):
        assert crqat(monkeypatch, stage, "recipe.yaml") == 0
    capsys.readouterr()
    assert crqat(monkeypatch, "bundle", "runs/run1", "--out", "b.tar.gz") == 0
    printed = capsys.readouterr().out
    expected = r"wrote b\.tar\.gz, bundle [0-9a-f]{64}\nthe bundle contains the benchmark settings of .*: .*threads=1"
    assert re.match(expected, printed)
    assert "on the board:\n  tar xzf b" in printed
    assert crqat(monkeypatch, "bundle", "runs/none") == 2
    capsys.readouterr()
    # Port 1 of this machine: nobody listens there.
    assert crqat(monkeypatch, "benchmark", "recipe.yaml", "--on", "ssh://127.0.0.1:1") == 3
    assert re.fullmatch(r"crqat: error: ssh://127\.0\.0\.1:1: .*ssh.*\n", capsys.readouterr().err)
    assert fakes.calls == ["train", "export"]
    assert {path.name for path in Path("runs/run1").iterdir() if path.name[0] != "."} == {"train", "export"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark", "recipe.yaml", "--on", "orin"], "--on orin: write it as ssh://"),
        (["benchmark", "recipe.yaml", "--clean"], "apply only to a board; name it with --on"),
        (["benchmark", "recipe.yaml", "--python", "python3.12"], "apply only to a board; name it with --on"),
        (["gate", "recipe.yaml", "--on", "ssh://orin"], "benchmark@orin: no such stage yet"),
    ],
)
def test_wrong_use_of_boards(
    fakes: Fakes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert crqat(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_bug_is_one_line_and_its_traceback_a_file_of_the_run(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("crqat.pipeline.stages.staleness.inputs", None)
    assert crqat(monkeypatch, "run", "recipe.yaml") == 3
    line = capsys.readouterr().err
    assert re.fullmatch(
        r"crqat: error: internal error in train: TypeError: 'NoneType' object is not callable at "
        r"crqat/pipeline/stages/run\.py:"
        r"\d+; traceback in runs/run1/traceback\.txt; report it with that file under the repository's Issues\n",
        line,
    )
    account = Path("runs/run1/traceback.txt").read_text()
    assert "command: crqat run recipe.yaml\n" in account and "torch " in account
    assert account.endswith("\nTypeError: 'NoneType' object is not callable\n")


@pytest.mark.parametrize(
    ("trouble", "code", "words"),
    [
        (ZeroDivisionError("a bug"), 2, r"train: your code raised ZeroDivisionError: a bug at \S+conftest\.py:\d+; "),
        (SystemExit(0), 2, r"train: your code ended the process at \S+conftest\.py:\d+ by sys\.exit\(0\); let it "),
        (SystemExit(1), 2, r"train: your code ended the process at \S+conftest\.py:\d+ by sys\.exit\(1\); let it "),
        (OSError(28, "No space left on device", "a/file"), 3, "train: a/file: No space left on device; make room"),
        (PermissionError(13, "Permission denied", "a/file"), 3, "train: a/file: Permission denied; make room or give "),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), 3, "train: no temporary directory "),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 3, "train: out of memory "),
        (MemoryError(), 3, r"train: out of memory \(MemoryError\); take a smaller batch_size"),
        (EOFError("an end"), 2, "train: your code raised EOFError: an end at "),
    ],
)
def test_what_a_user_or_a_machine_causes_is_neither_a_traceback_nor_1(
    fakes: Fakes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: BaseException,
    code: int,
    words: str,
) -> None:
    """A stage of the tests' own stands for code of the user's."""
    fakes.trouble["train"] = trouble
    assert crqat(monkeypatch, "run", "recipe.yaml") == code
    err = capsys.readouterr().err
    assert re.match(f"crqat: error: {words}", err) and err.count("\n") == 1, err


def test_an_export_whose_verification_failed_is_written_and_the_gate_fails_on_it(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = fakes.export

    def export(*arguments: Any, **further: Any) -> ExportPayload:
        payload = written(*arguments, **further)
        failed = replace(payload.models[1], verification=Verification("failed: runtime: 3 codes", 32, 1000, 3))
        return replace(payload, models=[payload.models[0], failed, payload.models[2]])

    monkeypatch.setattr(sys.modules["crqat.export.stage"], "export", export)
    proof = fakes.results["models"]["onnxruntime.onnx"]
    proof["verification"] = {**proof["verification"], "status": "failed: runtime: 3 codes", "differing_codes": 3}
    assert crqat(monkeypatch, "train", "recipe.yaml") == 0
    assert crqat(monkeypatch, "export", "recipe.yaml") == 0
    assert "onnxruntime.onnx: the verification failed; the file is written" in capsys.readouterr().out
    assert crqat(monkeypatch, "benchmark", "recipe.yaml") == 0
    assert crqat(monkeypatch, "gate", "recipe.yaml") == 1


def test_output_that_nobody_reads_or_that_cannot_be_written_is_no_verdict(tmp_path: Path) -> None:
    """By a pipe whose reader is gone, on a full disk, and without any stream at all."""
    command = [sys.executable, "-m", "crqat", "check", "--syntax", str(ROOT / "recipes" / "digits.yaml")]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 3 and ended.stderr.startswith("crqat: error: check: No space left on device")
    shell = ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh"]
    assert subprocess.run([*shell, *command], cwd=ROOT, check=False).returncode == 0
    assert subprocess.run([*shell, *command[:-1], "none.yaml"], cwd=ROOT, check=False).returncode == 2


def test_a_table_that_nobody_reads_ends_nothing_by_1(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("click.echo", lambda _: None)
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        console.show_table("title", ["column"], [["cell"]])


def test_init_writes_a_valid_recipe_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert crqat(monkeypatch, "init") == 0
    assert crqat(monkeypatch, "check", "--syntax", "recipe.yaml") == 0
    Path("recipe.yaml").write_text("mine")
    assert crqat(monkeypatch, "init") == 2
    assert "recipe.yaml: exists already" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text() == "mine"
    assert crqat(monkeypatch, "init", "none/recipe.yaml") == 3


def test_plain_progress_is_a_line_at_start_every_ten_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    progress = console.PlainProgress()
    for step in range(31):
        clock = float(step)
        progress("train", step, 30, f"loss {step}")
    progress("train", 30, 30, "again")
    progress("export", 1, 1)
    assert capsys.readouterr().err.splitlines() == [
        "train: 0/30  loss 0  (0 s)",
        "train: 10/30  loss 10  (10 s)",
        "train: 20/30  loss 20  (20 s)",
        "train: 30/30  loss 30  (30 s)",
        "export: 1/1  (0 s)",
    ]


def test_table_in_a_log_keeps_every_digit_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    cells = ["[bold]0.123456789[/bold]"] * 12
    console.show_table("title", [f"column {number}" for number in range(12)], [cells])
    line = next(line for line in capsys.readouterr().out.splitlines() if "0.1" in line)
    assert line.count("[bold]0.123456789[/bold]") == 12


def test_ci_gets_plain_lines_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("CI", raising=False)
    assert console.drawn(Terminal())  # type: ignore[arg-type]
    monkeypatch.setenv("CI", "true")
    assert not console.drawn(Terminal())  # type: ignore[arg-type]


def test_text_of_a_file_cannot_steer_the_terminal() -> None:
    assert console.printable("a\x1b[2Jb\nc\u202ed é") == "a?[2Jb?c?d é"


def make(*arguments: str) -> list[str]:
    command = ["make", "--no-print-directory", "-s", "-C", str(ROOT), *arguments]
    # The tests may themselves be run by make, which hands its own options down.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def test_make_runs_the_stages_one_after_the_other_even_in_parallel(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "crqat").touch()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\necho "begin $*"\nsleep 0.1\necho "end $3"\n')
    python.chmod(0o755)
    stages = ("train", "export", "benchmark", "gate")
    lines = make("-j8", *stages, f"VENV={tmp_path}", "RECIPE=r.yaml")
    assert lines == [line for stage in stages for line in (f"begin -m crqat {stage} r.yaml", f"end {stage}")], (
        "an environment that is given and has crqat is used as it is"
    )


def test_make_installs_into_a_new_environment_once(tmp_path: Path) -> None:
    arguments = ("-n", "train", "gate", f"VENV={tmp_path}", "PYTHON=python3", "RECIPE=r.yaml")
    plan = make(*arguments)
    assert plan[0] == f"python3 -m venv {tmp_path}"
    assert plan[1].endswith(" -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'")
    assert all(line.startswith("PYTHONPATH= ") for line in plan[1:3]), "src has metadata that pip takes for an install"
    # For mypy, and without its dependencies, which are TensorRT itself.
    assert "--no-deps tensorrt-stubs==" in plan[2]
    assert [line.split(" -m crqat ")[-1] for line in plan[4:]] == [
        "train r.yaml",
        "gate r.yaml",
    ]
    (tmp_path / ".crqat-installed").touch()
    assert make(*arguments) == plan[4:]


def test_help_shows_the_own_commands_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert crqat(monkeypatch, "--help") == 0
    own, experts = capsys.readouterr().out.partition("\nCommands:\n")[2].split("\nExpert tools:\n")
    assert re.findall(r"^  (\w+)", own, re.M) == list(cli.FIRST)
    assert set(re.findall(r"^  (\w+)", experts, re.M)) == cli.crqat.commands.keys() - set(cli.FIRST)
    assert {"inspect", "models", "nncf", "scale", "sensitivity", "study", "bundle"} <= set(re.findall(r"\w+", experts))


@pytest.mark.parametrize("arguments", [["--quiet", "run", "recipe.yaml"], ["run", "recipe.yaml", "--quiet"]])
def test_quiet_leaves_results_warnings_and_errors(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert crqat(monkeypatch, *arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.endswith("\ngate: PASS\n")
    assert crqat(monkeypatch, *arguments) == 0  # "is up to date" is no result
    assert capsys.readouterr().err == ""
    fakes.trouble["train"] = ToolError("no compiler")
    assert crqat(monkeypatch, *arguments, "--force") == 3
    assert capsys.readouterr().err == "crqat: error: no compiler\n"
    assert crqat(monkeypatch, "run", "recipe.yaml", "--force") == 3  # the next command is not quiet
    assert "train: runs again" in capsys.readouterr().err


def test_a_warning_among_progress_is_said_quietly_too(capsys: pytest.CaptureFixture[str]) -> None:
    console._warnings_alone("images", 1, 2, "warning: they are black")
    console._warnings_alone("epochs", 1, 2, "loss 0.1")
    assert capsys.readouterr().err == "images: warning: they are black\n"


def every_command() -> list[tuple[str, click.Command]]:
    found = []
    for name, command in cli.crqat.commands.items():
        inner = command.commands.items() if isinstance(command, click.Group) else ()
        found += [(f"{name} {own}", below) for own, below in inner] or [(name, command)]
    return found


@pytest.mark.parametrize(("name", "command"), every_command())
def test_every_command_has_json_and_quiet(name: str, command: click.Command) -> None:
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--json", "--quiet"} <= options, name


def test_json_is_one_document_on_stdout_and_all_else_on_stderr(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def given(*arguments: str, code: int = 0) -> Any:
        assert crqat(monkeypatch, *arguments, "--json") == code
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out
        return json.loads(captured.out), captured.err

    found, err = given("run", "recipe.yaml")
    assert (found["verdict"], found["exit_code"], found["run"]) == ("pass", 0, "runs/run1")
    assert (
        found["training"]["best"] == "teacher" and found["results"]["models"].keys() == fakes.results["models"].keys()
    )
    assert found["files"]["report"] == "runs/run1/benchmark/report.html"
    assert {rule["status"] for rule in found["rules"]} <= {"pass", "not run"}
    assert "gate: PASS" in err and "warning: training made the network worse" in err
    failed, _ = given("gate", "recipe.yaml", "--set", "gate.max_accuracy_drop=0.01", code=1)
    assert failed["verdict"] == "fail" and any(rule["status"] == "fail" for rule in failed["rules"])
    assert given("train", "recipe.yaml")[0]["training"]["candidates"]["student"] == {"validation_accuracy": 0.89}
    assert given("export", "recipe.yaml")[0]["export"]["models"][0]["file"] == "float.onnx"
    assert given("benchmark", "recipe.yaml")[0]["results"]["run"] == "run1"
    assert given("check", "--syntax", "recipe.yaml")[0]["found"] == [
        "recipe.yaml: recipe run1 is valid, for onnxruntime, tensorrt"
    ]
    assert given("explain", "qat.lr")[0]["default"] == 0.01
    assert given("init", "new.yaml")[0] == {"recipe": "new.yaml"}
    assert given("bundle", "runs/run1", "--out", "b.tar.gz")[0]["archive"] == "b.tar.gz"
    Path("results.json").write_text(json.dumps(fakes.results))
    assert given("compare", "results.json")[0]["results"][0]["file"] == "results.json"
    assert crqat(monkeypatch, "run", "none.yaml", "--json") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("crqat: error: none.yaml: ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_a_shell_is_a_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    monkeypatch.setenv("_CRQAT_COMPLETE", f"{shell}_source")
    assert crqat(monkeypatch) == 0
    captured = capsys.readouterr()
    assert f"_CRQAT_COMPLETE={shell}_complete" in captured.out and captured.err == ""


def test_completion_knows_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_CRQAT_COMPLETE", "bash_complete")
    for words, cword, found in (("crqat ex", "1", ["export", "explain"]), ("crqat init --im", "2", ["--images"])):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", cword)
        assert crqat(monkeypatch) == 0
        assert [line.split(",")[1] for line in capsys.readouterr().out.splitlines()] == found
    monkeypatch.setenv("_CRQAT_COMPLETE", "nonsense")
    assert crqat(monkeypatch) == 2
