"""Emulates an ARM board: Debian's arm64 Python and ONNX Runtime's aarch64 wheels in qemu's user mode.

Nothing is installed and no root access is needed: packages and wheels are unpacked into a cache, and a shell script for
each CPU model runs that Python in qemu-aarch64. This shows what an ARM CPU computes, but not how fast.

``python -m bench.emulated_arm`` fills the cache, as `make test-arm` does; it exits with 1 if that fails.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bench.onnxruntime_process import NotRun

# Maps a CPU model of qemu to its kernel's description: implementer, part, and features.
_ARMV8 = "fp asimd aes pmull sha1 sha2 crc32 cpuid"
_DOT = f"{_ARMV8} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
CPUS = {
    "cortex-a57": ("0x41", "0xd07", _ARMV8),  # Jetson Nano and TX2: no dot product
    "cortex-a76": ("0x41", "0xd0b", _DOT),  # like the Cortex-A78AE of Jetson Orin: dot product
    "max": ("0x00", "0x051", f"{_DOT} sve i8mm bf16"),  # all features of qemu, including int8 matrix products and SVE
}
# Debian 12's Python, and the libraries that it, numpy and ONNX Runtime load.
PYTHON = "python3.11"
PACKAGES = (
    PYTHON, f"{PYTHON}-minimal", f"lib{PYTHON}-minimal", f"lib{PYTHON}-stdlib", "libc6", "zlib1g", "libexpat1",
    "libssl3", "libbz2-1.0", "liblzma5", "libsqlite3-0", "libffi8", "libuuid1", "libstdc++6", "libgcc-s1",
    "libncursesw6", "libtinfo6", "libreadline8", "libcrypt1", "libnsl2", "libtirpc3", "libgomp1",
)  # fmt: skip
WHEELS = ("numpy==2.4.6", "flatbuffers==25.12.19", "packaging==26.4", "protobuf==7.36.2")
# The last ONNX Runtime for Python 3.10, which JetPack 6 has.
ONNXRUNTIME = "1.23.2"
TIME_LIMIT_SECONDS = 300.0
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64", "manylinux_2_17_aarch64")
# ONNX Runtime 1.28 and later crash at import if /proc/cpuinfo describes an x86 CPU, and qemu 7.2 shows the host's file.
# Files below qemu's -L take precedence over the host's.
_CPUINFO = """processor	: {number}
BogoMIPS	: 100.00
Features	: {features}
CPU implementer	: {implementer}
CPU architecture: 8
CPU variant	: 0x0
CPU part	: {part}
CPU revision	: 0

"""
# Processes that runtime_eval starts by sys.executable must also run in the emulator.
_START = 'import os, sys\n\nsys.executable = os.environ["CRQAT_EMULATED_PYTHON"]\n'
_SCRIPT = """#!/bin/sh
export PYTHONHOME='{root}/usr' PYTHONPATH='{site}' PYTHONNOUSERSITE=1 CRQAT_EMULATED_PYTHON='{script}'
exec qemu-aarch64 -cpu {cpu} -L '{sysroot}' '{root}/usr/bin/{python}' "$@"
"""


def cache() -> Path:
    """Return the cache folder: .cache/crqat/arm in the home directory, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "crqat" / "arm"


