"""Imports point one way, engines live in files that carry their name, and the rest runs without them."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each room may import rooms of a later row, and itself.
LAYERS = (
    {"cli"},
    {"grpo", "distill"},
    {"teachers", "rewards", "tasks"},
    {"rollout", "training"},
    {"sandboxes", "model"},
    {"conf"},
)
DEPTH = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}
# Import name -> what the names of files that import it begin with.
ENGINES = {
    "ray": "ray_",
    "wandb": "wandb_",
    "docker": "docker_",
    "aiodocker": "docker_",
    "deepspeed": "deepspeed_",
    "vllm": "vllm_",
    "triton": "triton_",
}
ENGINE_FILES = tuple(set(ENGINES.values()))


def _files() -> list[Path]:
    return sorted(f for room in DEPTH for f in (ROOT / room).rglob("*.py") if "__pycache__" not in f.parts)


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a file, those inside functions and of type checks too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names)


def _puts_together(file: Path) -> bool:
    """Whether a file puts a run together (cli/), or is a program of its own."""
    return file.relative_to(ROOT).parts[0] == "cli" or '__name__ == "__main__"' in file.read_text(
        encoding="utf-8"
    )


def layer_faults(room: str, imports: Iterator[tuple[int, str]]) -> list[str]:
    """Imports of a file in `room` that point the wrong way."""
    faults = []
    for line, name in imports:
        parts = name.split(".")
        if parts[0] in DEPTH:
            faults.append(f"line {line} imports '{name}' without 'consilience.'")
        elif parts[0] == "consilience" and len(parts) > 1 and parts[1] in DEPTH:
            other = parts[1]
            if other != room and DEPTH[other] <= DEPTH[room]:
                faults.append(f"line {line}: {room} imports {other}")
    return faults


def engine_faults(file_name: str, imports: Iterator[tuple[int, str]]) -> list[str]:
    """Engines imported by a file that does not carry their name."""
    tops = ((line, name.split(".")[0]) for line, name in imports)
    return [
        f"line {line} imports {top}"
        for line, top in tops
        if top in ENGINES and not file_name.startswith(ENGINES[top])
    ]


def test_the_rule_itself_catches_what_it_should():
    def imports(*names: str) -> Iterator[tuple[int, str]]:
        return iter([(1, name) for name in names])

    assert layer_faults("model", imports("consilience.rollout.engine.Request"))
    assert layer_faults("grpo", imports("consilience.distill.loss.kl"))
    assert layer_faults("grpo", imports("model.moe"))
    assert not layer_faults("grpo", imports("consilience.model.moe", "consilience.grpo.loss", "torch"))
    assert engine_faults("train.py", imports("ray.util"))
    assert not engine_faults("ray_workers.py", imports("ray.util"))
    assert engine_faults("ray_workers.py", imports("wandb"))


@pytest.mark.parametrize("room", sorted(DEPTH))
def test_imports_point_one_way(room):
    files = [f for f in _files() if f.relative_to(ROOT).parts[0] == room]
    faults = {str(f.relative_to(ROOT)): layer_faults(room, _imports(f)) for f in files}
    assert {name: found for name, found in faults.items() if found} == {}


def test_engines_are_imported_only_in_files_that_carry_their_name():
    faults = {str(f.relative_to(ROOT)): engine_faults(f.name, _imports(f)) for f in _files()}
    assert {name: found for name, found in faults.items() if found} == {}


def test_files_of_engines_are_imported_only_where_a_run_is_put_together():
    faults = []
    for file in _files():
        if file.name.startswith(ENGINE_FILES) or _puts_together(file):
            continue
        for node in ast.parse(
            file.read_text(encoding="utf-8")
        ).body:  # module level: a function may choose late
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            faults += [
                f"{file.relative_to(ROOT)} imports {n}"
                for n in names
                if n.split(".")[-1].startswith(ENGINE_FILES)
            ]
    assert faults == []


def test_no_file_is_named_like_a_standard_module():
    clashes = [
        str(f.relative_to(ROOT))
        for f in _files()
        if f.stem in sys.stdlib_module_names and f.stem != "__init__"
    ]
    assert clashes == []


CHILD = """
import importlib, json, sys

REFUSED = set(json.loads(sys.argv[1]))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError(f"{name} is an engine")
        return None

sys.meta_path.insert(0, Refuse())
faults = {}
for module in json.loads(sys.argv[2]):
    try:
        importlib.import_module(module)
    except ImportError as error:
        faults[module] = str(error)
print(json.dumps(faults))
"""


def _import_faults(refused: list[str], modules: list[str]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(refused), json.dumps(modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _module(file: Path) -> str:
    return ".".join(("consilience", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def test_every_module_outside_cli_imports_without_the_engines():
    pure = [
        f for f in _files() if not f.name.startswith(ENGINE_FILES) and f.relative_to(ROOT).parts[0] != "cli"
    ]
    assert _import_faults(sorted(ENGINES), [_module(f) for f in pure]) == {}


def test_configuration_records_and_protocols_import_without_torch():
    light = [_module(f) for f in _files() if f.relative_to(ROOT).parts[0] == "conf"]
    light += ["consilience.rollout.records", "consilience.rollout.engine", "consilience.sandboxes.protocol"]
    light += [
        "consilience.tasks.domain",
        "consilience.rewards.interface",
        "consilience.cli.main",
        "consilience.cli.graph",
    ]
    light += ["consilience.cli.stages", "consilience.cli.report"]
    light += [
        f"consilience.cli.{name}" for name in ("verbs", "report_build", "report_page", "report_assemble")
    ]
    assert _import_faults(["torch", "hydra", "omegaconf", *ENGINES], light) == {}


def test_the_schema_is_light():
    program = (
        "import time; began = time.process_time()\n"
        "import consilience.conf.schema\n"
        "print((time.process_time() - began) * 1000)"
    )
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(3)
    ]
    # 40 ms on an idle core, byte code compiled; twice that and more, because tests share their cores
    assert min(runs) < 100
