"""Facts about what data has to look like, when nobody trusts the data, and sometimes not the schema."""

import json
import time
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator

from rlm.errors import ConfigError, RLMError
from rlm.schemas import Schema, Schemas, of_json, of_type
from rlm.validator import DEPTH, PROBLEMS, SIZE

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
DRAFT_4 = "http://json-schema.org/draft-04/schema#"


class Colour(Enum):
    red = "red"
    blue = "blue"


class Item(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    price: Decimal = Field(ge=0)
    bought: date | None = None
    colours: set[Colour] = set()


class Order(BaseModel):
    items: list[Item]


ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {"items": {"type": "array", "items": {"$ref": "#/$defs/item"}}},
    "required": ["items"],
    "$defs": {
        "item": {
            "type": "object",
            "properties": {"name": {"type": "string", "minLength": 1}, "price": {"type": "number"}},
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}


def complaint(schema: dict[str, Any], value: Any, **settings: Any) -> str | None:
    return of_json(schema, **settings).parse(json.dumps(value), None)[1]


# --- texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [of_type(list[int]), of_json({"items": {"type": "integer"}})])
@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "  [1, 2]\n", "```json\n[1, 2]\n```", "\n```\n[1, 2]```\n", "```JSON \n[\n1, 2]\n\n```"],
)
def test_data_may_stand_in_a_fence_and_in_white_space(schema: Schema, text: str) -> None:
    assert schema.parse(text) == ([1, 2], None)


@pytest.mark.parametrize("schema", [of_type(str), of_json({"type": "string"})])
@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("plain", "plain"), (" as it is ", " as it is "), ("5", "5"), ("{", "{"), ('"in JSON"', "in JSON"),
        ("```\nx\n```", "```\nx\n```"),
    ],
)  # fmt: skip
def test_a_text_that_is_no_data_is_the_string_that_it_is(schema: Schema, text: str, data: str) -> None:
    assert schema.parse(text) == (data, None)


@pytest.mark.parametrize("schema", [of_type(Literal["yes", "no"]), of_json({"enum": ["yes", "no"]})])
def test_a_string_is_found_in_white_space_when_it_does_not_fit_with_it(schema: Schema) -> None:
    assert schema.parse("yes\n") == ("yes", None)
    data, why = schema.parse("perhaps")
    assert data is None
    assert why is not None
    assert "'yes'" in why


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (of_type(str), "5"), (of_json({"type": ["string", "null"]}), "{}"),
        (of_json({"enum": ["5", "6"]}), "5"),
        (of_json({"anyOf": [{"type": "string"}, {"type": "null"}]}), "[1]"),
    ],
)  # fmt: skip
def test_json_is_the_text_that_it_is_where_strings_are_wanted(schema: Schema, text: str) -> None:
    assert schema.parse(text) == (text, None)


@pytest.mark.parametrize("schema", [{"required": ["a"]}, {"items": {"type": "null"}, "minProperties": 2}])
@pytest.mark.parametrize("text", ["[1]", '{"b": 1}', '{"b": 1', '["b"', '{"a": 1, }'])
def test_json_that_does_not_fit_is_no_text_for_a_schema_without_a_type(schema: Any, text: str) -> None:
    if text == "[1]" and "items" not in schema:
        text = "{}"
    assert of_json(schema).parse(text)[1] is not None
    assert of_json(schema).parse("words") == ("words", None)


@pytest.mark.parametrize("schema", [of_type(Order), of_json(ORDER)])
def test_broken_json_is_told_where_it_is_broken(schema: Schema) -> None:
    assert schema.parse('{"items": [}') == (
        None,
        "the answer: it is not JSON: Expecting value: line 1 column 12 (char 11)",
    )


@pytest.mark.parametrize("schema", [of_type(list[Any]), of_json({"type": "array"})])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 5000 + "]" * 5000, "[NaN", "", "```json\n```", "[1e999999", "[\ud800]"]
)
def test_text_that_is_garbage_is_a_complaint(schema: Schema, text: str) -> None:
    data, why = schema.parse(text)
    assert data is None
    assert why


# --- types ------------------------------------------------------------------------------------------------


def test_a_model_is_parsed_and_is_plain_data_again() -> None:
    schema = of_type(Order)
    plain = {"items": [{"name": "pen", "price": "1.20", "bought": "2024-02-29", "colours": ["red"]}]}
    for arguments in ((json.dumps(plain), None), ("", plain)):
        order, why = schema.parse(*arguments)
        assert why is None
        assert order.items[0].price == Decimal("1.20")
        assert schema.plain(order) == plain
    assert json.loads(schema.text)["properties"]["items"]["type"] == "array"


