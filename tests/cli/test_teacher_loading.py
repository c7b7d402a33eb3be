"""What is loaded as a teacher follows from its folder, and from the engine that was asked for."""

import pytest
import torch
from causal_models import build, write
from small_teachers import registry_of

from consilience.cli.teacher_loading import ByFolder, teacher_loader
from consilience.conf.errors import ConfigError, EngineError
from consilience.conf.load import compose
from consilience.teachers.causal_teacher import CausalTeacher
from consilience.teachers.model_teacher import ModelTeacher
from consilience.teachers.registry import TeacherRecord

torch.set_num_threads(1)


def test_each_folder_is_scored_by_the_forward_of_its_model(tmp_path):
    (own,) = registry_of(tmp_path, {"math": 1})
    other = TeacherRecord("code", write(tmp_path / "llama", build("Llama")), ("code",))
    load = teacher_loader(compose(["engine.device=cpu"])).load
    assert isinstance(load(own), ModelTeacher) and isinstance(load(other), CausalTeacher)
    told = []
    mine, theirs = Told("own", told), Told("other", told)
    chosen = ByFolder(mine, theirs)
    chosen.announce(own)
    chosen.announce(other)
    assert [chosen.load(own), chosen.load(other)] == ["own math", "other code"]
    chosen.stop()
    assert told == ["own math", "other code", "own stops", "other stops"]


class Told:
    """A `TeacherLoader` that notes what is announced to it."""

    def __init__(self, name, told):
        self.name, self.told = name, told

    def load(self, record):
        return f"{self.name} {record.name}"

    def announce(self, record):
        self.told.append(self.load(record))

    def stop(self):
        self.told.append(f"{self.name} stops")


def test_vllm_scores_other_models_where_it_is_asked_for_and_v4_stays_with_our_own_forward(tmp_path):
    nothing = tmp_path / "python"  # an interpreter that ends at once
    nothing.write_text("#!/bin/sh\necho no vllm here >&2\n")
    nothing.chmod(0o755)
    cfg = compose(
        ["teachers.engine=vllm", f"rollout.vllm.python={nothing}", "teachers.settings.block_size=16"]
    )
    load = teacher_loader(cfg).load
    (own,) = registry_of(tmp_path, {"math": 1})
    assert isinstance(load(own), ModelTeacher)
    other = TeacherRecord("code", write(tmp_path / "llama", build("Llama")), ("code",))
    with pytest.raises(EngineError, match="teacher 'code': its vLLM ended: no vllm here"):
        load(other)
    with pytest.raises(ConfigError, match=r"teachers\.settings\.dtype is no argument"):
        teacher_loader(compose(["teachers.engine=vllm", "teachers.settings.dtype=float16"]))
