"""Quantize a float vision network to INT8 and verify it on its edge runtime.

docs/python_api.md shows how the names belong together. Each name is imported on first use, so that `import crqat` and
the command line's help load neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crqat.core.errors import ToolError, UsageError, VerificationError
    from crqat.core.preprocessing import Preprocessing
    from crqat.core.results.verification import Verification
    from crqat.core.targets import names as targets
    from crqat.export.export_model import Export, export, verify
    from crqat.pipeline.measure import Benchmark, Gate, benchmark, gate
    from crqat.train.data.dataset import Dataset
    from crqat.train.quantized_model import QuantizedModel, load, quantize, save
    from crqat.train.training.consistency import EMATeacher, consistency_loss
    from crqat.train.training.optimizer import parameter_groups

    __version__: str

__all__ = [
    "Benchmark", "Dataset", "EMATeacher", "Export", "Gate", "Preprocessing", "QuantizedModel", "ToolError",
    "UsageError", "Verification", "VerificationError", "__version__", "benchmark", "consistency_loss", "export",
    "gate", "load", "parameter_groups", "quantize", "save", "targets", "verify",
]  # fmt: skip

# Maps each name to the module that defines it; a test asserts that it matches the imports for type checkers above.
_MODULES = {
    "Benchmark": "crqat.pipeline.measure",
    "Dataset": "crqat.train.data.dataset",
    "EMATeacher": "crqat.train.training.consistency",
    "Export": "crqat.export.export_model",
    "Gate": "crqat.pipeline.measure",
    "Preprocessing": "crqat.core.preprocessing",
    "QuantizedModel": "crqat.train.quantized_model",
    "ToolError": "crqat.core.errors",
    "UsageError": "crqat.core.errors",
    "Verification": "crqat.core.results.verification",
    "VerificationError": "crqat.core.errors",
    "benchmark": "crqat.pipeline.measure",
    "consistency_loss": "crqat.train.training.consistency",
    "export": "crqat.export",  # the package, which is callable: see its __init__
    "gate": "crqat.pipeline.measure",
    "load": "crqat.train.quantized_model",
    "parameter_groups": "crqat.train.training.optimizer",
    "quantize": "crqat.train.quantized_model",
    "save": "crqat.train.quantized_model",
    "targets": "crqat.core.targets",
    "verify": "crqat.export.export_model",
}
_DEFINED_AS = {"targets": "names"}


if not TYPE_CHECKING:  # a type checker would otherwise accept any name

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib import metadata

            return metadata.version("crqat-edge")
        if name not in _MODULES:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        module = importlib.import_module(_MODULES[name])
        return module if name == "export" else getattr(module, _DEFINED_AS.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
