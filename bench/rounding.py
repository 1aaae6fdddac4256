"""Compares post-training quantization at few bits: crqat's and AIMET's rounding, on a trained network.

CIFAR-10's ResNet-20 is calibrated and rounded on the same training images, with all weights at the same bit width, and
evaluated on all 10,000 test images in torch; drops are paired by image. AIMET folds BatchNorm and rounds by AdaRound's
own gradient descent, as documented. Each method runs in a separate process, one after the other, on one thread. Writes
bench-out/rounding.json; a method whose package is not installed has a row that says so.

    python -m bench.rounding WEIGHTS --cifar10 DIR [--bits 4,8] [--images 512] [--iterations 10000] [--ways crqat,...]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crqat.core.typed_json import text
from crqat.runtime_eval.measure.accuracy import tango
from crqat.train.config import Override
from crqat.train.data import sources
from crqat.train.data.batches import evaluation_batches
from crqat.train.data.dataset import Dataset
from crqat.train.models import build as models
from crqat.train.quantized_model import quantize
from crqat.train.training.evaluate import answers

OUT = Path("bench-out/rounding.json")
NETWORK = "cifar/resnet20"
WAYS = ("crqat", "crqat, bias correction", "crqat, adaround", "crqat, adaround and bias correction", "AIMET",
        "AIMET, AdaRound")  # fmt: skip
_BATCH = 32


def ours(net: nn.Module, images: Tensor, bits: tuple[int, int], way: str) -> nn.Module:
    """Return a network quantized by crqat, with the same bit widths in all layers.

    Args:
        net: Float network.
        images: Calibration images.
        bits: Bit widths of weights and activations.
        way: Name of the method; "adaround" and "bias" in it enable AdaRound and bias correction.
    """
    weights, activations = bits
    ends = {"conv1": Override(weights, 8), "linear": Override(weights, activations)}
    model = quantize(
        net,
        [images],
        weights=weights,
        activations=activations,
        overrides=ends,
        calibration_images=len(images),
        adaround="adaround" in way,
        bias_correction="bias" in way,
    )
    model.finalize(trained=False)
    return model


def aimet(net: nn.Module, images: Tensor, bits: tuple[int, int], iterations: int) -> nn.Module:
    """Return a network quantized by AIMET's simulator, with AdaRound unless `iterations` is 0."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.v2.adaround import Adaround, AdaroundParameters
    from aimet_torch.v2.quantsim import QuantizationSimModel

    weights, activations = bits
    shape, batches = (1, *images.shape[1:]), list(torch.split(images, _BATCH))
    scheme, example = QuantScheme.post_training_tf_enhanced, images[:1]
    fold_all_batch_norms(net, shape)

    def run_all(model: nn.Module, _: Any = None) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    def run_one(model: nn.Module, inputs: Any) -> Any:
        return model(inputs[0] if isinstance(inputs, (tuple, list)) else inputs)

    with tempfile.TemporaryDirectory() as folder:
        if iterations:
            parameters = AdaroundParameters(
                [(batch,) for batch in batches], len(batches), iterations, forward_fn=run_one
            )
            net = Adaround.apply_adaround(
                net, example, parameters, path=folder, filename_prefix="rounded", default_param_bw=weights,
                default_quant_scheme=scheme,
            )  # fmt: skip
        simulated = QuantizationSimModel(
            net, example, quant_scheme=scheme, default_output_bw=activations, default_param_bw=weights
        )
        if iterations:
            simulated.set_and_freeze_param_encodings(f"{folder}/rounded.encodings")
        simulated.compute_encodings(run_all, None)
    found: nn.Module = simulated.model
    return found


def network(weights: Path) -> nn.Module:
    """Return the trained float network."""
    net = models.build(NETWORK, 10, 3)
    models.load_weights(net, weights)
    return net.eval()


def measure(way: str, given: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """Return the row of a method: its seconds, and the accuracy of its network compared with the float network."""
    if way.startswith("AIMET") and importlib.util.find_spec("aimet_torch") is None:
        return {"way": way, "bits": given.bits, "status": "not run: aimet-torch is not installed"}
    bits = tuple(int(part) for part in given.bits.split(","))
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(given.seed))
    chosen = dataset.train_images[order[: given.images]]
    images = torch.cat(list(evaluation_batches(chosen, dataset.preprocessing, given.images)))
    torch.manual_seed(given.seed)
    begun = time.monotonic()
    make: Callable[[], nn.Module] = {
        "AIMET": lambda: aimet(network(given.weights), images, (bits[0], bits[1]), 0),
        "AIMET, AdaRound": lambda: aimet(network(given.weights), images, (bits[0], bits[1]), given.iterations),
    }.get(way, lambda: ours(network(given.weights), images, (bits[0], bits[1]), way))
    model = make()
    seconds = time.monotonic() - begun
    right, of_float = (
        answers(net, dataset.test_images, dataset.preprocessing) == dataset.test_labels
        for net in (model, network(given.weights))
    )
    lost, won, n = int((of_float & ~right).sum()), int((~of_float & right).sum()), len(right)
    low, high = tango(lost, won, n)
    return {
        "way": way,
        "bits": given.bits,
        "images": given.images,
        "seed": given.seed,
        "iterations": given.iterations if way == "AIMET, AdaRound" else None,
        "seconds": round(seconds, 1),
        "n": n,
        "float_top1": float(of_float.float().mean()),
        "top1": float(right.float().mean()),
        "drop_points": 100 * (lost - won) / n,
        "drop_interval_points": [100 * low, 100 * high],
    }


def main() -> None:
    """Measure all methods, each in a separate process, and print each row when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--cifar10", required=True)
    parser.add_argument("--bits", default="4,8", help="of weights and activations")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=10_000, help="of AIMET's AdaRound, for each layer")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration images")
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way is not None:
        torch.set_num_threads(1)
        print(json.dumps(measure(given.way, given, sources.load("cifar10", given.cifar10, False))))
        return
    rows = json.loads(OUT.read_text())["rows"] if OUT.is_file() else []
    for way in given.ways.split(";"):
        command = [sys.executable, "-m", "bench.rounding", *sys.argv[1:], "--way", way]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        last = (ended.stdout or ended.stderr).strip().splitlines()[-1:]
        row = json.loads(last[0]) if ended.returncode == 0 else {"way": way, "bits": given.bits, "status": str(last)}
        print(json.dumps(row), flush=True)
        rows.append(row)
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(text({"rows": rows}))


if __name__ == "__main__":
    main()
