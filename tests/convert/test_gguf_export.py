"""A GGUF file holds the model: read back here value by value, and decoded by llama.cpp where that is installed."""

import importlib.util
import struct
from pathlib import Path

import pytest
import torch

from headway.convert.convert import convert
from headway.convert.gguf_export import export_gguf, interleaved
from headway.convert.gguf_file import UNQUANTIZED, encoded, file_type
from headway.data.tokenizers import BYTE_VOCABULARY_SIZE, byte_tokenizer, integer_tokenizer
from headway.errors import CheckpointError, ConfigError, IncompatibleModelError
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from tiny_models import tiny_base


def byte_base():
    torch.manual_seed(0)
    return tiny_base("llama", vocab_size=BYTE_VOCABULARY_SIZE, hidden_size=32, intermediate_size=64).eval()


def read_gguf(file: Path) -> tuple[dict[str, object], dict[str, tuple[tuple[int, ...], int, bytes]]]:
    """Metadata and tensors, by the layout of ggml's docs/gguf.md."""
    data, at = file.read_bytes(), 24
    magic, version, tensors, pairs = struct.unpack_from("<4sIQQ", data)
    assert (magic, version) == (b"GGUF", 3)

    def take(kind: str):
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(f"<{kind}")
        return value

    def text() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    def value(kind: int):
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return take({4: "I", 5: "i", 6: "f", 7: "?"}[kind])

    metadata = {}
    for _ in range(pairs):
        key = text()
        metadata[key] = value(take("I"))
    infos = []
    for _ in range(tensors):
        name = text()
        shape = tuple(reversed([take("Q") for _ in range(take("I"))]))
        infos.append((name, shape, take("I"), take("Q")))
    start = at + (-at % 32)
    ends = [info[3] for info in infos[1:]] + [len(data) - start]
    return metadata, {
        name: (shape, kind, data[start + offset : start + end])
        for (name, shape, kind, offset), end in zip(infos, ends, strict=True)
    }


def test_every_weight_is_in_the_file_under_its_name(tmp_path: Path):
    base = byte_base()
    export_gguf(base, byte_tokenizer(), tmp_path / "m.gguf", name="m", precision="f32")
    metadata, tensors = read_gguf(tmp_path / "m.gguf")
    state = base.state_dict()
    assert metadata["llama.block_count"] == base.config.num_hidden_layers
    assert len(tensors) == 3 + 9 * base.config.num_hidden_layers
    shape, kind, data = tensors["blk.0.ffn_down.weight"]
    wanted = state["model.layers.0.mlp.down_proj.weight"]
    assert (shape, kind) == (tuple(wanted.shape), 0)
    assert torch.equal(torch.frombuffer(bytearray(data[: wanted.numel() * 4]), dtype=torch.float32).view(shape), wanted)


def test_bytes_are_llama_cpps_byte_tokens_and_a_space_has_its_own_name(tmp_path: Path):
    export_gguf(byte_base(), byte_tokenizer(), tmp_path / "m.gguf", name="m", precision="bf16")
    metadata, _ = read_gguf(tmp_path / "m.gguf")
    tokens = metadata["tokenizer.ggml.tokens"]
    assert (tokens[0x0A], tokens[0x20], tokens[0xFF], tokens[256]) == ("<0x0A>", "\u2581", "<0xFF>", "</s>")
    assert metadata["tokenizer.ggml.eos_token_id"] == 256
    assert file_type(tmp_path / "m.gguf") in UNQUANTIZED


