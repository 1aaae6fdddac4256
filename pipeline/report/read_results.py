"""Reading a benchmark's results.json: everything that the gate and the tables rely on is checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crqat.core import strict_json
from crqat.core.errors import ToolError, UsageError
from crqat.pipeline.report.tables import side_by_side

SCHEMA_VERSION = 1
_UNSHOWABLE: tuple[type[Exception], ...] = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def read_results(path: Path) -> dict[str, Any]:
    """Read a benchmark's results.json and check everything that `crqat.pipeline.gate.rules.judge` relies on.

    Raises:
        UsageError: The file is not there or is damaged; the message names the file and the key.
        ToolError: It cannot be read.
    """
    try:
        data = strict_json.read(path)
    except FileNotFoundError as error:
        msg = f"{path}: missing; run the benchmark first (crqat benchmark RECIPE)"
        raise UsageError(msg) from error
    except IsADirectoryError as error:
        msg = f"{path}: a directory; name the results.json in it"
        raise UsageError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error
    except ValueError as error:
        msg = f"{path}: not JSON ({error}); run the benchmark again with --force"
        raise UsageError(msg) from error
    checked = _Checked(path, "", data)
    if checked.get("schema_version", int) != SCHEMA_VERSION:
        msg = f"{path}: schema_version {data['schema_version']}, this crqat reads {SCHEMA_VERSION}; benchmark again"
        raise UsageError(msg)
    checked.get("run", str)
    for optional in ("device", "config"):
        if optional in data:
            checked.child(optional)
    if "require" in data.get("config", {}):
        checked.child("config").texts("require")
    models = checked.child("models")
    for file in models.data:
        _check_model(models.child(file))
    results: dict[str, Any] = data
    with shown(path):
        side_by_side([results])
    return results


@contextmanager
def shown(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Around whatever shows a file of results: a value that cannot be shown is damage, too.

    Args:
        path: The file, or the run, for the message.
        also: What else the body raises for a value that is missing or of another kind.

    Raises:
        UsageError: The body raised one of these.
    """
    try:
        yield
    except _UNSHOWABLE + also as error:
        msg = f"{path}: damaged ({type(error).__name__}: {error}); run the benchmark again with --force"
        raise UsageError(msg) from error


@dataclass(frozen=True)
class _Checked:
    """A JSON object and where it stands; whoever takes a value states its type."""

    path: Path
    key: str
    data: Any

    def _fail(self, key: str, expected: str) -> UsageError:
        return UsageError(
            f"{self.path}: damaged: {key or 'the file'} is not {expected}; run the benchmark again with --force"
        )

    def get(self, name: str, kind: type) -> Any:
        """The value, of type `kind`; a float is finite and may be written as an integer, a bool is no number."""
        if not isinstance(self.data, dict):
            raise self._fail(self.key, "an object")
        key = f"{self.key}.{name}".lstrip(".")
        value: Any = self.data.get(name)
        if kind is float and (type(value) not in (int, float) or not math.isfinite(value)):
            raise self._fail(key, "a finite number")
        if kind is not float and type(value) is not kind:
            raise self._fail(key, f"of type {kind.__name__}")
        return value

    def within(self, name: str, kind: type, low: float, high: float) -> Any:
        """As `get`, of a number that has bounds."""
        value = self.get(name, kind)
        if not low <= value <= high:
            key = f"{self.key}.{name}".lstrip(".")
            raise self._fail(key, f"within {low:g} and {high:g}" if high < math.inf else f"at least {low:g}")
        return value

    def must_have(self, name: str) -> None:
        """Check that a value is there, which may be null."""
        if name not in self.data:
            key = f"{self.key}.{name}"
            raise self._fail(key, "there")

    def child(self, name: str) -> _Checked:
        """An object inside this one."""
        return _Checked(self.path, f"{self.key}.{name}".lstrip("."), self.get(name, dict))

    def children(self, name: str) -> list[_Checked]:
        """The objects in a list in this one."""
        values = enumerate(self.get(name, list))
        return [_Checked(self.path, f"{self.key}.{name}[{index}]", value) for index, value in values]

    def texts(self, name: str) -> None:
        """Check for a list of texts."""
        if not all(isinstance(value, str) for value in self.get(name, list)):
            key = f"{self.key}.{name}"
            raise self._fail(key, "a list of texts")

    def interval(self, name: str) -> None:
        """Check for two finite numbers in order."""
        value = self.get(name, list)
        if [type(v) in (int, float) and math.isfinite(v) for v in value] != [True, True] or value[0] > value[1]:
            key = f"{self.key}.{name}"
            raise self._fail(key, "an interval [low, high]")


def _check_model(model: _Checked) -> None:
    model.get("target", str)
    for name in ("accuracy", "latency", "versus_float", "verification"):
        model.must_have(name)
    if model.data.get("verification") is not None:
        verification = model.child("verification")
        verification.get("status", str)
        for count in ("codes", "differing_codes", "images"):
            verification.get(count, int)
    if model.data.get("codes_on_this_cpu") is not None:
        counted = model.child("codes_on_this_cpu")
        counted.get("status", str)
        for count in ("codes", "differing", "images"):
            counted.get(count, int)
    if model.data.get("findings") is not None:
        model.texts("findings")
    if model.data.get("float_layers") is not None:
        layers = model.child("float_layers")
        layers.get("macs", dict)
        layers.get("share", float)
    if model.data.get("engine") is not None:
        _check_engine(model.child("engine"))
    if model.data.get("int8_layers") is not None:
        layers = model.child("int8_layers")
        for count in ("int8", "layers"):
            layers.get(count, int)
        layers.get("float", list)
    if model.get("status", str) != "measured":
        return
    accuracy = model.child("accuracy")
    images = accuracy.within("n", int, 1, math.inf)
    accuracy.within("top1", float, 0, 1)
    if accuracy.data.get("chance") is not None:
        accuracy.within("chance", float, 0, 1)
    latency = model.child("latency")
    timed = latency.get("status", str) == "measured"
    if timed:
        latency.get("rounds", int)
        if latency.data.get("unstable") is not False:
            latency.get("unstable", str)
    if model.data.get("versus_float") is not None:
        versus = model.child("versus_float")
        for number in ("drop_points", "agreement", "size_ratio"):
            versus.get(number, float)
        versus.interval("drop_interval_points")
        versus.interval("agreement_interval")
        if "only_float_right" in versus.data:
            for count in ("only_float_right", "only_this_right"):
                versus.within(count, int, 0, images)
        if timed and versus.data.get("latency_ratio", ...) is not None:  # None: float was timed in another runtime
            versus.get("latency_ratio", float)
            versus.interval("latency_ratio_interval")


def _check_engine(engine: _Checked) -> None:
    if engine.get("status", str) != "built":
        if engine.data.get("failure") is not None:
            engine.child("failure").get("stage", str)
        return
    for remark in engine.children("remarks"):
        remark.get("severity", str)
        remark.get("message", str)
        remark.get("count", int)
        remark.texts("nodes")
    for name in ("name", "version"):
        engine.child("builder").get(name, str)
    covered, numbers = engine.child("coverage"), engine.child("counts")
    covered.must_have("by_macs")
    if covered.data["by_macs"] is not None:
        covered.get("by_macs", float)
    for count in ("nodes", "int8_nodes"):
        covered.get(count, int)
    for count in ("layers", "reformat"):
        numbers.get(count, int)
    for entry in engine.children("uncovered"):
        entry.get("node", str)
        entry.get("reason", str)
