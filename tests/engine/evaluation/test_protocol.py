"""Unlike protocols are refused, and every differing field is named."""

from __future__ import annotations

import copy
import json

import pytest

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.evaluation.protocol import differences, hash_texts, library_versions, refuse_unlike

PROTOCOL = {
    "common": {"seed": 0, "sampler": {"steps": 20, "eta": 0.0}, "size": [1, 32, 32]},
    "fidelity": {"n": 64, "value_range": "0-1"},
    "distribution": {"n": 5000, "extractors": {"fashion-features": {"sha256": "a" * 64}}},
    "versions": {"torch": "2.13"},
}


def changed(*path: str, value: object) -> dict:
    protocol = copy.deepcopy(PROTOCOL)
    place = protocol
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return protocol


def test_equal_protocols_are_comparable_also_after_json() -> None:
    fresh = changed("common", "size", value=(1, 32, 32))
    refuse_unlike(fresh, json.loads(json.dumps(PROTOCOL)), "x")


@pytest.mark.parametrize(
    "path",
    [
        ("common", "seed"),
        ("common", "sampler", "steps"),
        ("fidelity", "n"),
        ("fidelity", "value_range"),
        ("distribution", "extractors", "fashion-features", "sha256"),
    ],
    ids=".".join,
)
def test_any_other_field_is_refused_by_name(path: tuple[str, ...]) -> None:
    other = changed(*path, value=7)
    with pytest.raises(InputError, match=r"not comparable") as caught:
        refuse_unlike(PROTOCOL, other, "other.json")
    assert ".".join(path) in str(caught.value)
    assert "other.json" in str(caught.value)


def test_all_differences_are_listed() -> None:
    other = changed("common", "seed", value=1)
    other["fidelity"]["n"] = 32
    del other["common"]["sampler"]["eta"]
    assert [line.split(":")[0] for line in differences(PROTOCOL, other)] == ["common.sampler.eta", "common.seed", "fidelity.n"]


def test_versions_are_information_only() -> None:
    assert differences(PROTOCOL, changed("versions", "torch", value="3.0")) == []


def test_suites_that_one_lacks_are_not_compared() -> None:
    other = changed("fidelity", "n", value=64)
    del other["distribution"]
    refuse_unlike(PROTOCOL, other, "x")
    with pytest.raises(InputError, match="no suite in common"):
        refuse_unlike({"common": {}, "cost": {}, "versions": {}}, other, "x")


def test_the_hash_of_prompts_depends_on_order_and_division() -> None:
    assert hash_texts(None) is None
    assert len({hash_texts(texts) for texts in (["a", "b"], ["b", "a"], ["ab"], ["a, b"], [])}) == 5


def test_versions_of_absent_libraries_are_null() -> None:
    versions = library_versions()
    assert versions["torch"] and versions["torchmetrics"]
    assert all(value is None or value[0].isdigit() for value in versions.values())
