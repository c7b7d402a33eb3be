"""The process in which vLLM computes a teacher's hidden states: lists of token ids in, names of files out.

    python -m consilience.teachers.vllm_scoring '{"folder": …, "states": …, "layer": …, …}'

A process of its own: its interpreter may be another than the trainer's, and all that vLLM holds goes with it.
A line each way: {} when it is up; then, to the name of a file with [[ids], …], {"files": [one a list, in
order]}, or {"error": …} and the end. Each file has {"hidden_states" [T, 1, D]} behind the last layer, before
the final norm.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from consilience.rollout.vllm_settings import prepare_environment, whole_prompts

WRITING_S = 120.0
"""How long a file may take that vLLM has named."""


def start_engine(
    folder: str,
    states: str,
    layer: int,
    dtype: str,
    max_length: int,
    max_rows: int,
    settings: Mapping[str, Any],
) -> Any:
    """vLLM's engine over a folder, told to write the states behind `layer` layers into `states`."""
    prepare_environment()
    from vllm import EngineArgs  # pyright: ignore
    from vllm.platforms import current_platform  # pyright: ignore
    from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore

    if current_platform.is_cpu():
        settings = {**whole_prompts(max_rows, max_length), **settings}
    extraction = {"eagle_aux_hidden_state_layer_ids": [layer]}
    given = {
        "model": folder,
        "skip_tokenizer_init": True,
        "max_num_seqs": max_rows,
        "max_model_len": max_length,
        "dtype": dtype,
        "enable_prefix_caching": False,  # a prefix that is not computed again has no states
        "async_scheduling": False,
        "generation_config": "vllm",
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": extraction},
        },
        "kv_transfer_config": {
            "kv_connector": "StatesConnector",
            "kv_connector_module_path": "consilience.teachers.vllm_connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": states, "use_synchronization_lock": False},
        },
    }
    return LLMEngine.from_engine_args(EngineArgs(**{"enforce_eager": True, **settings, **given}))


def score(engine: Any, sequences: Iterable[Sequence[int]], first: int) -> list[str]:
    """The file of each sequence, written; requests are numbered from `first`."""
    from vllm import SamplingParams  # pyright: ignore

    files: dict[str, str] = {}
    names = []
    for number, ids in enumerate(sequences, first):
        names.append(str(number))
        how = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        engine.add_request(names[-1], {"prompt_token_ids": list(ids)}, how)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                files[output.request_id] = (output.kv_transfer_params or {})["hidden_states_path"]
    deadline = time.monotonic() + WRITING_S
    while not all(Path(file).exists() for file in files.values()):
        engine.step()  # files are written by the step after the last
        if time.monotonic() > deadline:
            raise TimeoutError(f"vLLM has not written its states within {WRITING_S:.0f} s")
    return [files[name] for name in names]


def serve(lines: TextIO, out: TextIO, arguments: Mapping[str, Any]) -> None:
    """Answers until the lines end."""

    def say(answer: Mapping[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    try:
        engine, done = start_engine(**arguments), 0
        say({})
        for line in lines:
            sequences = json.loads(Path(line.strip()).read_text())
            say({"files": score(engine, sequences, done)})
            done += len(sequences)
    except Exception as error:  # whatever it is, the other side has to hear of it
        say({"error": f"{type(error).__name__}: {error}"})
        raise


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints is no answer
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # only prompts are run: nothing pays for it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    serve(sys.stdin, answers, json.loads(sys.argv[1]))


if __name__ == "__main__":
    main()
