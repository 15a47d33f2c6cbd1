"""Parameter counts by component, in closed form from the architecture (spec 2.1)."""

from dataclasses import dataclass

from dsv3_jax.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. Every field but the last five is a component of the main model, summed over its layers."""

    embedding: int
    attention: int
    """Projections of all layers, with the two norms on the latents where there are latents."""
    norms: int
    """Two norms a layer and the final one."""
    dense_ffn: int
    shared_experts: int
    routed_experts: int
    router: int
    router_bias: int
    """Selection biases of ``noaux_tc``: stored, but not trained by the optimizer."""
    head: int
    """0 where the head is tied to the embedding."""

    routed_experts_active: int
    """Of ``routed_experts``, those that one token visits."""
    head_matrix: int
    """Weights that one token meets at the output, tied or not."""
    mtp: int
    """All MTP modules, router biases included, without the embedding and the head that they share."""
    mtp_active: int
    """Of ``mtp``, those that one token visits."""
    mtp_router_bias: int

    @property
    def components(self) -> dict[str, int]:
        """The main model's parts by name; they sum to :attr:`total`."""
        names = ("embedding", "attention", "norms", "dense_ffn", "shared_experts", "routed_experts", "router")
        return {name: getattr(self, name) for name in (*names, "router_bias", "head")}

    @property
    def total(self) -> int:
        """The main model, router biases counted, MTP not."""
        return sum(self.components.values())

    @property
    def active(self) -> int:
        """What one token meets in the main model, input table and head included."""
        return self.total - self.routed_experts + self.routed_experts_active

    @property
    def active_no_embedding(self) -> int:
        """:attr:`active` without the input table, which is looked up, not multiplied. The head stays, tied or not."""
        return self.active - self.embedding - self.head + self.head_matrix

    @property
    def trainable(self) -> int:
        """What the optimizer updates: main model and MTP, without router biases."""
        return self.total - self.router_bias + self.mtp - self.mtp_router_bias


def count_parameters(model: ModelConfig) -> Parameters:
    """Counts of ``model`` (spec 2.1; exact values for the published models in spec 2.2 and 2.3)."""
    d, layers, depth = model.hidden_size, model.num_hidden_layers, model.num_nextn_predict_layers
    moe_layers = model.n_moe_layers
    attention = _attention(model)
    dense_ffn = 3 * d * model.intermediate_size
    expert = 3 * d * model.moe_intermediate_size
    router = model.n_routed_experts * d
    bias = model.n_routed_experts if model.has_router_bias else 0
    shared, routed = model.n_shared_experts * expert, model.n_routed_experts * expert
    visited = model.num_experts_per_tok * expert
    table = model.vocab_size * d

    # Norms of the embedding, of the hidden state and before the head; eh_proj; one block (spec 2.2).
    mtp_fixed = 3 * d + 2 * d * d + attention + 2 * d
    has_experts = model.n_routed_experts > 0
    mtp_ffn = shared + routed + router + bias if has_experts else dense_ffn
    mtp_ffn_active = shared + visited + router + bias if has_experts else dense_ffn
    return Parameters(
        embedding=table,
        attention=layers * attention,
        norms=layers * 2 * d + d,
        dense_ffn=model.n_dense_layers * dense_ffn,
        shared_experts=moe_layers * shared,
        routed_experts=moe_layers * routed,
        router=moe_layers * router,
        router_bias=moe_layers * bias,
        head=0 if model.tie_word_embeddings else table,
        routed_experts_active=moe_layers * visited,
        head_matrix=table,
        mtp=depth * (mtp_fixed + mtp_ffn),
        mtp_active=depth * (mtp_fixed + mtp_ffn_active),
        mtp_router_bias=depth * bias,
    )


def _attention(model: ModelConfig) -> int:
    """Weights of one attention layer, with the norms on its latents."""
    d, heads = model.hidden_size, model.num_attention_heads
    query, value = model.qk_head_dim, model.value_head_dim
    output = heads * value * d
    if model.attention == "mha":
        return d * heads * query + d * model.num_key_value_heads * (query + value) + output
    latent, rope, query_latent = model.kv_lora_rank, model.qk_rope_head_dim, model.q_lora_rank
    compressed = d * query_latent + query_latent + query_latent * heads * query
    queries = compressed if query_latent else d * heads * query
    keys_values = d * (latent + rope) + latent + latent * heads * (model.qk_nope_head_dim + value)
    return queries + keys_values + output
