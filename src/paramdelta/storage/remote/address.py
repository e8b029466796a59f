"""Addresses of what lies elsewhere, as text: ``hf://org/name@revision``, ``s3://bucket/prefix``, ``https://…``."""

from __future__ import annotations

import re
from typing import Final

from paramdelta.errors import RecipeError

_ADDRESS: Final = re.compile(r"([a-z][a-z0-9+.-]+)://(.+)", re.IGNORECASE | re.DOTALL)
_FILE: Final = re.compile(r"\.(safetensors|json|gguf|bin|pth|pt|ckpt|h5|msgpack|onnx)$", re.IGNORECASE)
_CONTAINER_AT_ACCOUNT: Final = ("abfs", "abfss")
_ANY_CHARACTER: Final = ("s3", "s3a", "hf")  # a question mark is part of a name there


def is_remote(text: str) -> bool:
    """Return whether a text is an address of something elsewhere, not a path."""
    return scheme_of(text) not in {"", "file"}


def scheme_of(text: str) -> str:
    """Return the scheme of an address in lower case, nothing for a path."""
    found = _ADDRESS.fullmatch(text)
    return "" if found is None else found[1].lower()


def checked(text: str) -> str:
    """Return an address as it is kept: no slash at its end, its scheme in lower case.

    Raises:
        RecipeError: it holds what may be a secret, and addresses are written into receipts and shown in messages.
    """
    scheme, rest = scheme_of(text), text.partition("://")[2]
    if "@" in rest.partition("/")[0] and scheme not in _CONTAINER_AT_ACCOUNT:
        raise RecipeError(
            f"a {scheme}:// address has a user or a password in it, which would go into receipts and messages",
            remedy="Put them where clients look for them: .netrc for http and https, AWS_* variables or a profile for"
            " s3; then leave them out of the address.",
        )
    if scheme not in _ANY_CHARACTER and ("?" in rest or "#" in rest):
        raise RecipeError(
            f"a {scheme}:// address ends in a query or fragment, which may be a signature, and would go into receipts",
            remedy="Use an address without one: of a public place, or s3:// or gs:// with credentials.",
        )
    return f"{scheme}://{rest.rstrip('/')}"


def names_file(address: str) -> bool:
    """Return whether an address is that of one file, by the ending of its name; else it is that of a directory."""
    return _FILE.search(address) is not None


def split_file(address: str) -> tuple[str, str]:
    """Return the directory and the name of a file."""
    folder, _, name = address.rpartition("/")
    return folder, name
