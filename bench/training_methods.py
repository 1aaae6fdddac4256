"""One recipe, several ways to the quantized network, side by side: the controls without which a gain is not believed.

Each arm is the recipe with a few keys replaced, run through `crqat train`, `export` and `benchmark`. All arms of a seed
start from the same float weights. QAT and QAT with averaged weights are one training; so are CR-QAT's student and
teacher. The accuracy is that of onnxruntime.onnx on all test images, with its paired drop against the float file.

    python -m bench.training_methods RECIPE --seeds 0,1 --set data.root=DIR --set model.weights=FILE
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from crqat.pipeline import console
from crqat.pipeline.recipe import recipe

RUNS = Path("runs")
FILE = "onnxruntime.onnx"


# Each training's own keys, and the rows that come out of it: name and export.candidate.
TRAININGS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "ptq": (("qat.epochs=0",), (("PTQ", "student"),)),
    "qat": (("consistency.weight=0",), (("QAT", "student"), ("QAT, EMA of the weights", "teacher"))),
    "kd": (("consistency.teacher=float",), (("QAT, distillation", "student"),)),
    "cr": ((), (("CR-QAT, student", "student"), ("CR-QAT, teacher", "teacher"))),
}


def main() -> None:
    """The command."""
    rows_of_recipe()


@click.command()
@click.argument("path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--seeds", default="0", help="Separated by commas. Default: 0.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a recipe's value in every arm.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Default: bench-out/arms-NAME.json.")
def rows_of_recipe(path: Path, seeds: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Run every arm of RECIPE for every seed, and write one row each."""
    config = recipe.load(path, overrides)
    out = out or Path("bench-out") / f"arms-{config.name}.json"
    out.parent.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in map(int, seeds.split(",")):
        weights: tuple[str, ...] = ()
        for training, (own, candidates) in TRAININGS.items():
            name = f"{config.name}-{training}-seed{seed}"
            settings = (*overrides, f"name={name}", f"seed={seed}", *weights, *own)
            for arm, candidate in candidates:
                rows.append(_run(path, name, (*settings, f"export.candidate={candidate}"), arm, seed))
                out.write_text(json.dumps({"recipe": str(path), "overrides": overrides, "rows": rows}, indent=1))
            if config.model.weights is None:
                # The float network of this seed is trained once, by the first arm.
                weights = (f"model.weights={RUNS / f'{config.name}-ptq-seed{seed}' / 'train' / 'float.safetensors'}",)
    _show(rows, config.name)
    click.echo(f"written: {out}")


def _run(path: Path, name: str, settings: tuple[str, ...], arm: str, seed: int) -> dict[str, Any]:
    arguments = [str(path), *(part for setting in settings for part in ("--set", setting))]
    for stage in ("train", "export", "benchmark"):
        subprocess.run([sys.executable, "-m", "crqat", stage, *arguments], check=True)
    run = RUNS / name
    results = json.loads((run / "benchmark" / "results.json").read_text())
    training = json.loads((run / "train" / "manifest.json").read_text())["payload"]
    measured, against = results["models"][FILE], results["models"][FILE]["versus_float"]
    candidate = json.loads((run / "export" / "manifest.json").read_text())["payload"]["candidate"]
    return {
        "arm": arm,
        "seed": seed,
        "n": results["dataset"]["n"],
        "float_top1": results["models"]["float.onnx"]["accuracy"]["top1"],
        "top1": measured["accuracy"]["top1"],
        "drop_points": against["drop_points"],
        "drop_interval_points": against["drop_interval_points"],
        "validation_accuracy": training["candidates"][candidate]["validation_accuracy"],
        "verification": measured["verification"]["status"],
        "training_seconds": training["seconds"],
    }


def _show(rows: list[dict[str, Any]], name: str) -> None:
    cells = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        drops = [
            f"{row['drop_points']:.2f} [{row['drop_interval_points'][0]:.2f}, {row['drop_interval_points'][1]:.2f}]"
            for row in own
        ]
        cells.append(
            [
                arm,
                f"{100 * statistics.mean(row['top1'] for row in own):.2f}",
                ", ".join(f"{100 * row['top1']:.2f}" for row in own),
                ", ".join(drops),
                ", ".join(f"{row['training_seconds']:.0f}" for row in own),
            ]
        )
    title = f"{name}: {FILE} on {rows[0]['n']} test images, float {100 * rows[0]['float_top1']:.2f} %"
    columns = ("arm", "mean top-1 %", "of each seed", "drop, points", "training s")
    console.show_table(title, columns, cells)


if __name__ == "__main__":
    main()
