"""The engine: requests come and go at any time, and each step lets all that run write side by side.

>>> engine = Engine(model, tokenizer, EngineOptions(max_batch=8))
>>> sequence = engine.add(tokenizer.encode("def add("), Sampling(max_new_tokens=32))
>>> while engine.busy:
...     for news in engine.step():
...         print(news.text, end="")
"""

import dataclasses
from collections.abc import Sequence as List
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.block_manager import BlockManager
from dsv3_jax.inference.programs import Told, Written
from dsv3_jax.inference.runner import Runner, Shapes
from dsv3_jax.inference.scheduler import Plan, Scheduler
from dsv3_jax.inference.sequence import Finish, Logprob, Sampling, Sequence
from dsv3_jax.inference.text import TextStream
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.nn.mla import AttentionForm


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How much the engine holds and computes at a time."""

    max_batch: int = 32
    """Sequences that run side by side."""
    least_batch: int = 1
    """Sequences that the smallest program is for; the others are for four times as many each, up to ``max_batch``."""
    max_tokens: int = 0
    """Tokens of the longest sequence, prompt included; 0 is what the model was made for."""
    cache_tokens: int = 0
    """Tokens that the cache holds, of all sequences together; 0 is ``max_batch`` of the longest."""
    page_size: int = 64
    """Tokens of a page, in which the cache is given out and shared."""
    token_budget: int = 2048
    """Tokens a step computes at most; prompts get what writing leaves of it."""
    chunk: int = 512
    """Tokens of one prompt that a step reads at most."""
    turns: int = 8
    """Tokens that each sequence writes in one call of the device, where no prompt waits to be read."""
    drafts: int = 0
    """Tokens that the MTP module drafts and the model checks in one pass; 0 writes one at a time."""
    form: Literal["naive", "absorbed"] = "absorbed"
    """How latent attention reads the cache while writing; both give the same text."""
    cache_dtype: Literal["same", "fp8"] = "same"
    """What latents are stored in: the type of activations, or FP8 with a scale for 128 numbers."""
    share_prefixes: bool = True
    """Whether prompts that begin alike share the cache of what they have in common."""


class News(NamedTuple):
    """What a step added to a sequence."""

    sequence: Sequence
    tokens: list[int]
    text: str
    """Empty without a tokenizer, and while it may begin a stop text."""
    logprobs: list[Logprob]
    finish: Finish | None


@dataclasses.dataclass
class Counts:
    """What the engine did so far."""

    steps: int = 0
    prompt_tokens: int = 0
    """Of all requests that came."""
    shared_tokens: int = 0
    """Those of them that were found in the cache."""
    read_tokens: int = 0
    """Tokens read into the cache, those of sequences that were set aside again among them."""
    written_tokens: int = 0
    preemptions: int = 0
    proposed: int = 0
    """Drafted tokens that the model checked."""
    accepted: int = 0
    """Those of them that counted."""
    finished: dict[str, int] = dataclasses.field(default_factory=lambda: {"stop": 0, "length": 0, "cancelled": 0})

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that counted."""
        return self.accepted / self.proposed if self.proposed else 0.0


