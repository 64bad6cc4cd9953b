"""Imports: logits and text equal those of transformers, and unsupported or damaged folders are rejected by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.config.loading import load_config
from anarchobot.config.schema import GenerationConfig
from anarchobot.exchange.exporting import export
from anarchobot.exchange.importing import INDEX, import_model, load_hf_folder
from anarchobot.inference.generation import generate
from anarchobot.inference.model import load_model
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.exchange.random_run import STORIES, make_run, our_logits, real_ids
from tests.tiny import make_shards

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch_files = pytest.importorskip("safetensors.torch")

VOCAB = 500


def hf_folder(folder: Path, tokenizer: Path, kind: str = "Llama", **more: Any) -> Path:
    """A random model saved by transformers, with a tokenizer."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 120, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        "initializer_range": 0.08,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(folder, max_shard_size="40KB" if kind == "Mistral" else "1GB")
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    return folder


def fill_biases(folder: Path) -> None:
    """Replaces the zeros that transformers initializes biases with."""
    tensors = torch_files.load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".bias") and "o_proj" not in name:
            assert not tensor.any()
            tensors[name] = torch.randn_like(tensor)
    torch_files.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def their_logits(folder: Path, ids: list[int]) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()  # type: ignore[no-any-return]


def test_stories260k_gives_its_logits_and_published_text(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / STORIES / "hf"
    done = import_model(folder, tmp_path / "run")
    assert done["parameters"] == 260032 and done["warnings"] == []
    stories = json.loads((shared_data / STORIES / "reference.json").read_text())
    tokenizer = load_tokenizer(tmp_path / "run")
    text = (shared_data / "text" / "tinystories_train_part.txt").read_text(encoding="utf-8")[:3000]
    ids = [1, *tokenizer.encode_batch([text])[0].tolist()][:512]
    ours, theirs = our_logits(tmp_path / "run", ids), their_logits(folder, ids)
    np.testing.assert_allclose(ours[:256], theirs[:256], atol=1e-4, rtol=0)
    # With logits up to 30, both programs are about 1e-4 away from float64 by the end.
    np.testing.assert_allclose(ours, theirs, atol=3e-4, rtol=0)
    # The published text starts with BOS (1), as the training texts did.
    greedy = stories["greedy_from_bos_ids"]
    z = our_logits(tmp_path / "run", greedy[:-1])
    assert z.argmax(axis=1).tolist() == greedy[1:]
    published = (shared_data / STORIES / "stories260K.md").read_text()
    decoded = tokenizer.decode(greedy[1:])
    assert decoded == stories["greedy_text"] and decoded[:500] in published
    # `generate` starts with it too.
    model, config = load_model(tmp_path / "run")
    assert config.model.bos_id == 1
    text = generate(model, GenerationConfig(method="greedy", max_new_tokens=len(greedy) - 1))
    assert text == decoded


def test_training_starts_from_the_imported_weights(shared_data: Path, tmp_path: Path) -> None:
    """The first validation loss is the public model's, whether or not it was imported first, and far below that of an
    untrained model."""
    import_model(shared_data / STORIES / "hf", tmp_path / "llama")
    text = shared_data / "text" / "tinystories_train_part.txt"
    words = ["--quiet", "train.max_grad_norm=1", "--no-supervise", "train.total_steps=2", "data.seq_len=128"]
    words += ["train.eval_batches=20", "model.dropout=0", f"data.shard_dir={tmp_path}/shards", "train.lr=1e-4"]
    config = str(tmp_path / "llama" / "config.yaml")
    tokenizer = str(tmp_path / "llama" / "tokenizer.model")
    options = ["--tokenizer", tokenizer, "--output", str(tmp_path / "shards"), "--val-fraction", "0.1"]
    assert main(["pretokenize", "--input", str(text), *options, "--quiet", "data.documents=lines"]) == 0
    first = {}
    init_from = {"further": f"{tmp_path}/llama", "direct": str(shared_data / STORIES / "hf"), "new": "null"}
    for name, where in init_from.items():
        more = [f"train.init_from={where}"]
        assert main(["pretrain", config, *words, *more, "--checkpoint-dir", str(tmp_path / name)]) == 0
        lines = (tmp_path / name / "logs" / "metrics.jsonl").read_text().splitlines()
        first[name] = next(e["val_loss"] for e in map(json.loads, lines) if e["event"] == "eval")
    assert first["further"] == first["direct"] < 2.5
    assert first["new"] == pytest.approx(np.log(512), rel=0.05)


def test_resuming_an_import_and_changing_its_shape_are_errors(tmp_path: Path, bpe: Path, capsys: Any) -> None:
    import_model(hf_folder(tmp_path / "hf", bpe), tmp_path / "run")
    shards = make_shards(tmp_path / "shards", vocab_size=VOCAB)
    words = [f"data.shard_dir={shards}", "train.tokenizer_path=null", "--no-supervise"]
    config = ["pretrain", str(tmp_path / "run" / "config.yaml"), *words]
    assert main([*config, "--resume-from", "auto"]) == 2
    assert "a new run with train.init_from=" in capsys.readouterr().err
    other = ["train.init_from=" + str(tmp_path / "run"), f"train.save_dir={tmp_path}/new", "model.rope_theta=5.0"]
    assert main([*config, *other]) == 2
    assert "model.rope_theta: 5.0, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {"tie_word_embeddings": True, "rope_theta": 5e5}),
        ("Mistral", {"sliding_window": None}),  # saved in several files
        ("Qwen2", {"head_dim": 12}),
        ("Qwen3", {"rms_norm_eps": 1e-5}),
        ("Llama", {"attention_bias": True}),  # also has an output bias, which is zero
    ],
)
def test_folders_saved_by_transformers(tmp_path: Path, bpe: Path, kind: str, more: dict[str, Any]) -> None:
    folder = hf_folder(tmp_path / "hf", bpe, kind, **more)
    assert (folder / INDEX).exists() == (kind == "Mistral")
    biased = any(".bias" in name for f in folder.glob("*.safetensors") for name in torch_files.load_file(f))
    assert biased == (kind == "Qwen2" or "attention_bias" in more)
    if biased:
        fill_biases(folder)
    assert import_model(folder, tmp_path / "run")["architecture"] == kind.lower()
    ids = real_ids(tmp_path / "run")
    ours = our_logits(tmp_path / "run", ids)
    assert ours.std() > 0.1
    np.testing.assert_allclose(ours, their_logits(folder, ids), atol=1e-4, rtol=0)


