"""What the doctor finds, and that what stands in the way comes with its fix."""

import socket

from consilience.cli.doctor import doctor, inspect, plan_stages, sandbox_of
from consilience.conf.load import from_plain
from consilience.conf.schema import Config


def config(**groups) -> Config:
    return from_plain({"task": {"domains": {"math": {"kind": "math"}}}, **groups})


def test_every_finding_that_stands_in_the_way_has_a_fix():
    findings = inspect(config())
    assert {"python", "processor", "memory", "disk", "torch", "ray", "sandbox"} <= {f.what for f in findings}
    assert all(f.fix for f in findings if f.state == "missing")


def test_a_sandbox_stronger_than_this_machine_has_is_missing_and_fails(capsys):
    cfg = config(sandbox={"min_isolation": "vm"})
    finding = sandbox_of(cfg)
    assert finding.state == "missing"
    assert "need vm" in finding.fix
    assert doctor(cfg) == 1
    assert "stand in the way" in capsys.readouterr().out


def test_a_weak_sandbox_is_named_for_what_it_is():
    sandbox = {"driver": "insecure_subprocess", "min_isolation": "rlimit", "allow_insecure": True}
    assert "rlimit" in sandbox_of(config(sandbox=sandbox)).found


def test_a_port_in_use_is_found():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        findings = inspect(config(cluster={"dashboard": True, "dashboard_port": port}))
    (cluster,) = [f for f in findings if f.what == "ray cluster"]
    assert (cluster.state, cluster.found) == ("missing", f"port {port} in use")


def test_a_gpu_asked_for_by_name_must_be_there():
    import torch

    (found,) = [f for f in inspect(config(engine={"device": "cuda"})) if f.what == "torch"]
    assert found.state == ("ok" if torch.cuda.is_available() else "missing")


def test_the_plan_says_what_each_stage_will_use():
    plans = {p.stage: p for p in plan_stages(config(rollout={"num_workers": 3}), "cpu", "bwrap_user")}
    assert "3 Ray actors" in plans["grpo"].sampler
    assert plans["grpo"].sandbox == "bwrap_user"
    assert plans["base, sft"].engine == "torch, muon"
