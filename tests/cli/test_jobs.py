"""Jobs from problems: unique uids, seeds that depend on run and uid alone, tools as declared."""

from dataclasses import dataclass

from consilience.cli.jobs import rollout_jobs, seed_of
from consilience.rollout.tools import tool_schemas
from consilience.tasks.domain import Problem
from consilience.tasks.fake_domain import FakeDomain


@dataclass
class Boxed:
    """A domain whose verifier and episodes need a box."""

    name: str = "agent"
    effort: str = "think"
    reward: str = "consilience.rewards.exact_match:score"
    max_turns: int = 6
    max_tokens: int = 160
    needs_sandbox: bool = True

    def problems(self, split, num, *, start=0):
        return [self.problem(i) for i in range(start, start + num)]

    def problem(self, i, tools=("read", "write")):
        foreign = {"type": "function", "function": {"name": "browse", "parameters": {}}}
        system = {"role": "system", "content": "look", "tools": [*tool_schemas(tools), foreign]}
        user = {"role": "user", "content": f"question {i}"}
        return Problem(f"p{i}", "agent", (system, user), {"answer": str(i)}, files={"a": "b"})


def jobs(domain=None, *, num=3, prefix="grpo-x/0", samples=4, run_seed=1, **more):
    domain = domain or FakeDomain()
    return rollout_jobs(
        domain,
        domain.problems("train", num),
        prefix=prefix,
        samples=samples,
        temperature=0.7,
        run_seed=run_seed,
        **more,
    )


def test_a_problem_becomes_a_group_of_jobs_with_unique_uids():
    made = jobs() + jobs(prefix="grpo-x/1")
    assert len({job.uid for job in made}) == len(made) == 24
    assert [job.uid for job in made[:5]] == [f"grpo-x/0/0/{i}" for i in range(4)] + ["grpo-x/0/1/0"]
    assert {job.group for job in made[:4]} == {"grpo-x/0/0"} and made[4].group == "grpo-x/0/1"
    assert len({job.messages[0]["content"] for job in made[:12]}) == 3


def test_seeds_are_a_function_of_run_seed_and_uid_alone():
    few, many = jobs(num=2, samples=2), jobs(num=3, samples=4)
    by_uid = {job.uid: job.sampling.seed for job in many}
    assert all(by_uid[job.uid] == job.sampling.seed == seed_of(1, job.uid) for job in few)
    assert len(set(by_uid.values())) == len(by_uid)
    assert not set(by_uid.values()) & {job.sampling.seed for job in jobs(run_seed=2)}
    assert all(0 <= seed < 2**63 for seed in by_uid.values())
    assert seed_of(1, "2/a") != seed_of(12, "/a")  # run seed and uid do not run into each other
    # Pinned: a resumed run of a later version must draw what this one would have drawn.
    assert seed_of(1, "grpo-x/0/0/0") == 3347318654402630929


def test_limits_metadata_and_sampling_come_from_domain_and_problem():
    domain = Boxed()
    job = jobs(domain, num=1, samples=1)[0]
    assert job.metadata == {"answer": "0", "problem": "p0"} and job.files == {"a": "b"}
    assert (job.domain, job.effort, job.max_turns, job.max_tokens) == ("agent", "think", 6, 160)
    assert (job.sampling.temperature, job.sampling.max_tokens) == (0.7, 160)
    assert job.needs_sandbox and job.reward == domain.reward and job.teacher is None


def test_tools_are_the_declared_ones_that_exist():
    assert jobs(Boxed(), num=1)[0].tools == ("read", "write")
    assert jobs(num=1)[0].tools == ()


def test_ungraded_jobs_name_no_reward_and_need_no_sandbox():
    for job in jobs(Boxed(), teacher="math", is_graded=False):
        assert job.reward == "" and not job.needs_sandbox and job.teacher == "math"
        assert job.tools == ("read", "write")  # what the episode may do does not change
