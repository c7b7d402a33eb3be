"""A user's JSONL or parquet file as a domain, by configuration alone.

    kind: file
    path: questions.jsonl
    reward: my_rewards.py:score
    parameters: {columns: {prompt: question, answer: solution}}

Every row becomes a problem; its split follows from its content, like any other domain's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.conf.errors import TaskError
from consilience.conf.fields import nearest, setting
from consilience.rollout.tools import tool_schemas
from consilience.tasks.domain import Problem
from consilience.tasks.parameters import require
from consilience.tasks.splits import content_id

if TYPE_CHECKING:
    from datasets import Dataset

REWARD = "consilience.rewards.exact_match:score"
NUM_CHECKED = 1_000  # rows read at once, so that a wrong mapping shows before a run starts
ROLES = ("prompt", "messages", "answer", "metadata", "files", "tools", "demo", "user_turns")


@dataclass(frozen=True)
class FileParameters:
    """Which columns mean what. A column of structured values may hold them as JSON text.

    Roles in `columns` (role -> column of the file): `prompt` (the user's words) or `messages` (a list
    of protocol messages); `answer` (metadata["answer"]); `metadata` (a mapping, or a list of columns
    to collect); `files` (path -> text); `tools` (function schemas); `demo` (an answer text, or a list
    of assistant and tool messages); `user_turns` (a list of what the user says after each answer). A role
    left out uses the column of its own name, if there is one.
    """

    path: str = setting("", "JSONL (.jsonl, .json) or parquet (.parquet) file")
    columns: dict[str, Any] = setting({}, "role -> column")
    system: str = setting("", "system text put before every problem; empty: none")
    tools: tuple[str, ...] = setting((), "built-in tools an episode may call")
    reward: str | None = setting(None, "reward function; null: exact match with the answer")


class FileSource:
    """The rows of one file (a `Source`).

    TaskError names the file, the line or row, and the column when something is missing or malformed.
    """

    def __init__(self, domain: str, parameters: FileParameters) -> None:
        self.domain = domain
        self.parameters = parameters
        self.rows = read_rows(parameters.path)
        self.columns = _roles(parameters, self.rows.column_names)
        self.tools = tuple(parameters.tools)
        tool_schemas(self.tools)  # ConfigError on an unknown name
        for index in range(min(len(self.rows), NUM_CHECKED)):
            self._problem(index)

    def draw(self, index: int) -> tuple[str, Any] | None:
        if index >= len(self.rows):
            return None
        problem = self._problem(index)
        messages = [dict(m) for m in problem.messages]
        said = [list(problem.user_turns)] if problem.user_turns else []
        return content_id("file", messages, dict(problem.files), *said), problem

    def build(self, problem_id: str, draft: Problem) -> Problem:
        return replace(draft, id=problem_id)

    def _problem(self, index: int) -> Problem:
        row = self.rows[index]
        where = f"{self.parameters.path}, row {index + 1}"
        value = {role: row[column] for role, column in self.columns.items() if isinstance(column, str)}
        metadata = self._metadata(row, value, where)
        tools = _structured(value.get("tools"), list, f"{where}, column {self.columns.get('tools')!r}")
        files = _structured(value.get("files"), dict, f"{where}, column {self.columns.get('files')!r}")
        return Problem(
            id="",
            domain=self.domain,
            messages=self._messages(value, tools, where),
            metadata=metadata,
            files={str(k): str(v) for k, v in files.items() if v is not None},
            demo=self._demo(value, where),
            user_turns=self._user_turns(value, where),
        )

    def _messages(self, value: dict[str, Any], tools: list[Any], where: str) -> tuple[Mapping[str, Any], ...]:
        if "messages" in value:
            messages = _structured(value["messages"], list, f"{where}, column {self.columns['messages']!r}")
            _check_messages(messages, where)
        else:
            prompt = value["prompt"]
            require(
                isinstance(prompt, str) and prompt != "",
                f"{where}: the prompt is {prompt!r}; text is needed.",
            )
            messages = [{"role": "user", "content": prompt}]
        if self.parameters.system or tools:
            if not messages or messages[0]["role"] != "system":
                messages = [{"role": "system", "content": ""}, *messages]
            system = dict(messages[0])
            text = [t for t in (self.parameters.system, system.get("content")) if t]
            system["content"] = "\n\n".join(text)
            if tools:
                system["tools"] = tools
            messages = [system, *messages[1:]]
        return tuple(messages)

    def _user_turns(self, value: dict[str, Any], where: str) -> tuple[str, ...]:
        turns = _structured(value.get("user_turns"), list, f"{where}, column user_turns")
        for turn in turns:
            require(isinstance(turn, str) and turn != "", f"{where}: user turn {turn!r}; text is needed.")
        return tuple(turns)

    def _metadata(self, row: Mapping[str, Any], value: dict[str, Any], where: str) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        listed = self.columns.get("metadata")
        if isinstance(listed, list):
            metadata.update({column: row[column] for column in listed})
        elif "metadata" in value:
            metadata.update(_structured(value["metadata"], dict, f"{where}, column {listed!r}"))
        if "answer" in value:
            metadata["answer"] = value["answer"]
        try:
            return json.loads(json.dumps(metadata))
        except (TypeError, ValueError) as error:
            raise TaskError(
                f"{where}: metadata is not JSON-plain ({error}); use text and numbers."
            ) from error

    def _demo(self, value: dict[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
        demo = value.get("demo")
        if demo is None or demo == "":
            return ()
        if isinstance(demo, str) and not demo.lstrip().startswith("["):
            return ({"role": "assistant", "content": demo},)
        messages = _structured(demo, list, f"{where}, column {self.columns['demo']!r}")
        _check_messages(messages, where)
        return tuple(messages)


def read_rows(path: str) -> Dataset:
    """The file's rows as a `datasets.Dataset`, read without a network and without a cache on disk.

    A JSONL row's structured values stay exact (they are held as JSON text). TaskError on a file that
    is missing, empty, of another kind or malformed; for JSONL it names the line.
    """
    require(path != "", "kind=file needs a path to a JSONL or parquet file.")
    file = Path(path).expanduser()
    require(
        file.is_file(),
        f"no data file {path!r} (looked at {file.absolute()}); give the path of an existing file.",
    )
    if file.suffix in (".jsonl", ".json", ".ndjson"):
        rows = _read_jsonl(file)
    elif file.suffix in (".parquet", ".pq"):
        rows = _read_parquet(file)
    else:
        raise TaskError(f"data file {path!r} ends in {file.suffix!r}; .jsonl and .parquet files can be read.")
    require(len(rows) > 0, f"data file {path!r} has no rows.")
    return rows


def _read_jsonl(file: Path) -> Dataset:
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise TaskError(f"{file}, line {number} is not JSON: {error}.") from error
            require(
                isinstance(row, dict),
                f"{file}, line {number} is a {type(row).__name__}; an object is needed.",
            )
            rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    # One Arrow type a column: columns whose values differ in type or are structured travel as JSON text.
    as_text = {c for c in columns if len({type(r[c]) for r in rows if r.get(c) is not None} | {str}) > 1}
    table = [
        {c: json.dumps(r[c]) if c in as_text and r.get(c) is not None else r.get(c) for c in columns}
        for r in rows
    ]
    dataset = Dataset.from_list(table) if table else Dataset.from_dict({})
    return dataset.with_transform(lambda batch: _decode(batch, as_text)) if as_text else dataset


def _decode(batch: dict[str, list[Any]], as_text: set[str]) -> dict[str, list[Any]]:
    return {
        c: [json.loads(v) if v is not None else None for v in values] if c in as_text else values
        for c, values in batch.items()
    }


def _read_parquet(file: Path) -> Dataset:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        return Dataset(pyarrow.parquet.read_table(file))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise TaskError(f"{file} is no readable parquet file: {error}.") from error


def _roles(parameters: FileParameters, present: list[str]) -> dict[str, Any]:
    """Role -> column (or list of columns for metadata), all of them present in the file."""
    for role in parameters.columns:
        require(role in ROLES, f"columns: unknown role {role!r}; {nearest(role, ROLES)}")
    roles = {role: parameters.columns.get(role, role) for role in ROLES}
    chosen = {r: c for r, c in roles.items() if r in parameters.columns or c in present}
    for role, column in chosen.items():
        for name in column if isinstance(column, list) else [column]:
            if name not in present:
                raise TaskError(
                    f"{parameters.path} has no column {name!r} (wanted as {role}); "
                    f"{nearest(str(name), present)} Columns: {', '.join(present)}."
                )
    require(
        "prompt" in chosen or "messages" in chosen,
        f"{parameters.path} has neither a 'prompt' nor a 'messages' column; say which column holds the "
        f"prompt: parameters.columns.prompt=NAME. Columns: {', '.join(present)}.",
    )
    return chosen


def _structured(value: Any, kind: type, where: str) -> Any:
    """The value as a list or dict, decoded from JSON text where needed; None becomes empty."""
    if value is None or value == "":
        return kind()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise TaskError(f"{where} is not JSON: {error}.") from error
    require(isinstance(value, kind), f"{where} is a {type(value).__name__}; a {kind.__name__} is needed.")
    return value


def _check_messages(messages: list[Any], where: str) -> None:
    require(len(messages) > 0, f"{where}: the list of messages is empty.")
    roles = ("system", "user", "developer", "assistant", "tool", "latest_reminder")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        require(role in roles, f"{where}: message {i + 1} has role {role!r}; {nearest(str(role), roles)}")
