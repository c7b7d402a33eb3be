"""The silent progress keeps what a watcher would see."""

from consilience.training.progress import Progress, SilentProgress


def test_it_counts_units_and_keeps_the_last_values():
    progress = SilentProgress()
    watched: Progress = progress
    watched.start("grpo-math", 3, "step")
    watched.advance(loss=2.0, reward=0.1)
    watched.advance(2, loss=1.0)
    watched.finish()
    watched.finish()
    assert (progress.stage, progress.total, progress.unit, progress.done) == ("grpo-math", 3, "step", 3)
    assert progress.info == {"loss": 1.0, "reward": 0.1} and progress.is_finished


def test_a_second_stage_starts_from_nothing():
    progress = SilentProgress()
    progress.start("a", 1, "step")
    progress.advance(x=1)
    progress.finish()
    progress.start("b", None, "rollout")
    assert progress.done == 0 and progress.info == {} and not progress.is_finished
