"""Small models with weights wide enough that every token has its own logits, drawn without compiling anything.

JAX is imported within the fixtures: pytest may read this file before tests/conftest.py has set the devices.
"""

import dataclasses

import numpy as np
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """For programs that run for milliseconds: half the compile time is worth more than their speed."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def toy():
    """``(**changes) -> ModelConfig`` of a V3 of a few thousand parameters."""
    from dsv3_jax.config import ModelConfig

    fields = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 32,
    }
    return lambda **changes: ModelConfig(**fields | changes)


@pytest.fixture(scope="session")
def drawn_parts():
    """``(config, seed=0) -> Parts`` with random parameters, norms and router biases."""
    import jax
    import jax.numpy as jnp

    from dsv3_jax.model import Parts, abstract_model, split_model

    def make(config, seed=0):
        rng = np.random.default_rng(seed)

        def leaf(path, shape):
            centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
            return jnp.asarray(centre + 0.2 * rng.standard_normal(shape.shape), jnp.float32)

        graph, params, router_bias = split_model(abstract_model(config))
        draw = jax.tree_util.tree_map_with_path
        return Parts(graph, draw(leaf, params), draw(leaf, router_bias))

    return make


@pytest.fixture(scope="session")
def drawn_model(drawn_parts):
    """``(config, seed=0) -> model``."""
    from dsv3_jax.model import merge_model

    return lambda config, seed=0: merge_model(*drawn_parts(config, seed))


@pytest.fixture(scope="session")
def tokenizer():
    """A trained tokenizer of nearly no merges."""
    from dsv3_jax.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer

    return train_tokenizer(["def add(a, b):\n    return a + b\n"] * 4, SMALLEST_VOCABULARY + 8)


@pytest.fixture(scope="session")
def run_config(toy):
    """``(train, **model changes) -> Config``"""
    from dsv3_jax.config import Config, replace

    def make(train=None, **changes):
        config = dataclasses.replace(Config(), name="toy", model=toy(vocab_size=300, **changes))
        return replace(config, train={"seq_len": 16} | (train or {}))

    return make


@pytest.fixture(scope="session")
def saved_run(drawn_parts):
    """``(folder, config, tokenizer, ema=False) -> folder`` of a run with checkpoints of steps 10, 20 and 30, each with
    weights drawn from its step; 20 has the best validation."""
    import jax.numpy as jnp

    from dsv3_jax.checkpoint import CheckpointWriter
    from dsv3_jax.config import to_toml
    from dsv3_jax.train.state import TrainState

    def make(folder, config, tokenizer, ema=False):
        folder.mkdir()
        (folder / "config.toml").write_text(to_toml(config))
        tokenizer.save(folder / "tokenizer.json")
        with CheckpointWriter(
            folder / "checkpoints", keep=9, config_toml=to_toml(config), tokenizer_json=folder / "tokenizer.json"
        ) as writer:
            for step, val_bpb in ((10, 3.0), (20, 2.0), (30, None)):
                _, params, router_bias = drawn_parts(config.model, step)
                average = drawn_parts(config.model, step + 1).params
                state = TrainState(params, router_bias, (params,), jnp.int32(0), step=step, tokens=step * 10)
                arrays = state.arrays() | ({"ema": average} if ema else {})
                writer.save(arrays, step=step, tokens=step * 10, data={}, val_bpb=val_bpb)
        return folder

    return make
