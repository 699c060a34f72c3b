"""Families of causal LMs: each is served rightly, or refused with the reason, as docs/families.md says."""

import importlib
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
families = importlib.import_module("kv_families")
sys.path.pop(0)

PAGE = families.PAGE.read_text("utf-8")
SERVED = re.search(r"## Supported \(\d+\)\n\n(.*)\.", PAGE)[1].split(", ")
REFUSED = {
    family: reason
    for names, reason in re.findall(r"^\| (.*?) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    for family in names.split(", ")
    if family in families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not reason.startswith("not tested")
}
LARGE = ("dots3_note_text", "gemma3", "gemma4", "gemma4_unified", "longcat_flash", "xlm")  # as tiny as they get


def test_the_page_knows_all_families():
    known = {*SERVED, *REFUSED, *families.UNBUILT}
    assert known == set(families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(SERVED) > 80 and len(REFUSED) > 40


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in SERVED[::2] if f not in LARGE])
def test_a_family_is_served_rightly(family):
    assert families.verdict(family) == "served"


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in REFUSED if f not in LARGE])
def test_a_family_is_refused_with_the_reason(family):
    assert families.without_names(families.verdict(family)) == REFUSED[family]
