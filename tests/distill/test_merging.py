"""Two toy teachers, one student: distillation beats the average of their weights (notes 13, D18c)."""

from dataclasses import replace

import pytest
import torch
from small_teachers import META, model, phase, record, side
from small_trainer import CONFIG

from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.training.checkpoint import save_checkpoint
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)

LENGTH, VOCABULARY = 10, CONFIG.vocab_size
RULES = {"add": (4, lambda x: 6 + (x - 6 + 5) % 30), "mirror": (5, lambda x: 6 + (x - 6) * 7 % 30)}
"""Domain -> (the token that names it, the next token as a function of the last)."""


def prompts(domain, num, seed):
    """[num, 3]: the domain's token, filler, a first token of 6 … 35."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(6, 36, (num, 1), generator=generator)
    return torch.cat([torch.full((num, 1), RULES[domain][0]), torch.full((num, 1), 2), first], 1)


def solved(domain, num, seed):
    ids = prompts(domain, num, seed)
    for _ in range(LENGTH):
        ids = torch.cat([ids, RULES[domain][1](ids[:, -1:])], 1)
    return ids


def score(student, domain):
    """Share of next tokens that the student finds likeliest on the domain's held-out texts."""
    ids = solved(domain, 64, 1000)
    with torch.no_grad():
        found = student.head(student.hidden(ids[:, :-1])).argmax(-1)
    return float((found[:, 2:] == ids[:, 3:]).float().mean())


def teach(domain, steps):
    """A specialist from the common start, by supervised training on its domain."""
    specialist = model()
    engine = TorchEngine(specialist, OptimizerSettings(lr=0.01, weight_decay=0.0))

    def loss_fn(student, ids):
        logits = student.head(student.hidden(ids[:, :-1])[:, 2:])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 3:].flatten())
        return loss, {}

    for step in range(steps):
        engine.forward_backward(loss_fn, [solved(domain, 32, step)], {})
        engine.step(1.0)
    return specialist


@torch.no_grad()
def sample(student, domain, num, seed):
    """Records of what the student itself goes on with."""
    generator = torch.Generator().manual_seed(seed)
    ids = prompts(domain, num, seed)
    for _ in range(LENGTH):
        logits = student.head(student.hidden(ids)[:, -1])
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return [
        record(f"{domain}/{seed}/{i}", domain, row[3:], prompt_ids=tuple(row[:3]))
        for i, row in enumerate(ids.tolist())
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_student_of_two_teachers_beats_the_average_of_their_weights(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    specialists = {domain: teach(domain, 150) for domain in RULES}
    for domain, specialist in specialists.items():
        assert score(specialist, domain) > 0.9, domain
        save_checkpoint(
            tmp_path / domain, specialist, tmp_path / "tokenizer.json", replace(META, domain=domain)
        )
    average = model()
    states = [specialist.state_dict() for specialist in specialists.values()]
    average.load_state_dict(
        {n: ((states[0][n] + states[1][n]) / 2).to(v.dtype) for n, v in average.state_dict().items()}
    )
    registry = TeacherRegistry([TeacherRecord(domain, tmp_path / domain, (domain,)) for domain in RULES])
    teachers, student = side(registry, tmp_path / "states"), model()
    engine = TorchEngine(student, OptimizerSettings(lr=0.01, weight_decay=0.0))
    for step in range(60):
        records = [r for domain in RULES for r in sample(student, domain, 24, step)]
        phase(engine, records, teachers, step=5, mini_batches=2, warmup=0)
    kept, averaged = ({d: score(m, d) for d in RULES} for m in (student, average))
    print("student", kept, "average of weights", averaged)
    for domain in RULES:
        assert kept[domain] > averaged[domain] + 0.1, (domain, kept, averaged)
