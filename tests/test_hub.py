from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import anyio
import pytest
from conftest import eventually
from hub_server import ONE, SPLIT, TOKEN, Asked, Hub, Repo, sha256, some_bytes

from kitty_nb import hub as downloading
from kitty_nb.catalog.catalog import ModelCatalog
from kitty_nb.errors import (
    ChecksumError,
    DiskFullError,
    HubAccessError,
    HubError,
    HubOfflineError,
)
from kitty_nb.hub import (
    Download,
    HubFile,
    HubReference,
    Repository,
    find_repository,
    list_variants,
)

MB = 10**6


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture(autouse=True)
def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "FIRST_PAUSE", 0.01)


def prepare(models: Path, text: str = f"{ONE}:Q4_K_M") -> Download:
    reference = HubReference.parse(text)
    repository = anyio.run(find_repository, reference)
    return Download(repository, repository.choose(reference.wanted), models)


def ignore(_step: str, _done: int) -> None:
    """Show nothing."""


def fetch(download: Download) -> list[tuple[str, int]]:
    """Download; return the steps and the bytes that were reported."""
    seen: list[tuple[str, int]] = []
    assert anyio.run(download.run, lambda *progress: seen.append(progress)) == download.model
    return seen


def fetch_until(download: Download, enough: Callable[[], bool]) -> None:
    """Cancel the download at a moment."""

    async def run() -> None:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(download.run, ignore)
                while not enough():
                    await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()

    anyio.run(run)


def parts(models: Path) -> list[Path]:
    return sorted(models.rglob("*.incomplete"))


@pytest.mark.parametrize(
    ("text", "repository", "wanted", "revision"),
    [
        ("owner/name", "owner/name", None, "main"),
        (" owner/Na.me_2-GGUF/ ", "owner/Na.me_2-GGUF", None, "main"),
        ("owner/name:Q4_K_M", "owner/name", "Q4_K_M", "main"),
        ("owner/name/a/b.gguf", "owner/name", "a/b.gguf", "main"),
        ("https://huggingface.co/owner/name", "owner/name", None, "main"),
        ("hf.co/owner/name:Q8_0", "owner/name", "Q8_0", "main"),
        ("https://hf.co/owner/name?library=llama.cpp#x", "owner/name", None, "main"),
        ("https://huggingface.co/owner/name/tree/main", "owner/name", None, "main"),
        ("https://huggingface.co/owner/name/tree/v2/Q8_0", "owner/name", "Q8_0", "v2"),
        (
            "https://huggingface.co/o/n/blob/refs%2Fpr%2F1/a%20b.gguf",
            "o/n",
            "a b.gguf",
            "refs/pr/1",
        ),
        (
            "https://huggingface.co/o/n/resolve/main/x.gguf?download=true",
            "o/n",
            "x.gguf",
            "main",
        ),
    ],
)
def test_a_reference_has_many_spellings(
    text: str, repository: str, wanted: str | None, revision: str
) -> None:
    assert HubReference.parse(text) == HubReference(repository, wanted, revision)