def test_neighbouring_pairs_are_the_halves_of_hugging_face():
    rows = torch.arange(8.0)[:, None]  # two heads of four rows: halves (0 1)(2 3), (4 5)(6 7)
    assert interleaved(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_eight_bits_keep_each_value_within_half_a_step_of_its_block():
    values = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    values[0, :32] = 0
    data = torch.frombuffer(bytearray(encoded("w", values, "q8_0")), dtype=torch.uint8).view(-1, 34)
    scales = data[:, :2].contiguous().view(torch.float16).float()
    back = (data[:, 2:].contiguous().view(torch.int8).float() * scales).view(values.shape)
    step = values.view(-1, 32).abs().amax(1, keepdim=True) / 127
    assert ((back - values).view(-1, 32).abs() <= 0.5 * step + 1e-3 * values.view(-1, 32).abs() + 1e-9).all()
    with pytest.raises(ConfigError, match="rows of 40; write f32 or bf16"):
        encoded("w", torch.zeros(1, 40), "q8_0")


def test_quantized_files_are_told_from_whole_ones(tmp_path: Path):
    export_gguf(byte_base(), byte_tokenizer(), tmp_path / "m.gguf", name="m", precision="q8_0")
    assert file_type(tmp_path / "m.gguf") not in UNQUANTIZED
    (tmp_path / "no.gguf").write_bytes(b"")
    assert file_type(tmp_path / "no.gguf") is None


def test_models_that_llama_cpps_llama_is_not_are_refused(tmp_path: Path):
    with pytest.raises(IncompatibleModelError, match="got 'qwen2'; convert --to hf"):
        export_gguf(tiny_base("qwen2"), byte_tokenizer(), tmp_path / "m.gguf", name="m", precision="f32")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- headway convert


def with_heads(folder: Path, *, dtype: torch.dtype = torch.float32, tokenizer: object = None):
    """A model of bytes with heads, saved; its base."""
    base = byte_base().to(dtype)
    attach_heads(base, MultiTokenConfig(num_future_tokens=3)).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return base


@pytest.mark.parametrize(
    ("target", "dtype", "precision"),
    [
        ("gguf", torch.float32, "f32"),
        ("gguf", torch.bfloat16, "bf16"),
        ("gguf", torch.float16, "f32"),
        ("gguf-q8_0", torch.bfloat16, "q8_0"),
    ],
)
def test_a_folder_becomes_the_file_of_its_base(target, dtype, precision, tmp_path: Path):
    base = with_heads(tmp_path / "a", dtype=dtype)
    report = convert(tmp_path / "a", tmp_path / "b", source_format="headway", target_format=target)
    export_gguf(base, byte_tokenizer(), tmp_path / "own.gguf", name="a", precision=precision)
    assert (tmp_path / "b" / "model.gguf").read_bytes() == (tmp_path / "own.gguf").read_bytes()
    assert (report.num_future_tokens, report.num_head_tensors, report.target_format) == (1, 0, target)
    assert report.notes[-1] == f"model.gguf holds matrices in {precision} and the vocabulary of bytes"
    assert "heads left behind: 2" in report.notes


def test_an_export_takes_the_place_of_a_model_only_where_told(tmp_path: Path):
    with_heads(tmp_path / "a")
    options = {"source_format": "headway", "target_format": "gguf"}
    convert(tmp_path / "a", tmp_path / "b", **options)
    with pytest.raises(CheckpointError, match="overwrite"):
        convert(tmp_path / "a", tmp_path / "b", **options)
    with pytest.raises(CheckpointError, match="overwrite"):
        convert(tmp_path / "a", tmp_path / "b", **options | {"target_format": "hf"})
    convert(tmp_path / "a", tmp_path / "b", **options | {"target_format": "hf"}, overwrite=True)
    assert not (tmp_path / "b" / "model.gguf").exists()


def test_what_the_file_cannot_hold_is_refused_and_nothing_is_left(tmp_path: Path):
    to_gguf = {"source_format": "hf", "target_format": "gguf"}
    for family, what in (("qwen2", "got 'qwen2'; convert --to hf"), ("llama", "has none that can be loaded: put")):
        tiny_base(family).save_pretrained(tmp_path / family)
        with pytest.raises(IncompatibleModelError, match=what):
            convert(tmp_path / family, tmp_path / "b", **to_gguf)
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(IncompatibleModelError, match="258 tokens, the embedding 40 rows"):
        convert(tmp_path / "llama", tmp_path / "b", **to_gguf)
    with_heads(tmp_path / "words", tokenizer=integer_tokenizer(258))
    with pytest.raises(
        IncompatibleModelError, match=r"vocabulary of bytes: got .* convert --to hf and use llama.cpp's"
    ):
        convert(tmp_path / "words", tmp_path / "b", source_format="headway", target_format="gguf")
    with pytest.raises(ConfigError, match="leave verify out"):
        convert(tmp_path / "words", tmp_path / "b", source_format="headway", target_format="gguf", verify=True)
    with pytest.raises(ConfigError, match="gguf is written, not read"):
        convert(tmp_path / "words", tmp_path / "b", source_format="gguf", target_format="hf")
    with pytest.raises(ConfigError, match="format gguf holds no heads"):
        convert(tmp_path / "words", tmp_path / "b", source_format="headway", target_format="gguf", num_future_tokens=2)
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_decodes_the_same_tokens(tmp_path: Path):
    import llama_cpp

    base = byte_base()
    export_gguf(base, byte_tokenizer(), tmp_path / "m.gguf", name="m", precision="f32")
    model = llama_cpp.Llama(model_path=str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, verbose=False)
    prompt = list(b"def f(x):\n  ")
    assert model.tokenize(bytes(prompt), add_bos=False) == prompt
    made = []
    for token in model.generate(prompt, temp=0.0, top_k=1, top_p=1.0, min_p=0.0, repeat_penalty=1.0):
        made.append(token)
        if len(made) == 16:
            break
    wanted = base.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
    assert made == wanted
