"""Settings of models that were adopted from a Transformer, for tests of invariants."""

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ADOPTED = [
    {"num_key_value_heads": 1, "head_dim": 20},
    {"num_sinks": 3},
    {"num_sinks": 3, "rope_theta": 10000.0, "num_key_value_heads": 1, "num_prelude_layers": 0},
    {"qkv_bias": True, "qk_norm": True, "conv_size": None, "conv_silu": False},
    {"window_output": "full", "rope_theta": 10000.0, "rope_scaling": YARN, "conv_silu": False},
    {
        "branches": "window",
        "num_prelude_layers": 0,
        "num_sinks": 2,
        "head_dim": 20,
        "num_key_value_heads": 1,
        "qkv_bias": True,
        "rope_theta": 10000.0,
        "rope_scaling": LLAMA3,
    },
    {"branches": "linear", "num_key_value_heads": 1, "conv_size": None, "qk_norm": True},
]
