"""Checkpoints: round trip, damage detection, rotation, and refusal of the wrong model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, ModelConfig
from anarchobot.model.parameters import init_parameters
from anarchobot.runs import checkpoint
from anarchobot.runs.progress import Progress
from anarchobot.storage.durable import CHECKSUM, write_checksummed
from tests.storage.disk_calls import DiskCalls

MODEL = ModelConfig(vocab_size=11, n_layers=1, d_model=4, n_heads=2)
CONFIG = Config(model=MODEL).model_dump()


def engine_state(seed: int = 0) -> dict[str, np.ndarray]:
    params = init_parameters(MODEL, seed)
    arrays = {f"params/{name}": p for name, p in params.items()}
    return {
        **arrays,
        **{f"optimizer/adamw.first/{name}": 2 * p for name, p in params.items()},
        "updates": np.array(7),
        "loss_scale": np.array(1024.0),
    }


def save(run: Path, step: int, seed: int = 0) -> Path:
    return checkpoint.save(run, step, engine_state(seed), {"config": CONFIG, "tokens": 5})


def test_round_trip_and_plain_numpy(tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.json", "step_00000020"]
    assert sorted(p.name for p in folder.iterdir()) == ["model.npz", "optimizer.npz", "state.json"]
    found = checkpoint.find(tmp_path)
    assert (found.folder, found.step, found.state["tokens"]) == (folder, 20, 5)
    assert found.config.model == MODEL
    arrays = checkpoint.load_arrays(found, MODEL, optimizer=True)
    saved = engine_state()
    assert set(arrays) == set(saved)
    for name, value in saved.items():
        np.testing.assert_array_equal(arrays[name], value)
    with np.load(folder / "model.npz", allow_pickle=False) as npz:
        assert npz["model.layers.0.self_attn.q_proj.weight"].dtype == np.float32
        assert set(npz.files) == {name.removeprefix("params/") for name in saved if name.startswith("params/")}


def test_more_arrays_than_mlx_can_save(tmp_path: Path) -> None:
    """mx.savez takes at most 1,024 arrays; a deep model has more."""
    many = {f"optimizer/adamw.first/{i}": np.full(1, i) for i in range(1100)}
    checkpoint.save(tmp_path, 1, engine_state() | many, {"config": CONFIG})
    arrays = checkpoint.load_arrays(checkpoint.find(tmp_path), MODEL, optimizer=True)
    assert arrays["optimizer/adamw.first/1099"].tolist() == [1099]


def test_find_accepts_run_step_folder_and_file(tmp_path: Path) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    for path, step in ((tmp_path, 10), (newest, 10), (tmp_path / "step_00000005", 5), (newest / "model.npz", 10)):
        assert checkpoint.find(path).step == step


def test_find_follows_best_and_latest(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    write_checksummed(tmp_path / "best.json", {"step": 5})
    assert checkpoint.find(tmp_path / "best.json").step == 5
    assert checkpoint.find(tmp_path / "latest.json").step == 10
    assert checkpoint.read_best(tmp_path, 7) == {"step": 5}
    assert checkpoint.read_best(tmp_path, 4) is None


def test_find_follows_symbolic_links_to_their_run(tmp_path: Path) -> None:
    """The files of a run, such as its tokenizer, are looked up beside the step folder."""
    run, links = tmp_path / "run", tmp_path / "links"
    for step in (5, 10):
        save(run, step)
    checkpoint.write_best(run, 5, {})
    links.mkdir()
    (links / "newest").symlink_to(run / "step_00000010")
    (links / "model.npz").symlink_to(Path("newest") / "model.npz")
    (links / "best.json").symlink_to(run / "best.json")
    for name, step in {"newest": 10, "newest/model.npz": 10, "model.npz": 10, "best.json": 5}.items():
        assert checkpoint.find(links / name).folder == run / f"step_{step:08d}"


def test_copy_of_a_step_folder_is_ignored(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step_00000007 copy").mkdir()
    (tmp_path / "step_00000007 copy" / "state.json").write_text("{}")
    assert checkpoint.saved_steps(tmp_path) == [5]


def test_step_without_state_json_is_ignored(tmp_path: Path) -> None:
    """state.json is written last: a step without it is incomplete."""
    save(tmp_path, 5)
    (save(tmp_path, 10) / "state.json").unlink()
    assert checkpoint.find(tmp_path).step == 5


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    write_checksummed(tmp_path / "best.json", {"step": 2})
    assert checkpoint.rotate(tmp_path, keep=2) == [1, 3]
    assert sorted(checkpoint.saved_steps(tmp_path)) == [2, 4, 5]


def test_rotation_keeps_protected_steps_also_behind_a_newer_one(tmp_path: Path) -> None:
    for step in (1, 4, 5, 8):
        save(tmp_path, step)
    assert checkpoint.rotate(tmp_path, keep=1, protected=[5, 4]) == [1]
    assert sorted(checkpoint.saved_steps(tmp_path)) == [4, 5, 8]


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: b"", lambda data: b'{"step": 3}\n'])
def test_damaged_best_json_is_an_error_and_removes_nothing(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoint.write_best(tmp_path, 1, {})
    best = tmp_path / "best.json"
    best.write_bytes(damage(best.read_bytes()))
    for use in (checkpoint.best_step, lambda run: checkpoint.rotate(run, 1), lambda run: checkpoint.find(best)):
        with pytest.raises(UserError, match=r"best.json: damaged .*: delete it, and name a step_... folder"):
            use(tmp_path)
    assert sorted(checkpoint.saved_steps(tmp_path)) == [1, 2, 3]
    assert checkpoint.find(tmp_path).step == 3
    best.unlink()
    assert checkpoint.rotate(tmp_path, 1) == [1, 2]


def test_order_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step gets its name once all its files and their names are on the disk, and latest.json refers to it after that.
    A replaced step is moved aside before, and removed when the new one is on the disk."""
    save(tmp_path, 3, seed=0)
    calls = DiskCalls(monkeypatch, tmp_path)
    save(tmp_path, 3, seed=1)
    temporary, final = ".step_00000003.tmp", "step_00000003"
    assert calls.in_order() == [
        f"fsync {final}/model.npz",
        f"fsync {final}/optimizer.npz",
        f"fsync {final}/state.json",
        f"rename {temporary}/state.json.tmp {temporary}/state.json",
        f"fsync {final}",
        f"rename {final} .{final}.old",
        f"rename {temporary} {final}",
        "fsync .",
        f"remove .{final}.old",
        "fsync latest.json",
        "rename latest.json.tmp latest.json",
        "fsync .",
    ]


