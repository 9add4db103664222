"""A check as JUnit XML, which CI systems show: one test case for each layer and kind of row."""

from __future__ import annotations

from xml.etree import ElementTree

from moescope.diagnosis.check import CheckResult, Finding, RouterCheck, uncompared
from moescope.diagnosis.check_rows import KINDS
from moescope.safety import printable, single_line

TITLES = {
    "experts": "the same experts",
    "order": "in the same order",
    "score_sum": "the same score sum",
    "weights": "the same weights",
    "valid": "finite logits",
}


def junit(result: CheckResult, model: str, golden: str, seconds: float) -> bytes:
    """One `testsuites` document, UTF-8. Names of a stranger's are made printable first."""
    failures = sum(not passed for router in result.routers for passed in router.passed.values())
    count = {"tests": str(len(result.routers) * len(KINDS)), "failures": str(failures)}
    name = single_line(f"{model} against {golden}", 200)
    root = ElementTree.Element("testsuites", {"name": "moescope check", **count})
    skipped = sum(not result.compared[kind] for kind in KINDS) * len(result.routers)
    more = {"errors": "0", "skipped": str(skipped), "time": f"{seconds:.3f}"}
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **count, **more})
    listed = ElementTree.SubElement(suite, "properties")
    for key, value in _properties(result).items():
        ElementTree.SubElement(listed, "property", {"name": key, "value": single_line(value, 200)})
    for index, router in enumerate(result.routers):
        for kind in KINDS:
            _case(suite, result, index, router, kind)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, "utf-8", xml_declaration=True)) + b"\n"


def _properties(result: CheckResult) -> dict[str, str]:
    names = {"weights": "weights (by samples)"}
    same = {f"same {names.get(name, name)}": str(v) for name, v in result.same.items()}
    return {
        "tokens": str(result.tokens),
        "dtype": result.dtype,
        "golden dtype": result.golden_dtype,
        **same,
    }


def _case(
    suite: ElementTree.Element, result: CheckResult, index: int, router: RouterCheck, kind: str
) -> None:
    site = " attention" if router.site == "attention" else ""
    place = f"L{router.layer:02d}{site}"
    case = ElementTree.SubElement(
        suite, "testcase", {"classname": f"moescope.{place}", "name": TITLES[kind]}
    )
    if not result.compared[kind]:
        ElementTree.SubElement(case, "skipped", {"message": uncompared(result, kind)})
    elif not router.passed[kind]:
        message = f"{router.failed[kind]} of {router.rows} rows differ"
        rows = [f for f in result.findings if f.router == index and f.kind == kind]
        failure = ElementTree.SubElement(case, "failure", {"message": message, "type": kind})
        failure.text = printable("\n".join(line_of(row) for row in rows)) or None


def line_of(row: Finding) -> str:
    """`sequence 0 @12 L03  experts: expected E4, found E9, margin 0.21`."""
    place = f"sequence {row.sequence} @{row.position} L{row.layer:02d}"
    return (
        f"{place}  {row.kind}: expected {row.expected}, found {row.found}, margin {row.margin:.3g}"
    )
