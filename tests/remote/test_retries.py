from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramdelta.errors import RecipeError
from paramdelta.storage.remote.address import checked, is_remote, names_file, scheme_of
from paramdelta.storage.remote.place import place_of
from paramdelta.storage.remote.retries import MOST_ASKED, Patience, retry_after

PATIENCE = Patience()


@given(tried=st.integers(0, 10_000), asked=st.none() | st.floats(0, 1e9))
def test_waits_are_between_half_and_all_of_what_doubles_and_heed_the_server(tried: int, asked: float | None) -> None:
    most = min(PATIENCE.longest, PATIENCE.first * 2.0 ** min(tried, 30))
    wait = PATIENCE.wait(tried, asked)
    assert wait >= most / 2
    assert wait >= min(asked or 0, MOST_ASKED)
    assert wait <= max(most, min(asked or 0, MOST_ASKED))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        (None, None),
        ("", None),
        ("-1", None),
        ("inf", None),
        ("nan", None),
        ("Fri, 27 Nov 2026 10:00:00 GMT", None),
    ],
)
def test_only_seconds_are_made_of_what_a_server_asks_for(value: str | None, seconds: float | None) -> None:
    assert retry_after(value) == seconds


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("hf://org/name", "hf"),
        ("HTTPS://host/x", "https"),
        ("s3://bucket/a b", "s3"),
        ("org/name", ""),
        ("C:\\models\\x", ""),
        ("c:/models/x", ""),
        ("/a://b", ""),
        ("://x", ""),
        ("file:///x", "file"),
    ],
)
def test_addresses_are_told_from_paths(text: str, scheme: str) -> None:
    assert scheme_of(text) == scheme
    assert is_remote(text) == (scheme not in {"", "file"})


@pytest.mark.parametrize(
    "text",
    ["https://u:p@h/x", "https://h/x?sig=1", "az://c/x?sig=1", "gs://b/x#1", "s3://k:s@b/x", "https://h/x#y"],
)
def test_what_may_be_a_secret_is_refused_before_anybody_sees_it(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        checked(text)
    assert text not in str(caught.value)
    with pytest.raises(RecipeError):
        place_of(text)


def test_addresses_are_kept_in_one_form() -> None:
    assert checked("HTTP://host/dir/") == "http://host/dir"
    assert checked("hf://org/name@main") == "hf://org/name@main"
    assert checked("abfs://container@account.host/dir") == "abfs://container@account.host/dir"
    assert names_file("s3://b/model.safetensors")
    assert names_file("https://h/model.safetensors.index.json")
    assert not names_file("s3://b/Llama-3.1")
