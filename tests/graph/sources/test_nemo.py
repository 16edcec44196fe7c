"""NeMo archives: the same logits as the Hugging Face model they were written from, and one line for what isn't whole or safe."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from nemo_archives import archive_files, fused_qkv, gpt2, llama_config, llama_like, saved, write_archive, write_folder
from small_graphs import run
from steps import RAGGED, all_rows, batches, cached_generation, slot_tables, worst_error

from llmlab.build import build
from llmlab.checkpoint import ASSETS
from llmlab.errors import LlmlabError
from llmlab.graph.export import export
from llmlab.graph.optimize import optimize
from llmlab.graph.sources.nemo.archive import Archive
from llmlab.graph.sources.nemo.checkpoint import NemoCheckpoint, is_nemo

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer.json in it")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.make_model(tiny.MODELS["llama"])


@pytest.fixture(scope="module")
def nemotron() -> Any:
    """LayerNorm1P, a plain MLP, RoPE over half of a head, and biases."""
    sizes = {
        "model_type": "nemotron",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 0.5,
    }
    return tiny.make_model({**sizes, "attention_bias": True, "mlp_bias": True})


def nemotron_config(model: Any, **changes: Any) -> dict[str, Any]:
    kind = {"normalization": "layernorm1p", "activation": "squared-relu", "bias": True, "rotary_percentage": 0.5}
    return llama_config(model, **(kind | changes))


GPT2 = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def learned() -> Any:
    sizes = {
        "n_embd": 64,
        "num_hidden_layers": 1,
        "n_head": 4,
        "n_positions": 64,
        "activation_function": "gelu_pytorch_tanh",
    }
    return tiny.make_model({"model_type": "gpt2", **sizes})


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def values(path: Path) -> dict[str, np.ndarray]:
    """The tensors under their Hugging Face names, read after the archive was closed."""
    checkpoint = NemoCheckpoint(path)
    mapped = {name: tensor.map() for name, tensor in checkpoint.weights.items()}
    checkpoint.close()
    return {n: np.asarray(v if isinstance(v, np.ndarray) else v.load()) for n, v in mapped.items()}


def same(found: dict[str, np.ndarray], model: Any) -> bool:
    """Whether these are the model's parameters, but for a tied head."""
    expected = {n: p.detach().numpy() for n, p in model.named_parameters()}
    return expected.keys() == found.keys() and all(np.array_equal(expected[n], found[n]) for n in expected)


def plain_error(path: Path, model: Any) -> float:
    ids = np.random.default_rng(0).integers(3, 96, (2, 9))
    (found,) = run(export(path), {"input_ids": ids, "position_ids": np.tile(np.arange(9), (2, 1))})
    with torch.no_grad():
        return worst_error(found, model(torch.tensor(ids)).logits.numpy())


def test_a_llama_gives_the_same_logits_through_the_engine(llama: Any, tmp_path: Path) -> None:
    path = write_archive(tmp_path / "model.nemo", archive_files(llama_config(llama), llama_like(llama)))
    engine = build(optimize(export(path)), tmp_path / "engine", max_tokens_per_step=128)
    backend = engine.backend(threads=1, max_num_seqs=5)
    expected = cached_generation(llama, RAGGED, 96)
    wrong = cached_generation(wrongly_taken_apart(llama), RAGGED, 96)
    errors, off = [], []
    for batch, rows in batches(RAGGED, 96, slot_tables(RAGGED, range(5)), lambda step, n: all_rows(step, n)):
        found = backend.execute(batch)
        errors.append(worst_error(found, np.stack([expected[b][i] for b, i in rows])))
        off.append(worst_error(found, np.stack([wrong[b][i] for b, i in rows])))
    assert max(errors) < TOLERANCE and min(off) > 100 * TOLERANCE


def wrongly_taken_apart(model: Any) -> Any:
    """The model with its fused QKV read as all queries, all keys, all values."""
    import copy

    result, config = copy.deepcopy(model), model.config
    with torch.no_grad():
        for layer in result.model.layers:
            parts = [getattr(layer.self_attn, f"{p}_proj").weight for p in "qkv"]
            fused = fused_qkv(*parts, config.num_key_value_heads, config.head_dim)
            for parameter, rows in zip(parts, fused.split([p.shape[0] for p in parts]), strict=True):
                parameter.copy_(rows)
    return result


