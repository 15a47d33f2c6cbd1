"""Small models with weights wide enough that every token has its own logits, drawn without compiling anything.

JAX is imported within the fixtures: pytest reads this file before tests/conftest.py has set the devices.
"""

import numpy as np
import pytest


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
