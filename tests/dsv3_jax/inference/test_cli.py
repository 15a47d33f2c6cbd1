"""``dsv3 generate`` prints what :func:`generate_text` returns, and mistakes in one line."""

import dataclasses
import io
import socket

import pytest

from dsv3_jax.cli.generate import Options
from dsv3_jax.cli.main import main
from dsv3_jax.data.chat import encode_chat
from dsv3_jax.data.tokenizer import EOS
from dsv3_jax.inference import generate, generate_text
from dsv3_jax.interop.pretrained import from_pretrained

PROMPT = "def add("


@pytest.fixture(scope="module")
def folder(tmp_path_factory, saved_run, run_config, tokenizer):
    config = run_config(attention="mha", num_hidden_layers=1, n_routed_experts=0, max_position_embeddings=96)
    return saved_run(tmp_path_factory.mktemp("runs") / "a", config, tokenizer)


@pytest.fixture(scope="module")
def run(folder):
    return from_pretrained(folder)


@pytest.fixture
def command(folder, capsys):
    """``(words) -> (status, stdout, stderr)``"""

    def call(*words):
        status = main(["generate", "--checkpoint", str(folder), "--max-new-tokens", "8", *words])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def stdin(monkeypatch):
    def put(raw, **how):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), **how))

    return put