def test_a_nemotron_gives_the_same_logits(nemotron: Any, tmp_path: Path) -> None:
    files = archive_files(nemotron_config(nemotron), llama_like(nemotron))
    assert plain_error(write_archive(tmp_path / "model.nemo", files), nemotron) < TOLERANCE


def test_a_gpt2_gives_the_same_logits(learned: Any, tmp_path: Path) -> None:
    files = archive_files(GPT2, gpt2(learned))
    assert plain_error(write_archive(tmp_path / "model.nemo", files), learned) < TOLERANCE


@pytest.mark.parametrize("names", ["core", "legacy"])
@pytest.mark.parametrize("form", ["tar", "gz", "folder"])
def test_every_form_of_an_archive(llama: Any, tmp_path: Path, temporary: Path, form: str, names: str) -> None:
    files = archive_files(llama_config(llama), llama_like(llama, names))
    if form == "folder":
        path = write_folder(tmp_path / "unpacked", files)
    else:
        path = write_archive(tmp_path / "model.nemo", files, "w:gz" if form == "gz" else "w")
    assert is_nemo(path) and same(values(path), llama)
    assert list(temporary.iterdir()) == [], "nothing is left behind"


def test_a_plain_archive_is_not_unpacked(llama: Any, tmp_path: Path, temporary: Path) -> None:
    path = write_archive(tmp_path / "model.nemo", archive_files(llama_config(llama), llama_like(llama)))
    checkpoint = NemoCheckpoint(path)
    assert list(temporary.iterdir()) == []
    embedding = checkpoint.weights["model.embed_tokens.weight"].map()
    assert isinstance(embedding, np.memmap) and Path(str(embedding.filename)) == path


