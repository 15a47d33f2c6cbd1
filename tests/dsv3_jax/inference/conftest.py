"""Text generation is tested with programs that run for milliseconds, and engines of one shape share them."""

import dataclasses

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture(scope="session")
def engine_model(toy, drawn_parts):
    """A model whose MTP module is often right: blocks add little to the embedding, and the module passes it on."""
    import jax
    import jax.numpy as jnp

    from dsv3_jax.model import merge_model

    config = toy(
        vocab_size=300,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_nextn_predict_layers=1,
        max_position_embeddings=128,
    )
    graph, params, bias = drawn_parts(config)

    def leaf(path, value):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("out/kernel", "down/kernel", "moe/down")):
            return value * 0.1
        if name.endswith("project/kernel"):
            return jnp.eye(*value.shape) + 0.03 * value
        return jnp.ones_like(value) if "norm" in name else value

    return merge_model(graph, jax.tree_util.tree_map_with_path(leaf, params), bias)


@pytest.fixture(scope="session")
def engine_of(engine_model, tokenizer):
    """``(**changes) -> Engine``: two drafts, pages of 4 tokens and few of them, so that sequences are set aside."""
    from dsv3_jax.inference import Engine, EngineOptions

    options = EngineOptions(
        least_batch=4, max_batch=4, cache_tokens=128, page_size=4, token_budget=20, chunk=8, turns=3, drafts=2
    )
    return lambda **changes: Engine(engine_model, tokenizer, dataclasses.replace(options, **changes))
