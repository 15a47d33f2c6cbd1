"""The DeepSeek family in float64 NumPy, one sequence at a time, written from sections 3-7 and 27 of the specification.

Weights are given under the published checkpoints' names, matrices [out, in]. Nothing here imports the code under test;
``cfg`` is any object with the published configuration's fields.
"""

import math

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(x, p):
    return (silu(x @ p["gate_proj"].T) * (x @ p["up_proj"].T)) @ p["down_proj"].T


def yarn_frequencies(dim, base, s, original, beta_fast, beta_slow):
    theta = np.array([base ** (-2 * k / dim) for k in range(dim // 2)])
    if s == 1:
        return theta

    def corr(n):
        return dim * math.log(original / (2 * math.pi * n)) / (2 * math.log(base))

    low, high = max(math.floor(corr(beta_fast)), 0), min(math.ceil(corr(beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    ramp = np.array([min(max((k - low) / (high - low), 0), 1) for k in range(dim // 2)])
    return theta / s * ramp + theta * (1 - ramp)


def mscale(s, m):
    return 1.0 if s <= 1 else 0.1 * m * math.log(s) + 1.0


def rope_adjacent(x, positions, theta):
    """Adjacent channels as complex numbers, turned; x is [T, heads, dim]."""
    z = x[..., 0::2] + 1j * x[..., 1::2]
    z = z * np.exp(1j * positions[:, None, None] * theta)
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = z.real, z.imag
    return out


def rope_halves(x, positions, theta):
    """Rotate-half form: channel i with channel i + dim/2."""
    angle = np.concatenate([theta, theta]) * positions[:, None, None]
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * np.cos(angle) + turned * np.sin(angle)


def _rope(x, positions, cfg):
    sc = cfg.rope_scaling
    theta = yarn_frequencies(
        x.shape[-1], cfg.rope_theta, sc.factor, sc.original_max_position_embeddings, sc.beta_fast, sc.beta_slow
    )
    gain = mscale(sc.factor, sc.mscale) / mscale(sc.factor, sc.mscale_all_dim)
    return gain * (rope_adjacent if cfg.rope_interleave else rope_halves)(x, positions, theta)


def _attend(q, k, v, scale):
    """q [T, H, dq], k [T, H, dq], v [T, H, dv]."""
    T = q.shape[0]
    s = np.einsum("thd,shd->hts", q, k) * scale
    s = np.where(np.tril(np.ones((T, T), bool)), s, -np.inf)
    return np.einsum("hts,shd->thd", softmax(s), v).reshape(T, -1)


def mla(x, positions, p, cfg):
    T, H = x.shape[0], cfg.num_attention_heads
    dn, dr, dv, dc = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.kv_lora_rank
    if cfg.q_lora_rank:
        q = rms_norm(x @ p["q_a_proj"].T, p["q_a_layernorm"], 1e-6) @ p["q_b_proj"].T
    else:
        q = x @ p["q_proj"].T
    q = q.reshape(T, H, dn + dr)
    kv = x @ p["kv_a_proj_with_mqa"].T
    c, k_rope = kv[:, :dc], kv[:, dc:]
    kvu = (rms_norm(c, p["kv_a_layernorm"], 1e-6) @ p["kv_b_proj"].T).reshape(T, H, dn + dv)
    q = np.concatenate([q[..., :dn], _rope(q[..., dn:], positions, cfg)], axis=-1)
    k_rope = np.repeat(_rope(k_rope[:, None, :], positions, cfg), H, axis=1)
    k = np.concatenate([kvu[..., :dn], k_rope], axis=-1)
    scale = (dn + dr) ** -0.5 * mscale(cfg.rope_scaling.factor, cfg.rope_scaling.mscale_all_dim) ** 2
    return _attend(q, k, kvu[..., dn:], scale) @ p["o_proj"].T


def mha(x, positions, p, cfg):
    T, H, J, d = x.shape[0], cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    q = _rope((x @ p["q_proj"].T).reshape(T, H, d), positions, cfg)
    k = _rope((x @ p["k_proj"].T).reshape(T, J, d), positions, cfg)
    v = (x @ p["v_proj"].T).reshape(T, J, d)
    k, v = np.repeat(k, H // J, axis=1), np.repeat(v, H // J, axis=1)
    scale = d**-0.5 * mscale(cfg.rope_scaling.factor, cfg.rope_scaling.mscale_all_dim) ** 2
    return _attend(q, k, v, scale) @ p["o_proj"].T


def gate_scores(u, weight, cfg):
    logits = u @ weight.T
    return 1 / (1 + np.exp(-logits)) if cfg.scoring_func == "sigmoid" else softmax(logits)


def choose(s, bias, cfg):
    """Experts of one token in order, and the smallest gap between a kept and a left-out score."""
    selection = s if bias is None else s + bias
    margin = np.inf
    if cfg.n_group > 1:
        groups = selection.reshape(cfg.n_group, -1)
        ranked = np.sort(groups, axis=1)[:, ::-1]
        group_scores = ranked[:, 0] if bias is None else ranked[:, 0] + ranked[:, 1]
        order = sorted(range(cfg.n_group), key=lambda g: -group_scores[g])
        kept = order[: cfg.topk_group]
        if cfg.topk_group < cfg.n_group:
            margin = group_scores[kept[-1]] - group_scores[order[cfg.topk_group]]
        allowed = [i for i in range(s.size) if i // (s.size // cfg.n_group) in kept]
    else:
        allowed = list(range(s.size))
    allowed.sort(key=lambda i: -selection[i])
    K = cfg.num_experts_per_tok
    if len(allowed) > K:
        margin = min(margin, selection[allowed[K - 1]] - selection[allowed[K]])
    return allowed[:K], margin


def gate_values(s, experts, cfg):
    w = s[experts]
    if cfg.norm_topk_prob:
        w = w / (w.sum() + 1e-20)
    return w * cfg.routed_scaling_factor


def moe(u, p, cfg, trace=None):
    """Every token through its experts, one by one. ``trace`` collects (experts, scores, margin) a token."""
    s = gate_scores(u, p["gate"], cfg)
    bias = p.get("e_score_correction_bias")
    out = np.zeros_like(u)
    for t in range(u.shape[0]):
        experts, margin = choose(s[t], bias, cfg)
        if trace is not None:
            trace.append((experts, s[t], margin))
        for e, g in zip(experts, gate_values(s[t], experts, cfg), strict=True):
            out[t] += g * swiglu(u[t], p["experts"][e])
    return out + swiglu(u, p["shared_experts"]) if cfg.n_shared_experts else out


def block(h, positions, p, cfg, trace=None):
    attention = mla if cfg.attention == "mla" else mha
    h = h + attention(rms_norm(h, p["input_layernorm"], cfg.rms_norm_eps), positions, p["self_attn"], cfg)
    u = rms_norm(h, p["post_attention_layernorm"], cfg.rms_norm_eps)
    return h + (moe(u, p["mlp"], cfg, trace) if "gate" in p["mlp"] else swiglu(u, p["mlp"]))


def trunk(tokens, p, cfg, traces):
    """Hidden states before the final norm. ``traces`` gets one list a mixture-of-experts layer."""
    h, positions = p["embed_tokens"][tokens], np.arange(len(tokens))
    for layer in p["layers"]:
        trace = []
        h = block(h, positions, layer, cfg, trace)
        if trace:
            traces.append(trace)
    return h


def forward(tokens, p, cfg):
    """Logits of the main head for one row of T + 1 tokens (the last is not read), those of each MTP depth, and traces.

    Depth k has T - k + 1 positions; the last has no label in the row.
    """
    traces = []
    hidden = trunk(tokens[:-1], p, cfg, traces)
    normed = rms_norm(hidden, p["norm"], cfg.rms_norm_eps)
    main = normed @ p["lm_head"].T
    below = normed if cfg.mtp_hidden == "post_norm" else hidden
    ahead = []
    for k, module in enumerate(p["mtp"], start=1):
        positions = np.arange(len(tokens) - k)
        e = rms_norm(p["embed_tokens"][tokens[k:]], module["enorm"], cfg.rms_norm_eps)
        h = rms_norm(below[: len(positions)], module["hnorm"], cfg.rms_norm_eps)
        pair = [e, h] if cfg.mtp_concat == "embedding_first" else [h, e]
        trace = []
        raw = block(np.concatenate(pair, axis=-1) @ module["eh_proj"].T, positions, module["block"], cfg, trace)
        if trace:
            traces.append(trace)
        out = rms_norm(raw, module["shared_head.norm"], cfg.rms_norm_eps)
        below = out if cfg.mtp_hidden == "post_norm" else raw
        ahead.append(out @ p["lm_head"].T)
    return main, ahead, traces


def nats(logits, labels):
    """``-log softmax(logits)[label]`` a row."""
    top = logits.max(axis=-1)
    normalizer = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
    return normalizer - logits[np.arange(len(labels)), labels]


def sequence_balance(scores, chosen, k):
    """``sum_i f_i P_i`` of one sequence (V3 eqs 17-20): scores [T, N], chosen the counted experts a token."""
    T, N = scores.shape
    f = np.array([N / (k * T) * sum(i in row for row in chosen) for i in range(N)])
    P = (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)
    return float(f @ P)