def test_narrow_weights_and_the_module_prefix(llama: Any, tmp_path: Path) -> None:
    """bf16, `model.module.`, and the states and tables that hold no weights."""
    state: dict[str, Any] = {
        n.replace("model.", "model.module.", 1): t.bfloat16() for n, t in llama_like(llama).items()
    }
    state["model.module.decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"fp8")
    state["model.module.rotary_pos_emb.inv_freq"] = torch.ones(8)
    path = write_archive(tmp_path / "m.nemo", archive_files(llama_config(llama), state))
    found = values(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    expected = llama.state_dict()[name].bfloat16().float().numpy()
    assert str(found[name].dtype) == "bfloat16" and np.array_equal(found[name].astype(np.float32), expected)


def test_gate_and_up_that_lie_apart(llama: Any, tmp_path: Path) -> None:
    state = llama_like(llama, "legacy")
    for layer in range(2):
        at = f"model.language_model.encoder.layers.{layer}.mlp.dense_h_to_4h"
        state[f"{at}.weight"], state[f"{at}_2.weight"] = (t.clone() for t in state[f"{at}.weight"].chunk(2))
    path = write_archive(tmp_path / "m.nemo", archive_files(llama_config(llama, activation="swiglu"), state))
    assert same(values(path), llama)


def sharded(state: dict[str, torch.Tensor], tensor: int, stages: int) -> dict[str, dict[str, torch.Tensor]]:
    """A Llama's state over tensor- and pipeline-parallel ranks, as Megatron deals it out; two layers, one a stage."""
    ranks: dict[str, dict[str, torch.Tensor]] = {}
    for p in range(stages):
        for t in range(tensor):
            own = ranks[f"tp_rank_{t:02}_pp_rank_{p:03}" if stages > 1 else f"mp_rank_{t:02}"] = {}
            for name, values in state.items():
                layer = int(name.split(".")[3]) if ".layers." in name else None
                stage = layer if layer is not None else 0 if "embedding" in name else 1
                if stages > 1:
                    if stage != p:
                        continue
                    name = name.replace(f".layers.{layer}.", ".layers.0.")
                if "fc1.weight" in name:
                    values = torch.cat([half.chunk(tensor)[t] for half in values.chunk(2)])
                elif any(n in name for n in ("linear_qkv.weight", "embeddings", "output_layer")):
                    values = values.chunk(tensor)[t]
                elif any(n in name for n in ("linear_proj.weight", "fc2.weight")):
                    values = values.chunk(tensor, 1)[t]
                own[name] = values.clone()
    return ranks


@pytest.mark.parametrize(("tensor", "stages"), [(2, 1), (1, 2), (2, 2)])
def test_parallel_ranks_are_put_together(llama: Any, tmp_path: Path, tensor: int, stages: int) -> None:
    files = archive_files(llama_config(llama), {})
    del files["model_weights.ckpt"]
    ranks = sharded(llama_like(llama), tensor, stages)
    files |= {f"{rank}/model_weights.ckpt": saved(state) for rank, state in ranks.items()}
    assert same(values(write_archive(tmp_path / "m.nemo", files)), llama)
    del files[f"{list(ranks)[-1]}/model_weights.ckpt"]
    assert refusal(write_archive(tmp_path / "less.nemo", files))


@pytest.mark.parametrize("kind", ["layernorm", "layernorm1p"])
def test_norms_around_one_and_around_zero(nemotron: Any, learned: Any, tmp_path: Path, kind: str) -> None:
    """Nemotron adds one to a norm's weight, GPT-2 doesn't."""
    config = nemotron_config(nemotron, normalization=kind)
    one = values(write_archive(tmp_path / "a.nemo", archive_files(config, llama_like(nemotron))))
    two = values(write_archive(tmp_path / "b.nemo", archive_files(GPT2 | {"normalization": kind}, gpt2(learned))))
    stored = (nemotron.model.norm.weight, learned.transformer.ln_f.weight)
    shifts = (-1, 0) if kind == "layernorm" else (0, 1)
    for found, weight, shift in zip(
        (one["model.norm.weight"], two["transformer.ln_f.weight"]), stored, shifts, strict=True
    ):
        np.testing.assert_allclose(found, weight.detach().numpy() + shift, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seq_len_interpolation_factor": 4}, {"rope_type": "linear", "factor": 4.0}),
        ({"scale_positional_embedding": True, "rotary_base": 500000}, {"rope_type": "llama3", "rope_theta": 500000.0}),
        ({"layernorm_epsilon": "1e-6"}, {"rope_type": "default"}),
    ],
)
def test_positions(llama: Any, tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    files = archive_files(llama_config(llama, **changes), llama_like(llama))
    raw = NemoCheckpoint(write_folder(tmp_path / "m", files)).config.raw
    assert expected.items() <= raw["rope_parameters"].items()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "gelu_pytorch_tanh"),  # NeMo's fused kernel is the approximation
        ({"bias_activation_fusion": False}, "gelu"),
        ({"activation": "squared-relu"}, "relu2"),
    ],
)
def test_activations(learned: Any, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = write_folder(tmp_path / "m", archive_files(GPT2 | changes, gpt2(learned)))
    assert NemoCheckpoint(path).config.raw["activation_function"] == expected


def test_a_tokenizer_goes_along(llama: Any, tmp_path: Path) -> None:
    from llmlab import zoo

    tokens = {n: (zoo.path() / n).read_bytes() for n in ASSETS if (zoo.path() / n).is_file()}
    renamed = {f"0f3a_{n}" if n == "tokenizer.json" else n: data for n, data in tokens.items()}
    files = archive_files(llama_config(llama), llama_like(llama)) | renamed
    checkpoint = NemoCheckpoint(write_archive(tmp_path / "m.nemo", files))
    assert checkpoint.assets == tokens and checkpoint.config.eos_token_ids


def test_a_tokenizer_that_stays_behind(llama: Any, tmp_path: Path) -> None:
    tokenizer = {"library": "sentencepiece", "model": "nemo:0f3a_tokenizer.model"}
    files = archive_files(llama_config(llama, tokenizer=tokenizer), llama_like(llama))
    with pytest.warns(UserWarning, match=r"no tokenizer goes along \(its config names: nemo:0f3a_tokenizer.model\)"):
        assert NemoCheckpoint(write_archive(tmp_path / "m.nemo", files)).assets == {}


def refusal(path: Path) -> str:
    with pytest.raises(LlmlabError) as caught:
        NemoCheckpoint(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 700
    return message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_moe_experts": 8}, "num_moe_experts is 8, which isn't known here"),
        ({"window_size": [4096, 0]}, "window_size is a list, which"),
        ({"rotary_interleaved": True}, "rotary_interleaved is True"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'; known: learned_absolute, rope"),
        ({"activation": "tanh"}, "activation is 'tanh'; known: gelu"),
        ({"normalization": "layernorm"}, "LayerNorm, a gated MLP and rotary positions over 100% of a head"),
        ({"rotary_percentage": 0.25}, "RMSNorm, a gated MLP and rotary positions over 25% of a head"),
        ({"num_layers": 3}, "num_layers is 3, the weights have 2 layers"),
        ({"num_layers": "many"}, "'num_layers' is 'many', expected a positive integer"),
        ({"num_query_groups": 3}, "4 heads in 3 groups over 64 channels don't divide"),
        ({"num_query_groups": 4}, "the fused QKV weight of layer 0 has shape [128, 64] on 1 ranks, expected [192, 64]"),
        ({"ffn_hidden_size": 100}, "the fused gate and up weight of layer 0 has 160 rows, expected 200"),
        ({"share_embeddings_and_output_weights": "yes"}, "is 'yes', expected true or false"),
        ({"layernorm_epsilon": "small"}, "'layernorm_epsilon' is 'small', expected a positive number"),
        ({"seq_len_interpolation_factor": 8, "scale_positional_embedding": True}, "sets both"),
    ],
)
def test_what_is_not_followed_is_refused(llama: Any, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    files = archive_files(llama_config(llama, **changes), llama_like(llama))
    assert reason in refusal(write_folder(tmp_path / "m", files))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("model.decoder.layers.1.mlp.linear_fc2.weight"), "have no weight for 'fc2' of layer 1"),
        (lambda s: s.pop("model.output_layer.weight"), "have no weight for 'head' of the model"),
        (
            lambda s: s.update({"model.adapter.weight": torch.ones(2)}),
            "holds 'model.adapter.weight', which has no place",
        ),
        (lambda s: s.update({"model.output_layer.weight": torch.ones(64, 96).T}), "a view with strides"),
        (
            lambda s: s.update({"model.output_layer.weight": torch.ones(2, dtype=torch.complex64)}),
            "has type torch.complex64, expected one of float32",
        ),
    ],
)
def test_weights_that_do_not_fit(llama: Any, tmp_path: Path, change: Callable[[dict], Any], reason: str) -> None:
    state = llama_like(llama)
    change(state)
    assert reason in refusal(write_folder(tmp_path / "m", archive_files(llama_config(llama), state)))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("model_config.yaml", b"a: [", "not valid YAML"),
        ("model_config.yaml", b"- 1", "expected a mapping of names to values, got list"),
        ("model_config.yaml", b"[" * 3000, "not valid YAML"),
        ("model_config.yaml", b"#" * (300 << 10), "307200 bytes, more than the 65536"),
        ("model_config.yaml", b"a: !!python/object/apply:os.system ['touch x']", "not valid YAML"),
        ("model_weights.ckpt", b"", "not a torch file"),
        ("model_weights.ckpt", pickle.dumps({"a": 1}), "not a torch file"),
        ("model_weights.ckpt", saved([1, 2]), "not a state dict"),
    ],
)
def test_broken_files(llama: Any, tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    files = archive_files(llama_config(llama), llama_like(llama)) | {name: data}
    assert reason in refusal(write_archive(tmp_path / "m.nemo", files))


class _Harm:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_archive(tmp_path / "m.nemo", archive_files(GPT2, {"model.x.weight": _Harm()}))
    assert "torch refuses to load it with weights_only" in refusal(path) and not Path("harmed").exists()


def test_yaml_that_unfolds_is_refused(tmp_path: Path) -> None:
    """Aliases of aliases: a billion entries, should anyone walk them."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
    )
    files = archive_files(GPT2, {}) | {"model_config.yaml": bomb.encode() + b"num_layers: *a9\n"}
    assert "model_config.yaml" in refusal(write_archive(tmp_path / "m.nemo", files))


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (entry("../outside"), "names the file '../outside'"),
        (entry("/etc/passwd"), "names the file '/etc/passwd'"),
        (entry("a/../../b"), "names the file 'a/../../b'"),
        (entry("model_weights.ckpt", tarfile.SYMTYPE, "/etc/passwd"), "is a link or a device"),
        (entry("model_weights.ckpt", tarfile.LNKTYPE, "x"), "is a link or a device"),
        (entry("model_weights.ckpt", tarfile.CHRTYPE), "is a link or a device"),
        (entry("model_weights.ckpt", tarfile.FIFOTYPE), "is a link or a device"),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_hostile_members(tmp_path: Path, temporary: Path, member: tarfile.TarInfo, reason: str, mode: str) -> None:
    path = tmp_path / "m.nemo"
    with tarfile.open(path, mode) as archive:
        archive.addfile(member)
    assert reason in refusal(path) and list(temporary.iterdir()) == [] and list(tmp_path.iterdir()) == [path]


def test_sizes_that_are_absurd(tmp_path: Path, temporary: Path) -> None:
    path = tmp_path / "m.nemo"
    info = entry("model_weights.ckpt")
    info.size = 1 << 50
    path.write_bytes(info.tobuf() + bytes(10240))
    assert "truncated" in refusal(path)
    with gzip.open(path, "wb", compresslevel=1) as bomb:
        for _ in range(80):
            bomb.write(bytes(1 << 20))
    assert "when it is unzipped: no archive of weights" in refusal(path) and list(temporary.iterdir()) == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_that_are_cut(llama: Any, tmp_path: Path, temporary: Path, mode: str) -> None:
    path = write_archive(tmp_path / "m.nemo", archive_files(llama_config(llama), llama_like(llama)), mode)
    data = path.read_bytes()
    for length in (0, 1, 100, 700, len(data) // 2, len(data) * 9 // 10):
        path.write_bytes(data[:length])
        refusal(path)
    assert list(temporary.iterdir()) == []


def test_a_link_in_the_folder_is_refused(llama: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", archive_files(llama_config(llama), llama_like(llama)))
    shutil.move(folder / "model_weights.ckpt", tmp_path / "outside")
    (folder / "model_weights.ckpt").symlink_to(tmp_path / "outside")
    with pytest.raises(LlmlabError, match=r"a link; expected plain files"):
        NemoCheckpoint(folder)


def test_a_distributed_checkpoint_is_refused(tmp_path: Path) -> None:
    files = archive_files(GPT2, {}) | {"model_weights/metadata.json": b"{}"}
    del files["model_weights.ckpt"]
    assert "a distributed checkpoint (model_weights/) where model_weights.ckpt" in refusal(
        write_archive(tmp_path / "m.nemo", files)
    )


def test_what_stops_the_export_leaves_nothing(llama: Any, tmp_path: Path, temporary: Path) -> None:
    files = archive_files(llama_config(llama, num_layers=1), llama_like(llama))
    with pytest.raises(LlmlabError):
        export(write_archive(tmp_path / "m.nemo", files, "w:gz"))
    assert list(temporary.iterdir()) == []


def test_reading_past_the_end_of_a_tensor_is_refused(tmp_path: Path) -> None:
    """A storage that claims more bytes than its file has."""
    data = saved({"model.embedding.word_embeddings.weight": torch.ones(8, 8)})
    archive = Archive(write_folder(tmp_path / "m", {"model_weights.ckpt": data.replace(b"K@", b"M\xff\x7f", 1)}))
    with pytest.raises(LlmlabError, match=r"model_weights.ckpt"):
        archive.ranks()
