"""The hosts' numbers reach every row of a stage's metrics."""

from consilience.cli.host_metrics import WithSandboxHosts, hosts_here, over_all
from consilience.training.metrics import MemorySink, MetricsLog, read_metrics


def test_counts_are_summed_and_latencies_are_the_slowest_hosts():
    hosts = {"a" * 20: {"created": 3.0, "exec_p95_ms": 4.0}, "b" * 20: {"created": 5.0, "exec_p95_ms": 9.0}}
    found = over_all(hosts)
    assert found["sandbox/hosts"] == 2 and found["sandbox/created"] == 8 and found["sandbox/exec_p95_ms"] == 9
    assert found["sandbox/aaaaaaaa/created"] == 3 and found["sandbox/bbbbbbbb/exec_p95_ms"] == 9
    assert over_all({"a": {"leased": 1.0}}) == {"sandbox/hosts": 1.0, "sandbox/leased": 1.0}
    assert over_all({}) == {}


def test_they_stand_in_the_metrics_file_beside_the_steps_own_numbers(tmp_path):
    inner = MetricsLog(tmp_path / "metrics.jsonl")
    sink = WithSandboxHosts(inner, lambda: {"n": {"reaped": 2.0}})
    sink.scalars(1, {"loss": 0.5})
    sink.finish()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["step"], row["loss"], row["sandbox/reaped"], row["sandbox/hosts"]) == (1, 0.5, 2.0, 1.0)


def test_without_a_cluster_nothing_is_added():
    inner = MemorySink()
    sink = WithSandboxHosts(inner)
    sink.scalars(1, {"loss": 0.5})
    sink.rollouts(1, [])
    sink.finish()
    assert hosts_here() == {} and inner.rows == [{"step": 1, "loss": 0.5}] and inner.is_finished
