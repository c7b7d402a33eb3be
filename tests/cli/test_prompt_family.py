"""The checkpoint family of prompts: told by the released folder, handed down to all trained from it."""

from dataclasses import replace

import pytest
import torch
from synthetic_release import RELEASED, write_official

from consilience.cli.evaluate import run_evaluate
from consilience.cli.main import main
from consilience.cli.prompt_family import prompt_family
from consilience.cli.ray_session import close_session
from consilience.cli.stage import StageContext
from consilience.cli.supervised_stages import run_sft
from consilience.conf.errors import CheckpointError, ConfigError
from consilience.conf.load import from_plain
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.tasks.fake_domain import FakeDomain
from consilience.training.checkpoint import load_checkpoint, read_meta
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder

torch.set_num_threads(1)

CONSTANT = {"preview": "REASONING_EFFORT_MAX = ''\n", "official": "REASONING_EFFORT_PROMPTS = {}\n"}
NARROW = replace(
    RELEASED,
    vocab_size=byte_tokenizer().padded_vocab_size(16),
    hidden_size=128,
    num_hidden_layers=2,
    compress_ratios=(0, 4),
    num_nextn_predict_layers=0,
    mtp_compress_ratios=(),
)


@pytest.fixture
def released(tmp_path):
    """A released checkpoint of the preview family with a tokenizer."""
    folder = write_official(tmp_path / "released", NARROW)
    byte_tokenizer().save(folder / "tokenizer.json")
    return tell(folder, "preview")


def tell(folder, family):
    (folder / "encoding").mkdir(exist_ok=True)
    (folder / "encoding" / "encoding_dsv4.py").write_text(CONSTANT[family])
    return folder


def config(**groups):
    task = {"domains": {"math": {"kind": "mathematics"}}, **groups.pop("task", {})}
    rest = {"log": {"wandb": "disabled"}, "engine": {"threads": 1, "device": "cpu"}}
    return from_plain({"task": task, **rest, **groups})


def context(root, name, domain=None, **groups):
    run = RunFolder(root)
    folder = run.stage(name.replace("/", "-")).create()
    return StageContext(name, domain, config(**groups), folder, run, {}, SilentProgress())


@pytest.mark.parametrize("family", ["preview", "official"])
def test_a_released_checkpoint_says_it_itself(released, family):
    tell(released, family)
    _, meta = load_checkpoint(released)
    assert meta.family is None and prompt_family(config(), released, meta) == family
    assert prompt_family(config(task={"family": family}), released, meta) == family


def test_what_the_settings_say_is_never_put_over_what_the_checkpoint_says(released):
    _, meta = load_checkpoint(released)
    with pytest.raises(ConfigError, match=r"task\.family is official, but .* is of the preview family"):
        prompt_family(config(task={"family": "official"}), released, meta)


def test_a_checkpoint_without_an_encoder_needs_to_be_told(released):
    (released / "encoding" / "encoding_dsv4.py").unlink()
    (released / "encoding").rmdir()
    _, meta = load_checkpoint(released)
    with pytest.raises(CheckpointError, match=r"task\.family=preview or task\.family=official"):
        prompt_family(config(), released, meta)
    assert prompt_family(config(task={"family": "preview"}), released, meta) == "preview"


def test_random_weights_are_of_the_official_family_unless_another_is_named(tmp_path):
    assert prompt_family(config(), tmp_path, None) == "official"
    assert prompt_family(config(task={"family": "preview"}), tmp_path, None) == "preview"


def test_an_effort_that_the_family_lacks_is_refused_before_anything_is_sampled(released):
    _, meta = load_checkpoint(released)
    low = FakeDomain("letters")
    low.effort = "low"
    with pytest.raises(ConfigError, match=r"task\.domains\.letters\.effort is low, .*chat, think, high, max"):
        prompt_family(config(), released, meta, [FakeDomain(), low])
    assert prompt_family(config(), tell(released, "official"), meta, [low]) == "official"


def test_what_is_trained_from_a_checkpoint_keeps_its_family(released, tmp_path):
    settings = {"steps": 1, "tokens_per_step": 150, "row_tokens": 128, "num_examples": 2, "warmup": 1}
    given = context(tmp_path / "run", "sft/math", "math", sft={**settings, "init": str(released)})
    result = run_sft(given)
    folder = tmp_path / "run" / result["checkpoint"]
    assert result["family"] == read_meta(folder).family == "preview"
    assert prompt_family(config(), folder, read_meta(folder)) == "preview"


def test_a_converted_checkpoint_keeps_its_family(released, tmp_path):
    words = [f"source={released}", f"target={tmp_path / 'native'}", "layout=native", "log.progress=off"]
    assert main(["convert", *words]) == 0
    assert read_meta(tmp_path / "native").family == "preview"
    again = [f"source={tmp_path / 'native'}", f"target={tmp_path / 'again'}", "layout=native"]
    assert main(["convert", *again, "log.progress=off"]) == 0
    assert read_meta(tmp_path / "again").family == "preview"


def test_evaluation_asks_a_released_checkpoint_in_its_own_family(released, tmp_path):
    settings = {"checkpoint": str(released), "num_problems": 1, "greedy_problems": 0}
    task = {"domains": {"math": {"kind": "mathematics", "effort": "max", "max_tokens": 4}}}
    rollout = {"num_workers": 1, "max_batch": 2}
    try:
        result = run_evaluate(context(tmp_path, "evaluate", task=task, evaluate=settings, rollout=rollout))
    finally:
        close_session()
    assert result["families"] == {"checkpoint": "preview"}
    # prefix A is 476 bytes and prefix B 528, one token each; question and answer take about 30
    found = {check["name"]: check["value"] for check in result["checks"]}
    assert 476 < found["longest episode minus 255 tokens"] + 255 < 528