class Engine:
    """A model that serves many requests. Not for several threads at once.

    Args:
        model: any model of the family.
        tokenizer: for text and stop texts; None writes tokens only.
        options: how much it holds and computes at a time.
        dtype: of activations, matrix products and, unless it is FP8, cache.

    Raises:
        ConfigError: options that do not fit each other or the model.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
        *,
        dtype: Any = jnp.float32,
    ):
        options = EngineOptions() if options is None else options
        self.config, self.tokenizer, self.options = model.config, tokenizer, options
        self.max_tokens = options.max_tokens or model.config.max_position_embeddings
        cache_tokens = options.cache_tokens or options.max_batch * self.max_tokens
        _check(options, model.config, self.max_tokens, cache_tokens)
        shapes = Shapes(
            least_batch=options.least_batch,
            max_batch=options.max_batch,
            max_pages=-(-self.max_tokens // options.page_size),
            page_size=options.page_size,
            chunk=min(options.chunk, options.token_budget, self.max_tokens),
            turns=options.turns,
            drafts=options.drafts,
            form=options.form,
            dtype=np.dtype(dtype),
        )
        pages = -(-cache_tokens // options.page_size) + 1
        self.runner = Runner(model, shapes, pages, fp8_cache=options.cache_dtype == "fp8")
        self.blocks = BlockManager(
            pages, options.page_size, lookahead=int(options.drafts > 0), sharing=options.share_prefixes
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_batch=options.max_batch,
            token_budget=options.token_budget,
            chunk=shapes.chunk,
            reach=options.turns * (options.drafts + 1),
        )
        self.counts = Counts()

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, prompt: List[int], sampling: Sampling) -> Sequence:
        """A new request, to the end of the line.

        Raises:
            ConfigError: as :meth:`prepare`.
        """
        sequence = self.prepare(prompt, sampling)
        self.submit(sequence)
        return sequence

    def prepare(self, prompt: List[int], sampling: Sampling) -> Sequence:
        """A request checked, and nothing else done; the one method that any thread may call at any time.

        Raises:
            ConfigError: an empty or too long prompt, a token that the vocabulary does not have, or stop texts without a
                tokenizer.
        """
        prompt = check_prompt("the prompt", np.asarray(prompt), self.config, self.max_tokens)
        if sampling.stop and self.tokenizer is None:
            raise ConfigError("stop needs a tokenizer: the engine was made without one")
        stop_tokens = (self.config.eos_token_id,) if sampling.stop_tokens is None else sampling.stop_tokens
        end = min(len(prompt) + sampling.max_new_tokens, self.max_tokens)
        sequence = Sequence(prompt, sampling, end, stop_tokens)
        if self.tokenizer is not None:
            sequence.text = TextStream(self.tokenizer, sampling.stop)
        return sequence

    def submit(self, sequence: Sequence) -> None:
        """A request of :meth:`prepare`, to the end of the line."""
        self.counts.prompt_tokens += len(sequence.prompt)
        self.scheduler.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Leave a request where it is; what it held is free at once. Nothing, where it is finished."""
        if sequence.finish is None:
            self._finish(sequence, "cancelled")

    def run(self) -> None:
        """Step until every request is finished."""
        while self.busy:
            self.step()

    def step(self) -> list[News]:
        """Read what is to be read of prompts, and let every sequence that is read write."""
        plan = self.scheduler.plan()
        self.counts.steps += 1
        self.counts.preemptions += len(plan.preempted)
        self._move_drafts(plan)
        self.runner.read(plan.prefill)
        for chunk in plan.prefill:
            sequence = chunk.sequence
            self.counts.read_tokens += chunk.stop - chunk.start
            sequence.computed = chunk.stop
            self._publish(sequence)
        if not plan.decode:
            return []
        written = self.runner.write(plan.decode, 1 if plan.prefill else self.options.turns)
        return [self._take(sequence, written, row) for row, sequence in enumerate(plan.decode)]

    def _move_drafts(self, plan: Plan) -> None:
        """A sequence that is set aside takes its drafts with it, so that it goes on as it would have."""
        if not self.options.drafts:
            return
        for sequence in plan.preempted:
            if not sequence.fresh:
                sequence.drafts, sequence.fresh = self.runner.save_drafts(sequence.slot), True
        for sequence in plan.decode:
            if sequence.drafts is not None:
                self.runner.restore_drafts(sequence.slot, sequence.drafts)
                sequence.drafts, sequence.fresh = None, False

    def _take(self, sequence: Sequence, written: Written, row: int) -> News:
        tokens, text, stopped = [], "", bool(written.stopped[row])
        for token in written.tokens[row, : written.size[row]].tolist():
            tokens.append(token)
            if sequence.text is not None:
                text += sequence.text.add(token)
                if sequence.text.stopped:
                    stopped = True
                    break
        told = self._logprobs(sequence, tokens, written.told, row)
        sequence.tokens += tokens
        sequence.logprobs += told
        sequence.computed, sequence.fresh = len(sequence.tokens) - 1, False
        for counts in (sequence, self.counts):
            counts.proposed += int(written.proposed[row])
            counts.accepted += int(written.accepted[row])
        self.counts.written_tokens += len(tokens)
        self._publish(sequence)
        if stopped or len(sequence.tokens) >= sequence.end:
            if sequence.text is not None:
                text += sequence.text.end()
                stopped |= sequence.text.stopped
            self._finish(sequence, "stop" if stopped else "length")
        return News(sequence, tokens, text, told, sequence.finish)

    def _publish(self, sequence: Sequence) -> None:
        sequence.published = self.blocks.publish(sequence.pages, sequence.tokens, sequence.computed, sequence.published)

    def _finish(self, sequence: Sequence, how: Finish) -> None:
        sequence.finish = how
        sequence.drafts = None
        self.counts.finished[how] += 1
        self.counts.shared_tokens += sequence.shared
        self.scheduler.remove(sequence)

    @staticmethod
    def _logprobs(sequence: Sequence, tokens: List[int], told: Told | None, row: int) -> list[Logprob]:
        wanted = sequence.sampling.logprobs
        if wanted is None or told is None:
            return []
        found = []
        for place, token in enumerate(tokens):
            best = zip(told.best[row, place, :wanted].tolist(), told.theirs[row, place, :wanted].tolist(), strict=True)
            found.append(Logprob(token, float(told.own[row, place]), tuple(best)))
        return found