@pytest.fixture
def refused(capsys, folder, monkeypatch):
    """``(command, *words) -> the one line`` of a mistake that is told before the model is loaded."""

    def loaded(*_, **__):
        raise AssertionError("the model was loaded before the mistake was told")

    def call(command, *words):
        with monkeypatch.context() as patch:
            patch.setattr("dsv3_jax.interop.pretrained.from_pretrained", loaded)
            assert main([command, "--checkpoint", str(folder), *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        return line

    return call


def test_text_is_the_decoded_tokens(run):
    model, _, tokenizer = run
    (new,) = generate(model, tokenizer.encode(PROMPT), max_new_tokens=8, form="absorbed")
    assert generate_text(model, tokenizer, PROMPT, max_new_tokens=8) == [tokenizer.decode(new)]
    assert 0 < len(new) <= 8


def test_an_empty_text_starts_a_document_behind_the_border_of_training(run):
    model, _, tokenizer = run
    (new,) = generate(model, [tokenizer.eos_id], max_new_tokens=8)
    assert generate_text(model, tokenizer, "", max_new_tokens=8) == [tokenizer.decode(new)]


def test_special_tokens_count_only_where_asked_for(run):
    model, _, tokenizer = run
    expected = generate_text(model, tokenizer, "", max_new_tokens=8)
    assert generate_text(model, tokenizer, EOS, max_new_tokens=8, parse_special=True) == expected
    assert generate_text(model, tokenizer, "|", max_new_tokens=8) != expected


def test_the_prompt_and_what_follows_it_are_printed(command, run):
    (new,) = generate_text(run.model, run.tokenizer, PROMPT, max_new_tokens=8)
    assert command("--prompt", PROMPT) == (0, PROMPT + new + "\n", "")


def test_several_prompts_are_printed_in_order(command, run):
    texts = [PROMPT, "--x"]
    first, second = generate_text(run.model, run.tokenizer, texts, max_new_tokens=8)
    expected = f"--- 0 ---\n{texts[0]}{first}\n--- 1 ---\n{texts[1]}{second}\n"
    assert command("--prompt", PROMPT, "--form", "naive", "--prompt=--x") == (0, expected, "")


def test_without_a_prompt_standard_input_is_read(command, run, stdin):
    stdin(PROMPT.encode() + b"\n")
    (new,) = generate_text(run.model, run.tokenizer, PROMPT, max_new_tokens=8)
    assert command() == (0, PROMPT + new + "\n", "")


def test_settings_reach_the_sampler_and_the_checkpoint(command, run):
    _, greedy, _ = command("--prompt", PROMPT)
    hot = ["--prompt", PROMPT, "--temperature", "2"]
    status, drawn, _ = command(*hot, "--seed", "1")
    assert status == 0
    assert command(*hot, "--seed", "1")[1] == drawn
    assert len({greedy, drawn, command(*hot, "--seed", "2")[1]}) == 3
    assert command(*hot, "--top-p", "1e-6")[1] == greedy
    assert command("--prompt", PROMPT, "--step", "10")[1] != greedy
    assert command("--prompt", PROMPT, "--weights", "best")[1] == command("--prompt", PROMPT, "--step", "20")[1]


def test_bfloat16_is_an_option(command, run):
    (new,) = generate_text(run.model, run.tokenizer, PROMPT, max_new_tokens=8, dtype="bfloat16")
    assert command("--prompt", PROMPT, "--precision", "bf16") == (0, PROMPT + new + "\n", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt", "a", "--step", "11"], "step = 11"),
        (["--prompt", "a" * 99], "max_position_embeddings = 96"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1"),
        (["--prompt", "a", "--form", "fused"], "--form = 'fused'"),
        (["--prompt"], "--prompt needs a value"),
        (["--prompt", "a\udcff"], "not UTF-8"),
        (["--promt", "a"], "did you mean '--prompt'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(command, words, told):
    status, out, err = command(*words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert told in err


def test_binary_standard_input_is_a_mistake(command, stdin):
    stdin(b"\xff\xfe\x00")
    status, _, err = command()
    assert status == 2
    assert "standard input is not UTF-8" in err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_standard_input_that_is_closed_is_one_line(refused, monkeypatch, command):
    monkeypatch.setattr("sys.stdin", None)
    assert "standard input is closed" in refused(command)


def test_a_prompt_needs_no_standard_input(command, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert command("--prompt", PROMPT)[0] == 0


def test_a_missing_folder_is_one_line_and_status_2(capsys, tmp_path):
    assert main(["generate", "--checkpoint", str(tmp_path / "none"), "--prompt", "a"]) == 2
    assert main(["generate", "--prompt", "a"]) == 2
    missing, unnamed = capsys.readouterr().err.splitlines()
    assert "none does not exist" in missing
    assert "--checkpoint is missing" in unnamed


def test_a_damaged_checkpoint_is_one_line_and_status_1(tmp_path, saved_run, run, tokenizer, capsys):
    broken = saved_run(tmp_path / "broken", run.config, tokenizer)
    (broken / "checkpoints" / "30" / "config.toml").unlink()
    assert main(["generate", "--checkpoint", str(broken), "--prompt", "a"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "30 is damaged: config.toml is missing" in line


def test_help_names_every_option(capsys):
    assert main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Options):
        assert "--" + field.name.replace("_", "-") in text


def test_a_chat_remembers_what_was_said(capsys, folder, run, stdin):
    options = ["chat", "--checkpoint", str(folder), "--max-new-tokens", "3", "--temperature", "0", "--system", "d"]
    stdin(b"a\nb\n/new\na\n\n/exit\nnever\n")
    assert main(options) == 0
    out, err = capsys.readouterr()
    assert "/new starts another conversation" in err
    model, _, tokenizer = run
    messages, expected = [{"role": "system", "content": "d"}], []
    for said in ("a", "b"):
        messages.append({"role": "user", "content": said})
        (new,) = generate(model, encode_chat(tokenizer, messages), max_new_tokens=3)
        expected.append(tokenizer.decode(new))
        messages.append({"role": "assistant", "content": expected[-1]})
    assert out == f"{expected[0]}\n{expected[1]}\n{expected[0]}\n"


def test_a_chat_too_long_is_told_and_forgotten(capsys, folder, stdin):
    stdin(b"a\n" + b"b" * 99 + b"\n")
    assert main(["chat", "--checkpoint", str(folder), "--max-new-tokens", "1", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "max_position_embeddings = 96" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--temperature", "-1"], "temperature = -1"),
        (["--temperature", "nan"], "temperature = nan"),
        (["--top-p", "5"], "top_p = 5"),
        (["--seed", "-1"], "seed = -1"),
        (["--max-new-tokens", "0"], "max_new_tokens = 0"),
        (["--system", "a\udcff"], "--system is not UTF-8"),
    ],
)
def test_a_chat_that_cannot_be_ends_before_it_begins(refused, stdin, words, told):
    stdin(b"a\n")
    assert told in refused("chat", *words)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_chat_of_other_bytes_than_text_is_one_line(capsys, folder, stdin, errors):
    stdin(b"hello\xff\n", encoding="utf-8", errors=errors)
    assert main(["chat", "--checkpoint", str(folder)]) == 2
    assert "standard input is not UTF-8" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to others: give a key"),
        (["--host", "example.org"], "is open to others"),
        (["--api-key-file", "none"], "--api-key-file none cannot be read"),
        (["--drafts", "1"], "drafts = 1 needs an MTP module"),
        (["--max-tokens", "199"], "max_tokens = 199"),
    ],
)
def test_a_server_that_cannot_be_is_one_line(capsys, folder, monkeypatch, words, told):
    monkeypatch.delenv("DSV3_API_KEY", raising=False)
    assert main(["serve", "--checkpoint", str(folder), "--port", "0", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.parametrize("number", ["max-body", "max-new-tokens", "max-seconds"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_servers_numbers_are_positive(refused, number, value):
    assert f"--{number} = {value}" in refused("serve", f"--{number}", value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "-1"], "--port = -1 must be between 0 and 65535"),
        (["--port", "65536"], "--port = 65536 must be between 0 and 65535"),
        (["--max-seconds", "nan"], "--max-seconds = nan"),
        (["--max-waiting", "-1"], "--max-waiting = -1 must not be negative"),
        (["--model-name", "a\udcff"], "--model-name = 'a\\udcff' is not UTF-8"),
    ],
)
def test_a_number_or_name_that_no_server_has_is_told_first(refused, words, told):
    assert told in refused("serve", *words)


def test_a_place_that_cannot_be_had_is_told_first(refused, monkeypatch):
    monkeypatch.setenv("DSV3_API_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused("serve", "--port", port)
    assert f"--host 127.0.0.1 --port {port} cannot be listened on (Address already in use)" in line
    for host in ("192.0.2.1", "a" * 70):  # of no machine, and no name
        line = refused("serve", "--port", "0", "--host", host)
        assert f"--host {host} --port 0 cannot be listened on" in line
        assert "give --host an address of this machine" in line


def test_the_served_application_is_the_checkpoints(folder, monkeypatch, tmp_path):
    """What is handed to the HTTP server, with its limits and its key."""
    uvicorn = pytest.importorskip("uvicorn")
    handed = {}

    def run(server, sockets):
        handed.update(server=server.config.app.state.server, where=sockets[0].getsockname())
        socket.create_connection(handed["where"]).close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    key = tmp_path / "key"
    key.write_text("secret\n")
    words = [
        "--host",
        "0.0.0.0",
        "--port",
        "0",
        "--api-key-file",
        str(key),
        "--max-batch",
        "2",
        "--compile-first",
        "false",
    ]
    assert main(["serve", "--checkpoint", str(folder), *words]) == 0
    assert handed["where"][0] == "0.0.0.0"
    options, engine = handed["server"].options, handed["server"].engine
    assert (options.api_key, options.model_name, engine.options.max_batch) == ("secret", folder.name, 2)


def test_a_place_that_another_takes_meanwhile_is_one_line(folder, monkeypatch, capsys):
    uvicorn = pytest.importorskip("uvicorn")
    from dsv3_jax.cli import serve

    class Taken(socket.socket):
        def listen(self, *_):
            raise OSError(98, "Address already in use")

    monkeypatch.setattr(serve.socket, "socket", Taken)
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: pytest.fail("it ran"))
    assert main(["serve", "--checkpoint", str(folder), "--port", "0", "--max-batch", "1"]) == 2
    assert "cannot be listened on (Address already in use)" in capsys.readouterr().err.splitlines()[-1]


def test_a_server_that_does_not_start_is_status_1_not_uvicorns(folder, monkeypatch):
    uvicorn = pytest.importorskip("uvicorn")

    def run(server, sockets):
        raise SystemExit(3)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    assert main(["serve", "--checkpoint", str(folder), "--port", "0", "--max-batch", "1"]) == 1
