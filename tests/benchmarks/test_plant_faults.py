"""The faults that are planted to test the tests: each has its place in the code as it is, and a test that is there."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from benchmarks.plant_faults import ROOT, check, read

FAULTS = read()


def test_each_can_be_planted() -> None:
    assert {fault.about: problem for fault in FAULTS if (problem := check(fault))} == {}


def test_every_package_has_two_and_half_of_all_are_numbers() -> None:
    places = Counter(fault.file.rpartition("/")[0] or fault.file for fault in FAULTS)
    inits = [path for top in ("megapix", "data_prep") for path in (ROOT / top).rglob("__init__.py")]
    packages = {str(path.parent.relative_to(ROOT)) for path in inits}
    assert {package: places[package] for package in packages if places[package] < 2} == {}
    assert len({fault.about for fault in FAULTS}) == len(FAULTS)
    assert 2 * sum(fault.number for fault in FAULTS) >= len(FAULTS)


def test_what_cannot_be_planted_is_named() -> None:
    fault = FAULTS[0]
    assert check(replace(fault, file="megapix/none.py")) == "megapix/none.py is not there"
    assert check(replace(fault, old="no such text")) == f"its text is 0 times in {fault.file}"
    assert check(replace(fault, new="(")).startswith(f"{fault.file} is no Python with it: ")
    assert (
        check(replace(fault, test="tests/test_rng.py::test_none[7]")) == "tests/test_rng.py::test_none[7] is not there"
    )