@pytest.mark.parametrize("text", ["", "gpt2", "a/b/c", "/etc/passwd", "owner/na me", "a/b:"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(HubError, match="owner/name"):
        HubReference.parse(text)


def listed(*paths: str) -> dict[str, list[str]]:
    files = [HubFile(PurePosixPath(path), 100 + place, "") for place, path in enumerate(paths)]
    return {v.label: [str(file.path) for file in v.files] for v in list_variants(files)}


@pytest.mark.parametrize(
    ("paths", "variants"),
    [
        (
            ["README.md", "a-Q4_K_M.gguf", "a.Q8_0.gguf", "a-q2_k.gguf", "imatrix.dat"],
            {"Q4_K_M": ["a-Q4_K_M.gguf"], "Q8_0": ["a.Q8_0.gguf"], "Q2_K": ["a-q2_k.gguf"]},
        ),
        (
            ["a-UD-Q4_K_XL.gguf", "a-Q4_K_XL.gguf", "a.i1-IQ2_XXS.gguf", "a-MXFP4.gguf"],
            {
                "UD-Q4_K_XL": ["a-UD-Q4_K_XL.gguf"],
                "Q4_K_XL": ["a-Q4_K_XL.gguf"],
                "IQ2_XXS": ["a.i1-IQ2_XXS.gguf"],
                "MXFP4": ["a-MXFP4.gguf"],
            },
        ),
        (
            ["Q4_0/model.gguf", "BF16/model.gguf", "plain.gguf"],
            {"Q4_0": ["Q4_0/model.gguf"], "BF16": ["BF16/model.gguf"], "plain": ["plain.gguf"]},
        ),
        (
            ["a-2B-Q8_0.gguf", "a-9B-Q8_0.gguf", "old/a-9B-Q8_0-00001-of-00001.gguf"],
            {
                "a-2B-Q8_0": ["a-2B-Q8_0.gguf"],
                "a-9B-Q8_0": ["a-9B-Q8_0.gguf"],
                "old/a-9B-Q8_0": ["old/a-9B-Q8_0-00001-of-00001.gguf"],
            },
        ),
        (
            [
                "b-Q8_0-00002-of-00002.gguf",
                "b-Q8_0-00001-of-00002.gguf",
                "b-F16-00001-of-00002.gguf",
            ],
            {"Q8_0": ["b-Q8_0-00001-of-00002.gguf", "b-Q8_0-00002-of-00002.gguf"]},
        ),
        (
            [
                "UD-Q2_K_XL/b-UD-Q2_K_XL-00001-of-00002.gguf",
                "UD-Q2_K_XL/b-UD-Q2_K_XL-00002-of-00002.gguf",
            ],
            {
                "UD-Q2_K_XL": [
                    "UD-Q2_K_XL/b-UD-Q2_K_XL-00001-of-00002.gguf",
                    "UD-Q2_K_XL/b-UD-Q2_K_XL-00002-of-00002.gguf",
                ]
            },
        ),
        (
            ["v-Q4_K_M.gguf", "mmproj-F32.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf"],
            {"Q4_K_M": ["mmproj-F16.gguf", "v-Q4_K_M.gguf"]},
        ),
        (
            ["v-4b-Q8_0.gguf", "v-12b-Q8_0.gguf", "mmproj-v-4b-f16.gguf", "v-12b.mmproj-f16.gguf"],
            {
                "v-4b-Q8_0": ["mmproj-v-4b-f16.gguf", "v-4b-Q8_0.gguf"],
                "v-12b-Q8_0": ["v-12b.mmproj-f16.gguf", "v-12b-Q8_0.gguf"],
            },
        ),
        (["q/v-Q8_0.gguf", "elsewhere/mmproj-F16.gguf"], {"Q8_0": ["q/v-Q8_0.gguf"]}),
        (["imatrix.gguf", "imatrix_unsloth.gguf", "a.imatrix.gguf", "a.gguf.part1of2"], {}),
        (["../../evil.gguf", "/abs/evil.gguf", "a\\evil.gguf"], {}),
    ],
)
def test_a_repositorys_files_become_variants(
    paths: list[str], variants: dict[str, list[str]]
) -> None:
    assert listed(*paths) == variants


def test_variants_are_sorted_by_size() -> None:
    sizes = {"a-Q8_0.gguf": 8, "a-Q2_K.gguf": 2, "a-Q4_K_M.gguf": 4, "mmproj-F16.gguf": 1}
    variants = list_variants(HubFile(PurePosixPath(path), size, "") for path, size in sizes.items())
    assert [(v.label, v.size) for v in variants] == [("Q2_K", 3), ("Q4_K_M", 5), ("Q8_0", 9)]


def repository_of(*paths: str) -> Repository:
    files = [HubFile(PurePosixPath(path), 1, "") for path in paths]
    return Repository("a/b", "main", list_variants(files))


def test_a_variant_is_chosen_by_label_file_or_folder() -> None:
    repository = repository_of(
        "x-Q4_K_M.gguf", "x-UD-Q4_K_XL.gguf", "Q8_0/x-Q8_0.gguf", "big/x.gguf"
    )

    def label(wanted: str | None) -> str:
        return repository.choose(wanted).label

    assert label(None) == "Q4_K_M"
    assert label("ud-q4_k_xl") == "UD-Q4_K_XL"
    assert label("Q8_0/x-Q8_0.gguf") == label("x-q8_0.gguf") == label("Q8_0") == "Q8_0"
    assert label("big") == "x"
    assert repository_of("x-Q8_0.gguf").choose(None).label == "Q8_0"
    with pytest.raises(HubError, match=r"a/b has no Q2_K\. Choose one of .*UD-Q4_K_XL"):
        label("Q2_K")
    with pytest.raises(HubError, match="several models"):
        repository_of("x-Q8_0.gguf", "x-Q2_K.gguf").choose(None)


def test_a_repository_without_models_is_explained(hub: Hub, models: Path) -> None:
    hub.repos["a/b"] = Repo({"README.md": b"# b", "model.safetensors": b"x"})
    with pytest.raises(HubError, match="ends in -GGUF"):
        prepare(models, "a/b")


def test_a_download_is_found_by_the_catalog_and_not_repeated(
    hub: Hub, models: Path, demo_model: Path
) -> None:
    hub.repos[ONE].files["tiny-F16.gguf"] = demo_model.read_bytes()
    download = prepare(models, f"{ONE}:F16")
    plan = download.plan()
    assert (plan.size, plan.there) == (demo_model.stat().st_size, 0)
    seen = fetch(download)
    assert download.model.read_bytes() == demo_model.read_bytes()
    assert [model.name for model in ModelCatalog(models).scan()] == [f"{ONE}/tiny-F16.gguf"]
    assert seen[-1] == ("verifying", plan.size)
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert not parts(models)
    before = len(hub.asked)
    assert download.plan().there == plan.size
    fetch(download)
    assert len(hub.asked) == before


def test_shards_and_projector_are_fetched_with_the_model(hub: Hub, models: Path) -> None:
    download = prepare(models, SPLIT)
    fetch(download)
    folder = models / SPLIT / "Q4_K_M"
    assert download.model == folder / "vl-Q4_K_M-00001-of-00002.gguf"
    names = ["mmproj-F16.gguf", *(f"vl-Q4_K_M-0000{n}-of-00002.gguf" for n in (1, 2))]
    assert sorted(path.name for path in folder.iterdir()) == names
    files = hub.repos[SPLIT].files
    assert (folder / names[0]).read_bytes() == files["mmproj-F16.gguf"]
    assert (folder / names[2]).read_bytes() == files[f"Q4_K_M/{names[2]}"]
    assert [asked.path.rpartition("/")[2] for asked in hub.asked] == names


def test_two_repositories_with_the_same_names_do_not_collide(hub: Hub, models: Path) -> None:
    hub.repos["other/Tiny-GGUF"] = Repo({"tiny-Q4_K_M.gguf": b"another"})
    fetch(prepare(models))
    fetch(prepare(models, "other/Tiny-GGUF"))
    found = sorted(path.relative_to(models).as_posix() for path in models.rglob("*.gguf"))
    assert found == [f"{ONE}/tiny-Q4_K_M.gguf", "other/Tiny-GGUF/tiny-Q4_K_M.gguf"]


def test_a_cancelled_download_resumes(hub: Hub, models: Path) -> None:
    hub.silent_after = 2 * MB
    download = prepare(models)
    fetch_until(download, lambda: bool(parts(models)) and parts(models)[0].stat().st_size > MB)
    (part,) = parts(models)
    had, whole = part.stat().st_size, hub.repos[ONE].files["tiny-Q4_K_M.gguf"]
    assert MB < had < len(whole)
    assert part.read_bytes() == whole[:had]
    assert not download.model.exists()
    (row,) = ModelCatalog(models).scan()
    assert (row.path, row.downloading, row.startable) == (download.model, True, False)
    assert download.plan().there == had

    hub.silent_after = None
    hub.asked.clear()
    again = prepare(models)
    fetch(again)
    assert hub.asked == [Asked("tiny-Q4_K_M.gguf", had, len(whole) - 1)]
    assert again.model.read_bytes() == whole
    assert not parts(models)


def test_cancelling_does_not_wait_for_a_silent_hub(hub: Hub, models: Path) -> None:
    hub.rate = 1000.0  # a block each 16 seconds
    download = prepare(models)
    threads = set(threading.enumerate())
    asked: list[float] = []

    def enough() -> bool:
        if hub.asked:
            asked.append(time.monotonic())
        return len(asked) > 10  # it has the first block, and waits for the second

    fetch_until(download, enough)
    assert time.monotonic() - asked[-1] < 5

    def left() -> set[str]:
        return {t.name for t in set(threading.enumerate()) - threads if t.name.startswith("AnyIO")}

    eventually(lambda: not left())


def test_a_lost_connection_is_resumed(hub: Hub, models: Path) -> None:
    size = len(hub.repos[ONE].files["tiny-Q4_K_M.gguf"])
    hub.cuts = [1_000_000, 500_000]
    seen = fetch(prepare(models))
    assert [asked.last for asked in hub.asked] == [size - 1] * 3
    first, second, third = (asked.first for asked in hub.asked)
    assert first == 0
    assert 700_000 < second <= 1_000_000
    assert 1_000_000 < third <= second + 500_000
    assert "connection lost, retrying" in {step for step, _ in seen}


def test_a_busy_hub_is_retried(hub: Hub, models: Path) -> None:
    hub.refusals = [503, 429]
    fetch(prepare(models))
    assert len(hub.asked) == 3


def test_a_server_without_ranges_sends_the_whole_file_again(hub: Hub, models: Path) -> None:
    hub.cuts, hub.deaf = [1_000_000], True
    download = prepare(models)
    fetch(download)
    assert sha256(download.model.read_bytes()) == sha256(hub.repos[ONE].files["tiny-Q4_K_M.gguf"])


def test_large_files_are_requested_in_pieces(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading, "MAX_RANGE", 2 * MB)
    fetch(prepare(models))
    assert [(a.first, a.last) for a in hub.asked] == [(0, 2 * MB - 1), (2 * MB, 3 * MB - 1)]


def test_a_damaged_file_is_deleted(hub: Hub, models: Path) -> None:
    hub.wrong = {"tiny-Q4_K_M.gguf"}
    with pytest.raises(ChecksumError, match="try again"):
        fetch(prepare(models))
    assert not [path for path in models.rglob("*") if path.is_file()]
    hub.wrong.clear()
    fetch(prepare(models))


def test_a_part_of_an_older_version_is_discarded(hub: Hub, models: Path) -> None:
    hub.silent_after = 2 * MB
    download = prepare(models)
    fetch_until(download, lambda: bool(parts(models)) and parts(models)[0].stat().st_size > MB)
    hub.silent_after = None
    hub.repos[ONE].files["tiny-Q4_K_M.gguf"] = changed = some_bytes(2 * MB, 9)
    fetch(prepare(models))
    assert download.model.read_bytes() == changed
    assert not parts(models)


def test_a_changed_file_of_the_same_size_is_fetched_again(hub: Hub, models: Path) -> None:
    first = prepare(models)
    fetch(first)
    size = first.plan().size
    hub.repos[ONE].files["tiny-Q4_K_M.gguf"] = changed = some_bytes(size, 9)
    second = prepare(models)
    seen = fetch(second)
    assert second.model.read_bytes() == changed
    assert [asked.first for asked in hub.asked] == [0, 0]
    assert seen[-1] == ("verifying", size)


def test_a_file_in_place_is_read_once(hub: Hub, models: Path) -> None:
    download = prepare(models)
    fetch(download)
    whole, then = download.model.read_bytes(), time.time() - 60
    os.utime(download.model, (then, then))
    fetch(download)
    with download.model.open("r+b") as file:
        file.write(bytes(4))
    os.utime(download.model, (then, then))  # and looks unchanged
    fetch(download)
    assert len(hub.asked) == 1
    os.utime(download.model)
    fetch(download)
    assert download.model.read_bytes() == whole


def test_disk_space_is_checked_first(hub: Hub, models: Path) -> None:
    hub.repos[ONE].claimed["tiny-Q4_K_M.gguf"] = 10**18
    download = prepare(models)
    with pytest.raises(DiskFullError, match=r"1\.0 EB to download.*Free .* more"):
        fetch(download)
    assert not models.exists()
    assert not hub.asked


def test_an_unwritable_folder_is_named(hub: Hub, models: Path) -> None:
    models.mkdir()
    (models / "maker").write_text("a file where a folder should be")
    with pytest.raises(HubError, match=r"Can't write to .*maker/Tiny-GGUF"):
        fetch(prepare(models))


def test_a_disk_that_fills_up_keeps_the_part(hub: Hub, models: Path) -> None:
    download = prepare(models)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MB, limits[1]))
    try:
        with pytest.raises(DiskFullError, match="Free some space"):
            fetch(download)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert download.plan().there > MB
    fetch(download)
    assert hub.asked[-1].first > MB


