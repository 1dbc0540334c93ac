"""`headway generate`: the new text on stdout, the same tokens whatever the way, mistakes in one line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headway.cli.generate import Sampling
from headway.decoding.loop import DecodingLoop
from headway.model.multi_token_lm import MultiTokenLM


def greedy(folder: Path, prompt: bytes, new_tokens: int) -> list[int]:
    """What the plain base says, by Hugging Face's own generate."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([list(prompt)])
    out = base.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=257
    )
    return out[0, len(prompt) :].tolist()


def as_text(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


def last_document(out: str) -> dict[str, Any]:
    document = json.loads(out.splitlines()[-1])
    assert isinstance(document, dict)
    return document


def test_stdout_is_the_text_that_hugging_face_generates(headway, byte_folder: Path):
    status, out, err = headway("generate", byte_folder, "hello", "--max-new-tokens", "20")
    assert status == 0
    assert out.removesuffix("\n") == as_text(greedy(byte_folder, b"hello", 20)).removesuffix("\n")
    assert err.startswith("self-speculative: 20 tokens in ")


def test_argument_file_and_pipe_are_the_same_prompt(headway, pipe, byte_folder: Path, tmp_path: Path):
    (tmp_path / "prompt.txt").write_bytes(b"hello\n")
    from_argument = headway("generate", byte_folder, "hello\n", "--max-new-tokens", "9")[1]
    from_file = headway("generate", byte_folder, "--file", tmp_path / "prompt.txt", "--max-new-tokens", "9")[1]
    pipe(b"hello\n")
    from_pipe = headway("generate", byte_folder, "--max-new-tokens", "9")[1]
    assert from_argument == from_file == from_pipe != ""


def test_a_byte_model_takes_bytes_that_are_not_utf8(headway, pipe, byte_folder: Path):
    prompt = b"\x00a\xff\xfe\x80\r\n"
    pipe(prompt)
    status, out, _ = headway("generate", byte_folder, "--max-new-tokens", "12", "--json")
    document = last_document(out)
    assert status == 0
    assert document["prompt_tokens"] == len(prompt)
    assert document["token_ids"] == greedy(byte_folder, prompt, 12)


@pytest.mark.skipif(os.name != "posix", reason="arguments are bytes on posix only")
def test_an_argument_that_is_not_utf8_reaches_the_model_as_typed(headway, byte_folder: Path):
    typed = os.fsdecode(b"a\xff")
    document = last_document(headway("generate", byte_folder, typed, "--max-new-tokens", "5", "--json")[1])
    assert document["token_ids"] == greedy(byte_folder, b"a\xff", 5)


def test_special_words_in_a_prompt_are_bytes_to_a_byte_model(headway, byte_folder: Path):
    document = last_document(headway("generate", byte_folder, "<|pad|>", "--max-new-tokens", "2", "--json")[1])
    assert document["prompt_tokens"] == 7


def test_json_repeats_the_text_and_carries_every_figure(headway, constant_folder: Path):
    status, out, _ = headway("generate", constant_folder, "x", "--max-new-tokens", "9", "--json")
    document = last_document(out)
    assert status == 0
    assert out.splitlines()[0] == document["text"] == "a" * 9
    assert document["mode"] == "self-speculative"
    assert document["tokens_per_forward"] == 4
    assert document["acceptance"]["lengths"] == [[4, 4]]
    assert document["new_tokens"] == 9
    assert document["tokens_per_second"] > 0
    assert document["provenance"]["versions"]["torch"]
    assert str(constant_folder) not in out


def test_zero_drafts_decode_plainly(headway, constant_folder: Path):
    command = ("generate", constant_folder, "x", "--max-new-tokens", "9", "--num-draft-tokens", "0", "--json")
    document = last_document(headway(*command)[1])
    assert (document["mode"], document["tokens_per_forward"], document["text"]) == ("plain", 1, "a" * 9)


def test_compare_shows_both_texts_and_ends_in_the_verdict(headway, constant_folder: Path):
    status, out, err = headway("generate", constant_folder, "x", "--max-new-tokens", "9", "--compare")
    document = last_document(out)
    assert status == 0
    assert out.splitlines()[:-1] == ["a" * 9, "a" * 9]
    assert document["identical"] is True
    assert document["plain"]["token_ids"] == document["self_speculative"]["token_ids"]
    assert document["plain"]["mode"] == "plain"
    assert document["self_speculative"]["tokens_per_forward"] == 4
    rounds = [document[arm]["tokens_per_second_rounds"] for arm in ("plain", "self_speculative")]
    assert len(rounds[0]) == len(rounds[1]) >= 1
    verdict = err.splitlines()[-3:]
    assert verdict[0] == "identical: yes"
    assert verdict[1] == "tokens per forward: 1.00 plain, 4.00 self-speculative"
    assert verdict[2].startswith("tokens/s: ")


def test_compare_agrees_on_a_random_model(headway, byte_folder: Path):
    document = last_document(headway("generate", byte_folder, "hello", "--max-new-tokens", "30", "--compare")[1])
    assert document["identical"] is True
    assert document["plain"]["token_ids"] == greedy(byte_folder, b"hello", 30)


def test_compare_says_where_two_generations_part_and_ends_with_status_1(
    headway, byte_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    step = DecodingLoop.step

    def wrong_fifth_token(loop: DecodingLoop) -> list[list[int]]:
        tokens = step(loop)
        if loop.num_draft_tokens and len(loop.rows[0]) == 5:
            tokens[0][0] = (tokens[0][0] + 1) % 256
        return tokens

    monkeypatch.setattr(DecodingLoop, "step", wrong_fifth_token)
    status, out, err = headway("generate", byte_folder, "hello", "--max-new-tokens", "12", "--compare")
    document = last_document(out)
    parted = sum(document["self_speculative"]["acceptance"]["lengths"][0][:3]) + 1
    assert status == 1
    assert document["identical"] is False
    assert document["first_difference"] == parted
    assert document["logit_gap"] > 0
    assert "identical: no" in err.splitlines()
    assert f"first difference at new token {parted + 1}, where the two best logits are " in err


def test_blocks_stand_in_brackets_where_there_is_no_terminal(headway, constant_folder: Path):
    out = headway("generate", constant_folder, "x", "--max-new-tokens", "9", "--show-blocks")[1]
    assert out == "[a][aaaa][aaaa]\n"


def test_compare_marks_the_blocks_of_both(headway, constant_folder: Path):
    out = headway("generate", constant_folder, "x", "--max-new-tokens", "5", "--show-blocks", "--compare")[1]
    assert out.splitlines()[:2] == ["[a][a][a][a][a]", "[a][aaaa]"]


def test_generation_ends_after_a_stop_string(headway, byte_folder: Path):
    whole = as_text(greedy(byte_folder, b"hello", 40))
    stop = next(whole[i : i + 2] for i in range(4, 30) if whole[i : i + 2].isascii() and whole[i : i + 2].isprintable())
    command = ("generate", byte_folder, "hello", "--max-new-tokens", "40", "--json", "--stop", "never!", "--stop", stop)
    document = last_document(headway(*command)[1])
    assert document["text"] == whole[: whole.index(stop) + len(stop)]


def test_a_text_model_is_given_utf8(headway, text_folder: Path, text_tokenizer: Any):
    status, out, _ = headway("generate", text_folder, "The caf\u00e9 has", "--max-new-tokens", "30", "--json")
    document = last_document(out)
    assert status == 0
    assert document["prompt_tokens"] == len(text_tokenizer("The caf\u00e9 has")["input_ids"])
    model = MultiTokenLM.from_pretrained(text_folder)
    ids = torch.tensor([text_tokenizer("The caf\u00e9 has")["input_ids"]])
    expected = model.base.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert document["token_ids"] == expected.tolist()
    assert document["text"] == text_tokenizer.decode(expected, skip_special_tokens=True)


def test_a_plain_folder_decodes_one_token_per_forward_and_says_so(headway, plain_folder: Path):
    status, out, err = headway("generate", plain_folder, "hello", "--max-new-tokens", "10", "--json")
    document = last_document(out)
    assert status == 0
    assert err.splitlines()[0] == "model has no heads: one token per forward"
    assert document["token_ids"] == greedy(plain_folder, b"hello", 10)
    assert (document["mode"], document["num_future_tokens"]) == ("plain", 1)


def test_sampling_is_reproducible_with_and_without_drafts(headway, byte_folder: Path):
    def sample(*options: str) -> dict[str, Any]:
        command = ("generate", byte_folder, "hello", "--max-new-tokens", "24", "--json", *options)
        return last_document(headway(*command)[1])

    one, same, other = sample("--seed", "1"), sample("--seed", "1"), sample("--seed", "2")
    plain = sample("--seed", "1", "--num-draft-tokens", "0")
    assert one["token_ids"] == same["token_ids"] == plain["token_ids"] != other["token_ids"]
    assert (one["mode"], plain["mode"]) == ("self-speculative", "plain")
    assert one["note"] is None


@pytest.mark.parametrize(
    ("sampling", "arguments"),
    [
        (Sampling(None, None, None), {"do_sample": False}),
        (Sampling(0.0, None, 1), {"do_sample": False}),
        (Sampling(None, None, 1), {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1}),
        (
            Sampling(None, None, None, top_k=5, min_p=0.1),
            {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 5, "min_p": 0.1},
        ),
        (Sampling(0.7, 0.9, None), {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}),
    ],
)
def test_sampling_draws_from_the_models_own_distribution(sampling: Sampling, arguments: dict[str, Any]):
    assert sampling.arguments() == arguments


def test_the_folders_own_sampling_defaults_do_not_make_greedy_decoding_sample(
    headway, byte_folder: Path, tmp_path: Path
):
    model = MultiTokenLM.from_pretrained(byte_folder)
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=5)
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((byte_folder / name).read_bytes())
    document = last_document(headway("generate", tmp_path / "model", "hello", "--max-new-tokens", "10", "--json")[1])
    assert document["token_ids"] == greedy(byte_folder, b"hello", 10)
    assert document["mode"] == "self-speculative"


def test_dtype_and_threads_are_what_was_asked(headway, byte_folder: Path):
    before = torch.get_num_threads()
    try:
        command = (
            "generate",
            byte_folder,
            "x",
            "--max-new-tokens",
            "3",
            "--json",
            "--dtype",
            "float64",
            "--threads",
            "1",
        )
        document = last_document(headway(*command)[1])
    finally:
        torch.set_num_threads(before)
    assert (document["dtype"], document["threads"]) == ("float64", 1)


def test_without_a_limit_the_text_ends_where_the_context_does(headway, constant_folder: Path):
    out = headway("generate", constant_folder, "x" * 60, "--json")[1]
    # positions 60..63 are fed, and the last new token is not
    assert last_document(out)["text"] == "a" * 5


def test_an_interrupt_keeps_what_was_generated(headway, constant_folder: Path, monkeypatch: pytest.MonkeyPatch):
    step = DecodingLoop.step

    def interrupted_third_time(loop: DecodingLoop) -> list[list[int]]:
        if len(loop.rows[0]) == 2:
            raise KeyboardInterrupt
        return step(loop)

    monkeypatch.setattr(DecodingLoop, "step", interrupted_third_time)
    status, out, err = headway("generate", constant_folder, "x", "--max-new-tokens", "50", "--json")
    assert status == 130
    assert out.splitlines()[0] == "aaaaa"
    assert last_document(out)["interrupted"] is True
    assert "(interrupted)" in err
    assert headway("generate", constant_folder, "x", "--max-new-tokens", "50", "--compare")[0] == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{bytes}", ""], "the prompt is empty"),
        (["{bytes}", "x", "--file", "{bytes}/config.json"], "leave one of them out"),
        (["{bytes}", "--file", "{empty}/gone"], "No such file"),
        (["{bytes}", "--file", "{empty}"], "cannot read"),
        (["{bytes}", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["{bytes}", "x", "--max-new-tokens", "65"], "leaves room for 64 new ones"),
        (["{bytes}", "x" * 65], "shorten it by at least 1"),
        (["{bytes}", "x", "--num-draft-tokens", "4"], "0..3"),
        (["{bytes}", "x", "--stop", ""], "empty string"),
        (["{bytes}", "x", "--temperature", "-1"], "--temperature"),
        (["{bytes}", "x", "--top-p", "0"], "--top-p"),
        (["{bytes}", "x", "--compare", "--seed", "1"], "leave --temperature"),
        (["{bytes}", "x", "--compare", "--num-draft-tokens", "0"], "with itself"),
        (["{plain}", "x", "--compare"], "nothing to compare"),
        (["{empty}/gone", "x"], "there is no model folder"),
        (["{empty}", "x"], "no config.json"),
        (["gpt2", "x"], "hf download"),
        ([], "MODEL"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, headway, byte_folder: Path, plain_folder: Path, tmp_path: Path
):
    places = {"bytes": byte_folder, "plain": plain_folder, "empty": tmp_path}
    status, out, err = headway("generate", *(argument.format(**places) for argument in arguments))
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err


def test_no_prompt_on_a_terminal_is_one_line(headway, byte_folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Keyboard:
        @staticmethod
        def isatty() -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Keyboard)
    status, _, err = headway("generate", byte_folder)
    assert status == 2
    assert err == "error: there is no prompt: pass PROMPT, --file F, or pipe text in\n"


def test_a_text_model_refuses_bytes_that_are_not_utf8(headway, pipe, text_folder: Path):
    pipe(b"abc\xff")
    status, _, err = headway("generate", text_folder)
    assert status == 2
    assert "byte 3 is 0xff" in err


@pytest.mark.parametrize("damaged", ["model.safetensors", "mtp/heads.safetensors", "mtp/config.json", "config.json"])
def test_a_damaged_folder_is_one_line(damaged: str, headway, byte_folder: Path, tmp_path: Path):
    for path in byte_folder.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(byte_folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:40])
    status, out, err = headway("generate", tmp_path, "x")
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err


def test_a_folder_without_tokenizer_is_one_line(headway, byte_folder: Path, tmp_path: Path):
    MultiTokenLM.from_pretrained(byte_folder).save_pretrained(tmp_path / "model")
    status, _, err = headway("generate", tmp_path / "model", "x")
    assert status == 2
    assert "tokenizer" in err
    assert len(err.splitlines()) == 1


DRAFTING = {
    "default tree": ("--tree", "8"),
    "tree": ("--tree", "[[0], [1], [0, 0]]"),
    "dynamic tree": ("--tree", "dynamic", "--tree-nodes", "6", "--tree-width", "2"),
    "lookup": ("--drafts", "lookup", "--num-lookup-tokens", "5", "--lookup-ngram", "2"),
    "heads and lookup": ("--drafts", "heads+lookup", "--tree", "6"),
}


@pytest.mark.parametrize("drafting", DRAFTING)
def test_trees_and_copies_give_the_greedy_text(drafting, headway, byte_folder: Path, constant_folder: Path):
    command = ("generate", byte_folder, "hello hello", "--max-new-tokens", "30", "--json", *DRAFTING[drafting])
    document = last_document(headway(*command)[1])
    assert document["token_ids"] == greedy(byte_folder, b"hello hello", 30)
    assert (document["mode"], document["lossless"], document["note"]) == ("self-speculative", True, None)
    status, out, err = headway(
        "generate", constant_folder, "aaa", "--max-new-tokens", "30", "--compare", *DRAFTING[drafting]
    )
    assert (status, last_document(out)["identical"]) == (0, True)
    assert "identical: yes" in err


def test_a_plain_folder_drafts_by_lookup(headway, plain_folder: Path):
    command = ("generate", plain_folder, "hello hello hello", "--max-new-tokens", "20", "--json", "--drafts", "lookup")
    _, out, err = headway(*command)
    document = last_document(out)
    assert document["token_ids"] == greedy(plain_folder, b"hello hello hello", 20)
    assert document["mode"] == "self-speculative"
    assert "has no heads" not in err


def test_lossy_acceptance_is_said_on_the_screen_and_in_the_document(headway, byte_folder: Path):
    command = ("generate", byte_folder, "hello", "--max-new-tokens", "9", "--json", "--seed", "3")
    _, out, err = headway(*command, "--acceptance", "typical", "--posterior-threshold", "0.01")
    document = last_document(out)
    assert (document["acceptance_rule"], document["lossless"]) == ("typical", False)
    assert "acceptance='typical' is lossy" in err.splitlines()[0]
    assert last_document(headway(*command, "--sample-drafts")[1])["lossless"] is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tree", "x"), "--tree takes a number of nodes, a JSON list of paths"),
        (("--tree", "[[0, 0]]"), "where it begins"),
        (("--sample-drafts",), "--sample-drafts is for sampling: pass --temperature"),
        (("--drafts", "lookup", "--tree", "4"), "a tree is made of the heads' candidates"),
    ],
)
def test_drafts_that_cannot_be_are_one_line(flags, message, headway, byte_folder: Path):
    status, out, err = headway("generate", byte_folder, "hello", "--max-new-tokens", "5", *flags)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err
