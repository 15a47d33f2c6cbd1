"""``dsv3 chat --checkpoint PATH``: a conversation in the terminal."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv3_jax.cli.loading import Loaded, Loading, load
from dsv3_jax.cli.main import DONE, FAILURE
from dsv3_jax.cli.overrides import parse_options
from dsv3_jax.config import ConfigError

if TYPE_CHECKING:
    from dsv3_jax.inference import Sampling

_HELP = "/new starts another conversation, /exit (or Ctrl-D) ends; Ctrl-C stops an answer"


@dataclass(frozen=True)
class Options(Loading):
    """Options of ``dsv3 chat``."""

    system: str = ""
    """What stands before the conversation."""
    max_new_tokens: int = 1024
    """Tokens of an answer at most."""
    temperature: float = 0.6
    """0 takes the best token each time; R1 is made for 0.5 to 0.7."""
    top_p: float = 0.95
    """Share of the probability that is drawn from."""
    seed: int = 0
    """The same seed draws the same answers."""
    thinking: bool = False
    """Answers open with <think>, as R1's do."""
    max_batch: int = 1


def run(argv: Sequence[str]) -> int:
    """Talk until the input ends; the exit status."""
    options = parse_options("dsv3 chat", argv, "A conversation in the terminal.", Options)
    if sys.stdin is None:
        raise ConfigError("standard input is closed: a chat reads from it what you say")
    try:
        options.system.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError("--system is not UTF-8 text") from error
    # JAX and all above it take seconds to import: mistakes on the command line are told before.
    from dsv3_jax.inference import Sampling

    how = Sampling(options.max_new_tokens, options.temperature, options.top_p, seed=options.seed)
    loaded = load(options)
    if loaded is None:
        return FAILURE
    print(f"dsv3: {_HELP}", file=sys.stderr)
    begin = [{"role": "system", "content": options.system}] if options.system else []
    messages: list[dict[str, Any]] = list(begin)
    while (line := _ask()) is not None:
        if line == "/exit":
            break
        if line == "/new":
            messages = list(begin)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(loaded, messages, how, options.thinking)
            except ConfigError as error:
                print(f"dsv3: {error}", file=sys.stderr)
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})
    return DONE


def _ask() -> str | None:
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    try:
        # Not its text, which has half surrogates for what is no UTF-8 where the locale is C.
        line = sys.stdin.buffer.readline().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError("standard input is not UTF-8 text: type or pipe in UTF-8") from error
    return line.strip() if line else None


def _answer(loaded: Loaded, messages: list[dict[str, Any]], how: "Sampling", thinking: bool) -> str:
    """The assistant's next turn, printed as it comes."""
    from dsv3_jax.data.chat import encode_chat

    engine = loaded.engine
    prompt = encode_chat(loaded.tokenizer, messages, thinking=thinking)
    how = dataclasses.replace(how, choice=len(messages), stop_tokens=(loaded.tokenizer.eos_id,))
    sequence = engine.add(prompt, how)
    text = ""
    try:
        while engine.busy:
            for news in engine.step():
                text += news.text
                print(news.text, end="", flush=True)
    except KeyboardInterrupt:
        engine.cancel(sequence)
    print()
    return text
