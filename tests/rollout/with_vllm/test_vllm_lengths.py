"""Lengths after many deaths of a real vLLM, whose tokens are others than undisturbed once it goes on.

Going on from the log leaves the law of lengths as it was; starting unfinished samples again from their prompt
does not, and the same test on as many samples sees it. `make chaos-vllm` takes 5,000 samples.
"""

import os
import random

import pytest
from test_lengths import ks_p_value
from tiny_qwen import write_checkpoint
from vllm_lives import MEAN_TOKENS, MOST_TOKENS, anew, jobs, lengths

NUM = int(os.environ.get("CHAOS_SAMPLES", 400))
LIFE = 20  # mean steps between two deaths: less than a sample's mean length
pytestmark = pytest.mark.timeout(300 + NUM // 2)


def test_going_on_from_the_log_keeps_the_law_of_lengths_and_starting_again_does_not(tmp_path):
    checkpoint = tmp_path / "qwen"
    write_checkpoint(checkpoint)
    undisturbed, _ = lengths(checkpoint, tmp_path / "whole", jobs(NUM, 0), None, life=None)
    resumed, num_deaths = lengths(checkpoint, tmp_path / "log", jobs(NUM, 10**6), random.Random(1), life=LIFE)
    restarted, num_restarts = lengths(
        checkpoint, tmp_path / "none", jobs(NUM, 2 * 10**6), random.Random(1), life=LIFE, renew=anew
    )
    going_on, again = ks_p_value(resumed, undisturbed), ks_p_value(restarted, undisturbed)
    means = [sum(found) / NUM for found in (undisturbed, resumed, restarted)]
    print(
        f"\n{NUM} samples, mean length {means[0]:.2f} undisturbed; {num_deaths} deaths: {means[1]:.2f}, "
        f"p = {going_on:.3g}; {num_restarts} deaths, started again: {means[2]:.2f}, p = {again:.3g}"
    )
    assert num_deaths >= 3 and num_restarts >= 3
    assert means[0] == pytest.approx(MEAN_TOKENS, rel=0.15) and max(undisturbed) == MOST_TOKENS
    assert going_on > 1e-3
    assert again < 1e-6
    assert means[2] < 0.9 * means[0] < means[1]