def test_a_complaint_names_each_place_up_to_twenty() -> None:
    why = of_type(Order).parse("", {"items": [{"name": 1, "price": -1}] * 30})[1]
    assert why is not None
    assert why.startswith("items.0.name: Input should be a valid string; items.0.price: Input should be ")
    assert why.count("; ") == PROBLEMS - 1
    assert of_type(int).parse("x")[1] == (
        "the answer: Input should be a valid integer, unable to parse string as an integer"
    )


def test_a_complaint_is_short_whatever_the_data() -> None:
    why = of_type(dict[str, int]).parse("", {"k" * 10_000: "v" * 10_000})[1]
    assert why is not None
    assert len(why) < 500


@pytest.mark.parametrize("kind", [object(), 5, "no such name", "a b", list["Missing"]])  # type: ignore[name-defined] # noqa: F821
def test_what_is_no_type_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match="no type that pydantic"):
        of_type(kind)


@pytest.mark.parametrize("value", [object(), {1, 2}, {"a": b""}, float("nan"), [10**5000], [[]] * 3])
def test_values_that_are_no_plain_data_are_complaints(value: Any) -> None:
    for schema in (of_type(int), of_json({"type": "integer", "maximum": 3})):
        data, why = schema.parse("", value)
        assert data is None
        assert why


def test_a_model_that_fails_in_its_own_code_is_an_error_that_says_so() -> None:
    class Broken(BaseModel):
        x: int

        @field_validator("x")
        @classmethod
        def check(cls, value: int) -> int:
            raise KeyError("oh")

        @field_serializer("x")
        def show(self, value: int) -> str:
            raise KeyError("no")

    with pytest.raises(RLMError, match="checking an answer failed: KeyError"):
        of_type(Broken).parse('{"x": 1}')
    with pytest.raises(RLMError, match="no plain data"):
        of_type(Broken).plain(Broken.model_construct(x=1))


# --- JSON schemas -----------------------------------------------------------------------------------------


def test_a_json_schema_is_told_as_it_is() -> None:
    schema = {"$schema": DRAFT_7, "$id": "https://example.org/x", "title": "é", "type": "null"}
    assert of_json(schema).text == json.dumps(schema, ensure_ascii=False)


def test_each_problem_is_listed_with_its_place() -> None:
    items = [{"name": "pen", "price": "cheap"}, {"name": ""}, {"nmae": "x"}]
    assert complaint(ORDER, {"items": items}) == (
        "items.0.price: 'cheap' is not of type 'number'; items.1.name: '' should be non-empty; "
        "items.2: 'name' is a required property; items.2: there is to be no 'nmae'"
    )
    assert complaint(ORDER, [1]) == "the answer: [1] is not of type 'object'"
    many = complaint(ORDER, {"items": [{}] * 100})
    assert many is not None
    assert many.count("; ") == PROBLEMS - 1


