"""What the engine does in a second: reading prompts, writing many sequences side by side, writing one alone."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.engine import Engine, EngineOptions
from dsv3_jax.inference.sequence import Sampling
from dsv3_jax.model import DeepSeekV3, abstract_model
from dsv3_jax.nn.router import RouterBias


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """One engine's figures. Times are of the wall clock, the host's work among them."""

    device: str
    batch: int
    prompt: int
    new: int
    drafts: int
    cache_dtype: str
    compile_seconds: float
    prefill_tokens_per_second: float
    """Of all prompts, read alone."""
    decode_tokens_per_second: float
    """Of all sequences together, once prompts are read."""
    step_milliseconds: float
    """A token of every sequence."""
    alone_milliseconds: float
    """A token of one sequence alone."""
    first_token_milliseconds: float
    """From one request alone to its first token."""
    acceptance: float
    """Share of drafted tokens that counted; of random weights it is chance."""
    cache_bytes_per_token: float


def random_model(config: ModelConfig, dtype: DTypeLike) -> DeepSeekV3:
    """Normal weights of deviation 0.02 in ``dtype``, made leaf by leaf: nothing larger is ever held."""
    graph, state = nnx.split(abstract_model(config))
    leaves, structure = jax.tree.flatten(state)
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    model = nnx.merge(graph, jax.tree.unflatten(structure, made))
    for _, module in nnx.iter_modules(model):
        for name in ("scale", "bias"):
            if isinstance(variable := getattr(module, name, None), nnx.Variable):
                fill = jnp.zeros if isinstance(variable, RouterBias) else jnp.ones
                variable[...] = fill(variable.shape, jnp.float32)
    return model


def bench_decode(
    model: DeepSeekV3,
    *,
    batch: int,
    prompt: int,
    new: int,
    options: EngineOptions | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    say: Callable[[str], None],
) -> DecodeResult:
    """Greedy text behind random prompts; nothing ends before its time.

    Args:
        model: any model of the family.
        batch: sequences side by side.
        prompt: tokens of each.
        new: tokens written behind each.
        options: of the engine; sizes that follow from the others are set here.
        dtype: of activations and cache.
        say: told what is going on.
    """
    longest = prompt + new
    options = dataclasses.replace(
        options or EngineOptions(),
        max_batch=batch,
        max_tokens=longest,
        token_budget=max(2048, batch + 512),
        share_prefixes=False,
    )
    engine = Engine(model, None, options, dtype=dtype)
    rng = np.random.default_rng(0)
    sampling = Sampling(new, stop_tokens=())

    def run(count: int, tokens: int) -> tuple[float, float, float]:
        """Seconds until prompts are read, until the first tokens, and until the end."""
        how = dataclasses.replace(sampling, max_new_tokens=tokens)
        began = time.perf_counter()
        sequences = [engine.add(rng.integers(0, model.config.vocab_size, prompt).tolist(), how) for _ in range(count)]
        while not all(sequence.prefilled for sequence in sequences):
            engine.step()
        jax.block_until_ready(engine.runner.pages)
        read = time.perf_counter() - began
        while not all(sequence.new for sequence in sequences):
            engine.step()
        first = time.perf_counter() - began
        engine.run()
        return read, first, time.perf_counter() - began

    say("compiling")
    began = time.perf_counter()
    run(batch, new)
    run(1, new)
    compiled = time.perf_counter() - began
    say(f"compiled in {compiled:.1f} s, the first run among it")
    engine.counts.proposed = engine.counts.accepted = 0
    read, _, whole = run(batch, new)
    _, first, alone = run(1, new)
    pages = jax.tree.leaves(engine.runner.pages)
    held = sum(leaf.nbytes for leaf in pages) / (pages[0].shape[1] * options.page_size)
    return DecodeResult(
        device=jax.devices()[0].device_kind,
        batch=batch,
        prompt=prompt,
        new=new,
        drafts=options.drafts,
        cache_dtype=options.cache_dtype,
        compile_seconds=compiled,
        prefill_tokens_per_second=batch * prompt / read,
        decode_tokens_per_second=batch * new / (whole - read),
        step_milliseconds=1e3 * (whole - read) / new,
        alone_milliseconds=1e3 * (alone - first) / max(new - 1, 1),
        first_token_milliseconds=1e3 * first,
        acceptance=engine.counts.acceptance,
        cache_bytes_per_token=held,
    )
