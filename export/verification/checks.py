"""Verifies a file by its integer codes, in three checks that compare two computations each.

1. torch's fake quantization on the trained Grids, without BN folding, against the simulator of the file. Each operation
   in torch receives the simulator's codes. Codes may differ only where the simulator's value lies within a derived
   bound of a rounding tie, and logits only by a derived bound.
2. The simulator, with the trained Grids' scales and the kernels of this machine's CPU family, against ONNX Runtime with
   all optimizations. No code may differ, and the logits must agree bit for bit. Only codes and logits that are computed
   from operations left in float, such as a SiLU, follow the rule of check 1, with the bounds of
   `crqat.export.simulator.float_ops`.
3. The simulator of one target's file against the simulator of another target's file, operation by operation, by the
   rule of check 1.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

from crqat.core import targets as runtimes
from crqat.core.compare_codes import Tie, compare_codes
from crqat.core.grid import Grid
from crqat.core.results.verification import Check, Verification
from crqat.export.qdq.float16 import as_float16
from crqat.export.qdq.lower import lower_activation
from crqat.export.qdq.write import QDQModel
from crqat.export.simulator.run import simulate
from crqat.export.simulator.values import UNIT_ROUNDOFF, NotSimulated, Simulation
from crqat.export.verification.fusion import in_float, optimized_operations, session
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers import specs_of
from crqat.train.quantizers.calibration import Hook, hooked

REFUSED = "failed: runtime: ONNX Runtime refuses the file"
# Largest number of pixels that are simulated at once, over all images, because all values of the network are in memory.
_PIXELS = 1 << 17


def verify(
    model: fx.GraphModule,
    grids: Mapping[str, Grid],
    exported: Mapping[str, QDQModel],
    images: npt.NDArray[np.float32],
) -> dict[str, Verification]:
    """Verify each target's file by the three checks that this module's docstring describes.

    Args:
        model: The exported quantized network, on the CPU, in eval mode.
        grids: Trained Grids by edge name.
        exported: Files by target.
        images: Normalized training images, float32 of shape [N, C, H, W].

    Returns:
        Results by target.
    """
    stopped: dict[str, Verification] = {}
    parts: dict[str, list[dict[str, Check | str]]] = {target: [] for target in exported}
    observe = cache(lambda target: _observe(exported[target]))  # one session of ONNX Runtime for all parts
    size = max(1, _PIXELS // math.prod(images.shape[2:]))
    for start in range(0, len(images), size):
        part, simulations = images[start : start + size], dict[str, Simulation]()
        for target, file in exported.items():
            if target in stopped:
                continue
            try:
                simulation = simulate(file.model, part, stored_error={**_rounded_constants(file), **_bias_errors(file)})
                checks: dict[str, Check | str] = {"torch": _against_torch(model, grids, file, simulation, part)}
                missing = runtimes.get(target).not_run
                checks["runtime"] = (
                    _against_runtime(observe(target), file, grids, simulation, part)
                    if missing is None
                    else f"not run: {missing}"
                )
                for other, theirs in simulations.items():
                    checks[other] = _against_target(file, exported[other], theirs, part)
            except NotSimulated as reason:
                stopped[target] = Verification(f"not run: {reason}", len(images), 0, 0)
            except Exception as error:
                if not _by_runtime(error):
                    raise
                # A file that its runtime does not run counts as a failed verification, not as an error of the export.
                status = f"{REFUSED} ({' '.join(str(error).split())[:300]})"
                stopped[target] = Verification(status, len(images), 0, 0)
            else:
                simulations[target] = simulation
                parts[target].append(checks)
    return {target: stopped.get(target) or _summary(_merged(parts[target]), len(images)) for target in exported}


def _merged(parts: Sequence[Mapping[str, Check | str]]) -> dict[str, Check | str]:
    """Merge the checks of several parts of the images, by the name of the computation that was compared."""
    result: dict[str, Check | str] = {}
    for name, first in parts[0].items():
        checks = [check for part in parts if isinstance(check := part.get(name), Check)]
        result[name] = _sum(checks) if checks else first
    return result


def _sum(checks: Sequence[Check]) -> Check:
    """Return one check for all images: counts are added; distances and bounds are the largest."""

    def largest(name: str) -> float | None:
        return max((value for check in checks if (value := getattr(check, name)) is not None), default=None)

    def total(name: str) -> int | None:
        found = [value for check in checks if (value := getattr(check, name)) is not None]
        return sum(found) if found else None

    differing = [check for check in checks if check.at]
    farthest = max(differing, key=lambda check: check.farthest_from_tie or 0.0, default=checks[0])
    # One session computes all parts, so a changed graph counts as one violation.
    unchanged = checks[0].observed_graph_is_shipped_graph
    repeated = len(checks) - 1 if unchanged is False else 0
    return Check(
        codes=sum(check.codes for check in checks),
        differing=sum(check.differing for check in checks),
        violations=sum(check.violations for check in checks) - repeated,
        at=farthest.at,
        differing_logits=total("differing_logits"),
        farthest_from_tie=largest("farthest_from_tie"),
        largest_bound=largest("largest_bound"),
        observed_graph_is_shipped_graph=unchanged,
        inexact=total("inexact"),
        inexact_differing=total("inexact_differing"),
        inexact_farthest_from_tie=largest("inexact_farthest_from_tie"),
        inexact_largest_bound=largest("inexact_largest_bound"),
    )


def _by_runtime(error: Exception) -> bool:
    return type(error).__module__.startswith("onnxruntime.")


def _summary(checks: dict[str, Check | str], images: int) -> Verification:
    ran = {name: check for name, check in checks.items() if isinstance(check, Check)}
    broken = [f"{name}: {check.violations} codes" for name, check in ran.items() if check.violations]
    shown = ran.get("runtime", ran["torch"])
    return Verification(
        status=f"failed: {'; '.join(broken)}" if broken else "passed",
        images=images,
        codes=shown.codes,
        differing_codes=shown.differing if "runtime" in ran else shown.violations,
        checks=checks,
    )


def _compare(
    pairs: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    simulation: Simulation,
    kernel_bounds: Mapping[str, float] | None = None,
) -> Check:
    """Count the codes that differ, and the violations: differences that no rounding error within the bound explains.

    Args:
        pairs: Codes of the simulator and of the other computation, by tensor name.
        simulation: The simulator's results.
        kernel_bounds: If the other computation is a simulation, its `Simulation.kernel_bounds`, by the names in
            `pairs`; otherwise None.
    """
    bounds = {name: simulation.bounds[name] + (kernel_bounds or {}).get(name, 0.0) for name in pairs}
    ties = {name: Tie(simulation.before_rounding[name], np.asarray(bound)) for name, bound in bounds.items()}
    counted = compare_codes(pairs, ties)
    return Check(
        codes=counted.codes,
        differing=counted.differing,
        violations=counted.wrong,
        at=counted.farthest_in,
        farthest_from_tie=counted.farthest_from_tie,
        largest_bound=max((float(np.max(bound, initial=0.0)) for bound in bounds.values()), default=0.0),
    )


def _bias_errors(file: QDQModel) -> dict[str, npt.NDArray[np.float64]]:
    """Return the largest error of each layer's bias against the trained bias, by the name of its dequantized weight.

    The result is for `Simulation.stored_error`.
    """
    return {
        f"{edge}.dequantized": np.asarray(weight.bias_error + _stored_error(file, edge))
        for edge, weight in file.weights.items()
    }


def _trained_grids(file: QDQModel, grids: Mapping[str, Grid], target: str) -> dict[str, tuple[npt.NDArray[Any], int]]:
    """Return the scale and zero point that each tensor of codes must have; see `Simulation.grids`."""
    result: dict[str, tuple[npt.NDArray[Any], int]] = {}
    for edge, names in file.codes.items():
        lowered = (
            file.activations[edge] if file.activations[edge].claim == "lossy" else lower_activation(grids[edge], target)
        )
        for name in names:
            own = (lowered.grid.scale[0], int(lowered.grid.zero_point))
            result[name] = result[f"{name.removesuffix('.codes')}.unclipped"] = own
    for edge, weight in file.weights.items():
        result[f"{edge}.codes"] = (weight.scale, 0)
    return result


def _stores(model: onnx.ModelProto, grids: Mapping[str, tuple[npt.NDArray[Any], int]]) -> bool:
    """Whether all quantizers of a file have the scale and zero point of the trained Grids."""
    producer = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        while name not in grids and name in producer:  # moved codes
            name = producer[name].input[0]
        if name in grids:
            scale, zero_point = grids[name]
            if not np.array_equal(constants[node.input[1]], scale) or (constants[node.input[2]] != zero_point).any():
                return False
    return True


def _against_torch(
    model: fx.GraphModule,
    grids: Mapping[str, Grid],
    file: QDQModel,
    simulation: Simulation,
    images: npt.NDArray[np.float32],
) -> Check:
    pairs: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}

    def replaced_by_the_file(spec: QuantizerSpec) -> Hook:
        tensors, grid = iter(file.codes[spec.edge]), grids[spec.edge]

        def replace(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
            name = next(tensors)
            # A file may quantize a pooled tensor before the flatten, and torch after it.
            codes = simulation.codes[name].reshape(output.shape)
            # Rounding a value of the Grid returns its code; the simulator's codes have the zero point subtracted.
            pairs[name] = (codes, grid.quantize(output.numpy()) - grid.zero_point)
            # In the output's own memory layout, on which a later view may depend.
            return torch.empty_like(output).copy_(torch.from_numpy(grid.dequantize(codes + grid.zero_point)))

        return replace

    in_file = [spec for spec in specs_of(model) if spec.kind == "activation" and spec.edge in file.codes]
    with torch.no_grad(), hooked(model, [(spec, replaced_by_the_file(spec)) for spec in in_file]):
        logits = model(torch.from_numpy(images)).double().numpy()
    check = _compare(pairs, simulation)
    # After the last quantizer, too, scales are those of the trained Grids. Lossy ones differ, as their claim states.
    exact = all(claim.claim == "exact" for claim in file.claims().values())
    differing = _outside(logits, simulation.real_logits.values, simulation.real_logits.error) if exact else 0
    return replace(check, differing_logits=differing, violations=check.violations + differing)


def _outside(values: npt.NDArray[Any], expected: npt.NDArray[Any], bound: npt.NDArray[Any] | float) -> int:
    """Count values that are farther from the expected ones than the bound, or are NaN."""
    with np.errstate(invalid="ignore"):  # equal infinities
        return int((~((values == expected) | (np.abs(values - expected) <= bound))).sum())


@dataclass(frozen=True)
class _Observed:
    """Session of ONNX Runtime on a copy of a file that also returns the codes.

    Attributes:
        session: The session; its outputs are the logits and the tensors of codes.
        names: Names of the tensors of codes.
        operations: Operations that ONNX Runtime runs in the shipped file; see `optimized_operations`.
        changed: Whether reading the codes changes the number of computing operations.
    """

    session: Any
    names: list[str]
    operations: dict[str, list[str]]
    changed: bool


def _observe(file: QDQModel) -> _Observed:
    names = [name for names in file.codes.values() for name in names]
    tapped = onnx.ModelProto()
    tapped.CopyFrom(file.model)
    for name in names:
        tapped.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    before, after = optimized_operations(file.model), optimized_operations(tapped)
    computing = {op for op in before if op.startswith("QLinear") or op in {"QGemm", "Conv", "FusedConv", "Add", "Gemm"}}
    changed = any(len(before[op]) != len(after[op]) for op in computing)
    return _Observed(session(tapped.SerializeToString()), names, before, changed)


def _against_runtime(
    observed: _Observed,
    file: QDQModel,
    grids: Mapping[str, Grid],
    simulation: Simulation,
    images: npt.NDArray[np.float32],
) -> Check:
    names = observed.names
    logits, *codes = observed.session.run(["logits", *names], {"input": images})
    zero_points = {name: file.activations[edge].grid.zero_point for edge, own in file.codes.items() for name in own}
    theirs = {name: own.astype(np.int64) - zero_points[name] for name, own in zip(names, codes, strict=True)}
    trained = _trained_grids(file, grids, runtimes.executed())
    seen = in_float(file.model, observed.operations)
    # Use the first family if this CPU's is unknown: a difference then shows in the comparison.
    cpu = runtimes.get(runtimes.executed()).cpu(platform.machine())
    kernel = cpu.add_kernel if cpu is not None else simulation.add_kernel
    anew = seen or simulation.inexact or simulation.logits_bound is not None or kernel != simulation.add_kernel
    if anew or not _stores(file.model, trained):
        # Feed each quantizer with the runtime's codes: a difference then shows where it arises and does not spread.
        forced = theirs if simulation.inexact or seen else None
        simulation = simulate(file.model, images, forced, grids=trained, in_float=seen, add_kernel=kernel)
    pairs = {name: (simulation.codes[name], theirs[name]) for name in names}
    exact = compare_codes({name: pair for name, pair in pairs.items() if name not in simulation.inexact})
    near = _compare({name: pair for name, pair in pairs.items() if name in simulation.inexact}, simulation)
    allowed = 0.0 if simulation.logits_bound is None else simulation.logits_bound
    differing_logits = _outside(logits.astype(np.float64), simulation.logits, allowed)
    return Check(
        codes=sum(codes.size for codes in theirs.values()),
        differing=exact.wrong + near.violations,
        differing_logits=differing_logits,
        at=exact.first_wrong or (near.at if near.violations else ""),
        violations=exact.wrong + near.violations + differing_logits + int(observed.changed),
        observed_graph_is_shipped_graph=not observed.changed,
        # Codes after float operations, and those on the other side of a tie.
        inexact=near.codes,
        inexact_differing=near.differing,
        inexact_farthest_from_tie=near.farthest_from_tie,
        inexact_largest_bound=near.largest_bound,
    )


def _against_target(
    file: QDQModel, other: QDQModel, other_simulation: Simulation, images: npt.NDArray[np.float32]
) -> Check:
    """Compare the codes of this target's simulation with those of the other target's simulation.

    Each operation of this target's simulation receives the other target's codes.
    """
    tensors = {
        own: theirs for edge in file.codes if edge in other.codes
        for own, theirs in zip(file.codes[edge], other.codes[edge], strict=True)
    }  # fmt: skip
    forced = {own: other_simulation.codes[theirs] for own, theirs in tensors.items()}
    stored = {f"{edge}.dequantized": np.asarray(_stored_error(file, edge)) for edge in file.weights}
    simulation = simulate(file.model, images, forced, stored_error={**_rounded_constants(file), **stored})
    pairs = {own: (simulation.codes[own], forced[own]) for own in tensors}
    # The other target's codes come from its kernels, which may lie farther from the exact value than this target's.
    return _compare(pairs, simulation, {own: other_simulation.kernel_bounds[theirs] for own, theirs in tensors.items()})


def _stored_error(file: QDQModel, edge: str) -> float:
    """Return the largest rounding error of a bias stored as float16; 0.0 for a bias stored as float32 or int32."""
    stored = next((t for t in file.model.graph.initializer if t.name == f"{edge}.bias"), None)
    if stored is None:
        return 0.0
    # Computed from the intended bias, not from the one in the file, which is to be verified.
    bias = file.weights[edge].bias
    values = as_float16(bias) if stored.data_type == TensorProto.FLOAT16 else bias
    return float(np.abs(values.astype(np.float64) - bias).max())


def _rounded_constants(file: QDQModel) -> dict[str, npt.NDArray[np.float64]]:
    """Return the error of each constant in the float parts against the network's own constant.

    Constants are rounded to the file's float type, so float32 constants have no error. An exception is a number written
    in the code of a forward pass, such as 1.41421356: the export rounds it to float32, but torch may compute with the
    float64 number. Every constant of one element is assumed to be such a number, except multiples of 2^-12, such as
    0.5, which float32 represents exactly.
    """
    types = {tensor.name: helper.tensor_dtype_to_np_dtype(tensor.data_type) for tensor in file.model.graph.initializer}
    result = {}
    for name, value in file.float_constants.items():
        # Computed from the intended constant, not from the one in the file, which is to be verified.
        stored = as_float16(value) if types.get(name) == np.float16 else value
        moved = np.abs(stored.astype(np.float64) - value)
        if value.size == 1:
            short = np.ldexp(value.astype(np.float64), 12) % 1 == 0
            moved = moved + np.where(short, 0.0, UNIT_ROUNDOFF * np.abs(value))
        if moved.any():
            result[name] = moved
    return result
