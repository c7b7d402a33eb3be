"""These tests are for the environment that has vLLM (`make test-vllm`); in another they are not there."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
