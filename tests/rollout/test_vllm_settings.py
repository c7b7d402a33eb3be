import numpy as np
import pytest

from consilience.conf.errors import ConfigError
from consilience.rollout.vllm_settings import ALLOWED, REFUSED, V4, check_settings, seed_at, whole_prompts


def test_what_changes_the_sampled_distribution_is_refused_by_name_and_reason():
    for name, why in REFUSED.items():
        with pytest.raises(ConfigError, match=f"settings.{name} is refused: {why[:20]}"):
            check_settings({name: 1}, "Qwen3ForCausalLM", True)
    with pytest.raises(ConfigError, match="did you mean 'enforce_eager'"):
        check_settings({"enforce_eagre": True}, "Qwen3ForCausalLM", True)
    assert not set(ALLOWED) & set(REFUSED)
    check_settings({"enforce_eager": True, "dtype": "float32"}, "Qwen3ForCausalLM", True)


def test_v4_needs_a_gpu_and_an_fp8_cache():
    for settings, is_cpu, why in (
        ({"kv_cache_dtype": "fp8"}, True, "CPU build cannot serve"),
        ({}, False, "fp8"),
    ):
        with pytest.raises(ConfigError, match=why):
            check_settings(settings, V4, is_cpu)
    check_settings({"kv_cache_dtype": "fp8", "enable_sleep_mode": True}, V4, False)
    with pytest.raises(ConfigError, match="has none"):
        check_settings({"enable_sleep_mode": True}, "Qwen3ForCausalLM", True)


def test_a_cpu_prefills_whole_prompts_in_steps_that_hold_the_longest_and_all_rows():
    with pytest.raises(ConfigError, match="in two parts"):
        check_settings({"enable_chunked_prefill": True}, "Qwen3ForCausalLM", True)
    check_settings({"enable_chunked_prefill": True, "kv_cache_dtype": "fp8"}, V4, False)
    for sizes, wanted in (((8, 256), 4096), ((8, 9000), 9000), ((5000, 256), 5000)):
        assert whole_prompts(*sizes) == {"enable_chunked_prefill": False, "max_num_batched_tokens": wanted}


def test_a_request_that_goes_on_draws_other_numbers_than_its_prefix_did():
    seeds = {seed_at(seed, position) for seed in range(50) for position in range(50)}
    assert len(seeds) == 2500 and all(0 <= s < 2**63 for s in seeds)
    assert seed_at(3, 7) == seed_at(3, 7)
    # the bits are even: each of the 63 is set in about half, four standard deviations of 2,500 coins
    bits = np.array([[s >> b & 1 for b in range(63)] for s in seeds]).mean(0)
    assert abs(bits - 0.5).max() < 4 * 0.5 / 50
