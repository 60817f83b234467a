"""Facts about keys: how they are found among settings, and kept out of what is shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from rlm import secrets
from rlm.secrets import HIDDEN, Secret, SecretText, find, hide, is_secret, mask, reveal

KEY = "sk-test-51be20"


@pytest.mark.parametrize(
    "name",
    ["api_key", "OPENAI_API_KEY", "apiKey", "x-api-key", "Authorization", "Proxy-Authorization", "HF_TOKEN",
     "tokens", "password", "DB_PASSWORD", "client_secret", "AWS_SECRET_ACCESS_KEY", "credentials", "keys"],
)  # fmt: skip
def test_the_name_of_a_secret_says_so(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["model_name", "base_url", "timeout", "key_header", "token_field", "", "PATH"]
)
def test_other_names_do_not(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key": KEY}, {"other": Secret(KEY)}, {"other": SecretStr(KEY)}, Secret(KEY), [Secret(KEY)],
        {"headers": {"X-Api-Key": KEY}}, {"a": [{"b": ({"password": KEY},)}]}, {"api_keys": [KEY, 5, None]},
        {"credentials": {"user": KEY}},
    ],
    ids=str,
)  # fmt: skip
def test_a_secret_is_found_and_masked_however_deep(settings: Any) -> None:
    assert find(settings) == {KEY}
    assert KEY not in repr(mask(settings))
    assert HIDDEN in repr(mask(settings))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Basic", "Token"])
@pytest.mark.parametrize("wrap", [str, Secret])
def test_of_a_header_the_key_is_found_with_its_scheme_and_without(scheme: str, wrap: Any) -> None:
    assert find({"Authorization": wrap(f"{scheme} {KEY}")}) == {KEY, f"{scheme} {KEY}"}


def test_a_secret_of_several_words_is_one() -> None:
    assert find({"password": "correct horse battery"}) == {"correct horse battery"}


@pytest.mark.parametrize("settings", [{}, [], None, 5, "text", {"model": KEY}, {"max_tokens": 5}, {5: KEY}])
def test_where_there_is_no_secret_none_is_found_and_nothing_changes(settings: Any) -> None:
    assert find(settings) == set()
    assert mask(settings) == settings


def test_masking_leaves_the_rest_and_the_original_as_they_are() -> None:
    settings = {"api_key": KEY, "model": "m", "max_tokens": 5, "nested": [{"token": KEY, "n": None}]}
    masked = {"api_key": HIDDEN, "model": "m", "max_tokens": 5, "nested": [{"token": HIDDEN, "n": None}]}
    assert mask(settings) == masked
    assert settings["api_key"] == KEY


def test_the_secrets_of_the_environment_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", KEY)
    monkeypatch.setenv("SOME_NAME", "sk-no-secret")
    found = secrets.in_environment()
    assert KEY in found
    assert "sk-no-secret" not in found


def test_a_secret_prints_as_stars_and_reveals_itself_when_asked() -> None:
    assert f"{Secret(KEY)} {Secret(KEY)!r} {[Secret(KEY)]}" == f"{HIDDEN} {HIDDEN} [{HIDDEN}]"
    assert [reveal(value) for value in (KEY, Secret(KEY), SecretStr(KEY))] == [KEY] * 3
    assert isinstance(Secret(KEY), SecretText)
    assert isinstance(SecretStr(KEY), SecretText)


def test_hiding_masks_every_occurrence_and_the_longest_first() -> None:
    assert hide(f"a {KEY} b {KEY}-long c", [KEY, f"{KEY}-long"]) == f"a {HIDDEN} b {HIDDEN} c"


@pytest.mark.parametrize("placeholder", ["", "x", "none", "EMPTY"])
def test_a_placeholder_is_no_secret(placeholder: str) -> None:
    assert hide("none of it is EMPTY x", [placeholder]) == "none of it is EMPTY x"


plain = st.characters(exclude_characters="*", exclude_categories=["Cs"])
a_secret = st.text(plain, min_size=secrets.SHORTEST, max_size=12) | st.text("ab", min_size=6, max_size=9)


@given(data=st.data(), among=st.lists(a_secret, min_size=1, max_size=5))
def test_no_secret_survives_being_hidden(data: st.DataObject, among: list[str]) -> None:
    part = st.sampled_from(among) | st.text(plain, max_size=5) | st.text("ab", max_size=5)
    text = "".join(data.draw(st.lists(part, max_size=10)))
    hidden = hide(text, among)
    assert not any(secret in hidden for secret in among)


@given(text=st.text(), among=st.lists(a_secret, max_size=3))
def test_hiding_twice_is_hiding_once(text: str, among: list[str]) -> None:
    assert hide(hide(text, among), among) == hide(text, among)


@given(
    settings=st.recursive(
        st.none() | st.integers() | st.just(KEY) | st.just(KEY).map(Secret),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner)
            | st.dictionaries(st.sampled_from(["api_key", "headers", "model", "token"]), inner, max_size=3)
        ),
    )
)
def test_what_is_found_is_what_is_masked(settings: Any) -> None:
    named = KEY in find(settings)
    assert (HIDDEN in repr(mask(settings))) == named
    assert find(mask(settings)) <= {HIDDEN}