def check_prompt(name: str, ids: np.ndarray, config: ModelConfig, longest: int) -> list[int]:
    """A prompt as a list of token ids.

    Raises:
        ConfigError: it is empty, too long for a new token, or holds what is no token of the vocabulary.
    """
    vocabulary = config.vocab_size
    if ids.size == 0:
        raise ConfigError(f"{name} is empty: give at least one token id, such as the EOS that starts a new document")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError(f"{name} must be a list of token ids, not {ids.dtype} of shape {ids.shape}")
    unknown = ids[(ids < 0) | (ids >= vocabulary)]
    if unknown.size:
        raise ConfigError(
            f"{name} has the token {unknown[0]}: model.vocab_size = {vocabulary} knows 0 to {vocabulary - 1}"
        )
    if len(ids) >= longest:
        limit = "model.max_position_embeddings" if longest == config.max_position_embeddings else "max_tokens"
        raise ConfigError(
            f"{name} has {len(ids)} tokens, {limit} = {longest} leaves no room for a new one: give at most "
            f"{longest - 1}"
        )
    return ids.tolist()


def _check(options: EngineOptions, config: ModelConfig, max_tokens: int, cache_tokens: int) -> None:
    for name in ("least_batch", "max_batch", "page_size", "token_budget", "chunk", "turns"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} = {getattr(options, name)} must be at least 1")
    if not 2 <= max_tokens <= config.max_position_embeddings:
        raise ConfigError(
            f"max_tokens = {max_tokens} must be between 2 and model.max_position_embeddings = "
            f"{config.max_position_embeddings}"
        )
    if cache_tokens < max_tokens:
        raise ConfigError(f"cache_tokens = {cache_tokens} must hold one sequence of max_tokens = {max_tokens}")
    if options.token_budget <= options.max_batch:
        raise ConfigError(
            f"token_budget = {options.token_budget} must be greater than max_batch = {options.max_batch}, or no prompt "
            "is read while all write"
        )
    if options.drafts < 0:
        raise ConfigError(f"drafts = {options.drafts} must be at least 0")
    if options.drafts and not config.num_nextn_predict_layers:
        raise ConfigError(
            f"drafts = {options.drafts} needs an MTP module, and model.num_nextn_predict_layers = 0: take 0"
        )


def attention_form(form: str) -> AttentionForm:
    """The form of that name.

    Raises:
        ConfigError: there is none.
    """
    if form not in ("naive", "absorbed"):
        raise ConfigError(f"form = {form!r} must be 'naive' or 'absorbed'")
    return form
