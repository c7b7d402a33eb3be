"""An environment of your own is one class. Here: read the numbers in a few files, leave their sum in another.

    consilience grpo specialist.domain=sums task.domains.sums.kind=examples/sum_of_files.py:SumOfFiles

`problem(index)` makes a problem, `score` judges what became of it. The agent has a box of its own with
`files` in it and may call `tools`; what it changed there reaches `score` as `completion.patch`, a diff that
was made outside of the box. With `needs_sandbox` the judge has a box too, another one: `sandbox`, to run
things in.
"""

import random

from consilience.rewards.interface import Tier

TIER = Tier.PROGRAM  # what the verdict rests on: here, the content of a file that is compared outside


class SumOfFiles:
    """`num_files` files of numbers; problems without end."""

    tools = ("list", "read", "write", "shell")
    max_turns = 8
    max_tokens = 512
    needs_sandbox = True

    def __init__(self, num_files: int = 2, largest: int = 99) -> None:
        self.num_files, self.largest = num_files, largest

    def problem(self, index: int) -> dict:
        rng = random.Random(index)
        numbers = [rng.randint(0, self.largest) for _ in range(self.num_files)]
        names = [f"{chr(97 + i)}.txt" for i in range(self.num_files)]
        files = {name: f"{number}\n" for name, number in zip(names, numbers)}
        total = f"{sum(numbers)}\n"
        call = {"name": "write", "arguments": {"path": "sum.txt", "content": total}}
        return {
            "prompt": f"Add up the numbers in {', '.join(names)}; write the sum to sum.txt.",
            "files": files,
            "metadata": {"sum": sum(numbers)},
            "demo": [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "0", "type": "function", "function": call}],
                },
                {"role": "tool", "tool_call_id": "0", "content": f"wrote {len(total)} bytes"},
                {"role": "assistant", "content": "Done."},
            ],
        }

    @staticmethod
    def score(completion, *, prompt, metadata, sandbox) -> dict[str, float]:
        """1 if sum.txt is new and holds the sum alone, and no other file was touched."""
        lines = (completion.patch or "").splitlines()
        added = [line[1:].strip() for line in lines if line.startswith("+") and not line.startswith("+++ ")]
        touched = [line for line in lines if line.startswith(("--- ", "+++ "))]
        is_right = touched == ["--- /dev/null", "+++ b/sum.txt"] and added == [str(metadata["sum"])]
        return {"reward": float(is_right), "correct": float(is_right)}
