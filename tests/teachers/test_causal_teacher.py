"""Any causal model of transformers teaches: its states times its head are its own logits."""

import json
from dataclasses import replace

import pytest
import torch
from causal_models import KINDS, TOKENIZER, VOCAB_SIZE, build, write
from safetensors.torch import load_file, save_file
from small_teachers import META, model, phase, samples, side
from small_trainer import GradientKeeper

from consilience.conf.errors import AdmissionError, CheckpointError, EngineError
from consilience.teachers.admission import admit, check_loaded
from consilience.teachers.causal_teacher import CausalTeacher, load_causal_teacher
from consilience.teachers.heads import read_digests, read_head
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import ScoreRequest
from consilience.training.checkpoint import load_checkpoint, save_checkpoint
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)


def draw(*lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilt_logits_are_the_models_own(kind, tmp_path):
    made = build(kind)
    record = TeacherRecord("math", write(tmp_path / kind, made), ("math",))
    teacher = load_causal_teacher(record, batch_tokens=40)
    ids = draw(5, 17, 3, 40, 9)
    positions = [range(len(own)) for own in ids[:-1]] + [(8, 2)]
    head = read_head(record.checkpoint)
    assert torch.equal(head, teacher.head()) and check_loaded(teacher) <= 1e-6
    for own, wanted, states in zip(ids, positions, teacher.score(ids, positions), strict=True):
        with torch.no_grad():
            expected = made(torch.tensor([own])).logits[0, list(wanted)]
        torch.testing.assert_close(states @ head.T, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    found = read_digests(record)
    assert (found.weights, found.head) == (teacher.digest, teacher.head_digest)
    assert (found.dtype, found.width) == (states.dtype, states.shape[1])


def test_states_come_in_the_type_that_the_files_have(tmp_path):
    record = TeacherRecord("math", write(tmp_path / "bf16", build("Llama"), torch.bfloat16), ("math",))
    teacher = load_causal_teacher(record)
    assert teacher.score([[1, 2, 3]], [[0, 1]])[0].dtype == read_digests(record).dtype == torch.bfloat16
    assert teacher.score([], []) == []
    with pytest.raises(ValueError, match="1 samples but positions for 2"):
        teacher.score([[1]], [[0], [0]])


def test_a_sample_longer_than_the_model_has_positions_is_refused():
    with pytest.raises(EngineError, match=r"teacher 'x' has 64 positions .* 65 tokens"):
        CausalTeacher("x", build("GPT2"), "digest").score(draw(65), [[3]])


def test_a_dense_specialist_of_our_own_teaches_too(tmp_path):
    """One whose checkpoint has a card: trained here from a model of transformers."""
    start = write(tmp_path / "start", build("Qwen3"))
    trained, _ = load_checkpoint(start)
    own = tmp_path / "own"
    save_checkpoint(own, trained, start / "tokenizer.json", replace(META, special_tokens={"<eos>": 1}))
    admit(start, own)
    registry = TeacherRegistry([TeacherRecord("math", own, ("math",))])
    teachers = side(registry, tmp_path / "states", load_causal_teacher)
    found = teachers.scheduler.score([ScoreRequest("a", "math", (3, 4, 5), (0, 1))])
    expected = load_causal_teacher(TeacherRecord("start", start, ("math",))).score([(3, 4, 5)], [(0, 1)])[0]
    assert torch.equal(teachers.store.take(found.keys["a"]), expected)


SCALED = {
    "Cohere": ({"logit_scale": 0.25, "num_key_value_heads": 1}, "logit_scale is 0.25"),
    "Granite": ({"logits_scaling": 4.0, "num_key_value_heads": 1}, "logits_scaling is 4.0"),
    "Gemma2": ({"num_key_value_heads": 1, "head_dim": 16}, "final_logit_softcapping is 30.0"),  # its default
}


@pytest.mark.parametrize("kind", SCALED)
def test_logits_behind_the_head_are_refused_by_the_folder_and_by_the_model(kind, tmp_path):
    settings, said = SCALED[kind]
    folder = write(tmp_path / "it", build(kind, **settings))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "final_logit_softcapping"})
    )
    student = write(tmp_path / "student", build("Llama"))
    with pytest.raises(AdmissionError, match=f"teacher 'math': {said} in config.json"):
        admit(student, folder, "math")
    with pytest.raises(AdmissionError, match=f"logits of {kind}ForCausalLM differ by [0-9.]+ from states"):
        load_causal_teacher(TeacherRecord("math", folder, ("math",)))


def test_a_head_with_a_bias_is_refused_with_its_size(tmp_path):
    made = build("Phi", num_key_value_heads=2)
    with torch.no_grad():
        made.lm_head.bias[3] = 0.5
    with pytest.raises(AdmissionError, match=r"the head of PhiForCausalLM has a bias \(to 0.5\)"):
        load_causal_teacher(TeacherRecord("math", write(tmp_path / "it", made), ("math",)))


def test_a_tensor_that_the_files_lack_is_named_and_not_drawn_at_random(tmp_path):
    folder = write(tmp_path / "it", build("Llama"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys model.layers.1.mlp.up_proj.weight"):
        load_causal_teacher(TeacherRecord("math", folder, ("math",)))


def test_a_v4_student_of_16_channels_is_taught_by_a_llama_of_32(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    given = replace(META, special_tokens={"<eos>": 1})
    save_checkpoint(tmp_path / "student", model(), tmp_path / "tokenizer.json", given)
    row = json.loads((tmp_path / "student" / "config.json").read_text())
    ends = {key: row.get(key) for key in ("bos_token_id", "eos_token_id")}
    made = build("Llama", **ends)
    folder = write(tmp_path / "llama", made)
    admit(tmp_path / "student", folder, "math")

    teachers = side(
        TeacherRegistry([TeacherRecord("math", folder, ("math",))]), tmp_path / "states", load_causal_teacher
    )
    engine, records = TorchEngine(model(), OptimizerSettings(lr=0.01)), samples(0, ["math"] * 4)
    kl = [phase(engine, records, teachers)["kl"]["math"] for _ in range(4)]
    total = []
    for r in records:
        ids = torch.tensor([r.prompt_ids + r.token_ids])
        with torch.no_grad():
            student = model()
            p = torch.log_softmax(student.head(student.hidden(ids))[0].double(), -1)
            q = torch.log_softmax(made(ids).logits[0].double(), -1)
        total += (p.exp() * (p - q)).sum(-1)[2:-1].tolist()
    first = phase(GradientKeeper(model()), records, teachers, mini_batches=1)["kl"]["math"]
    assert first == pytest.approx(sum(total) / len(total), rel=1e-4)
    assert kl[-1] < 0.9 * first
