"""The report, opened in a real browser: nothing overflows, nothing is loaded, nothing that came from a user runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from matplotlib.figure import Figure
from onnx import TensorProto, helper

from crqat.core.results import answers as packed
from crqat.core.results.analysis import LayerAccuracy, NoiseLevel, NoisyNetwork, Perturbation
from crqat.core.results.benchmark import Results
from crqat.core.results.verdict import Verdict
from crqat.core.run_directory import Manifest, read_manifest, write_stage
from crqat.core.typed_json import from_json
from crqat.pipeline.gate import rules
from crqat.pipeline.gate.rules import GateConfig
from crqat.pipeline.report import html as report
from tests.needs import require
from tests.pipeline.conftest import measured

# What the browser may not obey, the template language, the SVG's labels (mathtext) and a terminal may not either.
HOSTILE = '<script>document.title="taken"</script><img src=x onerror="document.title=\'taken\'">"&\''


# The test images that the page holds are data themselves.
FOREIGN_IMAGES = "img:not([src^='data:image/png;base64,'])"


def render(run: Path, results: dict[str, Any], verdicts: Sequence[Verdict], layers: Any = (), others: Any = ()) -> str:
    """The page of results as JSON has them."""
    devices = [from_json(Results, other) for other in others]
    return report.render(run, from_json(Results, results), verdicts, layers, devices)


def judge(results: dict[str, Any], limits: GateConfig) -> list[Verdict]:
    """The verdicts on results as JSON has them."""
    return rules.judge(from_json(Results, results), limits)


def finished_run(run: Path, name: str) -> dict[str, Any]:
    """A run directory as the report reads it, and its results."""
    link = {
        "codes": 552960,
        "differing": 159,
        "violations": 0,
        "farthest_from_tie": 0.0016,
        "at": "x",
        "largest_bound": 0.005,
    }
    proof = {"status": "passed", "codes": 10, "differing_codes": 0, "images": 4, "links": {"torch": link}}
    proof["links"]["runtime"] = {"codes": 10, "differing": 0, "differing_logits": 0, "violations": 0}  # type: ignore[index]
    edge = "post_hooks.layer1/0/a_module_with_a_very_long_name/that_does_not_break/batch_norm/0__0.0"
    stayed = [{"node": name, "operation": "Add", "reason": "its input is not quantized"}]
    fusion = {"expected": {"QLinearConv": 19}, "operations": {"QLinearConv": 18}, "float": stayed, "complete": False}
    models = [
        {"file": "float.onnx", "target": "float"},
        {
            "file": "onnxruntime.onnx",
            "target": "onnxruntime",
            "claims": {edge: {"claim": "exact"}},
            "verification": proof,
            "fusion": fusion,
        },
        {
            "file": "tensorrt.onnx",
            "target": "tensorrt",
            "claims": {edge: {"claim": "exact"}},
            "verification": {**proof, "links": {"runtime": "not run: no CUDA device"}},
            "fusion": None,
        },
    ]
    payload = {
        "class_names": ["a", "b"],
        "input_shape": [1, 8, 8],
        "preprocessing": {"mean": [0.3], "std": [0.4]},
        "quantizers": 2,
        "best": "student",
        "validation_images": 100,
        "float": {"validation_accuracy": 0.99},
        "candidates": {"student": {"validation_accuracy": 0.99}, "teacher": {"validation_accuracy": 0.98}},
        "seconds": 12.3,
        "device": "cpu",
        "compiled": "no: no compiler",
        "notes": [name],
        "warnings": [name],
    }
    rows: list[dict[str, Any]] = [{"phase": "float", "epoch": e, "loss": 1 / e, "validation": 0.9} for e in (1, 2, 3)]
    rows += [{"phase": "qat", "epoch": 0, "validation": 0.8, "validation_teacher": 0.8}]
    rows += [
        {"phase": "qat", "epoch": e, "loss": 0.1, "lambda": 0.5 * e, "validation": 0.9, "validation_teacher": 0.91}
        for e in (1, 2)
    ]
    environment = {"git_revision": "0" * 40 + "-dirty", "versions": {"torch": name}}
    with write_stage(run, Manifest("train", "k", None, {"name": name}, environment, payload)) as out:
        (out / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with write_stage(
        run,
        Manifest(
            "export",
            "k",
            None,
            {"name": name},
            environment,
            {
                "run": name,
                "images": "images.npy",
                "labels": "labels.npy",
                "models": models,
                "candidate": "student",
                "noise": {edge: 31.5},
                "class_names": [name, "b"],
                "layers": [
                    {
                        "layer": edge + name,
                        "operation": "Conv",
                        "macs": 9,
                        "products": 9,
                        "weight_bits": 8,
                        "input_bits": None,
                        "weight_snr": 40.0,
                        "input_snr": None,
                        "reason": name,
                    },
                ],
            },
        ),
    ) as out:
        np.save(out / "images.npy", np.zeros((600, 1, 8, 8), np.uint8))
        np.save(out / "labels.npy", np.zeros(600, np.int64))
        conv = helper.make_node("Conv", ["input", "w"], ["logits"], name=edge + name)
        values = [helper.make_tensor_value_info(value, TensorProto.FLOAT, None) for value in ("input", "w", "logits")]
        onnx.save(helper.make_model(helper.make_graph([conv], "g", values[:2], values[2:])), out / "float.onnx")
    results = measured(0.2, (0.1, 0.3))
    times = [{"node": edge + name, "operation": "Conv", "microseconds": 9.0}]
    results["models"]["float.onnx"].update(node_times=times, answers=packed.pack(np.arange(600) // 599))
    results["models"]["onnxruntime.onnx"].update(node_times=times, answers=packed.pack(np.arange(600) // 594))
    results["models"]["tensorrt.onnx"].update(answers=packed.pack(np.arange(600) // 600))
    results.update(run=name, dataset={"n": 600, "classes": 10})
    results["models"]["tensorrt.onnx"]["engine"] = {
        "status": "built",
        "builder": {"name": "tensorrt_rtx", "version": "1.7"},
        "compute_capabilities": ["default"],
        "seconds": 0.5,
        "size_bytes": 3388036,
        "coverage": {"by_macs": 0.9418, "nodes": 20, "int8_nodes": 19},
        "uncovered": [{"node": edge + name, "macs": 3, "reason": "multiplies Half by Half"}],
        "counts": {"layers": 42, "pointwise": 21, "reformat": 1, "copy": 0},
        "remarks": [{"kind": "other", "severity": "warning", "message": name, "count": 2, "nodes": [name]}],
        "notices": ["says nothing of Jetson"],
    }
    for model in results["models"].values():
        if model["latency"]["status"] == "measured":
            model["latency"].update(p90_ms=1.2, p99_ms=None, n=500, cv=0.03)
        if model["versus_float"] is not None:
            model["versus_float"].update(only_float_right=3, only_this_right=1)
    return results


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    require("selenium", "chromium")
    from selenium import webdriver

    chromium, driver = shutil.which("chromium") or "", shutil.which("chromedriver") or ""
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_is_quiet(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    results = finished_run(tmp_path / "run", "digits")
    page = tmp_path / "report.html"
    page.write_text(
        render(tmp_path / "run", results, judge(results, GateConfig(max_latency_ratio=1.0, min_int8_coverage=0.9)))
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    scheme_feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_feature)
    browser.get(page.as_uri())
    assert "pass" in browser.find_element("css selector", "h1").text
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # A table that is too wide scrolls in its own box; nothing else may reach beyond the page.
    outside = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, p, svg, details, .scroll')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    if width < 500:  # there a row is a list of its cells, each under its column's heading, and nothing scrolls
        browser.execute_script("document.querySelectorAll('details').forEach(e => { e.open = true; })")
        scrolls = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert browser.execute_script(f"return {scrolls}") == 0
        cells = browser.find_elements("css selector", "td")
        assert len(cells) > 50 and all(cell.get_attribute("data-heading") for cell in cells)
    ground, text = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )
    brightness = [sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) for color in (ground, text)]
    assert (brightness[0] < brightness[1]) == (scheme == "dark")
    assert len(browser.find_elements("css selector", "svg")) == 4
    assert browser.get_log("browser") == []


def test_names_from_a_run_are_shown_and_not_executed(browser: Any, tmp_path: Path) -> None:
    results = finished_run(tmp_path / "run", HOSTILE)
    page = tmp_path / "report.html"
    page.write_text(render(tmp_path / "run", results, judge(results, GateConfig())))
    browser.get(page.as_uri())
    assert browser.find_element("css selector", "h1").text.startswith(HOSTILE)
    assert browser.title != "taken"
    assert browser.find_elements("css selector", f"script, {FOREIGN_IMAGES}") == []


WORDS = [
    HOSTILE,
    "</pre></script></title></style><script>document.title='taken'</script>",
    "{{ 7 * 7 }}{% raw %}<svg onload=\"document.title='taken'\">",
    "$x^$ _hidden\n\r\t\x00\x01\x1b[2J\u202e\u2028'`\"",
    "javascript:document.title='taken'//--><!--",
]


@pytest.mark.parametrize("word", WORDS, ids=["script", "closing tags", "template", "control", "comment"])
def test_no_text_of_a_run_is_executed_wherever_it_stands(browser: Any, tmp_path: Path, word: str) -> None:
    results = finished_run(tmp_path / "run", word)
    models = results["models"]
    models[word] = models.pop("onnxruntime.onnx")
    models[word]["accuracy"]["top1_interval"] = [0.9, 0.96]
    models["tensorrt.onnx"]["latency"]["status"] = f"not run: {word}"
    models["tensorrt.onnx"]["engine"].update(notices=[word], compute_capabilities=[word])
    results["device"] = {"cpu": word, "onnxruntime": word, "os": word}
    export = read_manifest(tmp_path / "run" / "export")
    export.payload["class_names"] = [word, "b"]
    export.payload["models"][1]["fusion"]["float"][0].update(node=word, reason=word)
    with write_stage(tmp_path / "run", export):
        pass
    rows = [LayerAccuracy(word, 0.9, word)] * 2
    page = tmp_path / "report.html"
    page.write_text(render(tmp_path / "run", results, judge(results, GateConfig()), rows, [results]))
    browser.get(page.as_uri())
    assert browser.title != "taken"
    # Nothing became an element or an attribute that could run, and the page is whole.
    assert (
        browser.find_elements("css selector", f"script, {FOREIGN_IMAGES}, iframe, object, a, [onload], [onerror]") == []
    )
    assert browser.find_element("xpath", "//h2[text()='Environment']")
    assert "49{%" not in browser.page_source
    assert browser.get_log("browser") == []


def test_what_stayed_float_and_what_was_not_run_is_said(tmp_path: Path) -> None:
    results = finished_run(tmp_path / "run", "digits")
    page = render(tmp_path / "run", results, judge(results, GateConfig(max_latency_ratio=1.0)))
    assert "not run: no CUDA device" in page
    assert "18 of 19 QLinearConv" in page
    assert "stays float: its input is not quantized" in page
    assert "94.18 % of the MACs, 19 of 20 Conv and Gemm" in page
    assert "42 layers: 21 pointwise, 1 reformat, 0 copy." in page
    assert "built-in method" not in page
    assert "digits, multiplies Half by Half." in page
    assert "warning: digits (2 times)" in page
    results["models"]["tensorrt.onnx"]["engine"] = {"status": "not run: no builder"}
    assert '<p class="remark">tensorrt.onnx: not run: no builder</p>' in render(tmp_path / "run", results, [])
    assert not re.search(r'(src|href)="(?!#|data:image/png;base64,)|url\((?!#)|@import', page), (
        "the page loads something from elsewhere"
    )


def test_the_training_starts_at_the_calibrated_network_and_has_floats_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = finished_run(tmp_path / "run", "digits")
    figures: list[Any] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    page = render(tmp_path / "run", results, [])
    assert '<p class="remark">Warning: digits.</p>' in page
    (qat,) = (axes for figure in figures for axes in figure.axes if axes.get_title() == "qat")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in qat.get_lines()}
    assert lines.keys() == {"student", "teacher", "float"}
    assert lines["student"] == ([0, 1, 2], [80.0, 90.0, 90.0]) and lines["teacher"][1] == [80.0, 91.0, 91.0]
    assert lines["float"][1] == [99.0, 99.0]


def test_noise_has_a_chart_of_each_kind_where_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = finished_run(tmp_path / "run", "digits")
    assert "Noise on inputs and weights" not in render(tmp_path / "run", results, [])
    on_input = [NoiseLevel(0, [0.9], [0.3]), NoiseLevel(0.4, [0.5, 0.7], [1.0, 1.2])]
    on_weights = [NoiseLevel(0, [0.9], [0.3]), NoiseLevel(0.1, [0.8, 0.8], [0.4, 0.4])]
    names = {"float": "float", "calibrated": "calibration alone", "student": "trained", "teacher": "EMA teacher"}
    networks = [NoisyNetwork(name, on_input, on_weights) for name in names]  # type: ignore[arg-type]
    figures: list[Any] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    measured_noise = Perturbation("digits", 100, 2, networks)
    page = report.render(tmp_path / "run", from_json(Results, results), [], perturbation=measured_noise)
    assert "Accuracy on 100 validation images, mean and standard deviation over 2 draws" in page
    axes = {axes.get_title(): axes for figure in figures for axes in figure.axes}
    for title, last in (("noise on the input", (0.4, 60.0)), ("noise on the weights", (0.1, 80.0))):
        drawn = axes[title].containers
        assert [container.get_label() for container in drawn] == list(names.values())
        for line in (container.lines[0] for container in drawn):
            assert (line.get_xdata()[-1], line.get_ydata()[-1]) == pytest.approx(last)


def test_devices_stand_side_by_side(tmp_path: Path) -> None:
    results = finished_run(tmp_path / "run", "digits")
    assert "Devices side by side" not in render(tmp_path / "run", results, [])
    other = {**results, "device": {**results["device"], "cpu": "Orin's CPU"}}
    page = render(tmp_path / "run", results, [], others=[other])
    section = page.split("Devices side by side")[1].split("</table>")[0]
    assert section.count("<tr>") == 1 + 2 * len(results["models"])
    assert section.count("Orin&#39;s CPU") == len(results["models"])


def test_layers_are_shown_on_request_worst_first(browser: Any, tmp_path: Path) -> None:
    results = finished_run(tmp_path / "run", "digits")
    rows = [
        LayerAccuracy(name, accuracy, bits)
        for name, accuracy, bits in (("none", 0.95, ""), ("all", 0.9, ""), ("layer1.0.<b>conv1</b>", 0.925, "4/8"))
    ]
    verdicts = judge(results, GateConfig())
    assert "One layer at a time" not in render(tmp_path / "run", results, verdicts)
    page = tmp_path / "report.html"
    page.write_text(render(tmp_path / "run", results, verdicts, rows))
    browser.get(page.as_uri())
    heading = browser.find_element("xpath", "//h2[text()='One layer at a time']")
    cells = heading.find_elements("xpath", "following::table[1]//tr[4]/td")
    assert [cell.text for cell in cells] == ["layer1.0.<b>conv1</b>", "4/8", "92.50", "-2.50"]


def test_what_float_layers_cost_stands_in_the_report_and_is_no_markup(tmp_path: Path) -> None:
    results = finished_run(tmp_path / "run", "a run")
    results["models"]["tensorrt.onnx"]["float_layers"] = {"macs": {"fc<b>": 1, "conv1": 5}, "share": 0.0291}
    page = render(tmp_path / "run", results, judge(results, GateConfig()))
    assert "tensorrt.onnx: kept in float by float_layers: conv1, fc&lt;b&gt;, 2.91 % of the MACs." in page
    assert "onnxruntime.onnx: kept in float" not in page
