"""Tokenizer and chat template as transformers opens them, and what a conversion takes along."""

import json
from pathlib import Path

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import PAD, Tokenizer
from dsv3_jax.interop.convert import convert
from dsv3_jax.interop.folder_files import carry_texts, tokenizer_texts, write_texts
from dsv3_jax.interop.pretrained import from_pretrained
from dsv3_jax.interop.tensor_io import WeightsError
from tests.dsv3_jax.interop.folders import config_of

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"

TEXTS = [
    "",
    "def add(a, b):\n    return a + b\n",
    f"{BOS}Hello{EOS}{USER}1234567{ASSISTANT}<think>\n汉字 é\t</think>\r\n  x",
    "<｜tool▁sep｜><|User|> < ｜User｜> <｜▁pad▁｜>",
    " leading and trailing ",
    "don't ’s , . ! it 's",
]

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "<think>\neasy</think>4"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
OTHER_CALL = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL, OTHER_CALL]}
RESULTS = [{"role": "tool", "content": "18 C"}, {"role": "tool", "content": "9:00"}]
CALLS_TEXT = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n'
    '<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{"zone": "CET"}\n```<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>"
)
RESULTS_TEXT = (
    "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>18 C<｜tool▁output▁end｜>"
    "<｜tool▁output▁begin｜>9:00<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
)

# What spec 9.4 says of each.
CHATS = {
    "one question": ([QUESTION], {"add_generation_prompt": True}, f"{BOS}{USER}2+2?{ASSISTANT}"),
    "no prompt": ([QUESTION], {}, f"{BOS}{USER}2+2?"),
    "thinking": (
        [QUESTION],
        {"add_generation_prompt": True, "thinking": True},
        f"{BOS}{USER}2+2?{ASSISTANT}<think>\n",
    ),
    "system text without a marker": (
        [{"role": "system", "content": "Be brief."}, QUESTION],
        {"add_generation_prompt": True},
        f"{BOS}Be brief.{USER}2+2?{ASSISTANT}",
    ),
    "history without its thoughts": (
        [QUESTION, ANSWER, {"role": "user", "content": "And 3+3?"}],
        {"add_generation_prompt": True},
        f"{BOS}{USER}2+2?{ASSISTANT}4{EOS}{USER}And 3+3?{ASSISTANT}",
    ),
    "tools called": ([QUESTION, CALLS], {}, f"{BOS}{USER}2+2?{ASSISTANT}{CALLS_TEXT}{EOS}"),
    "results of tools": (
        [QUESTION, CALLS, *RESULTS],
        {"add_generation_prompt": True},
        f"{BOS}{USER}2+2?{ASSISTANT}{CALLS_TEXT}{EOS}{RESULTS_TEXT}",
    ),
    "an answer from results": (
        [QUESTION, CALLS, *RESULTS, {"role": "assistant", "content": "18 C at 9"}, QUESTION],
        {"add_generation_prompt": True},
        f"{BOS}{USER}2+2?{ASSISTANT}{CALLS_TEXT}{EOS}{RESULTS_TEXT}18 C at 9{EOS}{USER}2+2?{ASSISTANT}",
    ),
}


@pytest.fixture(scope="module")
def opened(oracle, made_once, ragged):
    """What transformers makes of the tokenizer beside weights that we wrote."""

    def make(base):
        chats = [{"messages": messages, "options": options} for messages, options, _ in CHATS.values()]
        (base / "asked.json").write_text(json.dumps({"texts": TEXTS, "chats": chats}))
        job = {"do": "tokenizer", "folder": ragged / "bf16", "asked": base / "asked.json", "out": base / "out.json"}
        oracle([job])

    return json.loads((made_once("tokenizer", make) / "out.json").read_text())


def test_transformers_opens_our_tokenizer_with_its_special_tokens(opened, tokenizer):
    assert "Fast" in opened["class"] or "Tokenizers" in opened["class"]
    assert opened["special"] == {
        "bos": [BOS, tokenizer.bos_id],
        "eos": [EOS, tokenizer.eos_id],
        "pad": [PAD, tokenizer.pad_id],
    }
    assert opened["model_max_length"] == 4096


def test_ids_are_ours_and_nothing_is_added(opened, tokenizer):
    assert opened["ids"] == [tokenizer.encode(text, parse_special=True) for text in TEXTS]
    assert opened["decoded"] == TEXTS


@pytest.mark.parametrize("case", CHATS)
def test_chats_are_written_as_v3_and_r1_write_them(case, opened, tokenizer):
    number, wanted = list(CHATS).index(case), CHATS[case][2]
    assert opened["chats"][number] == wanted
    assert opened["chat_ids"][number] == tokenizer.encode(wanted, parse_special=True)


def test_a_vocabulary_without_pad_pads_with_eos(tokenizer):
    tree = json.loads(tokenizer.definition)
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != PAD]
    del tree["model"]["vocab"][PAD]
    texts = tokenizer_texts(Tokenizer(json.dumps(tree)), 128)
    assert json.loads(texts["tokenizer_config.json"])["pad_token"] == EOS


def test_what_lies_beside_the_weights_comes_along_unchanged_and_is_made_where_it_is_missing(
    ragged, tokenizer, tmp_path
):
    own = {
        "tokenizer.json": tokenizer.definition,
        "tokenizer_config.json": '{"mine": "täglich"}',
        "chat_template.jinja": "{{ messages }}\r\n",
        "special_tokens_map.json": "{}",
        "generation_config.json": '{"temperature": 0.6}',
    }
    folder = convert(ragged / "bf16", tmp_path / "own", to="hf").path
    write_texts(folder, own)
    ours = convert(folder, tmp_path / "ours", to="orbax", verify=True).path
    back = convert(ours, tmp_path / "back", to="hf", verify=True).path
    assert carry_texts(back) == own
    assert (back / "chat_template.jinja").read_bytes() == b"{{ messages }}\r\n"
    assert from_pretrained(ours).tokenizer.fingerprint == tokenizer.fingerprint
    for name in own:
        (folder / name).unlink()
    bare = convert(folder, tmp_path / "bare", to="hf").path
    assert carry_texts(bare).keys() == {"generation_config.json"}
    made = json.loads((bare / "generation_config.json").read_text())
    assert (made["bos_token_id"], made["eos_token_id"]) == (
        config_of(bare)["bos_token_id"],
        config_of(bare)["eos_token_id"],
    )
    assert from_pretrained(bare).tokenizer is None


def test_a_file_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json cannot be read as text"):
        carry_texts(tmp_path)


def test_a_text_that_changes_on_the_disk_is_found(ragged, tmp_path, monkeypatch):
    write = Path.write_bytes

    def flipped(path, data):
        return write(path, data.replace(b"bos", b"eos") if path.name == "config.json" else data)

    monkeypatch.setattr(Path, "write_bytes", flipped)
    with pytest.raises(WeightsError, match=r"^read back and different: config\.json; convert again"):
        convert(ragged / "bf16", tmp_path / "out", to="hf", verify=True)
    assert not (tmp_path / "out").exists()
