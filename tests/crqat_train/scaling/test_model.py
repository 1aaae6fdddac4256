"""The formula is what it says, and the fit finds the constants that timings were made from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from crqat.train.scaling import model as scaling
from crqat.train.scaling.model import Constants, Link, all_reduce_terms, fit, fit_rounds, predict

CONSTANTS = Constants(
    batch=64,
    gradient_bytes=1_000_000,
    image_bytes=3000,
    step_seconds=0.01,
    image_seconds=0.001,
    data_rate=1e9,
    holds=4,
    local=Link(latency=1e-4, bandwidth=1e9),
    between=Link(latency=1e-3, bandwidth=1e8),
)


def test_one_process_exchanges_nothing() -> None:
    row = predict(CONSTANTS, 1)
    assert row["step_seconds"] == pytest.approx(0.01 + 64 * 0.001)
    assert row["all_reduce_seconds"] == 0
    assert row["efficiency"] == 1
    assert row["images_per_second"] == pytest.approx(64 / 0.074)
    assert row["limit"] == "compute"


def test_processes_of_one_machine_use_the_measured_link() -> None:
    row = predict(CONSTANTS, 4)
    # Six steps of the ring, in which each process sends one and a half times the gradients.
    assert row["all_reduce_seconds"] == pytest.approx(6e-4 + 1.5e6 / 1e9)
    assert row["compute_seconds"] == pytest.approx(0.026)
    assert row["step_seconds"] == pytest.approx(0.0281)
    assert row["efficiency"] == pytest.approx(0.074 / (4 * 0.0281))
    assert row["machines"] == 1


def test_more_machines_use_the_given_link() -> None:
    row = predict(CONSTANTS, 8)
    assert row["machines"] == 2
    assert row["all_reduce_seconds"] == pytest.approx(14e-3 + 2 * 7 / 8 * 1e6 / 1e8)
    assert row["limit"] == "all-reduce"


@pytest.mark.parametrize(
    ("constants", "processes", "reason"),
    [
        (replace(CONSTANTS, between=None), 8, "the link between machines was not given"),
        (replace(CONSTANTS, local=None), 2, "the link on one machine was not measured"),
    ],
)
def test_nothing_is_predicted_from_a_constant_that_is_not_known(
    constants: Constants, processes: int, reason: str
) -> None:
    row = predict(constants, processes)
    assert reason in row["not_predicted"]
    assert "step_seconds" not in row


def test_an_indivisible_batch_is_that_of_the_fullest_process() -> None:
    assert predict(CONSTANTS, 3)["local_batch"] == 22


def test_the_source_is_shared_by_the_processes_of_a_machine() -> None:
    slow = replace(CONSTANTS, data_rate=1e6)
    one, four, eight = (predict(slow, number) for number in (1, 4, 8))
    assert one["data_seconds"] == four["data_seconds"] == pytest.approx(64 * 3000 / 1e6)
    assert eight["data_seconds"] == pytest.approx(four["data_seconds"] / 2)
    assert four["limit"] == "data"
    assert four["step_seconds"] == four["data_seconds"]
    assert four["efficiency"] == pytest.approx(0.25)


def test_the_fit_recovers_the_constants_of_compute() -> None:
    terms = [(1.0, size) for size in (8, 23, 64)]
    assert fit(terms, [0.01 + 0.002 * size for _, size in terms]) == pytest.approx((0.01, 0.002))


def test_the_fit_recovers_latency_and_bandwidth() -> None:
    terms = [all_reduce_terms(4, size) for size in (1e4, 1e6, 4e6)]
    seconds = [2e-5 * steps + sent / 3e9 for steps, sent in terms]
    assert fit(terms, seconds) == pytest.approx((2e-5, 1 / 3e9))


def test_no_constant_is_negative() -> None:
    # The line through these points begins below zero.
    constant, slope = fit([(1.0, 1.0), (1.0, 2.0)], [1.0, 3.0])
    assert constant == 0
    assert slope == pytest.approx(15 / 13)  # where (1 - s)^2 + (1 - 2 s / 3)^2, the relative errors, is smallest


def test_rounds_give_the_spread_of_each_constant() -> None:
    chance, terms = np.random.default_rng(0), [(1.0, size) for size in (8, 64)]
    rounds = [[(0.01 + 0.002 * size) * chance.uniform(0.99, 1.01) for _ in range(101)] for _, size in terms]
    constant, slope = fit_rounds(terms, rounds)
    assert constant["value"] == pytest.approx(0.01, rel=0.05)
    assert slope["value"] == pytest.approx(0.002, rel=0.01)
    assert slope["n"] == 101
    low, high = slope["quartiles"]
    assert 0.00198 < low < slope["value"] < high < 0.00202


def test_processes_asked_for_by_default() -> None:
    assert scaling.default_processes(1, 64, between=False) == [1]
    assert scaling.default_processes(8, 256, between=False) == [1, 2, 4, 8]
    assert scaling.default_processes(6, 256, between=False) == [1, 2, 4]
    assert scaling.default_processes(8, 256, between=True) == [1, 2, 4, 8, 16, 32, 64]
    assert scaling.default_processes(8, 16, between=True) == [1, 2, 4]  # four images a process, not fewer


def test_compute_is_measured_from_the_largest_to_the_smallest_batch_asked_for() -> None:
    assert scaling.local_batches(64, [1, 2, 16]) == [4, 16, 64]
    assert scaling.local_batches(64, [1]) == [32, 45, 64]
    assert scaling.local_batches(2, [2]) == [1, 2]
    assert scaling.local_batches(1, [1]) == [1, 2]
