"""`import crqat`: lazy, typed, and the same names on both sides."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import crqat

if TYPE_CHECKING:
    from typing import assert_type

    import torch
    from torch import nn

    import crqat.export.stage

    def the_package_is_a_function_to_type_checkers(net: nn.Module, images: torch.Tensor) -> None:
        preprocessing = crqat.Preprocessing((0.5,), (0.5,))
        assert_type(crqat.export(net, "out", images=images, preprocessing=preprocessing), crqat.Export)


def run(code: str) -> str:
    """What a process of its own prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_it_is_imported_in_a_tenth_of_a_second() -> None:
    code = "import time; start = time.perf_counter(); import crqat; print(time.perf_counter() - start)"
    assert min(float(run(code)) for _ in range(5)) < 0.1  # the fastest: other work may share the machine


def test_it_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'nncf', 'tensorrt', 'tensorrt_rtx', 'numpy', 'pydantic'}"
    code = f"import sys, crqat; dir(crqat), crqat.__version__, crqat.export; print({heavy} & set(sys.modules))"
    assert run(code) == "set()"
    # A limit's name needs no torch, either.
    light = (
        "import sys, crqat; crqat.targets(), crqat.UsageError, crqat.gate; print({'torch', 'onnx'} & set(sys.modules))"
    )
    assert run(light) == "set()"


def for_type_checkers() -> dict[str, tuple[str, str]]:
    """Name to (module, name there) of what `__init__` imports under TYPE_CHECKING."""
    tree = ast.parse(Path(str(crqat.__file__)).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}


def test_what_type_checkers_see_is_what_there_is() -> None:
    typed = for_type_checkers()
    assert {*typed, "__version__"} == set(crqat.__all__) <= set(dir(crqat))
    for name, (module, there) in typed.items():
        if name != "export":
            assert getattr(crqat, name) is getattr(importlib.import_module(module), there), name
    assert crqat.__version__ == metadata.version("crqat-edge")
    assert crqat.targets() == ("onnxruntime", "tensorrt")


def test_every_name_says_what_it_is_for() -> None:
    from crqat.export.export_model import export

    for name in set(crqat.__all__) - {"__version__", "export"}:
        assert (getattr(crqat, name).__doc__ or "").strip(), name
    for text in (export.__doc__, crqat.quantize.__doc__, crqat.benchmark.__doc__):
        assert text is not None and all(word in text for word in ("[N, C, H, W]", "Raises:", "UsageError"))


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'crqat' has no attribute 'nonsense'"):
        crqat.nonsense  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import crqat; crqat.export; import crqat.export.config",
        "import crqat.export.config; import crqat",
        "from crqat import export; from crqat.export.config import ExportConfig",
        "from crqat.export.config import ExportConfig; from crqat import export",
    ],
)
def test_export_is_a_function_and_a_package_in_every_order(imports: str) -> None:
    code = (
        f"{imports}; import crqat.export.config as config; import crqat; from crqat import export; "
        "print(callable(crqat.export), crqat.export is export, crqat.export.config is config)"
    )
    assert run(code) == "True True True"


def test_export_has_the_functions_signature() -> None:
    import inspect

    from crqat.export.export_model import export

    assert inspect.signature(crqat.export) == inspect.signature(export)
    with pytest.raises(crqat.UsageError, match=r"^model: a str; expected what crqat\.quantize or crqat\.load made$"):
        crqat.export("a model", "out", images=None, preprocessing=None)  # type: ignore[arg-type]