def test_alternatives_that_do_not_fit_are_told_with_reasons() -> None:
    why = complaint({"anyOf": [{"type": "integer"}, {"properties": {"a": {"type": "null"}}}]}, {"a": 1})
    assert why == (
        "the answer: {'a': 1} is not valid under any of the given schemas "
        "({'a': 1} is not of type 'integer'; a: 1 is not of type 'null')"
    )


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"pattern": "^[a-z]+$"}, ["abc", 5], ["abc1", "abc\n", ""]),
        ({"pattern": "b"}, ["abc"], ["ac"]),
        ({"patternProperties": {"^x_": {"type": "integer"}}}, [{"x_a": 1, "y": "z"}, []], [{"x_a": "1"}]),
        (
            {"properties": {"a": {}}, "patternProperties": {"^x_": {}}, "additionalProperties": False},
            [{"a": 1, "x_": 2}],
            [{"b": 1}],
        ),
        ({"additionalProperties": {"type": "integer"}}, [{"b": 1}], [{"b": "1"}]),
        ({"additionalProperties": True}, [{"b": 1}], []),
        ({"propertyNames": {"pattern": "^a"}}, [{"ab": 1}], [{"b": 1}]),
        ({"uniqueItems": True}, [[1, "1", True, [1], {"a": 1}], [0, False]], [[1, 1.0], [{"a": [1]}] * 2]),
        ({"uniqueItems": False}, [[1, 1]], []),
        ({"multipleOf": 0.1}, [0.3, 1, "x", True, 1e300], [0.35]),
        ({"multipleOf": 3}, [9, 9.0, 3 * 10**4000], [10]),
        ({"const": 1}, [1, 1.0], [True, "1"]),
        ({"prefixItems": [{"type": "null"}], "items": False}, [[None], []], [[1], [None, 2]]),
        ({"contains": {"const": 1}, "maxContains": 1}, [[1, 2]], [[2], [1, 1]]),
        ({"dependentRequired": {"a": ["b"]}}, [{"a": 1, "b": 2}, {}], [{"a": 1}]),
        ({"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"minimum": 2}}, ["ab", 2], ["a", 1]),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, [1, 2.5], [3]),
        ({"not": {"type": ["null", "string"]}}, [1], [None, "x"]),
        ({"format": "email"}, ["no such thing"], []),
        (
            {"$schema": DRAFT_7, "items": [{"type": "null"}], "additionalItems": False},
            [[None]],
            [[1], [None, 1]],
        ),
        ({"$schema": DRAFT_4, "id": "x", "maximum": 3, "exclusiveMaximum": True}, [2], [3]),
        ({"$schema": DRAFT_7, "dependencies": {"a": ["b"]}}, [{"b": 1}], [{"a": 1}]),
        (
            {"$schema": "https://json-schema.org/draft/2019-09/schema", "items": [{"type": "null"}]},
            [[None, 1]],
            [[1]],
        ),
        (
            {"properties": {"$schema": {"type": "string"}, "$id": {}, "$ref": {}}},
            [{"$schema": "x"}],
            [{"$schema": 1}],
        ),
        ({"enum": [{"$ref": "http://x/"}, {"$schema": "x"}, {"pattern": "("}]}, [{"pattern": "("}], [1]),
        ({"$ref": "#/definitions/a~1b", "definitions": {"a/b": {"type": "null"}}}, [None], [1]),
    ],
)  # fmt: skip
def test_keywords_mean_what_they_say(schema: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    checked = of_json(schema)
    for value in good:
        if value is not None:
            assert checked.parse("", value) == (value, None)
        assert checked.parse(json.dumps(value)) == (value, None)
    for value in bad:
        assert checked.parse("", value)[1] if value is not None else checked.parse("null")[1]


def test_a_schema_may_refer_to_itself_in_its_parts() -> None:
    tree = {"properties": {"children": {"type": "array", "items": {"$ref": "#"}}}, "required": ["name"]}
    assert complaint(tree, {"name": 1, "children": [{"name": 2, "children": []}]}) is None
    assert complaint(tree, {"name": 1, "children": [{"children": []}]}) == (
        "children.0: 'name' is a required property"
    )


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ([], "a dict, not a list"),
        ({1: 2}, "names in an object are strings"),
        ({"type": {1}}, "a set is not plain data"),
        ({"minimum": float("nan")}, "JSON has no number nan"),
        ({"type": "strnig"}, "is not valid: type: 'strnig'"),
        ({"properties": {"a": {"minLength": -1}}}, "properties.a.minLength: -1 is less than"),
        ({"properties": []}, r"properties: \[\] is not of type 'object'"),
        ({"$schema": 5}, r"\$schema is 5: leave it out"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "leave it out"),
        ({"$ref": 5}, r"\$ref: 5 is not of type"),
        ({"title": "x" * SIZE}, "longer than 65,536 bytes"),
    ],
)
def test_what_is_no_schema_is_refused_with_what_is_wrong(schema: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        of_json(schema)


# --- hostile schemas --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    [
        "http://127.0.0.1:1/x", "https://json-schema.org/draft/2020-12/schema", "file:///etc/passwd", "other",
        "/etc/passwd", "#anchor", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["$ref", "$dynamicRef"])
def test_nothing_outside_of_the_schema_is_looked_up(key: str, reference: str) -> None:
    for schema in ({key: reference}, {"items": {key: reference}}):
        with pytest.raises(ConfigError, match="is not supported: refer to a place in the schema"):
            of_json({**schema, "$defs": {"a": {"$anchor": "anchor"}}})


@pytest.mark.parametrize(
    "reference", ["#/$defs/b", "#/allOf/x", "#/title/0/a", "#/%ff", "#/type/0", "#/allOf/9"]
)
def test_references_to_nothing_are_refused(reference: str) -> None:
    schema = {"$ref": reference, "$defs": {"a": {}}, "allOf": [{}], "title": "x", "type": ["null"]}
    with pytest.raises(ConfigError, match="points to"):
        of_json(schema)


@pytest.mark.parametrize(
    "hidden",
    [{"type": 5}, {"pattern": "(a+)+$"}, {"$schema": DRAFT_7, "pattern": "a"}, {"$id": 5}, 5, "x", []],
)
@pytest.mark.parametrize("place", ["const", "default", "x-mine"])
def test_a_reference_makes_no_schema_of_what_is_none(place: str, hidden: Any) -> None:
    with pytest.raises(ConfigError, match="something that is no schema"):
        of_json({"properties": {"a": {"$ref": f"#/{place}"}}, place: hidden})


