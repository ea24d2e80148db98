"""Parameter files of the official release: read, named and laid out as ours, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from conftest import golden_names, load_golden, make_tiny_config
from official_model import official_model
from torch import nn

from pixelllm.checkpoints import own_tensors
from pixelllm.commands import import_weights as command
from pixelllm.pretrained import PixelLLM
from pixelllm.scenic import Tree, copy_state, load_scenic, model_state, read_tree


def ext(value: np.ndarray, kind: str = "", code: int = 1) -> msgpack.ExtType:
    """An array as flax.serialization packs it."""
    content = (value.shape, kind or value.dtype.name, value.tobytes())
    return msgpack.ExtType(code, msgpack.packb(content, use_bin_type=True))


def nest(tree: Tree) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, value in tree.items():
        *folders, leaf = path.split("/")
        place = root
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = ext(value)
    return root


def write(tree: Tree, path: Path) -> None:
    if path.suffix == ".npz":
        np.savez(path, **tree)
    else:  # a training state
        state = {"global_step": ext(np.array(5), code=3), "params": nest(tree), "rng": None}
        path.write_bytes(msgpack.packb(state))


@pytest.mark.parametrize("suffix", [".npz", ".msgpack"])
@pytest.mark.parametrize("name", golden_names("pixel_llm"))
def test_golden_whole_models_come_from_files(name: str, suffix: str, tmp_path: Path):
    """Every tensor is overwritten; the model's numbers are the business of the other tests."""
    case = load_golden(name)
    model = official_model(case)
    expected = {key: tensor.clone() for key, tensor in own_tensors(model).items()}
    with torch.no_grad():
        for key, tensor in own_tensors(model).items():
            if "mask_downscaling" not in key:  # SAM's mask prompts are in no whole model
                tensor.fill_(7)
    write(case.weights(), tmp_path / f"model{suffix}")
    load_scenic(model, tmp_path / f"model{suffix}")
    for key, tensor in own_tensors(model).items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize(
    ("path", "shape", "ours", "our_shape"),
    [
        ("sam_backbone/blocks.0/attn/qkv/kernel", (4, 12), "sam.encoder.blocks.0.attn.qkv.weight",
         (12, 4)),
        ("sam_backbone/patch_embed.proj/kernel", (8, 9, 3, 4),
         "sam.encoder.patch_embed.proj.weight", (4, 3, 8, 9)),
        ("git_backbone/blocks.3/mlp/w3/kernel", (6, 4), "eva02.encoder.vit.blocks.3.mlp.fc2.weight",
         (4, 6)),
        ("visual_project_layers/visual_projection.1/scale", (6,), "projection.1.weight", (6,)),
        ("textual/t5_module/decoder/layers_7/encoder_decoder_attention/query/kernel_left_lora",
         (8, 2), "language.model.decoder.block.7.layer.1.EncDecAttention.q.lora_A.default.weight",
         (2, 8)),
        ("textual/t5_module/encoder/layers_0/mlp/wi_1/kernel", (8, 2),
         "language.model.encoder.block.0.layer.1.DenseReluDense.wi_1.weight", (2, 8)),
        ("textual/embedding/words/embedding", (9, 4), "language.words.weight", (9, 4)),
        ("point_predictor/mlp/layers.3/kernel", (5, 8), "point_head.mlp.6.weight", (8, 5)),
        ("box_decoder/fpn/simfp_4.1.norm/scale", (4,), "detector.pyramid.laterals.1.3.weight",
         (4,)),
        ("det_backbone/odd/kernel", (2, 3), "det_backbone/odd/kernel", (2, 3)),
    ],
)  # fmt: skip
def test_paths_become_our_names(path: str, shape: tuple, ours: str, our_shape: tuple):
    [(key, tensor)] = model_state({path: np.zeros(shape, np.float32)}).items()
    assert (key, tuple(tensor.shape)) == (ours, our_shape)


def test_heads_are_stacked_in_the_order_of_their_numbers():
    """As text, 10 comes before 2."""
    name = "prompt_adapter/output_hypernetworks_mlps.{}/layers.0/bias"
    tree = {name.format(n): np.full(3, n, np.float32) for n in (10, 2, 0)}
    state = model_state(tree | {"prompt_adapter/dense_output_mlp/layers.0/bias": np.zeros(3)})
    assert list(state) == ["extractor.head_bias"]
    assert state["extractor.head_bias"][:, 0].tolist() == [0, 2, 10]


