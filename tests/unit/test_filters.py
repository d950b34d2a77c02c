"""OpenAI's filters: what they say to LanceDB, and what of them is refused. LanceDB itself judges the predicates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest

from deployments.errors import BadRequest
from deployments.retrieval.filters import checked_attributes, decoded, encoded, predicate

FILES: dict[str, dict[str, Any]] = {
    "german": {"lang": "de", "year": 2024.0, "draft": True},
    "english": {"lang": "en", "year": 1999.0, "draft": False},
    "odd": {"lang": 7.0, 'it\'s "a" key\\': "x' OR 1=1 --"},
    "bare": {},
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows = pa.array([encoded(attributes) for attributes in FILES.values()], pa.string())
    data = pa.table({"name": list(FILES)}).append_column(
        pa.field("attributes", pa.json_()), pa.chunked_array([pa.ExtensionArray.from_storage(pa.json_(), rows)])
    )
    return lancedb.connect(Path(tmp_path_factory.mktemp("filters"))).create_table("files", data)


def matching(table: Any, filters: Any) -> set[str]:
    where = predicate(filters)
    assert where is not None
    return {row["name"] for row in table.search().where(where).limit(100).to_list()}


def compare(kind: str, key: str, value: Any) -> dict[str, Any]:
    return {"type": kind, "key": key, "value": value}


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (compare("eq", "lang", "de"), {"german"}),
        (compare("ne", "lang", "de"), {"english", "odd", "bare"}),
        (compare("eq", "lang", 7), {"odd"}),
        (compare("eq", "lang", "7"), set()),
        (compare("gt", "year", 1999), {"german"}),
        (compare("gte", "year", 1999), {"german", "english"}),
        (compare("lt", "year", 2024.5), {"german", "english"}),
        (compare("lte", "year", -1e300), set()),
        (compare("gt", "lang", "dz"), {"english"}),
        (compare("eq", "draft", True), {"german"}),
        (compare("eq", "draft", 1), set()),
        (compare("in", "lang", ["en", 7, "xx"]), {"english", "odd"}),
        (compare("nin", "lang", ["en", 7]), {"german", "bare"}),
        (compare("eq", 'it\'s "a" key\\', "x' OR 1=1 --"), {"odd"}),
        (compare("eq", "lang' OR 1=1 --", "de"), set()),
        ({"type": "and", "filters": [compare("gt", "year", 1900), compare("eq", "draft", False)]}, {"english"}),
        (
            {
                "type": "or",
                "filters": [
                    compare("eq", "lang", "de"),
                    {"type": "and", "filters": [compare("eq", "lang", "en"), compare("lt", "year", 2000)]},
                ],
            },
            {"german", "english"},
        ),
    ],
)
def test_a_filter_matches_what_it_says(table: Any, filters: Any, names: set[str]) -> None:
    assert matching(table, filters) == names


@pytest.mark.parametrize("key", ["a.b", "a[0]", "$", "ünï 日本", "0", "new\nline", "%", "/*", "{x}", "\u0000z", "?"])
def test_any_key_and_value_arrive_as_they_are(tmp_path: Path, key: str) -> None:
    stored = pa.array([encoded({key: f"v'{key}\\"}), encoded({"other": "v"})], pa.string())
    data = pa.table({"n": [1, 2]}).append_column(
        pa.field("attributes", pa.json_()), pa.chunked_array([pa.ExtensionArray.from_storage(pa.json_(), stored)])
    )
    table = lancedb.connect(tmp_path).create_table("t", data)
    assert table.count_rows(predicate(compare("eq", key, f"v'{key}\\"))) == 1


def test_no_filters_are_no_predicate() -> None:
    assert predicate(None) is None


@pytest.mark.parametrize(
    ("filters", "word"),
    [
        ([], "object"),
        ({}, "filters.type"),
        ({"type": "like", "key": "k", "value": "v"}, "filters.type"),
        ({"type": "eq", "key": "", "value": "v"}, "filters.key"),
        ({"type": "eq", "key": "k" * 65, "value": "v"}, "filters.key"),
        ({"type": "eq", "key": 3, "value": "v"}, "filters.key"),
        ({"type": "eq", "key": "k"}, "filters.value"),
        ({"type": "eq", "key": "k", "value": None}, "filters.value"),
        ({"type": "eq", "key": "k", "value": {}}, "filters.value"),
        ({"type": "eq", "key": "k", "value": float("nan")}, "finite"),
        ({"type": "eq", "key": "k", "value": 10**400}, "finite"),
        ({"type": "eq", "key": "k", "value": "\ud800"}, "filters.value"),
        ({"type": "eq", "key": "k", "value": "v" * 513}, "512"),
        ({"type": "gt", "key": "k", "value": True}, "boolean"),
        ({"type": "in", "key": "k", "value": "v"}, "list"),
        ({"type": "in", "key": "k", "value": []}, "1 to"),
        ({"type": "in", "key": "k", "value": [1, None]}, "filters.value[1]"),
        ({"type": "eq", "key": "k", "value": 1, "sql": "1=1"}, "filters.sql"),
        ({"type": "and", "filters": []}, "filters.filters"),
        ({"type": "or", "filters": [{"type": "eq", "key": "k", "value": 1}, 7]}, "filters.filters[1]"),
        ({"type": "or", "filters": [{"type": "eq", "key": "k", "value": 1}] * 101}, "100 comparisons"),
    ],
)
def test_a_wrong_filter_is_refused_with_its_place(filters: Any, word: str) -> None:
    with pytest.raises(BadRequest) as refused:
        predicate(filters)
    assert word in refused.value.message
    assert refused.value.param == "filters"


def test_deep_nesting_is_refused() -> None:
    filters: Any = compare("eq", "k", 1)
    for _ in range(2000):
        filters = {"type": "and", "filters": [filters]}
    with pytest.raises(BadRequest, match="nested"):
        predicate(filters)


def test_attributes_come_back_with_their_types() -> None:
    given = {"s": "7", "f": 7.0, "b": True, "ü'\"": "x"}
    back = decoded(encoded(given))
    assert back == given
    assert [type(value) for value in back.values()] == [str, float, bool, str]


@pytest.mark.parametrize(
    "attributes",
    [
        [],
        {f"k{i}": 1 for i in range(17)},
        {"k" * 65: 1},
        {"k": "v" * 513},
        {"k": None},
        {"k": [1]},
        {"k": float("inf")},
    ],
)
def test_attributes_beyond_openais_limits_are_refused(attributes: Any) -> None:
    with pytest.raises(BadRequest):
        checked_attributes(attributes)


def test_whole_numbers_become_floats() -> None:
    assert checked_attributes({"year": 2024, "draft": False}) == {"year": 2024.0, "draft": False}
    assert checked_attributes(None) == {}