@pytest.mark.parametrize(
    "schema",
    [
        {"items": {"$schema": "https://json-schema.org/draft/2020-12/schema", "pattern": "a"}},
        {"$defs": {"a": {"$id": "https://json-schema.org/draft/2020-12/meta/core"}}},
        {"$schema": DRAFT_4, "items": {"id": "http://x/"}},
        {"unevaluatedProperties": False},
        {"items": {"unevaluatedItems": False}},
    ],
)
def test_what_would_lead_to_other_validators_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"below its top|not supported"):
        of_json(schema)


@pytest.mark.parametrize(
    "pattern", ["(?=a)b", r"(a)\1", "(", "a{1000}{1000}", r"\w{1000}", "(?x)a", "a" * 3000, "[" * 2000]
)
@pytest.mark.parametrize(
    "where", [lambda p: {"pattern": p}, lambda p: {"items": {"patternProperties": {p: {}}}}]
)
def test_patterns_that_cannot_be_matched_in_linear_time_are_refused(where: Any, pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"is not supported|too much work"):
        of_json(where(pattern))


def _allof(levels: int) -> dict[str, Any]:
    """A schema that takes 2 ** levels steps."""
    steps = {str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(levels)}
    return {"$ref": "#/$defs/0", "$defs": {**steps, str(levels): {}}}


def _items(levels: int) -> dict[str, Any]:
    """The same, only once there is data."""
    bomb = _allof(levels)
    return {"items": {"$ref": "#/$defs/0"}, "$defs": bomb["$defs"]}


DEEP: list[Any] = []
for _ in range(500):
    DEEP = [DEEP]


HOSTILE: list[tuple[Any, Any]] = [
    (_allof(30), 1),
    (_items(30), [1]),
    ({"$ref": "#"}, 1),
    ({"allOf": [{"anyOf": [{"$ref": "#"}]}]}, 1),
    ({"items": {"not": {"$ref": "#/items"}}}, [1]),
    ({"$schema": "https://json-schema.org/draft/2019-09/schema", "$recursiveRef": "#"}, 1),
    ({"allOf": [{}] * 20_000}, 1),
    ({"items": {"enum": list(range(12_000))}}, [-1] * 100_000),
    ({"items": {"enum": [[{}] * 10_000]}}, [[{}] * 10_000] * 50),
    ({"enum": [list(range(300))] * 40, "items": {"const": 1}}, [2] * 10_000_000),
    ({"uniqueItems": True}, [[n] for n in range(300_000)]),
    ({"uniqueItems": True}, [n * ((1 << 61) - 1) for n in range(100_000)]),
    ({"anyOf": [{"type": "integer"}] * 2500}, "x" * 3_000_000),
    ({"items": {}}, [0] * 3_000_000),
    ({"items": True, "contains": {"const": 1}, "additionalProperties": {}}, [0] * 1_000_000),
    ({"required": ["a"] * 15_000, "type": "object"}, {}),
    ({"anyOf": [{"required": [str(n) for n in range(8000)]}] * 100}, {}),
    ({"patternProperties": {f"{n}a{{100}}": {} for n in range(1000)}}, {str(n): n for n in range(9000)}),
    ({"pattern": "a[ab]{1000}c"}, "a" * 1_000_000),
    ({"pattern": r"(?:(?:\w*a){20}){20}x"}, "a" * 1_000_000),
    ({"items": {"pattern": "(a+)+$"}}, ["a" * 50_000 + "!"] * 20),
    ({"type": "array"}, DEEP),
    (json.loads("[" * 500 + "]" * 500), 1),
    ({"multipleOf": 1e-300}, 10**4200 + 1),
    ({"enum": [{"a": n} for n in range(4000)], "$schema": DRAFT_4}, {"a": -1}),
]


@pytest.mark.parametrize(("schema", "value"), HOSTILE, ids=map(str, range(len(HOSTILE))))
def test_no_schema_and_no_data_take_long(schema: Any, value: Any) -> None:
    start = time.thread_time()
    try:
        data, why = of_json(schema).parse("", value)
    except ConfigError as error:
        data, why = None, str(error)
    assert time.thread_time() - start < 2  # a third of a second, usually
    assert why is not None or data == value
    assert len(why or "") < 10_000


