"""Writes a gate's verdicts as JUnit XML, which CI systems display."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from crqat.core.results.verdict import Verdict


def junit(verdicts: Sequence[Verdict], run: str) -> str:
    """Return verdicts as JUnit XML, with one testcase for each verdict (one rule on one file) of the run `run`.

    JUnit has four outcomes: "fail" becomes `failure`, "not run" becomes `skipped`, and both "inconclusive" and "error"
    become `error` with that word as the type.
    """
    count = [verdict.status for verdict in verdicts].count
    suite = ElementTree.Element(
        "testsuite",
        name=_xml_text(f"crqat gate {run}"),
        tests=str(len(verdicts)),
        failures=str(count("fail")),
        errors=str(count("inconclusive") + count("error")),
        skipped=str(count("not run")),
    )
    tags = {"fail": "failure", "inconclusive": "error", "error": "error", "not run": "skipped"}
    for verdict in verdicts:
        message = _xml_text(verdict.message)
        case = ElementTree.SubElement(suite, "testcase", classname=_xml_text(verdict.file), name=verdict.rule)
        if verdict.status == "pass":
            ElementTree.SubElement(case, "system-out").text = message
        else:
            ElementTree.SubElement(case, tags[verdict.status], type=verdict.status, message=message)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=False) + "\n"


def _xml_text(text: str) -> str:
    """Return the text with U+FFFD for characters that XML 1.0 cannot hold (a runtime's error text may have any)."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
