"""Settings of the smallest model and the shortest training of a stage of the program, for its tests."""

MODEL = {
    "preset": "tiny",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "compress_ratios": [0, 4],
    "n_routed_experts": 4,
    "moe_intermediate_size": 8,
}
SHORT = {"steps": 2, "tokens_per_step": 300, "row_tokens": 128, "num_examples": 6, "warmup": 1}
