"""Language models in GGUF files: the trunk and its tokenizer from one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pixelllm.models.language import add_lora, load_trunk
from pixelllm.training.captioning import load_tokenizer

gguf = pytest.importorskip("gguf")
D, FF, LETTERS = 32, 64, "abcdefghijklmnopqrstuvwxyzĠ"


def write_model(path: Path, changes: dict[str, tuple[int, ...] | None] | None = None) -> Path:
    """A llama of one layer whose matrices are held in blocks of 8 bits.

    Args:
        changes: matrices of other shapes, or None for none.
    """
    tokens = ["<unk>", "<s>", "</s>", *LETTERS, "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 28)
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(0)
    matrices = {"token_embd": (len(tokens), D), "output": (len(tokens), D)}
    matrices |= {f"blk.0.attn_{name}": (D, D) for name in ("q", "k", "v", "output")}
    matrices |= {"blk.0.ffn_gate": (FF, D), "blk.0.ffn_up": (FF, D), "blk.0.ffn_down": (D, FF)}
    for name, shape in (matrices | (changes or {})).items():
        if shape is None:
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        value = gguf.quants.quantize(generator.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", value, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(D, np.float32))
    writer.add_tensor("rope_freqs.weight", np.ones(D // 4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_equals_transformers_own_forward_and_takes_lora(file: Path):
    """Catches weights that stay packed: LoRA finds no linear layer, and nothing can be saved."""
    trunk = load_trunk(file).eval()
    assert {type(m).__name__ for m in trunk.modules() if "Linear" in type(m).__name__} == {"Linear"}
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    token_ids = torch.randint(3, 31, (2, 9))
    empty = token_ids[:, :0]
    args = (empty, empty.bool(), token_ids[:, 3:], token_ids[:, 3:] < 0)
    hidden = trunk(trunk.embed(token_ids[:, :3]), *args)
    torch.testing.assert_close(trunk.logits(hidden), theirs(input_ids=token_ids).logits[:, 3:])
    assert (trunk.bos_id, trunk.eos_id) == (1, 2)
    assert not hasattr(trunk.model.config, "quantization_config")  # saved with runs
    add_lora(trunk, 2, 4, ("q_proj", "v_proj"))
    trunk(trunk.embed(token_ids[:, :3]), *args).sum().backward()
    assert sum(p.grad is not None for p in trunk.parameters()) == 4


def test_a_gguf_file_brings_its_tokenizer(file: Path):
    tokenizer = load_tokenizer(str(file))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc").input_ids)[-2:] == ["ab", "c"]


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path):
    """Catches tensors that the reader passes over, and weights that stay random."""
    changes = {
        "blk.0.ffn_up": None,
        "blk.0.attn_k": (D // 2, D),
        "blk.1.attn_q": (D, D),
        "blk.0.attn_sinks": (D, D),
    }
    with pytest.raises(ValueError, match="odd.gguf") as error:
        load_trunk(write_model(tmp_path / "odd.gguf", changes))
    message = str(error.value)
    assert "missing model.layers.0.mlp.up_proj.weight\n" in message
    assert "unexpected blk.1.attn_q.weight; unexpected blk.0.attn_sinks.weight\n" in message
    assert "model.layers.0.self_attn.k_proj.weight is (16, 32), expected (32, 32)" in message


def test_a_damaged_gguf_file_is_named(file: Path, tmp_path: Path):
    for size in (30, file.stat().st_size // 2):
        (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match="cut.gguf"):
            load_trunk(tmp_path / "cut.gguf")
        if size == 30:
            with pytest.raises(ValueError, match="no tokenizer in .*cut.gguf"):
                load_tokenizer(str(tmp_path / "cut.gguf"))
