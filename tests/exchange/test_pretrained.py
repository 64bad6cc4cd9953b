"""Loading whole models: the tokenizer must fit the embedding, and the digest identifies the weights."""

import shutil
from pathlib import Path

import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.exchange.pretrained import load_pretrained
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