def test_qwen2_is_imported_trained_and_exported(tmp_path: Path, bpe: Path) -> None:
    """Gradients equal transformers'; after training, transformers and mlx-lm compute our logits."""
    import mlx.core as mx
    from mlx_lm import load as mlx_load

    from anarchobot.model.llama.gradients import loss_and_gradients
    from anarchobot.model.step_options import MicroBatch

    folder = hf_folder(tmp_path / "hf", bpe, "Qwen2", head_dim=12, tie_word_embeddings=True)
    fill_biases(folder)
    import_model(folder, tmp_path / "run")
    found = load_hf_folder(folder)
    assert found.model.attention_bias and load_config(tmp_path / "run" / "config.yaml").config.model == found.model
    ids = np.array([real_ids(tmp_path / "run", 200)])
    params = {name: mx.array(array) for name, array in found.weights.items()}
    batch = MicroBatch(mx.array(ids[:, :-1]), mx.array(ids[:, 1:]), mx.array(1 / 199))
    loss, ours = loss_and_gradients(params, batch, found.model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    out = theirs(torch.tensor(ids), labels=torch.tensor(ids))
    out.loss.backward()
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert set(gradients) == set(ours) and sum(name.endswith(".bias") for name in ours) == 6
    for name, expected in gradients.items():
        np.testing.assert_allclose(np.array(ours[name]), expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)
    shards = make_shards(tmp_path / "shards", vocab_size=VOCAB)
    words = [f"data.shard_dir={shards}", "train.tokenizer_path=null", "train.total_steps=3", "data.seq_len=64"]
    words += [f"train.init_from={tmp_path}/run", f"train.save_dir={tmp_path}/new", "train.warmup_steps=0"]
    words += ["--quiet", "--no-supervise", "train.lr=0.01"]
    assert main(["pretrain", str(tmp_path / "run" / "config.yaml"), *words]) == 0
    before, after = (np.load(tmp_path / step / "model.npz") for step in ("run/step_00000000", "new/step_00000003"))
    for name in before.files:
        assert not np.array_equal(before[name], after[name]), name
    export(tmp_path / "new", "hf", tmp_path / "out")
    z = our_logits(tmp_path / "new", ids[0].tolist())
    np.testing.assert_allclose(their_logits(tmp_path / "out", ids[0].tolist()), z, atol=1e-4)
    mlx_model = mlx_load(str(tmp_path / "out"))[0]
    np.testing.assert_allclose(np.array(mlx_model(mx.array(ids)))[0], z, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_exactly(tmp_path: Path, bpe: Path, dtype: torch.dtype) -> None:
    folder = hf_folder(tmp_path / "hf", bpe)
    half = {name: tensor.to(dtype) for name, tensor in torch_files.load_file(folder / "model.safetensors").items()}
    torch_files.save_file(half, folder / "model.safetensors", {"format": "pt"})
    import_model(folder, tmp_path / "run")
    found = np.load(tmp_path / "run" / "step_00000000" / "model.npz")
    for name, tensor in half.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], tensor.float().numpy())


