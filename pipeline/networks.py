from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Images:
    size: int
    verified: int
    cifar10: Path | None
