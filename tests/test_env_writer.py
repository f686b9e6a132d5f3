from __future__ import annotations

import random
import stat
import sys
from pathlib import Path

import platformdirs
import pytest

from kitty_nb.catalog.resolve import load_profile
from kitty_nb.config import FlashAttention, ServerConfig
from kitty_nb.config.env_file import read_env, write_env
from kitty_nb.config.profiles import save_settings
from kitty_nb.errors import ConfigError

_PIECES = (
    *"aZ0_-./:,+@%=~^*()[]{}<>|&;!?",
    *" \t'\"#\\$`\r\n\v\f\x1c\x85\u2028ü漢",
    "${HOME}",
    "${",
    "${:-x}",
    " # not a comment",
    "\\n",
    "\\'",
    "export ",
)


def backups(path: Path) -> list[Path]:
    folder = platformdirs.user_state_path("kitty_nb") / "env-backups"
    return sorted(folder.glob(f"{path.parent.name}-env.backup-*"))


def given(tmp_path: Path, text: str) -> Path:
    path = tmp_path / ".env"
    path.write_bytes(text.encode())
    return path


def write(path: Path, **changes: str) -> str:
    write_env(read_env(path), changes)
    return path.read_bytes().decode()


def random_value(dice: random.Random) -> str:
    return "".join(dice.choices(_PIECES, k=dice.randint(0, 6)))


def test_whatever_is_written_is_read_back_and_the_rest_stays(tmp_path: Path) -> None:
    for seed in range(300):
        dice = random.Random(seed)
        lines = []
        for number in range(dice.randint(0, 6)):
            before = dice.choice(("", "export ", "  ", "\n", "# a note\n"))
            value = dice.choice(("", "x", "'one'", '"two"', "two words", "'two\nlines'", "="))
            comment = dice.choice(("", "", " # why")) if value else ""
            lines.append(f"{before}K{number}={value}{comment}")
        text = "\n".join((*lines, dice.choice(("", "# the end"))))
        path = given(tmp_path, text)
        old = {key: value or "" for key, value in read_env(path).values.items()}
        wanted = {f"K{number}": random_value(dice) for number in dice.sample(range(9), k=3)}
        changed = write(path, **wanted)
        new = {key: value or "" for key, value in read_env(path).values.items()}
        assert new == old | {k: v for k, v in wanted.items() if k in old or v}, seed
        for kept in ("# a note", "# the end", " # why"):
            assert changed.count(kept) == text.count(kept), seed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("A=1\n# why\nK=old\nB=2\n", "A=1\n# why\nK=new\nB=2\n"),
        ("K\nB=2\n", "K=new\nB=2\n"),
        ('K="my #1"\n', "K=new\n"),
        ("K=  'a=b #1' # why\n", "K=new # why\n"),
        ("K=first\nK=second\n", "K=new\nK=new\n"),
        ("K='over\ntwo lines'\nB=2\n", "K=new\nB=2\n"),
        ("# nothing", "# nothing\nK=new\n"),
        ("B=2\r\n", "B=2\r\nK=new\r\n"),
        ("B=2\r\nK=old\r\nC='1\r\n2'\r\n", "B=2\r\nK=new\r\nC='1\r\n2'\r\n"),
        ("export K=old\nB=2\n", "export K=new\nB=2\n"),
        ("B=2\n\n  K=old", "B=2\n\n  K=new\n"),
        ("K=old # why\nB=2\n", "K=new # why\nB=2\n"),
        ("K='a # b' # why\r\n", "K=new # why\r\n"),
        ('K="a \\" # b"#why\n', "K=new #why\n"),
        ("K=a#b\n", "K=new\n"),
        ("\ufeffK=old\n", "\ufeffK=new\n"),
        ("H=${HOME}/x\nK=old\n", "H=${HOME}/x\nK=new\n"),
        ("", "K=new\n"),
    ],
)
def test_a_key_changes_where_it_stands(tmp_path: Path, before: str, after: str) -> None:
    path = given(tmp_path, before)
    assert write(path, K="new") == after
    assert [backup.read_bytes().decode() for backup in backups(path)] == [before]


def test_what_looks_like_a_variable_is_written_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KITTY_PLACE", "elsewhere")
    path = given(tmp_path, "")
    write(path, K="${KITTY_PLACE}/${NOT_SET:-x}")
    assert read_env(path).values["K"] == "${KITTY_PLACE}/${NOT_SET:-x}"


