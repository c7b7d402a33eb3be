"""Parameters that vLLM's reload loses: corrected where it is the sinks, found out where nobody knows of them.

One engine at a time: each test closes its own.
"""

import lossy_qwen as lossy
import numpy as np
import pytest
from tiny_qwen import MAX_MISMATCH, PROBES, build_engine, other_weights, rewrite_checkpoint, write_checkpoint

from consilience.conf.errors import ConfigError, EngineError
from consilience.model.digest import weights_digest
from consilience.rollout.vllm_reference import reference_of


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return folder, write_checkpoint(folder)


@pytest.fixture
def opened():
    """A list of engines that are closed behind the test."""
    engines = []
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture
def build(plain, tmp_path, opened):
    """(engine, its first weights, others, their reference) of one of the two models."""

    def build(extra):
        folder, weights = plain
        architecture = next(name for name, cls in lossy.MODELS.items() if cls.extra == extra)
        first, other = (lossy.with_extra(weights, extra, seed) for seed in (1, 2))
        lossy_folder = rewrite_checkpoint(folder, tmp_path / "lossy", architecture, first)
        reference = reference_of(folder)
        scored = lambda weights, sequences: reference(lossy.folded(weights), sequences)
        opened.append(build_engine(lossy_folder, scored))
        return opened[0], first, other, scored

    return build


def test_sinks_that_the_reload_puts_back_are_copied_and_the_proof_would_have_seen_them(build):
    engine, first, other, reference = build("attn_sink")
    engine.publish(first, weights_digest(first), 1)
    engine.publish(other, weights_digest(other), 2)  # equal but for the sinks
    (_, update) = engine.mismatches
    assert update.mean < MAX_MISMATCH and update.moved > 0.1
    assert "model.layers.*.self_attn.attn_sink" in {proof.kind for proof in engine.prove(other)}

    # What vLLM does alone: it reports no error, and samples with the sinks of before.
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(first.items())})
    engine._llm.reset_prefix_cache()
    off = np.concatenate(engine.score(PROBES)) - np.concatenate(reference(first, PROBES))
    assert np.abs(off).mean() > 0.1


def test_a_tensor_that_the_reload_drops_without_a_word_fails_the_update(build):
    engine, first, other, _ = build("gain")
    with pytest.raises(EngineError, match="nats off on average"):
        engine.publish(first, weights_digest(first), 1)  # as in the checkpoint, and lost all the same
        engine.publish(other, weights_digest(other), 2)
    with pytest.raises(EngineError, match="nats off"):
        engine.step()


def test_an_engine_whose_weights_did_not_arrive_samples_nothing_more(plain, opened):
    folder, weights = plain
    reference = reference_of(folder)
    engine = build_engine(folder, lambda given, probes: reference(other_weights(given, 1), probes))
    opened.append(engine)
    with pytest.raises(EngineError, match="nats off on average"):
        engine.publish(weights, weights_digest(weights), 1)
    for what in (engine.step, lambda: engine.publish(weights, weights_digest(weights), 2)):
        with pytest.raises(EngineError, match="nats off on average"):
            what()


def test_settings_that_change_what_is_sampled_never_reach_vllm(plain):
    with pytest.raises(ConfigError, match="processed_logprobs"):
        build_engine(plain[0], settings={"logprobs_mode": "raw_logprobs"})