def test_what_is_too_much_to_check_says_so() -> None:
    for schema in (_allof(30), {"$ref": "#"}):
        with pytest.raises(ConfigError, match="make it simpler"):
            of_json(schema)
    assert complaint(_items(30), [1]) == "the answer: it is too much work to check"
    assert complaint({}, [1] * 10_000, steps=200) == "the answer: it is longer than 20,000 characters"
    numbers = {"items": {"type": "integer"}}
    assert complaint(numbers, list(range(100_000))) == "the answer: it is too much work to check"
    assert complaint(numbers, list(range(100_000)), steps=1_000_000) is None
    assert complaint({"items": {}}, DEEP) == f"the answer: it is nested deeper than {DEPTH} levels"


def test_a_schema_of_a_few_hundred_properties_is_no_work() -> None:
    properties = {f"name {n}": {"type": "string", "description": "something"} for n in range(500)}
    schema = of_json({"properties": properties, "required": list(properties)})
    assert schema.parse("", dict.fromkeys(properties, "x"))[1] is None


def test_as_deep_as_may_be_is_checked() -> None:
    data: Any = {}
    for _ in range(DEPTH - 1):
        data = {"a": data}
    assert complaint({"properties": {"a": {"anyOf": [{"$ref": "#"}]}}, "type": "object"}, data) is None


# --- whatever comes ---------------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def _describe(value: Any) -> dict[str, Any]:
    """A JSON schema that a value fits."""
    if isinstance(value, dict):
        inner = {key: _describe(item) for key, item in value.items()}
        return {"type": "object", "properties": inner, "required": [*value], "additionalProperties": False}
    if isinstance(value, list):
        inner = {"prefixItems": [_describe(item) for item in value]} if value else {}
        return {"type": "array", **inner, "maxItems": len(value)}
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return {"type": kinds[type(value)], "enum": [value, "other"]}


@given(plain)
def test_data_fits_its_description(value: Any) -> None:
    schema = of_json(_describe(value))
    for text in (json.dumps(value), f"```json\n{json.dumps(value, indent=1)}\n```\n"):
        assert schema.parse(text) == (value, None)
    assert schema.plain(schema.parse(json.dumps(value))[0]) == value
    assert of_json({"const": value}).parse(json.dumps(value)) == (value, None)


@given(st.builds(Order, items=st.lists(st.builds(Item, price=st.decimals(0, 10**6, places=2)), max_size=3)))
def test_what_plain_gives_is_accepted(order: Order) -> None:
    schema = of_type(Order)
    data = schema.plain(order)
    assert schema.parse(json.dumps(data)) == (order, None)
    assert schema.parse("", data) == (order, None)
    assert of_json(json.loads(schema.text)).parse("", data)[1] is None


keywords = st.sampled_from(
    [
        "$ref", "$defs", "$id", "$schema", "$anchor", "$dynamicRef", "type", "enum", "const", "items",
        "prefixItems", "properties", "patternProperties", "pattern", "required", "additionalProperties",
        "anyOf", "allOf", "oneOf", "not", "if", "then", "else", "contains", "minContains", "uniqueItems",
        "multipleOf", "minimum", "maxLength", "definitions", "dependencies", "propertyNames", "format",
        "unevaluatedProperties", "dependentSchemas",
    ]
)  # fmt: skip
words = keywords | st.sampled_from(
    [
        "#",
        "#/$defs/type",
        "#/items",
        "#/properties/type",
        "object",
        "array",
        "string",
        "integer",
        "^a",
        "(",
        DRAFT_7,
    ]
)
scraps = st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | words
hostile = st.recursive(
    scraps,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=25,
)


@given(st.dictionaries(words, hostile, max_size=5), hostile, st.text())
def test_garbage_raises_nothing_but_what_is_declared(schema: dict[str, Any], value: Any, text: str) -> None:
    for kind in (schema, {**schema, "$schema": DRAFT_7}, {**schema, "$schema": DRAFT_4}):
        try:
            checked = of_json(kind)
        except ConfigError:
            continue
        checked.parse(text, value)
        checked.parse(text)


@given(hostile, st.text())
def test_garbage_fits_a_type_or_is_a_complaint(value: Any, text: str) -> None:
    for schema in (of_type(Order), of_type(dict[str, int]), of_json(ORDER)):
        for parsed, why in (schema.parse(text, value), schema.parse(text)):
            assert why is None or parsed is None


def test_a_named_schema_that_is_none_says_which_it_is() -> None:
    with pytest.raises(ConfigError, match="schemas: 'X': 5 is no type"):
        Schemas({"X": 5})
    with pytest.raises(ConfigError, match="schemas: 'Y': the JSON schema is not valid"):
        Schemas({"Y": {"type": "strin"}})
