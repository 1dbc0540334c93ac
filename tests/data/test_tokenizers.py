import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from headway.data.encoding import DocumentEncoder, piece_batches
from headway.data.fingerprint import tokenizer_fingerprint
from headway.data.sources import Document
from headway.data.tokenizers import (
    BYTE_EOS_ID,
    BYTE_PAD_ID,
    BYTE_VOCABULARY_SIZE,
    byte_tokenizer,
    decode_bytes,
    encode_bytes,
    is_byte_tokenizer,
    load_tokenizer,
    split_into_pieces,
    train_bpe_tokenizer,
    vocabulary_size,
)
from headway.errors import ConfigError, DataError

UGLY = " a  b , do n't .\r\n\t caf\u00e9 e\u0301 \u212b \U0001f642 \x00<|endoftext|><|pad|> <s> \u2581x "


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte-tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bpe():
    words = [f"def function_{number}(value):\n    return value + {number}\n" for number in range(200)]
    return train_bpe_tokenizer([word.encode() for word in words], vocabulary_size=300)


def test_the_vocabulary_is_the_bytes_and_two_special_tokens(tokenizer):
    assert len(tokenizer) == vocabulary_size(tokenizer) == BYTE_VOCABULARY_SIZE == 258
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (256, 256, 257)
    assert (BYTE_EOS_ID, BYTE_PAD_ID) == (256, 257)
    assert is_byte_tokenizer(tokenizer)


