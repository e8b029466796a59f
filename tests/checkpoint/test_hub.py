from __future__ import annotations

from pathlib import Path

import pytest

from paramdelta.checkpoint.checkpoint import open_checkpoint
from paramdelta.checkpoint.hub import HubModel, cache, locate, model_of
from paramdelta.errors import CheckpointError
from tests.make import normal, write_checkpoint

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two commits of org/name, as the Hub's client lays them out."""
    root = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(root))
    monkeypatch.chdir(tmp_path)
    folder = root / "models--org--name"
    for commit in (COMMIT, OTHER):
        blob = write_checkpoint(tmp_path / commit[0], {"w": normal((4,), seed=len(commit[0]))}) / "model.safetensors"
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        blob.rename(folder / "blobs" / commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "model.safetensors").symlink_to(f"../../blobs/{commit}")
    (folder / "refs/pr").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    (folder / "refs/v1").write_text(OTHER + "\n")
    (folder / "refs/pr/1").write_text(OTHER)
    return root


@pytest.mark.parametrize(
    ("text", "commit"),
    [
        ("org/name", COMMIT),
        ("hf://org/name", COMMIT),
        ("org/name@main", COMMIT),
        ("org/name@v1", OTHER),
        ("org/name@pr/1", OTHER),
        (f"org/name@{OTHER}", OTHER),
    ],
)
def test_a_model_and_revision_is_the_snapshot_in_the_cache(hub: Path, text: str, commit: str) -> None:
    snapshot = hub / "models--org--name" / "snapshots" / commit
    assert locate(text) == snapshot
    assert open_checkpoint(text).path == snapshot
    assert model_of(locate(text)) == HubModel("org/name", commit)


@pytest.mark.usefixtures("hub")
def test_a_path_that_exists_wins(tmp_path: Path) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    assert locate("org/name") == Path("org/name")
    assert "snapshots" in str(locate("hf://org/name"))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("org/missing", "hf download org/missing"),
        ("hf://org/missing", "hf download org/missing"),
        ("org/name@v2", "hf download org/name --revision v2"),
        ("org/missing@v2", "hf download org/missing --revision v2"),
    ],
)
def test_what_is_not_in_the_cache_is_an_error_that_says_how_to_get_it(text: str, remedy: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(text)
    assert remedy in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("revision", ["../../../../etc", "a/../../b", ".."])
@pytest.mark.usefixtures("hub")
def test_a_revision_never_leads_out_of_the_cache(revision: str) -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint(f"org/name@{revision}")


def test_a_ref_that_holds_no_commit_is_an_error(hub: Path) -> None:
    (hub / "models--org--name/refs/main").write_text("../../../../../etc")
    with pytest.raises(CheckpointError, match="does not hold a commit"):
        open_checkpoint("org/name")


@pytest.mark.parametrize(
    "text", ["org/name/deep", "./org/name", "name", "C:\\\\org\\\\name", "org\\\\name", "/org/name"]
)
@pytest.mark.usefixtures("hub")
def test_other_texts_are_paths(text: str) -> None:
    assert locate(text) == Path(text)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({}, "~/.cache/huggingface/hub"),
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"),
    ],
)
def test_the_cache_is_where_its_client_looks(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache() == Path(expected).expanduser()


def test_paths_outside_a_cache_show_no_model() -> None:
    assert model_of(Path("/models/Llama-3-8B")) is None
