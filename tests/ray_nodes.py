"""Several nodes of a Ray cluster, imitated on this machine: a node's processes, no network between them."""

import contextlib
import os

import pytest
import ray
from ray.cluster_utils import Cluster


@contextlib.contextmanager
def nodes(*cores, **more):
    """A cluster with a node of each number of cores, the first its head, and RAY_ADDRESS set to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        patch.setenv("RAY_health_check_period_ms", "500")  # a lost node is noticed in a few seconds
        patch.setenv("RAY_health_check_failure_threshold", "4")
        store = {"object_store_memory": 80 << 20, **more}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores[0], **store})
        try:
            for number in cores[1:]:
                cluster.add_node(num_cpus=number, **store)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            os.environ.pop("RAY_ADDRESS", None)
