"""The trainer's side of a vLLM teacher, against a process that only answers; vLLM itself: with_vllm/."""

import stat
import sys
import textwrap

import pytest
import torch
from causal_models import build

from consilience.conf.errors import AdmissionError, CheckpointError, ConfigError, EngineError
from consilience.teachers.causal_teacher import CausalTeacher
from consilience.teachers.registry import TeacherRecord
from consilience.teachers.vllm_teacher import Reference, VllmLoader, VllmTeacher, check_settings, final_norm

WIDTH, VOCAB_SIZE = 4, 9
HEAD = torch.randn(VOCAB_SIZE, WIDTH, generator=torch.Generator().manual_seed(0))
GOOD = """
    say({})
    for number, line in enumerate(sys.stdin):
        files = []
        for row, ids in enumerate(json.load(open(line.strip()))):
            files.append(f"{states}/{number}-{row}.safetensors")
            hidden = np.tile(np.array(ids, dtype=np.float32)[:, None, None], (1, 1, 4))
            save_file({"hidden_states": np.float32(FACTOR) * hidden}, files[-1])
        say({"files": files})
"""


def program(folder, body):
    """An executable that stands for an interpreter and does `body`."""
    head = f"""#!{sys.executable}
import json, os, sys, time
import numpy as np
from safetensors.numpy import save_file
FACTOR = 1.0
states = json.loads(sys.argv[-1])["states"]
def say(answer): print(json.dumps(answer), flush=True)
"""
    path = folder / "python"
    path.write_text(head + textwrap.dedent(body))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def reference():
    probes = [[1, 2, 3], [4]]
    states = [torch.tensor(ids, dtype=torch.float32)[:, None].expand(-1, WIDTH) for ids in probes]
    return Reference(probes, states, 1e-6, torch.nn.Identity(), 2, 64, "digest", HEAD)


def teacher(folder, body, **how):
    record = TeacherRecord("math", folder, ("math",))
    given = {"max_length": 10, "start_s": 60.0, "batch_s": 60.0, **how}
    return VllmTeacher(record, reference(), python=program(folder, body), **given)


def test_states_come_back_in_order_and_files_and_process_go(tmp_path):
    made = teacher(tmp_path, GOOD)
    assert made.check() == 0.0
    first, second = made.score([[5, 6, 7], [8]], [(2, 0), (0,)])
    assert first[:, 0].tolist() == [7, 5] and second[:, 0].tolist() == [8]
    assert torch.equal(made.head(), HEAD) and made.score([], []) == []
    assert not list(made._states.glob("*.safetensors"))
    process, states = made._process, made._states
    made.close()
    assert process.poll() is not None and not states.exists()


def test_states_that_differ_from_the_reference_are_refused_with_numbers(tmp_path):
    made = teacher(tmp_path, GOOD.replace("FACTOR", "1.01"))
    with pytest.raises(AdmissionError, match=r"differ by [0-9.e-]+ nats, at most 1e-06 .* states by 0.01 of"):
        made.check()


def test_states_that_are_no_numbers_are_refused(tmp_path):
    made = teacher(tmp_path, GOOD.replace("FACTOR", "'nan'"))
    with pytest.raises(AdmissionError, match="differ by nan nats"):
        made.check()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('sys.exit("no vllm here")', "its vLLM ended: no vllm here"),
        ("time.sleep(60)", "its vLLM has said nothing for 0 s: it printed nothing"),
        ('say({"error": "ValueError: no such model"})', "vLLM cannot score it: ValueError: no such model"),
    ],
)
def test_a_process_that_does_not_come_up_is_one_clear_error(tmp_path, body, message):
    with pytest.raises(EngineError, match=f"teacher 'math'.*{message}"):
        teacher(tmp_path, body, start_s=0.3 if "sleep" in body else 60.0)


def test_a_process_that_dies_while_it_scores_is_one_clear_error(tmp_path):
    made = teacher(tmp_path, "say({})\nsys.stdin.readline()\nos.abort()\n")
    with pytest.raises(EngineError, match="teacher 'math': its vLLM ended"):
        made.score([[1, 2]], [[0]])
    with pytest.raises(EngineError, match="a sample has 11 tokens, vLLM takes 10, by"):
        made.score([[1] * 11], [[0]])


def test_a_setting_that_would_change_what_is_computed_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match=r"teachers.settings.quantization is no argument .* did you mean"):
        VllmLoader(max_length=10, settings={"quantization": "fp8"})
    check_settings({"tensor_parallel_size": 2})


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX", "GPT2", "Qwen3"])
def test_the_final_norm_is_what_the_head_is_given(kind):
    made = build(kind)
    norm = final_norm(CausalTeacher("math", made, "digest"))
    assert norm is made.base_model.get_submodule(
        {"GPTNeoX": "final_layer_norm", "GPT2": "ln_f"}.get(kind, "norm")
    )


def test_a_model_that_does_not_end_in_a_norm_is_refused(tmp_path):
    made = build("Llama")
    made.base_model.norm = torch.nn.Identity()

    class Doubled(CausalTeacher):
        def _forward(self, token_ids):
            return 2 * super()._forward(token_ids)

    with pytest.raises(CheckpointError, match="LlamaModel does not end in a norm"):
        final_norm(Doubled("math", made, "digest"))
