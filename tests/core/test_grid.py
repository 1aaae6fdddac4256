"""Grids: codes at ties and bounds, both shapes of scale, and the way to JSON and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crqat.core.errors import UsageError
from crqat.core.grid import Grid, grids_hash, load_grids, save_grids


def grid(scale: list[float], zero_point: int = 0, qmin: int = -127, qmax: int = 127, axis: int | None = None) -> Grid:
    return Grid(np.array(scale, dtype=np.float32), zero_point, qmin, qmax, axis)


def test_ties_go_to_even_and_bounds_clip() -> None:
    values = np.array([-1e9, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 63.4, 63.5, 64.0, np.inf], dtype=np.float32)
    codes = grid([0.5]).quantize(values)
    assert codes.dtype == np.int32
    assert codes.tolist() == [-127, -2, -2, 0, 0, 2, 2, 127, 127, 127, 127]


def test_zero_point_shifts_after_rounding() -> None:
    """Rounding x/s + zero point in one step would send the tie 0.5 + 129 to even the other way."""
    shifted = grid([1.0], zero_point=129, qmin=0, qmax=255)
    values = np.array([-200, -0.5, 0.5, 1.5, 126.0, 200], dtype=np.float32)
    assert shifted.quantize(values).tolist() == [0, 129, 129, 131, 255, 255]
    assert shifted.dequantize(np.array([0, 129, 255], dtype=np.uint8)).tolist() == [-129.0, 0.0, 126.0]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_channel_scales_act_on_their_axis(axis: int) -> None:
    scales = [0.5, 0.25, 2.0]
    values = np.random.default_rng(0).normal(size=(3, 3, 3)).astype(np.float32)
    codes = grid(scales, axis=axis).quantize(values)
    for channel, scale in enumerate(scales):
        expected = grid([scale]).quantize(np.take(values, channel, axis))
        np.testing.assert_array_equal(np.take(codes, channel, axis), expected)


def test_every_code_survives_the_way_through_its_value() -> None:
    for scale in (1e-6, 0.1, 1 / 3, 7.7):
        codes = np.arange(-127, 128, dtype=np.int32)
        values = grid([scale]).dequantize(codes)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(grid([scale]).quantize(values), codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": [0.0]}, "finite and positive"),
        ({"scale": [-1.0]}, "finite and positive"),
        ({"scale": [float("nan")]}, "finite and positive"),
        ({"scale": [1.0, float("inf")], "axis": 0}, "finite and positive"),
        ({"scale": [1e-60]}, "finite and positive"),
        ({"scale": [1.0, 1.0]}, "shape"),
        ({"scale": []}, "shape"),
        ({"scale": [1.0], "zero_point": 128}, "zero point"),
        ({"scale": [1.0], "qmin": 0, "qmax": 0}, "zero point"),
    ],
)
def test_what_is_no_grid_is_refused(arguments: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(**arguments)  # type: ignore[arg-type]


def test_files_return_the_same_bits(tmp_path: Path) -> None:
    scales = np.random.default_rng(1).lognormal(size=64).astype(np.float32)
    grids = {"conv1/weight": Grid(scales, 0, -8, 7, 0), "input": grid([0.1], 128, 0, 255)}
    save_grids(tmp_path / "grids.json", grids)
    loaded = load_grids(tmp_path / "grids.json")
    assert loaded.keys() == grids.keys()
    for edge, expected in grids.items():
        np.testing.assert_array_equal(loaded[edge].scale.view(np.uint32), expected.scale.view(np.uint32))
        assert loaded[edge].to_json() == expected.to_json()
    assert grids_hash(loaded) == grids_hash(dict(reversed(grids.items())))


def test_hash_changes_with_the_last_bit_of_a_scale() -> None:
    one = grid([0.1])
    other = Grid(np.nextafter(one.scale, np.float32(1)), 0, -127, 127)
    assert grids_hash({"x": one}) != grids_hash({"x": other})


@pytest.mark.parametrize("text", ["", "[]", '{"x": 1}', '{"x": {"scale": [1]}}', '{"x": {"scale": "a"}}', "\x00"])
def test_damaged_files_are_usage_errors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "grids.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"grids\.json: not a file of Grids"):
        load_grids(path)


def test_wrong_shapes_in_a_file_are_usage_errors(tmp_path: Path) -> None:
    path = tmp_path / "grids.json"
    good = grid([0.5]).to_json()
    for key, value in (
        ("scale", [[1.0]]),
        ("scale", []),
        ("qmin", None),
        ("zero_point", "x"),
        ("qmax", 9.5),
        ("qmax", 2**40),
    ):
        path.write_text(json.dumps({"x": {**good, key: value}}))
        with pytest.raises(UsageError, match="not a file of Grids"):
            load_grids(path)


SCALES = st.floats(min_value=2.0**-140, max_value=2.0**100, width=32, exclude_min=True)
CODES = st.sampled_from([(-127, 127), (-128, 127), (0, 127), (0, 255), (-8, 7), (0, 15), (-2, 1)])


@settings(max_examples=200, deadline=None)
@given(SCALES, CODES, st.data())
def test_a_value_of_a_grid_is_kept_whatever_the_scale(
    scale: float, bounds: tuple[int, int], data: st.DataObject
) -> None:
    made = grid([scale], data.draw(st.integers(*bounds)), *bounds)
    codes = np.arange(bounds[0], bounds[1] + 1)
    values = made.dequantize(codes)
    np.testing.assert_array_equal(made.quantize(values), codes)
    drawn = data.draw(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
    with np.errstate(over="ignore"):
        kept = made.dequantize(made.quantize(np.array(drawn, np.float32)))
    np.testing.assert_array_equal(made.dequantize(made.quantize(kept)), kept)
    assert np.isin(kept, values).all()


PARTS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "scale": PARTS | st.lists(PARTS, max_size=3) | st.lists(st.floats(2.0**-10, 1, width=32), max_size=3),
            **{key: PARTS | st.integers(-130, 130) for key in ("zero_point", "qmin", "qmax", "axis")},
        },
    )
)
def test_any_object_is_a_grid_or_a_value_error(data: dict[str, Any]) -> None:
    try:
        made = Grid.from_json(data)
    except ValueError:
        return
    assert Grid.from_json(json.loads(json.dumps(made.to_json()))).to_json() == made.to_json()
    assert made.qmin <= made.zero_point <= made.qmax and (made.scale > 0).all()