def test_imported_run_generates_and_its_config_is_valid(tmp_path: Path, bpe: Path) -> None:
    folder = hf_folder(tmp_path / "hf", bpe)
    import_model(folder, tmp_path / "run")
    model, config = load_model(tmp_path / "run")
    assert len(generate(model, GenerationConfig(prompt="A text", method="greedy", max_new_tokens=20))) > 0
    written = load_config(tmp_path / "run" / "config.yaml").config
    assert written == config and written.model.vocab_size == VOCAB and written.data.seq_len == 1024
    assert load_tokenizer(str(written.train.tokenizer_path)).vocab_size == VOCAB


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"qk_norm": True, "tie_embeddings": False},
        {"attention_bias": True},
        {"n_heads": 5, "qk_norm": True, "n_kv_heads": 1, "head_dim": 16},
    ],
    ids=str,
)
def test_export_and_import_round_trip(tmp_path: Path, tokenizer_path: Path, shape: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", tokenizer_path, **shape)
    export(run, "hf", tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "back")
    before, after = (
        np.load(p) for p in (run / "step_00000040/model.npz", tmp_path / "back" / "step_00000000/model.npz")
    )
    assert set(before.files) == set(after.files)
    assert all(np.array_equal(before[name], after[name]) for name in before.files)
    text = ["Grüße aus <s>Köln</s>: 吾輩は\t▁x  y"]
    old, new = (load_tokenizer(folder).encode_batch(text)[0].tolist() for folder in (run, tmp_path / "back"))
    assert old == new


def test_extra_embedding_rows_are_dropped_with_a_warning(tmp_path: Path, bpe: Path) -> None:
    folder = hf_folder(tmp_path / "hf", bpe, vocab_size=512)
    (warning,) = import_model(folder, tmp_path / "run")["warnings"]
    assert warning.startswith("embedding rows without a token: the model has 512 rows, its tokenizer 500 tokens")
    ids = real_ids(tmp_path / "run", 100)
    np.testing.assert_allclose(our_logits(tmp_path / "run", ids), their_logits(folder, ids)[:, :VOCAB], atol=1e-4)


def test_of_two_tokenizers_the_one_that_fits_is_used(tmp_path: Path, bpe: Path, tokenizers_folder: Path) -> None:
    """A folder can have a tokenizer.model and a tokenizer.json with added tokens."""
    folder = hf_folder(tmp_path / "hf", tokenizers_folder / "json" / "tokenizer.json", vocab_size=VOCAB)
    (folder / "tokenizer.model").write_bytes(b"ranks, not SentencePiece")
    assert import_model(folder, tmp_path / "a")["tokenizer"] == "tokenizer.json"
    shutil.copyfile(bpe, folder / "tokenizer.model")
    assert import_model(folder, tmp_path / "b")["tokenizer"] == "tokenizer.json"
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["more"] = VOCAB
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    assert import_model(folder, tmp_path / "c")["tokenizer"] == "tokenizer.model"


def damage(folder: Path, what: str) -> Path:
    weights = folder / "model.safetensors"
    tensors = torch_files.load_file(weights)
    if what == "config":
        (folder / "config.json").unlink()
    elif what == "no json":
        (folder / "config.json").write_text("{")
    elif what == "a list":
        (folder / "config.json").write_text("[]")
    elif what == "odd types":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "layer_types": 5}))
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "no weights":
        weights.unlink()
    elif what == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
        torch_files.save_file(tensors, weights)
    elif what == "bias":
        torch_files.save_file({**tensors, "model.layers.0.self_attn.o_proj.bias": torch.ones(48)}, weights)
    elif what == "some biases":
        torch_files.save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, weights)
    elif what == "unknown":
        torch_files.save_file({**tensors, "model.layers.0.self_attn.sinks": torch.ones(4)}, weights)
    elif what == "shape":
        torch_files.save_file({**tensors, "model.norm.weight": torch.ones(49)}, weights)
    elif what == "nan":
        torch_files.save_file({**tensors, "model.norm.weight": torch.full((48,), torch.nan)}, weights)
    elif what == "no tokenizer":
        (folder / "tokenizer.model").unlink()
    elif what == "shard":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    elif what == "path":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    return folder


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("config", r"hf/config.json: no such file: expected a Hugging Face model folder"),
        ("no json", r"hf/config.json: can't be read as JSON"),
        ("a list", r"hf/config.json: expected a JSON object"),
        ("odd types", r"hf/config.json: not a model config"),
        ("truncated", r"hf/model.safetensors: truncated: .* copy it again"),
        ("no weights", r"hf: no weights: expected model.safetensors, or model.safetensors.index.json and its files"),
        ("pickle", r"hf/pytorch_model.bin: a pickle, which can run code: convert the model to safetensors"),
        ("missing", r"hf: model.layers.1.mlp.up_proj.weight is missing from the safetensors files"),
        (
            "bias",
            r"model.layers.0.self_attn.o_proj.bias is not zero: biases are supported only on queries, k",
        ),
        ("some biases", r"model.layers.0.self_attn.k_proj.bias is missing from the safetensors files"),
        ("unknown", r"model.layers.0.self_attn.sinks: unsupported parameter"),
        ("shape", r"model.norm.weight has shape \[49\], but config.json requires \[48\]"),
        ("nan", r"model.norm.weight contains a value that is not finite"),
        ("no tokenizer", r"hf: no tokenizer: expected one of tokenizer.json, tokenizer.model, vocab.json"),
        ("shard", r"model-00001-of-00002.safetensors: missing, but listed in model.safetensors.index.json"),
        ("path", r"model.safetensors.index.json: expected weight_map, a mapping from tensor names to file names"),
    ],
)
def test_damaged_folders_are_rejected_and_nothing_is_written(
    tmp_path: Path, bpe: Path, what: str, problem: str
) -> None:
    folder = damage(hf_folder(tmp_path / "hf", bpe), what)
    with pytest.raises(UserError, match=problem):
        import_model(folder, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_file_name_that_is_too_long_is_a_missing_file(tmp_path: Path, bpe: Path) -> None:
    folder = hf_folder(tmp_path / "hf", bpe)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(UserError, match="missing, but listed in"):
        import_model(folder, tmp_path / "run")


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10_000), ("num_hidden_layers", 1)])
def test_blocks_are_counted_before_their_names_are_built(tmp_path: Path, bpe: Path, key: str, value: int) -> None:
    folder = hf_folder(tmp_path / "hf", bpe)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value, "layer_types": None}))
    with pytest.raises(UserError, match=rf"hf: .* have 2 blocks .* but config.json says num_hidden_layers: {value}$"):
        import_model(folder, tmp_path / "run")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size"])
def test_absurd_sizes_are_rejected(tmp_path: Path, bpe: Path, key: str) -> None:
    folder = hf_folder(tmp_path / "hf", bpe)
    config = json.loads((folder / "config.json").read_text())
    for value in (10**400, 10**12):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError):
            import_model(folder, tmp_path / "run")


def test_invalid_folders(tmp_path: Path, bpe: Path) -> None:
    with pytest.raises(UserError, match=r"nothere: no such folder: expected the folder of a run"):
        import_model(tmp_path / "nothere", tmp_path / "run")
    folder = hf_folder(tmp_path / "hf", bpe, vocab_size=400)
    with pytest.raises(UserError, match=r"tokenizer.model: 500 tokens, but the model has 400 rows"):
        import_model(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"hf: already exists and is not empty"):
        import_model(hf_folder(tmp_path / "other", bpe), folder)