def test_rotation_removes_state_json_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose removal was interrupted must not look complete."""
    for step in (1, 2):
        save(tmp_path, step)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        checkpoint.rotate(tmp_path, 1)
    assert (tmp_path / "step_00000001" / "model.npz").exists()
    assert checkpoint.saved_steps(tmp_path) == [2]
    checkpoint.clean_up(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.json", "step_00000002"]


def test_clean_up_restores_a_step_that_was_moved_aside(tmp_path: Path) -> None:
    """Killed between the two renames of a replacement, a step is complete only under its name with .old."""
    save(tmp_path, 3, seed=0)
    aside = save(tmp_path, 5, seed=1).rename(tmp_path / ".step_00000005.old")
    (tmp_path / ".step_00000005.tmp").mkdir()
    checkpoint.clean_up(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.json", "step_00000003", "step_00000005"]
    arrays = checkpoint.load_arrays(checkpoint.find(tmp_path), MODEL, optimizer=True)
    name = "params/model.embed_tokens.weight"
    np.testing.assert_array_equal(arrays[name], engine_state(1)[name])
    # Killed after the second rename: the replacement is complete, and the old step is removed.
    (tmp_path / "step_00000003").rename(aside)
    checkpoint.clean_up(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.json", "step_00000005"]
    arrays = checkpoint.load_arrays(checkpoint.find(tmp_path), MODEL, optimizer=True)
    np.testing.assert_array_equal(arrays[name], engine_state(1)[name])


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, seed=0)
    folder = save(tmp_path, 3, seed=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.json", "step_00000003"]
    arrays = checkpoint.load_arrays(checkpoint.find(folder), MODEL, optimizer=False)
    name = "params/model.embed_tokens.weight"
    np.testing.assert_array_equal(arrays[name], engine_state(1)[name])


@pytest.mark.parametrize("name", ["model.npz", "optimizer.npz"])
def test_every_flipped_byte_is_detected(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    good = (folder / name).read_bytes()
    for place in range(0, len(good), 97):
        bad = bytearray(good)
        bad[place] ^= 1
        (folder / name).write_bytes(bad)
        with pytest.raises(UserError, match=f"{name}: damaged"):
            checkpoint.load_arrays(checkpoint.find(folder), MODEL, optimizer=True)


def test_errors(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 1)
    other = ModelConfig(vocab_size=11, n_layers=1, d_model=8, n_heads=2)
    deeper = ModelConfig(vocab_size=11, n_layers=2, d_model=4, n_heads=2)
    with pytest.raises(
        UserError, match=r"does not match .*: model.embed_tokens.weight has shape \[11, 4\], expected \[11, 8\]"
    ):
        checkpoint.load_arrays(checkpoint.find(folder), other, optimizer=False)
    with pytest.raises(UserError, match=r"model.layers.1.input_layernorm.weight has shape none"):
        checkpoint.load_arrays(checkpoint.find(folder), deeper, optimizer=False)
    with pytest.raises(UserError, match="no checkpoint here"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint here"):
        checkpoint.find(tmp_path)
    (folder / "optimizer.npz").unlink()
    with pytest.raises(UserError, match=r"optimizer.npz: can't be read"):
        checkpoint.load_arrays(checkpoint.find(folder), MODEL, optimizer=True)
    (folder / "state.json").write_text(json.dumps({"step": "x"}))
    with pytest.raises(UserError, match=r"state.json: damaged"):
        checkpoint.find(folder)


def test_states_of_another_form_are_refused(tmp_path: Path) -> None:
    """With a valid checksum, as another program may write."""
    folder = save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    state.pop(CHECKSUM)
    write_checksummed(folder / "state.json", state | {"engine": [1]})
    with pytest.raises(UserError, match=r"state.json: damaged \(engine: not a mapping\)"):
        checkpoint.find(folder)
    write_checksummed(folder / "state.json", state | {"step": float("inf")})
    with pytest.raises(UserError, match=r"state.json: damaged \(cannot convert float infinity"):
        checkpoint.find(folder)
    with pytest.raises(UserError, match="no data_position"):
        Progress.from_state({"step": 1})


def test_failed_save_keeps_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert checkpoint.find(tmp_path).step == 1


def test_a_disk_that_returns_other_bytes_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    write = checkpoint._write_npz

    def write_badly(path: Path, arrays: Any) -> str:
        digest = write(path, arrays)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        return digest

    monkeypatch.setattr(checkpoint, "_write_npz", write_badly)
    with pytest.raises(OSError, match=r"model.npz: .*the disk returned different bytes"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step_00000001"]
