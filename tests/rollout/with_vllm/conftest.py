"""These tests are for the environment that has vLLM (`make test-vllm`); in another they are not there."""

import os
from importlib.util import find_spec

from consilience.rollout.vllm_settings import prepare_environment

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # 27 s of the first step
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
prepare_environment()