def test_a_call_gives_what_a_decoder_only_model_takes_and_nothing_else(tokenizer):
    encoded = tokenizer(["a", "abc"], padding=True)
    assert encoded["input_ids"] == [[257, 257, 97], [97, 98, 99]]
    assert encoded["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert encoded.keys() == {"input_ids", "attention_mask"}


@given(st.text())
def test_byte_ids_are_the_utf8_bytes_and_decode_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert decode_bytes(ids) == text


@given(st.binary())
def test_every_byte_goes_straight_to_its_id(data):
    assert bytes(encode_bytes(data).tolist()) == data
    assert decode_bytes([*encode_bytes(data), BYTE_EOS_ID, BYTE_PAD_ID]) == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("load", [AutoTokenizer.from_pretrained, load_tokenizer])
def test_saving_and_loading_keeps_the_tokenizer(saved, tokenizer, load):
    again = load(saved)
    assert is_byte_tokenizer(again)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert again(UGLY)["input_ids"] == tokenizer(UGLY)["input_ids"]
    assert again.decode(again(UGLY)["input_ids"]) == UGLY
    assert (again.eos_token_id, again.pad_token_id, again.padding_side) == (256, 257, "left")


@pytest.mark.parametrize(
    "model_type",
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt_neox", "gpt2"],
)
def test_the_model_in_the_same_folder_does_not_change_the_tokenizer(tmp_path, tokenizer, bpe, model_type):
    for name, original in (("bytes", tokenizer), ("bpe", bpe)):
        folder = tmp_path / name
        original.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        again = load_tokenizer(folder)
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(original)
        assert again.decode(again(UGLY)["input_ids"]) == UGLY


def test_bytes_is_a_name_and_what_cannot_be_loaded_is_one_clear_error(tmp_path):
    assert is_byte_tokenizer(load_tokenizer("bytes"))
    (tmp_path / "tokenizer.json").write_text("{ not json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    for broken in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match=r"pass 'bytes', a folder with tokenizer\.json") as caught:
            load_tokenizer(broken)
        assert "\n" not in str(caught.value)


def test_decoding_ids_of_another_tokenizer_as_bytes_is_refused():
    with pytest.raises(DataError, match="decode ids of another tokenizer with that tokenizer"):
        decode_bytes([97, 258])


def test_bpe_learns_the_same_from_the_same_and_round_trips(bpe, tmp_path):
    words = [f"def function_{number}(value):\n    return value + {number}\n" for number in range(200)]
    again = train_bpe_tokenizer([word.encode() for word in words], vocabulary_size=300)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(bpe)
    assert len(bpe) == 300
    assert bpe.decode(bpe(UGLY)["input_ids"]) == UGLY
    assert len(bpe("def function_7(value):")["input_ids"]) < 12
    assert not is_byte_tokenizer(bpe)
    bpe.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_fingerprint(bpe)


def test_bpe_refuses_what_it_cannot_learn_from():
    with pytest.raises(ConfigError, match="at least 258"):
        train_bpe_tokenizer([b"text"], vocabulary_size=257)
    with pytest.raises(DataError, match="documents that are not empty"):
        train_bpe_tokenizer([b"", b""], vocabulary_size=300)


def test_the_fingerprint_tells_tokenizers_apart_but_not_how_they_were_last_called(tokenizer, bpe):
    before = tokenizer_fingerprint(bpe)
    bpe(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(bpe) == before != tokenizer_fingerprint(tokenizer)
    other = byte_tokenizer()
    other.eos_token = "a"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_special_tokens_spelled_out_in_a_document_are_text(tokenizer, bpe, kind):
    chosen = {"bytes": tokenizer, "bpe": bpe}[kind]
    ids = DocumentEncoder(chosen).encode_document(b"x<|endoftext|>y<|pad|>")
    assert not {chosen.eos_token_id, chosen.pad_token_id} & set(ids.tolist())
    assert chosen.decode(ids) == "x<|endoftext|>y<|pad|>"


def test_the_encoder_gives_a_tokenizers_own_ids_and_leaves_its_state_alone(bpe):
    bpe("a b c", truncation=True, max_length=1)
    texts = ["def function_9(value):\n", "caf\u00e9", ""]
    rows = DocumentEncoder(bpe).encode([text.encode() for text in texts])
    assert [row.tolist() for row in rows] == [bpe(text)["input_ids"] for text in texts]
    assert 0 in bpe("<|endoftext|>")["input_ids"]


def test_a_tokenizer_without_a_rust_backend_encodes_the_same_way():
    slow = ByT5Tokenizer()
    row = DocumentEncoder(slow).encode_document(b"ab</s>")
    assert row.tolist() == [byte + 3 for byte in b"ab</s>"]
    assert tokenizer_fingerprint(slow) == tokenizer_fingerprint(ByT5Tokenizer())


def test_undecodable_bytes_become_replacement_characters_for_bpe_only(tokenizer, bpe):
    assert DocumentEncoder(tokenizer).encode_document(b"a\xff\x00").tolist() == [97, 255, 0]
    assert bpe.decode(DocumentEncoder(bpe).encode_document(b"a\xff\x00")) == "a\ufffd\x00"


@given(st.lists(st.sampled_from(["a", "\n", " ", "\u00e9", "\u4f60", "\U0001f642"])), st.integers(4, 9))
def test_pieces_are_the_document_and_never_cut_a_character(characters, max_bytes):
    data = "".join(characters).encode()
    pieces = [*split_into_pieces(data, max_bytes=max_bytes)]
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= max_bytes for piece in pieces)
    assert "".join(piece.decode() for piece in pieces) == data.decode()


@given(st.binary(max_size=40), st.integers(1, 9))
def test_any_bytes_at_all_are_cut_without_loss(data, max_bytes):
    pieces = [*split_into_pieces(data, max_bytes=max_bytes)]
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= max_bytes for piece in pieces)


def test_an_enormous_line_is_encoded_in_bounded_batches(bpe):
    line = b"value " * 500_000
    documents = [Document("a", "a", b"x"), Document("b", "b", line), Document("c", "c", b""), Document("d", "d", b"y")]
    batches = [*piece_batches(documents)]
    assert max(sum(len(piece.data) for piece in batch) for batch in batches) <= 2 << 20
    pieces = [piece for batch in batches for piece in batch]
    assert b"".join(piece.data for piece in pieces) == b"x" + line + b"y"
    assert sum(piece.ends_document for piece in pieces) == 4
    whole = DocumentEncoder(bpe).encode_document(line)
    assert bpe.decode(whole).encode() == line
    assert whole.dtype == np.int64
