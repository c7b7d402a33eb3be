"""Constants of V4's prompt protocol, byte for byte (v4_model.md 13; sha256 of the fixed texts in tests).

The bar is U+FF5C and the low line U+2581. Token ids of the released models are in `RELEASED_IDS`; a
tokenizer trained here has its own ids for the same strings (`SPECIAL_TOKENS`, in that order, from 0).
"""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"
TASK_TOKENS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
EXTRACTED_URL = "<｜extracted_url｜>"

SPECIAL_TOKENS: tuple[str, ...] = (
    BOS,
    EOS,
    PAD,
    USER,
    ASSISTANT,
    THINK,
    END_THINK,
    DSML,
    LATEST_REMINDER,
    *TASK_TOKENS.values(),
    EXTRACTED_URL,
)

RELEASED_IDS: dict[str, int] = {
    BOS: 0,
    EOS: 1,
    PAD: 2,
    USER: 128803,
    ASSISTANT: 128804,
    THINK: 128821,
    END_THINK: 128822,
    DSML: 128825,
    LATEST_REMINDER: 128828,
    TASK_TOKENS["action"]: 128829,
    TASK_TOKENS["query"]: 128830,
    TASK_TOKENS["authority"]: 128831,
    TASK_TOKENS["domain"]: 128832,
    TASK_TOKENS["title"]: 128836,
    EXTRACTED_URL: 128844,
    TASK_TOKENS["read_url"]: 128845,
}

EFFORT_A = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the "
    "root cause, rigorously stress-testing your logic against all potential paths, edge cases, and "
    "adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
EFFORT_B = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively "
    "decompose the problem into its most fundamental components, trace every causal chain to its root, and "
    "resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are "
    "certain that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
# Checkpoint family -> effort -> prefix after BOS, thinking mode only (v4_model.md 13.3).
# "think" is thinking at the family's default effort; "chat" is the mode without thinking.
EFFORT_PREFIXES: dict[str, dict[str, str]] = {
    "preview": {"chat": "", "think": "", "high": "", "max": EFFORT_A},
    "official": {"chat": "", "think": "", "low": "", "high": EFFORT_A, "max": EFFORT_B},
}

# The tools block around the schemas, one JSON object a line between the two halves.
TOOLS_HEAD = f"""## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. \
For all other types (numbers, booleans, arrays, objects), \
pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), \
you MUST output your complete reasoning inside {THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

"""
TOOLS_TAIL = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
RESPONSE_FORMAT_HEAD = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

CALLS_OPEN = f"<{DSML}tool_calls>\n"
CALLS_CLOSE = f"</{DSML}tool_calls>"
INVOKE_CLOSE = f"</{DSML}invoke>"
PARAMETER_CLOSE = f"</{DSML}parameter>"
RESULT_OPEN = "<tool_result>"
RESULT_CLOSE = "</tool_result>"
