"""A file's tests lie at its path: crqat_train/data/batches.py has tests/crqat_train/data/test_batches.py."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The folders of code, by that of their tests.
CODE = {
    "core": "src/crqat/core",
    "crqat_train": "crqat_train",
    "export": "export",
    "runtime_eval": "runtime_eval",
    "pipeline": "pipeline",
    "bench": "bench",
}
# Tests of several files together, and why.
TOGETHER: dict[str, str] = {
    "core/results/test_frozen_runs.py": "every reader on runs of earlier versions",
    "crqat_train/quantizers/test_method_peers.py": "every method against its peer in another library",
    "export/graph/test_linear_and_attention.py": "linear layers and attention, from the graph to ONNX Runtime",
    "export/simulator/test_activations.py": "activations as the exporter and the simulator compute them",
    "export/simulator/test_layers.py": "layers between convolutions, from the network to both verified files",
    "export/test_methods.py": "every method from training to files",
    "export/test_mixed_widths.py": "several bit widths in one file, in every part of the export",
    "export/verification/test_avx2.py": "files on an emulated CPU without VNNI",
    "runtime_eval/board/test_arm.py": "a bundle on an emulated ARM board",
    "pipeline/test_interrupted.py": "signals and full disks, in every stage",
}
# Files with functions that the tests of others run: of whom.
ELSEWHERE: dict[str, str] = {
    "src/crqat/core/errors.py": "tests/pipeline/test_cli.py",
    "src/crqat/core/field_bounds.py": "tests/pipeline/recipe/test_recipe.py",
    "src/crqat/core/folders.py": "tests/crqat_train/data/test_imagefolder.py",
    "src/crqat/core/progress.py": "tests/pipeline/test_cli.py",
    "src/crqat/core/results/analysis.py": "tests/export/analysis/test_perturbation.py",
    "src/crqat/core/results/benchmark.py": "tests/core/results/test_frozen_runs.py",
    "src/crqat/core/results/engine.py": "tests/core/results/test_frozen_runs.py",
    "src/crqat/core/results/study.py": "tests/pipeline/study/test_study.py",
    "src/crqat/core/results/training.py": "tests/core/results/test_frozen_runs.py",
    "src/crqat/core/results/verification.py": "tests/export/test_export_model.py",
    "src/crqat/core/targets/base.py": "tests/core/targets/test_init.py",
    "src/crqat/core/targets/constraints.py": "tests/core/targets/test_init.py",
    "src/crqat/core/targets/onnxruntime.py": "tests/core/targets/test_init.py",
    "src/crqat/core/targets/scale_rounding.py": "tests/core/targets/test_init.py",
    "src/crqat/core/targets/tensorrt.py": "tests/core/targets/test_init.py",
    "crqat_train/arguments.py": "tests/test_api.py",
    "crqat_train/config.py": "tests/pipeline/recipe/test_recipe.py",
    "crqat_train/data/batches.py": "tests/crqat_train/data/test_sources.py",
    "crqat_train/data/builtin.py": "tests/crqat_train/data/test_sources.py",
    "crqat_train/data/dataset.py": "tests/crqat_train/data/test_sources.py",
    "crqat_train/data/split.py": "tests/crqat_train/data/test_sources.py",
    "crqat_train/data/streaming.py": "tests/crqat_train/data/test_imagefolder.py",
    "crqat_train/device.py": "tests/crqat_train/test_compilers.py",
    "crqat_train/training/float_network.py": "tests/crqat_train/training/test_stage.py",
    "crqat_train/models/cifar.py": "tests/crqat_train/models/test_build.py",
    "crqat_train/models/onnx_operators/activations.py": "tests/crqat_train/models/test_onnx_file.py",
    "crqat_train/models/onnx_operators/arithmetic.py": "tests/crqat_train/models/test_onnx_file.py",
    "crqat_train/models/onnx_operators/layers.py": "tests/crqat_train/models/test_onnx_file.py",
    "crqat_train/models/onnx_operators/movement.py": "tests/crqat_train/models/test_onnx_file.py",
    "crqat_train/models/onnx_operators/node.py": "tests/crqat_train/models/test_onnx_file.py",
    "crqat_train/models/own_network.py": "tests/crqat_train/models/test_build.py",
    "crqat_train/models/untrusted_onnx.py": "tests/pipeline/commands/test_check.py",
    "crqat_train/own_code.py": "tests/crqat_train/data/test_sources.py",
    "crqat_train/placement/nncf_layout.py": "tests/crqat_train/nncf/test_checkpoint.py",
    "crqat_train/placement/quantizer_spec.py": "tests/crqat_train/placement/test_insert.py",
    "crqat_train/placement/target_rules.py": "tests/crqat_train/placement/test_insert.py",
    "crqat_train/models/from_onnx.py": "tests/crqat_train/models/test_onnx_file.py",
    "crqat_train/models/onnx_network.py": "tests/crqat_train/models/test_onnx_file.py",
    "crqat_train/ptq/shared.py": "tests/crqat_train/ptq/test_equalization.py",
    "crqat_train/ptq/walk.py": "tests/crqat_train/ptq/test_bias_correction.py",
    "crqat_train/shares.py": "tests/crqat_train/test_distributed.py",
    "crqat_train/training/images.py": "tests/crqat_train/training/test_stage.py",
    "crqat_train/training/loop.py": "tests/crqat_train/training/test_stage.py",
    "export/__init__.py": "tests/test_init.py",
    "export/analysis/sqnr.py": "tests/export/analysis/test_bit_width_cost.py",
    "export/graph/batchnorm_nodes.py": "tests/export/graph/test_from_torch.py",
    "export/graph/record.py": "tests/export/graph/test_linear_and_attention.py",
    "export/graph/onnx_graph.py": "tests/export/graph/test_from_torch.py",
    "export/graph/operators/activations.py": "tests/export/qdq/test_float16.py",
    "export/graph/operators/arithmetic.py": "tests/export/qdq/test_float16.py",
    "export/graph/operators/layers.py": "tests/export/graph/test_linear_and_attention.py",
    "export/graph/operators/movement.py": "tests/export/qdq/test_float16.py",
    "export/graph/operators/walk.py": "tests/export/graph/test_linear_and_attention.py",
    "export/simulator/error_bounds.py": "tests/export/simulator/test_float_ops.py",
    "export/simulator/reduction_ops.py": "tests/export/simulator/test_float_ops.py",
    "export/simulator/values.py": "tests/export/simulator/test_run.py",
    "export/verification/fusion.py": "tests/export/verification/test_checks.py",
    "export/write_models.py": "tests/export/test_stage.py",
    "runtime_eval/board/job.py": "tests/runtime_eval/board/test_ssh.py",
    "runtime_eval/exported.py": "tests/runtime_eval/test_benchmark.py",
    "runtime_eval/config.py": "tests/pipeline/recipe/test_recipe.py",
    "runtime_eval/measure/worker_client.py": "tests/runtime_eval/measure/test_worker.py",
    "runtime_eval/runners/__init__.py": "tests/runtime_eval/test_benchmark.py",
    "runtime_eval/trt/builder.py": "tests/runtime_eval/trt/test_engine.py",
    "pipeline/cli_expert.py": "tests/pipeline/test_cli.py",
    "pipeline/cli_options.py": "tests/pipeline/test_cli.py",
    "pipeline/cli_quantize.py": "tests/pipeline/commands/test_quantize.py",
    "pipeline/cli_stages.py": "tests/pipeline/test_cli.py",
    "pipeline/cli_tools.py": "tests/pipeline/test_cli.py",
    "pipeline/commands/network_fit.py": "tests/pipeline/commands/test_new_recipe.py",
    "pipeline/commands/folder_of_images.py": "tests/pipeline/commands/test_new_recipe.py",
    "pipeline/commands/model_survey_worker.py": "tests/pipeline/commands/test_model_survey.py",
    "pipeline/commands/nncf.py": "tests/test_nncf_docs.py",
    "pipeline/commands/quantize_images.py": "tests/pipeline/commands/test_quantize.py",
    "pipeline/commands/quantize_request.py": "tests/pipeline/commands/test_quantize.py",
    "pipeline/study/runner.py": "tests/pipeline/study/test_study.py",
    "pipeline/console.py": "tests/pipeline/test_cli.py",
    "pipeline/gate/junit.py": "tests/pipeline/gate/test_rules.py",
    "pipeline/recipe/write.py": "tests/pipeline/commands/test_new_recipe.py",
    "pipeline/recipe/yaml.py": "tests/pipeline/recipe/test_recipe.py",
    "pipeline/report/tables.py": "tests/pipeline/test_cli.py",
    "pipeline/stages/boards.py": "tests/pipeline/stages/test_run.py",
    "pipeline/stages/changes.py": "tests/pipeline/stages/test_run.py",
    "pipeline/stages/staleness.py": "tests/pipeline/stages/test_run.py",
    "pipeline/streams.py": "tests/pipeline/test_cli.py",
    "bench/arm_networks.py": "tests/runtime_eval/board/test_arm.py",
    "bench/arm_codes.py": "tests/runtime_eval/board/test_arm.py",
    "bench/exporter_peers.py": "tests/bench/test_vs_exporters.py",
    "bench/import_arrows.py": "tests/test_imports.py",
    "bench/onnxruntime_process.py": "tests/export/verification/test_avx2.py",
    "bench/vs_onnxruntime.py": "tests/bench/test_vs_exporters.py",
    "bench/wrong_codes.py": "tests/bench/test_vs_exporters.py",
}
# `make` runs these measurements; they have no test of their own.
MEASUREMENTS = {
    "bench/advise.py",
    "bench/fuzz_readers.py",
    "bench/imagenet.py",
    "bench/residual_add.py",
    "bench/rounding.py",
    "bench/step_time.py",
}


def code_of(test: Path) -> Path:
    """The file that a test file is about: test_init.py and test_main.py are about __init__.py and __main__.py."""
    folder, *inner = test.relative_to(ROOT / "tests").parent.parts
    place = ROOT.joinpath(CODE[folder], *inner)
    name = test.name.removeprefix("test_")
    dunder = place / f"__{test.stem.removeprefix('test_')}__.py"
    return dunder if dunder.is_file() else place / name


def files_of_tests() -> list[Path]:
    """All test files in the folders of CODE."""
    return sorted(path for folder in CODE for path in (ROOT / "tests" / folder).rglob("test_*.py"))


def test_each_test_file_is_at_the_path_of_its_code() -> None:
    astray = {str(path.relative_to(ROOT / "tests")) for path in files_of_tests() if not code_of(path).is_file()}
    assert astray == TOGETHER.keys()


def test_each_code_file_with_functions_has_a_test_file_or_one_that_is_named() -> None:
    mirrored = {code_of(path) for path in files_of_tests()}
    alone = {
        str(path.relative_to(ROOT))
        for folder in CODE.values()
        for path in (ROOT / folder).rglob("*.py")
        if path not in mirrored
        and any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(path.read_text())))
    }
    assert alone == ELSEWHERE.keys() | MEASUREMENTS, "add a test file, or take out what has one by now"
    assert [name for name in ELSEWHERE.values() if not (ROOT / name).is_file()] == []