def test_lora_factors_of_unlike_ranks_get_the_larger():
    stem = "textual/t5_module/{}coder/layers_0/{}attention/value/kernel"
    places = (stem.format("en", ""), stem.format("de", "self_"))
    tree = {place: np.ones((4, 6), np.float32) for place in places}
    for place, rank in zip(places, (1, 2), strict=True):
        tree |= {f"{place}_left_lora": np.ones((4, rank), np.float32)}
        tree |= {f"{place}_right_lora": np.ones((rank, 6), np.float32)}
    state = model_state(tree)
    prefix = "language.model.encoder.block.0.layer.0.SelfAttention.v"
    assert f"{prefix}.base_layer.weight" in state and f"{prefix}.weight" not in state
    left, right = (state[f"{prefix}.lora_{side}.default.weight"] for side in "AB")
    assert left.tolist() == [[1] * 4, [0] * 4] and right.tolist() == [[1, 0]] * 6


def test_flax_arrays_in_chunks_and_in_bfloat16(tmp_path: Path):
    """Flax cuts arrays above 1 GiB; numpy has no bfloat16."""
    whole = np.arange(30, dtype=np.float32).reshape(5, 6)
    pieces = whole.reshape(-1)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 5, "1": 6},
        "chunks": {str(n): ext(pieces[3 * n : 3 * n + 3]) for n in range(10)}
        | {"10": ext(pieces[30:])},
    }
    half = torch.tensor([1.5, -2.0, 3e38]).bfloat16()
    bits = half.view(torch.int16).numpy()
    tree = {"optimizer": {"target": {"a": {"b": chunked}, "c": ext(bits, "bfloat16")}, "state": {}}}
    (tmp_path / "state").write_bytes(msgpack.packb(tree))
    found = read_tree(tmp_path / "state")
    assert list(found) == ["a/b", "c"]
    assert np.array_equal(found["a/b"], whole)
    assert found["c"].tolist() == half.float().tolist()


@pytest.mark.parametrize("content", ["noise", "number", "pickle", "cut", "empty"])
def test_other_files_are_refused(content: str, tmp_path: Path):
    path = tmp_path / "file.npz"
    if content == "pickle":
        np.savez(path, a=np.array([{}], dtype=object))
    else:
        whole = msgpack.packb({"a": ext(np.ones(99))})
        odd = {"noise": b"\xc1these are no weights", "number": b"\x07", "empty": b""}
        path.write_bytes(odd.get(content, whole[:-9]))
    with pytest.raises(ValueError, match="file.npz: neither an .npz nor a Flax msgpack file"):
        read_tree(path)
    with pytest.raises(FileNotFoundError, match="absent.npz"):
        read_tree(tmp_path / "absent.npz")


def test_misfits_are_listed_and_absent_parts_are_named(tmp_path: Path):
    model = nn.ModuleDict({"projection": nn.Linear(2, 3), "point_head": nn.Linear(2, 2)})
    before = model["point_head"].weight.clone()
    tree = {
        "visual_project_layers/visual_projection.bias": np.ones(3, np.float32),
        "visual_project_layers/kernel": np.ones((2, 4), np.float32),
        "textual/output/bias": np.ones(3, np.float32),
    }
    write(tree, tmp_path / "odd.npz")
    with pytest.raises(ValueError) as error:
        load_scenic(model, tmp_path / "odd.npz")
    lines = str(error.value).splitlines()
    assert "odd.npz" in lines[0]
    assert lines[1:] == [
        "  missing point_head.bias; missing point_head.weight",
        "  unexpected language.output.bias",
        "  projection.weight is (4, 2), expected (3, 2)",
    ]
    del tree["textual/output/bias"]
    tree["visual_project_layers/kernel"] = np.ones((2, 3), np.float32)
    copy_state(model, model_state(tree), "odd", absent=("point_head",))
    assert (model["projection"].weight == 1).all()
    assert torch.equal(model["point_head"].weight, before)


def test_import_command_writes_a_run(tmp_path: Path, tiny_model: PixelLLM, monkeypatch, capsys):
    """A recipe at a size for tests; what the file gives is tested above."""
    tiny_model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = make_tiny_config(include_frozen=False)
    sizes = replace(config.model.language, vocab_size=len(tiny_model.tokenizer))
    config = replace(config, model=replace(config.model, language=sizes))

    def fill(model: PixelLLM, path: Path, absent: tuple[str, ...]) -> None:
        assert (path.name, absent) == ("official.npz", ("point_head",))
        model.extractor.output_tokens.data.fill_(3)

    monkeypatch.setattr(command, "load_scenic", fill)
    monkeypatch.setitem(command.RECIPES, "tiny", lambda: config)
    arguments = {"tokenizer": str(tmp_path / "tokenizer"), "absent": ("point_head",)}
    file, run = tmp_path / "official.npz", tmp_path / "run"
    command.import_weights(command.ImportCommand(file, "tiny", run, **arguments))
    assert str(run) in capsys.readouterr().out
    loaded = PixelLLM.from_pretrained(run)
    assert (loaded.extractor.output_tokens == 3).all()
    assert loaded.config.include_frozen
    with pytest.raises(ValueError, match="'huge' is no recipe of a whole model"):
        command.import_weights(command.ImportCommand(file, "huge", run))