def test_what_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    path = given(tmp_path, "K='1'\nE=\n")
    inode = path.stat().st_ino
    saved = write_env(read_env(path), {"K": "1", "E": "", "NEVER": ""})
    assert (saved.keys, saved.backup) == ((), None)
    assert path.stat().st_ino == inode
    assert not backups(path)
    assert "nothing was written" in saved.sentence


def test_rights_and_links_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "dotfiles" / "env"
    target.parent.mkdir()
    target.write_text("K=1\n")
    target.chmod(0o640)
    link = tmp_path / ".env"
    link.symlink_to(target)
    saved = write_env(read_env(link), {"K": "2"})
    assert link.is_symlink()
    assert target.read_text() == "K=2\n"
    assert saved.backup
    assert saved.backup.read_text() == "K=1\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert [file.name for file in target.parent.iterdir()] == ["env"]


def test_the_backup_which_may_hold_a_key_is_for_its_owner_alone_and_not_in_the_project(
    tmp_path: Path,
) -> None:
    path = given(tmp_path, "LLAMACPP_API_KEY=sesame\n")
    path.chmod(0o644)
    backup = write_env(read_env(path), {"K": "1"}).backup
    assert backup
    assert "sesame" in backup.read_text()
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    assert stat.S_IMODE(backup.parent.stat().st_mode) == 0o700
    assert [file.name for file in tmp_path.iterdir()] == [".env"]


@pytest.mark.parametrize("now", ["K=3\n", None])
def test_a_file_that_has_changed_meanwhile_is_left_alone(tmp_path: Path, now: str | None) -> None:
    path = given(tmp_path, "K=1\n")
    env = read_env(path)
    path.unlink()
    if now:
        path.write_text(now)
    with pytest.raises(ConfigError, match="changed since it was read"):
        write_env(env, {"K": "2"})
    assert [file.read_text() for file in tmp_path.iterdir()] == ([now] if now else [])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that nobody may write to")
def test_an_unwritable_folder_is_explained(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.symlink_to("/proc/sys/kernel/hostname")
    with pytest.raises(ConfigError, match=r"Can't write it: .* by hand: K='a b'"):
        write_env(read_env(path), {"K": "a b"})


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("one.gguf", "sub/two words.gguf", "~tilde.gguf"):
        file = tmp_path / "models" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"GGUF")
    return tmp_path / "models"


def test_the_settings_of_a_profile_are_saved_under_its_own_keys(
    tmp_path: Path, models: Path
) -> None:
    text = "LLAMACPP_MODELS_DIR=models\nLLAMACPP_CTX=512 # for all\nLLAMACPP_CODER_PORT=9001\n"
    path = given(tmp_path, text)
    config = ServerConfig.from_env(path, "coder").replace(
        model="sub/two words.gguf",
        context_size=1024,
        port=9002,
        temperature=0.1,
        flash_attention="on",
        tool_calling=False,
        extra_args=("--chat-template", "a 'b' \"c\" ${HOME} \\"),
        stop_grace_seconds=2.5,
        log_dir=models / "logs",
    )
    saved = save_settings(config, path)
    assert ServerConfig.from_env(path, "coder") == config
    assert ServerConfig.from_env(path) == ServerConfig(models_dir=models, context_size=512)
    lines = path.read_text().splitlines()
    assert lines[:3] == [*text.splitlines()[:2], "LLAMACPP_CODER_PORT=9002"]
    assert "LLAMACPP_CODER_MODEL='sub/two words.gguf'" in lines
    assert "LLAMACPP_CODER_TOOL_CALLING=0" in lines
    assert set(saved.keys) == {line.partition("=")[0] for line in lines[2:]}
    assert str(saved.backup) in saved.sentence
    assert save_settings(config, path).keys == ()


def test_only_the_named_settings_are_saved(tmp_path: Path, models: Path) -> None:
    path = given(tmp_path, "LLAMACPP_MODELS_DIR=models\n")
    config = ServerConfig(models_dir=models, model="one.gguf", port=9000, threads=2)
    assert save_settings(config, path, {"model", "threads"}).keys == (
        "LLAMACPP_PRIMARY_MODEL",
        "LLAMACPP_PRIMARY_THREADS",
    )
    assert ServerConfig.from_env(path) == config.replace(port=8082)