def test_a_second_download_of_the_same_file_is_refused(hub: Hub, models: Path) -> None:
    hub.silent_after = 2 * MB
    first, second = prepare(models), prepare(models)

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first.run, ignore)
            while not parts(models):
                await anyio.sleep(0.01)
            with pytest.raises(HubError, match="is already being downloaded"):
                await second.run(ignore)
            hub.silent_after = None

    anyio.run(run)
    assert first.model.read_bytes() == hub.repos[ONE].files["tiny-Q4_K_M.gguf"]


@pytest.mark.parametrize("name", ["nobody/nothing", ONE])
def test_a_missing_or_private_repository_is_explained(hub: Hub, models: Path, name: str) -> None:
    hub.repos[ONE].private = True
    with pytest.raises(HubAccessError, match=f"no repository {name}.*hf auth login"):
        prepare(models, name)


def test_a_gated_repository_needs_a_login(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.repos[ONE].gated = True
    download = prepare(models)
    with pytest.raises(HubAccessError, match=f"Accept its authors' terms at {hub.url}/{ONE}"):
        fetch(download)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    download = prepare(models)
    with caplog.at_level("DEBUG"):
        fetch(download)
    assert len(hub.asked) == 1
    assert not hub.leaked
    assert TOKEN not in caplog.text + repr(vars(download))


def test_a_file_that_is_gone_is_explained(hub: Hub, models: Path) -> None:
    download = prepare(models)
    del hub.repos[ONE].files["tiny-Q4_K_M.gguf"]
    with pytest.raises(HubAccessError, match=f"{ONE} has no such revision or file"):
        fetch(download)


def test_offline_mode_is_explained(hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubOfflineError, match="HF_HUB_OFFLINE"):
        prepare(models)


def test_an_unknown_revision_is_explained(hub: Hub, models: Path) -> None:
    with pytest.raises(HubAccessError, match="no such revision"):
        prepare(models, f"https://hf.co/{ONE}/tree/v9")


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port}")
    with pytest.raises(HubOfflineError, match=r"Can't reach the Hub.*try again\.$"):
        anyio.run(find_repository, HubReference(ONE))


@pytest.mark.parametrize("called", ["../../elsewhere", "/elsewhere/x", "kitty/other"])
def test_a_mirrors_name_for_a_repository_stays_in_the_models_folder(
    hub: Hub, models: Path, called: str
) -> None:
    hub.renamed[ONE] = called
    download = prepare(models)
    fetch(download)
    assert download.model.parent == models.joinpath(*ONE.split("/"))
    assert [path.name for path in models.parent.iterdir()] == [models.name]


def test_a_folder_has_the_upper_and_lower_case_of_the_hub(hub: Hub, models: Path) -> None:
    hub.renamed[ONE] = ONE.upper()
    assert prepare(models).model.is_relative_to(models.joinpath(*ONE.upper().split("/")))
