"""Lists the images of `crqat quantize`, and splits them into calibration, judging and test images."""

from __future__ import annotations

from pathlib import Path

from crqat.core.errors import UsageError
from crqat.core.field_bounds import user_path
from crqat.pipeline.commands.quantize_request import Request

# Largest number of calibration images; a folder with fewer than twice as many gives half of its images.
CALIBRATION = 100
_FEWEST = 20


def listed(folder: Path, option: str, labels: bool) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """Return the class names (None without labels), and a map of image paths to class indices (0 without labels)."""
    from crqat.train.data.imagefolder import list_images

    folder = user_path(str(folder), option)
    paths = [file.path.relative_to(folder) for file in list_images(folder, option)]
    names = tuple(sorted({path.parts[0] for path in paths if len(path.parts) > 1}))
    loose = [path.name for path in paths if len(path.parts) == 1]
    if not labels or not names:
        return None, {str(path): 0 for path in paths}
    if loose:
        msg = f"{option}: {folder} has images outside its class folders, like {loose[0]}; move them, or use --no-labels"
        raise UsageError(msg)
    if len(names) == 1:
        msg = f"{option}: {folder} has one class folder, {names[0]}; add folders of other classes, or use --no-labels"
        raise UsageError(msg)
    return names, {str(path): names.index(path.parts[0]) for path in paths}


def split(
    request: Request, images: dict[str, int], judging: dict[str, int] | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the calibration and the test images, split at random by the request's seed.

    Raises:
        UsageError: There are too few images, or an image of `--test` is also a calibration image.
    """
    import torch

    if len(images) < _FEWEST:
        msg = f"--images: {request.images} has {len(images)} images; at least {_FEWEST} are needed"
        raise UsageError(msg)
    count = min(CALIBRATION, len(images) // 2) if judging is None else min(CALIBRATION, len(images))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(request.seed)).tolist()
    paths = list(images)
    calibrating = {paths[index]: images[paths[index]] for index in sorted(order[:count])}
    if judging is None:
        return calibrating, {paths[index]: images[paths[index]] for index in sorted(order[count:])}
    root = (request.test or request.images).resolve()
    test = {str(root / path): label for path, label in judging.items()}
    _check_apart(request, calibrating, test)
    return calibrating, test


def _check_apart(request: Request, calibrating: dict[str, int], test: dict[str, int]) -> None:
    """Check that no calibration image is a test image."""
    root = request.images.resolve()
    same = {(root / path).resolve() for path in calibrating} & {(root / path).resolve() for path in test}
    if same:
        msg = (
            f"--test: {len(same)} of its images are among the calibration images, such as {min(same)}; give a folder "
            "of other images, or leave --test out to split --images"
        )
        raise UsageError(msg)


def halves(request: Request, images: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Split the test images at random: one half selects the quantization method, the other tests the selected one."""
    import torch

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(request.seed + 1)).tolist()
    chosen, paths = set(order[: len(images) // 2]), list(images)
    halves: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for index, path in enumerate(paths):
        halves[index not in chosen][path] = images[path]
    return halves
