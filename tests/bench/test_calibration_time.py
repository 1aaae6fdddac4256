"""All ways on a small network: steps, medians and ratios, and what a way that cannot be gone says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import calibration_time, exporter_peers
from bench.calibration_time import OURS, VERIFICATION, WHOLE, Steps


def steps(**seconds: float) -> Steps:
    return {name: {"wall_s": s, "cpu_s": 2 * s, "peak_bytes": int(s * 1e9)} for name, s in seconds.items()}


def row(way: str, *rounds: Steps, status: str = "written") -> dict[str, Any]:
    return {"model": "net", "way": way, "status": status, "rounds": list(rounds)}


def test_medians_leave_verification_out_and_ratios_are_to_the_fastest_peer() -> None:
    mine = [steps(layout=1.0, calibration=c, verification=9.0) for c in (2.0, 30.0, 3.0)]
    rows = calibration_time.summarized(
        [row(OURS, *mine), row("slow", steps(all=8.0)), row("fast", steps(all=2.0)), row("none", status="failed: x")]
    )
    ours = rows[0]
    assert (ours["wall_s"], ours["cpu_s"], ours["peak_bytes"]) == (4.0, 8.0, 3e9)
    assert ours["steps"]["calibration"] == {"wall_s": 3.0, "cpu_s": 6.0}
    assert (ours["wall_s_to_fastest_peer"], ours["cpu_s_to_fastest_peer"]) == (2.0, 2.0)
    assert rows[1]["wall_s_to_fastest_peer"] == 4.0
    assert rows[3]["wall_s"] is rows[3]["wall_s_to_fastest_peer"] is rows[3]["peak_bytes"] is None
    assert calibration_time.cells(ours)[2:5] == ["4.0", "8.0", "2.00"]
    assert "verification 9.0 (18.0)" in calibration_time.cells(ours)[-1]
    assert all(len(calibration_time.cells(each)) == len(calibration_time.COLUMNS) for each in rows)


@pytest.mark.slow
def test_ours_and_a_peer_are_measured_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    absent_way = exporter_peers.Way(lambda source, out: None, ("a_peer_that_is_not_there",))
    monkeypatch.setitem(exporter_peers.WAYS, "absent", absent_way)
    ways = (OURS, WHOLE, "ONNX Runtime, U8S8", "absent")
    ours, whole, peer, absent = calibration_time.measure("cifar/resnet20", rounds=1, images=40, size=32, ways=ways)
    assert [row["status"] for row in (ours, whole, peer)] == ["written"] * 3
    assert absent["status"] == "not run: not installed (a_peer_that_is_not_there)"
    assert [list(steps) for steps in ours["rounds"]] == [["layout", "calibration", "export", VERIFICATION]]
    assert sorted(whole["rounds"][0]) == ["export", "recipe", "train", VERIFICATION]
    for measured in (ours, whole, peer):
        assert len(measured["rounds"]) == 1
        assert 0 < measured["wall_s"] < 60 and 0 < measured["cpu_s"] < 120
        assert 1e8 < measured["peak_bytes"] < 4e9
    assert peer["wall_s_to_fastest_peer"] == 1.0
    json.dumps([ours, whole, peer, absent])
