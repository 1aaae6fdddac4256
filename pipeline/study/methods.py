"""The methods that a study compares: how each changes the recipe, and which network of a training it evaluates."""

from __future__ import annotations

from dataclasses import dataclass

from crqat.core.errors import UsageError
from crqat.pipeline.recipe.recipe import Recipe

# For methods that train the float network further before QAT: the share of the optimizer steps in float.
FLOAT_SHARE = 2 / 3
REFERENCE = "cr-unlabeled"
BEST = "best"


@dataclass(frozen=True)
class Training:
    """One training run of a study, whose networks are the results of one or two methods.

    Attributes:
        methods: Maps a method's name to the network of this training that is its result: "float", "student",
            "teacher", or `BEST`, the better of student and teacher on the validation images.
        start: Name of the training whose float network it starts from; None trains one by the recipe's `float` section.
        views: Augmentation of labeled images and, after a slash, of unlabeled images, as the student sees them.
        unlabeled: What unlabeled images are used for.
        steps: Optimizer steps divided by those of the recipe's QAT. The steps of the training `start` are included,
            unless it is "float".
        settings: Changes to the recipe, as `--set` writes them.
    """

    methods: dict[str, str]
    start: str | None
    views: str
    unlabeled: str
    steps: float
    settings: tuple[str, ...]


_STRONG, _WEAK = "data.strong=randaugment", "data.strong=none"
_LABELS_ALONE = ("data.unlabeled=null", "data.unlabeled_root=null", "data.unlabeled_ratio=0")
_NO_TEACHER = "consistency.teacher=none"
_NO_QAT = ("qat.epochs=0", _NO_TEACHER)
_FLOAT_ON = ("float.fine_tune=true", "float.strong=randaugment", *_NO_QAT)

TRAININGS: dict[str, Training] = {
    "float": Training({"float": "float", "ptq": "student"}, None, "weak", "no", 0, (*_NO_QAT, *_LABELS_ALONE)),
    "qat": Training(
        {"qat": "student", "qat-ema": "teacher"}, "float", "weak", "no", 1,
        (_WEAK, "consistency.teacher=ema", "consistency.weight=0", *_LABELS_ALONE),
    ),
    "qat-strong": Training(
        {"qat-strong": "student"}, "float", "strong", "no", 1, (_STRONG, _NO_TEACHER, *_LABELS_ALONE)
    ),
    "pi": Training(
        {"pi": "student"}, "float", "strong", "no", 1,
        (_STRONG, "consistency.teacher=ema", "consistency.ema_decay=0", *_LABELS_ALONE),
    ),
    "cr": Training({"cr": BEST}, "float", "strong", "no", 1, (_STRONG, "consistency.teacher=ema", *_LABELS_ALONE)),
    "kd-unlabeled": Training(
        {"kd-unlabeled": "student"}, "float", "strong / strong", "distillation from the float network", 1,
        (_STRONG, "consistency.teacher=float"),
    ),
    "pseudo-label": Training(
        {"pseudo-label": "student"}, "float", "strong / strong", "labels of the float network", 1,
        (_STRONG, "consistency.teacher=pseudo-label"),
    ),
    "cr-unlabeled": Training(
        {REFERENCE: BEST}, "float", "strong / strong", "consistency", 1, (_STRONG, "consistency.teacher=ema"),
    ),
    "float-strong": Training(
        {"float-strong": "float", "float-strong+ptq": "student"}, "float", "strong", "no", FLOAT_SHARE,
        (*_FLOAT_ON, *_LABELS_ALONE),
    ),
    "float-strong+qat": Training(
        {"float-strong+qat": "student"}, "float-strong", "strong", "no", 1, (_STRONG, _NO_TEACHER, *_LABELS_ALONE)
    ),
    "float-cr": Training(
        {"float-cr": "float", "float-cr+ptq": "student"}, "float", "strong / strong", "consistency, in float",
        FLOAT_SHARE, _FLOAT_ON,
    ),
    "float-cr+qat": Training(
        {"float-cr+qat": "student"}, "float-cr", "strong / strong", "consistency, in float", 1,
        (_STRONG, _NO_TEACHER, *_LABELS_ALONE),
    ),
    "float-cr+cr": Training(
        {"float-cr+cr": BEST}, "float-cr", "strong / strong", "consistency, in float and in QAT", 1,
        (_STRONG, "consistency.teacher=ema"),
    ),
}  # fmt: skip
METHODS: dict[str, str] = {method: name for name, training in TRAININGS.items() for method in training.methods}


def needed(methods: tuple[str, ...]) -> list[str]:
    """Return the names of the training runs that `methods` need (all if empty), each after the one it starts from.

    Raises:
        UsageError: A method does not exist.
    """
    unknown = sorted(set(methods) - METHODS.keys())
    if unknown:
        msg = f"--methods: {unknown[0]} is not one of {', '.join(METHODS)}"
        raise UsageError(msg)
    found: set[str] = set()
    for method in methods or METHODS:
        name: str | None = METHODS[method]
        while name is not None:
            found.add(name)
            name = TRAININGS[name].start
    return [name for name in TRAININGS if name in found]


def settings(name: str, config: Recipe, factor: float = 1.0) -> tuple[str, ...]:
    """Return the changes that a training run of a study makes to the recipe, as "key=value" texts for `--set`.

    Args:
        name: Name of the training run in `TRAININGS`.
        config: The recipe.
        factor: Factor on the optimizer steps of all trainings except "float", from which the others start.
    """
    training, epochs = TRAININGS[name], config.qat.epochs * factor
    found = list(training.settings)
    if training.start == "float" and training.steps < 1:
        # Further float training uses the settings of QAT.
        found += [f"float.epochs={max(1, round(epochs * FLOAT_SHARE))}", f"float.batch_size={config.qat.batch_size}"]
        found += [f"float.lr={config.qat.lr}", f"float.weight_decay={config.qat.weight_decay}"]
        ema = config.consistency
        if name == "float-cr":
            given = f"weight: {ema.weight}, ramp_up: {ema.ramp_up}, temperature: {ema.temperature}"
            found.append(f"float.consistency={{teacher: ema, {given}, ema_decay: {ema.ema_decay}}}")
    elif training.start not in (None, "float"):
        found.append(f"qat.epochs={max(1, round(epochs) - round(epochs * FLOAT_SHARE))}")
    elif training.start == "float":
        found.append(f"qat.epochs={max(1, round(epochs))}")
    return tuple(found)
