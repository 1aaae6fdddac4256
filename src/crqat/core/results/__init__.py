"""Dataclasses of the JSON files that stages write; `crqat.core.typed_json` reads and writes them.

Fields that later stages rely on are required. Fields that are recorded only as evidence have a default, so that files
of earlier versions, which lack them, can still be read.
"""