def python(cpu: str, onnxruntime: str = ONNXRUNTIME) -> Path:
    """Return a program that acts as a Python interpreter with numpy and ONNX Runtime on an emulated ARM CPU.

    Packages that are not yet in the cache are downloaded.

    Args:
        cpu: A key of `CPUS`.
        onnxruntime: Version of ONNX Runtime, such as "1.23.2".

    Raises:
        NotRun: There is no emulator, or the packages cannot be downloaded.
    """
    for program, package in (("qemu-aarch64", "qemu-user"), ("apt-get", "apt"), ("dpkg", "dpkg")):
        if shutil.which(program) is None:
            msg = f"not run: no {program}; install Debian's {package}"
            raise NotRun(msg)
    root, site = _root(), _site(onnxruntime)
    board = cache() / f"{cpu}-{onnxruntime}"
    script = board / "python"
    if not script.is_file():
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            made = Path(scratch) / "board"
            (made / "sysroot" / "proc").mkdir(parents=True)
            for name in ("lib", "usr"):
                (made / "sysroot" / name).symlink_to(root / name)
            implementer, part, features = CPUS[cpu]
            processors = (
                _CPUINFO.format(number=number, features=features, implementer=implementer, part=part)
                for number in range(os.cpu_count() or 1)
            )
            (made / "sysroot" / "proc" / "cpuinfo").write_text("".join(processors))
            sysroot = board / "sysroot"
            text = _SCRIPT.format(root=root, site=site, script=script, cpu=cpu, sysroot=sysroot, python=PYTHON)
            (made / "python").write_text(text)
            (made / "python").chmod(0o755)
            _keep(made, board)
    return script


@functools.cache
def _root() -> Path:
    """Return the folder of Debian's unpacked packages."""
    root = cache() / "debian-12-arm64"
    if root.is_dir():
        return root
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        folder = Path(scratch)
        for name in ("lists/partial", "cache/archives/partial", "packages", "root"):
            (folder / name).mkdir(parents=True)
        options = [
            f"-oDir::State::Lists={folder / 'lists'}",
            f"-oDir::Cache={folder / 'cache'}",
            "-oAPT::Sandbox::User=",
        ]
        options += ["-oAPT::Architecture=arm64", "-oAPT::Architectures=arm64"]
        _run(["apt-get", "-qq", *options, "update"], folder)
        _run(["apt-get", "-qq", *options, "download", *PACKAGES], folder / "packages")
        for package in sorted((folder / "packages").glob("*.deb")):
            _run(["dpkg", "-x", str(package), str(folder / "root")], folder)
        _keep(folder / "root", root)
    return root


@functools.cache
def _site(onnxruntime: str) -> Path:
    """Return the folder of the unpacked wheels, with a start file that keeps Python's own processes in the emulator."""
    site = cache() / f"onnxruntime-{onnxruntime}"
    if site.is_dir():
        return site
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        folder = Path(scratch)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        options += ["--python-version", PYTHON.removeprefix("python"), "--implementation", "cp"]
        for platform in _PLATFORMS:
            options += ["--platform", platform]
        wheels = [*WHEELS, f"onnxruntime=={onnxruntime}"]
        _run([sys.executable, "-m", "pip", "download", *options, "--dest", str(folder / "wheels"), *wheels], folder)
        for wheel in sorted((folder / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder / "site")
        (folder / "site" / "sitecustomize.py").write_text(_START)
        _keep(folder / "site", site)
    return site


def _keep(made: Path, place: Path) -> None:
    """Move a complete file or folder to its place, unless another process was faster."""
    try:
        made.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def run_program(command: list[str], folder: Path, name: str, limit: float = TIME_LIMIT_SECONDS) -> str:
    """Run a program and return what it prints.

    Args:
        command: The program and its arguments.
        folder: Working directory.
        name: Name of the program in messages.
        limit: Seconds after which it is stopped.

    Raises:
        NotRun: The program fails or exceeds the time limit; the message has its last line.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired as error:
        msg = f"not run: {name} is not finished after {limit:g} s"
        raise NotRun(msg) from error
    if done.returncode:
        words = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        msg = f"not run: {name} ended with {done.returncode}: {words[-1] if words else 'no word'}"
        raise NotRun(msg)
    return done.stdout


def _run(command: list[str], folder: Path) -> None:
    run_program(command, folder, "pip" if "pip" in command else command[0])


def main() -> int:
    """Fill the cache for all CPU models; return 0, or 1 after printing the reason."""
    try:
        for cpu in CPUS:
            print(python(cpu))
    except NotRun as reason:
        print(reason, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
