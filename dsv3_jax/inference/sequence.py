"""One request on its way: what was asked for, what was written so far, which pages it holds."""

import dataclasses
import itertools
import math
from typing import Any, Literal

from dsv3_jax.config import ConfigError

Finish = Literal["stop", "length", "cancelled"]
MOST_LOGPROBS = 20
"""Alternatives that can be told beside a token."""
MOST_STOP_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen. Penalties come first, then the temperature, then what cuts the tail off."""

    max_new_tokens: int
    temperature: float = 0.0
    """What logits are divided by; 0 takes the best token, and what follows does not matter."""
    top_p: float = 1.0
    """The fewest best tokens whose probabilities reach this share are kept."""
    top_k: int = 0
    """So many best tokens are kept; 0 keeps all."""
    min_p: float = 0.0
    """Tokens of at least this share of the best one's probability are kept."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that was written already."""
    frequency_penalty: float = 0.0
    """Taken from it as often as it was written."""
    repetition_penalty: float = 1.0
    """What positive logits of tokens of the prompt and of the text are divided by, and negative ones multiplied."""
    seed: int = 0
    """The same seed, prompt and model draw the same tokens, whatever else the engine does."""
    choice: int = 0
    """Which of several texts of one seed this is."""
    logprobs: int | None = None
    """Alternatives whose log-probabilities are told beside each token's; None tells nothing."""
    stop: tuple[str, ...] = ()
    """Texts that end it; they are left out. They need an engine with a tokenizer."""
    stop_tokens: tuple[int, ...] | None = None
    """Token ids that end it; they are left out. None is the model's EOS."""

    def __post_init__(self) -> None:
        for good, message in (
            (self.max_new_tokens > 0, f"max_new_tokens = {self.max_new_tokens} must be greater than 0"),
            (
                0 <= self.temperature < math.inf,
                f"temperature = {self.temperature} must be at least 0 (0 is greedy)",
            ),
            (0 < self.top_p <= 1, f"top_p = {self.top_p} must be greater than 0 and at most 1"),
            (0 <= self.top_k < 2**31, f"top_k = {self.top_k} must be at least 0 (0 keeps all)"),
            (0 <= self.min_p <= 1, f"min_p = {self.min_p} must be between 0 and 1"),
            (abs(self.presence_penalty) <= 2, f"presence_penalty = {self.presence_penalty} must be between -2 and 2"),
            (
                abs(self.frequency_penalty) <= 2,
                f"frequency_penalty = {self.frequency_penalty} must be between -2 and 2",
            ),
            (
                0 < self.repetition_penalty < math.inf,
                f"repetition_penalty = {self.repetition_penalty} must be greater than 0 (1 is none)",
            ),
            (0 <= self.seed < 2**32, f"seed = {self.seed} must be at least 0 and less than 2**32"),
            (
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"logprobs = {self.logprobs} must be between 0 and {MOST_LOGPROBS}",
            ),
            (all(self.stop), "stop has an empty text: leave it out"),
            (
                len(self.stop_tokens or ()) <= MOST_STOP_TOKENS,
                f"stop_tokens has {len(self.stop_tokens or ())} ids: give at most {MOST_STOP_TOKENS}",
            ),
        ):
            if not good:
                raise ConfigError(message)

    @property
    def penalized(self) -> bool:
        """Whether earlier tokens change logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


@dataclasses.dataclass(frozen=True)
class Logprob:
    """What the model itself gave a token, before penalties, temperature and cuts."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]
    """The best tokens and theirs, as many as were asked for."""


_numbers = itertools.count()


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request and its text. ``computed`` tokens of it are in its pages; the last token never is before its turn."""

    prompt: list[int]
    sampling: Sampling
    end: int
    """Tokens, prompt included, at which it is as long as it may get."""
    stop_tokens: tuple[int, ...]
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))
    tokens: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    published: tuple[int, int] = (0, 0)
    """Where :meth:`~dsv3_jax.inference.block_manager.BlockManager.publish` goes on."""
    shared: int = 0
    """Tokens of the prompt that were found in pages."""
    slot: int = -1
    """Row of the engine's memory of drafts, its own while it runs; -1 until it first does."""
    drafts: Any = None
    """What that row held when the sequence was set aside."""
    fresh: bool = True
    """Whether that row holds nothing of it."""
    finish: Finish | None = None
    logprobs: list[Logprob] = dataclasses.field(default_factory=list)
    text: Any = None
    """The text so far, where the engine has a tokenizer."""
    proposed: int = 0
    accepted: int = 0
    """Drafted tokens that were checked, and those of them that were right."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def new(self) -> list[int]:
        """Tokens written so far."""
        return self.tokens[len(self.prompt) :]

    @property
    def prefilled(self) -> bool:
        """Whether all but the last token are in its pages."""
        return self.computed >= len(self.tokens) - 1
