"""Runs the training runs of a study, each in its own process, and stores their results."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from crqat.core.errors import ToolError
from crqat.core.progress import Progress, quiet
from crqat.pipeline import console
from crqat.pipeline.study import report
from crqat.pipeline.study.study import STARTS, Job, Study, write

_POLL_SECONDS = 0.5


def run(study: Study, jobs: Sequence[Job], processes: int, progress: Progress = quiet) -> list[str]:
    """Run the training runs that have no results yet, and write the study's files after each.

    Args:
        study: Study to which the results are added.
        jobs: Training runs in order; each waits until the one that it starts from has ended.
        processes: Number of training runs in parallel.
        progress: Reports how many training runs have ended, and how far each of the others is.

    Returns:
        One line of text for each training run that failed, with the reason.
    """
    pending = [job for job in jobs if not study.done(job)]
    wanted = {job.start for job in pending}
    pending = [job for job in jobs if job in pending or (job.name in wanted and not study.weights(job.name).is_file())]
    console.say(f"study: {len(jobs) - len(pending)} of {len(jobs)} training runs are already finished")
    for job in pending:
        row = next((row for row in study.rows if row.key == job.key), None)
        if row is not None:
            changed = study.replaced(job, row)
            why = f"others start from its weights, and {study.weights(job.name)} is missing"
            if changed:
                why = f"its result descends from other weights than {changed[0]} has"
            console.say(f"{job.training}, seed {job.seed}{_cell(job)}: runs again, because {why}")
    if pending:
        _make_weights_folder(study)
    failed: dict[str, str] = {}
    shown = ""
    with _processes() as running:
        while pending or running:
            for job in list(pending):
                blocked = job.start is not None and (
                    any(job.start == other.name for other in (*pending, *running)) or job.start in failed
                )
                if job.start in failed:
                    failed[job.name] = f"{job.training}, seed {job.seed}: not run, because {job.start} failed"
                    pending.remove(job)
                elif not blocked and len(running) < processes:
                    running[job] = _start(study, job)
                    pending.remove(job)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    _end(study, job, process.returncode, failed)
                    # Its float weights may differ from those that older results descend from.
                    known = {*pending, *running, *(other for other in jobs if other.name in failed)}
                    pending += [other for other in jobs if other not in known and not study.done(other)]
            state = "; ".join(
                f"{job.training}, seed {job.seed}{_cell(job)}: {_last_line(study, job)}" for job in running
            )
            if state != shown:
                progress("training runs", len(jobs) - len(pending) - len(running), len(jobs), state)
                shown = state
            time.sleep(_POLL_SECONDS)
    return list(failed.values())


def _last_line(study: Study, job: Job) -> str:
    """Return the last line of a training run's log, which states its progress; "starts" if the log is empty."""
    _, _, log = _files(study, job)
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return console.printable(lines[-1]) if lines else "starts"


@contextmanager
def _processes() -> Iterator[dict[Job, subprocess.Popen[bytes]]]:
    """Context manager that yields a dictionary for the active processes; on exit, these save and end."""
    running: dict[Job, subprocess.Popen[bytes]] = {}
    try:
        yield running
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()


def _files(study: Study, job: Job) -> tuple[Path, Path, Path]:
    return tuple(study.runs / f"{job.name}.{kind}" for kind in ("job", "result", "log"))  # type: ignore[return-value]


def _start(study: Study, job: Job) -> subprocess.Popen[bytes]:
    file, result, log = _files(study, job)
    study.runs.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    given = [*job.overrides, f"name={job.name}"]
    given += [] if job.start is None else [f"model.weights={study.weights(job.start)}"]
    file.write_text(json.dumps({"recipe": str(study.path), "settings": given, "runs": str(study.runs)}))
    console.say(f"{job.training}, seed {job.seed}{_cell(job)}: starts; {log}")
    # One core each: two training runs in parallel on two cores are faster than one after the other on both.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as lines:
        command = [sys.executable, "-m", "crqat.pipeline.study.worker", str(file)]
        # A session of its own: Ctrl-C reaches only the study, which then ends its trainings in order. The pipe closes
        # when the study ends, however it ends, and the training ends with the pipe.
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=lines, stderr=lines, env=environment, start_new_session=True
        )


def _end(study: Study, job: Job, code: int, failed: dict[str, str]) -> None:
    _, result, log = _files(study, job)
    if code != 0 or not result.is_file():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        failed[job.name] = f"{job.training}, seed {job.seed}{_cell(job)}: {lines[-1] if lines else code} ({log})"
        console.say(failed[job.name])
        return
    if job.training in STARTS:
        _keep_weights(study, job)
    study.add(job, json.loads(result.read_text()))
    write(study)
    found = [row for row in study.rows if row.key == job.key]
    shown = ", ".join(f"{row.method} {100 * report.top1(row):.2f} %" for row in found)
    console.say(f"{job.training}, seed {job.seed}{_cell(job)}: {shown} in {found[0].seconds:.0f} s")


def _make_weights_folder(study: Study) -> None:
    folder = study.out.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{folder}: the folder for the float networks cannot be made: {error.strerror}; name another --out"
        raise ToolError(msg) from error


def _keep_weights(study: Study, job: Job) -> None:
    """Copy the float weights of a finished training run to where the runs that start from it find them."""
    file = study.weights(job.name)
    partial = file.with_suffix(".partial")
    try:
        shutil.copyfile(study.runs / job.name / "train" / "float.safetensors", partial)
        partial.replace(file)
    except OSError as error:
        msg = f"{error.filename or file}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error


def _cell(job: Job) -> str:
    labels = "" if job.labels is None else f", {job.labels} labels"
    return labels + ("" if job.bits is None else f", {job.bits} bits")