def test_a_model_whose_name_begins_like_a_home_is_found_again(tmp_path: Path, models: Path) -> None:
    path = given(tmp_path, "LLAMACPP_MODELS_DIR=models\n")
    save_settings(ServerConfig(models_dir=models, model=models / "~tilde.gguf"), path)
    assert ServerConfig.from_env(path).model == models / "~tilde.gguf"


def test_a_setting_is_unset_in_the_file_unless_all_profiles_have_it(
    tmp_path: Path, models: Path
) -> None:
    path = given(tmp_path, "LLAMACPP_PRIMARY_CTX=512 # mine\nLLAMACPP_THREADS=2\n")
    config = ServerConfig.from_env(path)
    save_settings(config.replace(context_size=None), path)
    assert path.read_text() == "LLAMACPP_PRIMARY_CTX='' # mine\nLLAMACPP_THREADS=2\n"
    with pytest.raises(ConfigError, match=r"LLAMACPP_THREADS='2'.*every profile.* Clear it"):
        save_settings(config.replace(threads=None), path)


def test_flags_for_every_profile_are_not_shown_for_they_may_hold_a_secret(tmp_path: Path) -> None:
    path = given(tmp_path, "LLAMACPP_EXTRA_ARGS='--hf-token SECRET'\n")
    with pytest.raises(ConfigError, match=r"LLAMACPP_EXTRA_ARGS='\(hidden\)'.*every") as caught:
        save_settings(ServerConfig.from_env(path).replace(extra_args=()), path)
    assert "SECRET" not in str(caught.value)


def test_wrong_values_give_way_and_other_mistakes_stay(tmp_path: Path, models: Path) -> None:
    path = given(
        tmp_path,
        "LLAMACPP_MODELS_DIR=models\nLLAMACPP_PRIMARY_MODEL=gone.gguf\nLLAMACPP_PRIMARY_CTX=lots\n"
        "LLAMACPP_PORT=0\n",
    )
    config, complaint = load_profile(path)
    assert complaint
    assert len(complaint.problems) == 3
    save_settings(config.replace(model="one.gguf", flash_attention=FlashAttention.AUTO), path)
    assert path.read_text() == (
        "LLAMACPP_MODELS_DIR=models\nLLAMACPP_PRIMARY_MODEL=one.gguf\nLLAMACPP_PRIMARY_CTX=\n"
        "LLAMACPP_PORT=0\nLLAMACPP_PRIMARY_FLASH_ATTN=auto\n"
    )


def test_a_wrong_value_behind_a_wrong_value_is_found_and_left_out_too(
    tmp_path: Path, models: Path
) -> None:
    wrong = {
        "LLAMACPP_PORT": "99999",
        "LLAMACPP_PRIMARY_PORT": "0",
        "LLAMACPP_MODEL": "gone.gguf",
        "LLAMACPP_PRIMARY_MODEL": "gone-too.gguf",
    }
    lines = "".join(f"{key}={value}\n" for key, value in wrong.items())
    path = given(tmp_path, f"LLAMACPP_MODELS_DIR=models\n{lines}LLAMACPP_CTX=512\n")
    config, complaint = load_profile(path)
    assert complaint
    assert {problem.key: problem.value for problem in complaint.problems} == wrong
    assert (config.port, config.model, config.context_size) == (8082, None, 512)
    with pytest.raises(ConfigError, match="profile='no name'"):
        load_profile(path, "no name")


def test_a_missing_file_is_made_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = save_settings(ServerConfig(threads=3))
    assert (saved.path, saved.backup) == (tmp_path / ".env", None)
    assert (tmp_path / ".env").read_text() == "LLAMACPP_PRIMARY_THREADS=3\n"
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_what_nobody_could_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "my.env"
    path.write_text("LLAMACPP_PORT=9000\n")
    with pytest.raises(ConfigError):
        write_env(read_env(path), {"LLAMACPP_ALIAS": "a\0b"})
    assert path.read_text() == "LLAMACPP_PORT=9000\n"
    for wrong in ({"alias": "a\0b"}, {"model": "a\0b.gguf"}, {"extra_args": ["--x", "\0"]}):
        with pytest.raises(ConfigError):
            ServerConfig(**wrong)
