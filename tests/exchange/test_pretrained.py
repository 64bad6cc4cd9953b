"""Loading whole models: the tokenizer must fit the embedding, and the digest identifies the weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.exchange.adapters import same_base
from anarchobot.exchange.exporting import export
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.runs.write_model import write_model
from anarchobot.tokenizers.tokenizer import copy_tokenizer, load_tokenizer
from tests.exchange.random_run import make_run


@pytest.mark.parametrize("more", [-1, 1])
def test_tokenizer_of_another_size_is_rejected(
    tmp_path: Path, bpe: Path, more: int, capsys: pytest.CaptureFixture[str]
) -> None:
    right = make_run(tmp_path / "right", bpe)
    wrong = make_run(tmp_path / "wrong", bpe, vocab_size=load_pretrained(str(right)).tokenizer.vocab_size + more)
    match = rf"wrong/tokenizer.model: 500 tokens, but the model in .*step_00000040 has {500 + more} rows: put the"
    with pytest.raises(UserError, match=match):
        load_pretrained(str(wrong))
    assert main(["generate", "--checkpoint", str(wrong), "--prompt", "a"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_digest_depends_on_the_weights_and_not_on_the_path(tmp_path: Path, bpe: Path) -> None:
    run = make_run(tmp_path / "run", bpe)
    shutil.copytree(run, tmp_path / "copy")
    assert load_pretrained(str(run)).digest == load_pretrained(str(tmp_path / "copy" / "step_00000040")).digest
    other = make_run(tmp_path / "other", bpe, n_layers=1)
    assert load_pretrained(str(other)).digest != load_pretrained(str(run)).digest


def refuses(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_pretrained(str(path))
    assert "\n" not in str(error.value)


def test_foreign_tokenizer_of_equal_size_is_refused(tmp_path: Path, bpe: Path, tokenizers_folder: Path) -> None:
    """A step was copied beside another tokenizer, or reached by a link in such a folder; checkpoints of early versions
    don't name their tokenizer."""
    source = make_run(tmp_path / "source", bpe)
    config, weights = load_pretrained(str(source)).config, dict(load_pretrained(str(source)).weights)
    run, other = tmp_path / "run", load_tokenizer(tokenizers_folder / "unigram")
    for folder in (run, tmp_path / "new"):
        folder.mkdir()
    write_model(run, config, load_tokenizer(bpe), weights, {})
    step = run / "step_00000000"
    assert np.array_equal(load_pretrained(str(step)).weights["model.norm.weight"], weights["model.norm.weight"])
    assert other.vocab_size == config.model.vocab_size
    copy_tokenizer(other, tmp_path / "new")
    (tmp_path / "new" / "link").symlink_to(step, target_is_directory=True)
    assert load_pretrained(str(tmp_path / "new" / "link")).tokenizer.files[0].parent == run
    shutil.copytree(step, tmp_path / "new" / step.name)
    found = r"new/tokenizer.model: not the tokenizer that the model in .*new/step_00000000 was trained with \(SHA-256 "
    refuses(tmp_path / "new", found)
    with pytest.raises(UserError, match=found):
        export(tmp_path / "new", "hf", tmp_path / "hf")
    copy_tokenizer(other, source)
    assert load_pretrained(str(source)).tokenizer.files[0] == source / "tokenizer.model"


def test_digest_covers_settings_and_tokenizer(tmp_path: Path, bpe: Path, tokenizers_folder: Path) -> None:
    """rope_theta and the tokenizer change what the same weights compute. dropout and bos_id don't."""
    folder = tmp_path / "hf"
    export(make_run(tmp_path / "run", bpe, n_layers=1), "hf", folder)
    digests = [load_pretrained(str(folder)).digest]

    def change(file: str, **values: object) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | values))
        load_pretrained.cache_clear()
        digests.append(load_pretrained(str(folder)).digest)

    change("config.json", rope_theta=20000.0)
    change("config.json", rms_norm_eps=1e-3)
    for file in ("tokenizer.json", "tokenizer.model"):
        (folder / file).unlink()
    copy_tokenizer(load_tokenizer(tokenizers_folder / "json"), folder)
    change("config.json", eos_token_id=0)
    assert len(set(digests)) == 4
    assert len({digest.partition(":")[0] for digest in digests}) == 1, "the weights are the same"
    change("config.json", max_position_embeddings=77)
    assert digests[-1] == digests[-2]
    assert same_base(digests[0], digests[0]) and same_base(digests[0].partition(":")[0], digests[0])
    assert not same_base(digests[0], digests[1]) and not same_base("0" * 64, digests[0])
