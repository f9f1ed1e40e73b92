"""What a person should know of how conversations were rendered: one line each, for the audit."""

from typing import TYPE_CHECKING

from trainers.data.messages import ChatRow
from trainers.data.tokenizer import LoadedTokenizer

if TYPE_CHECKING:  # jinja2 is loaded only for chat rows
    from trainers.data.chat_template import ChatTemplate, Rendered

SHOWN_CHARS = 240
NEWLINE, NEWLINE_SIGN = "\n", "⏎"


class ToolSamples:
    """The first tool, call and result as they stand in the rendered text."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def look(self, row: ChatRow, rendered: "Rendered") -> None:
        """Remembers what of a row is the first of its kind."""
        if row.tools is not None and "tools" not in self._lines:
            name = row.tools[0].get("function", {}).get("name", "")
            self._keep(
                "tools", "tools are shown, not trained, as", _lines_with(rendered.text, name)
            )
        for message in row.messages:
            if "call" not in self._lines and message.get("tool_calls"):
                name = message["tool_calls"][0]["function"]["name"]
                trained = (rendered.text[start:stop] for start, stop in rendered.spans)
                found = next((text for text in trained if name in text), "")
                self._keep("call", "a call is trained as", found)
            if "result" not in self._lines and message["role"] == "tool":
                text = _lines_with(rendered.text, message["content"][:SHOWN_CHARS])
                self._keep("result", "a tool's result is shown, not trained, as", text)

    def _keep(self, kind: str, what: str, text: str) -> None:
        if text:
            short = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
            self._lines[kind] = f"{what}: {short.replace(NEWLINE, NEWLINE_SIGN)}"

    def lines(self) -> list[str]:
        """A line for each kind that was seen."""
        return list(self._lines.values())


def _lines_with(text: str, part: str) -> str:
    """The lines of a text from the one on which a part begins; empty where it is not there."""
    at = text.find(part) if part else -1
    return text[text.rfind("\n", 0, at) + 1 :] if at >= 0 else ""


def template_notes(template: "ChatTemplate", tokenizer: LoadedTokenizer) -> list[str]:
    """What the template did to the rows that it was given."""
    lines = []
    if template.wrote_tools_as_text:
        lines.append(
            "the chat template has no place for tools: schemas are written into the system message,"
            " calls as <tool_call>{json}</tool_call>"
        )
    if template.left_out_reasoning:
        lines.append(
            "the chat template leaves thoughts out of some turns, as it does when it serves them:"
            " they are not trained"
        )
    if template.reads_clock:
        lines.append("the chat template writes today's date: other days give other tokens")
    end, eos = template.end_of_turn, tokenizer.special_tokens.get("eos_token")
    if not end.strip().endswith(eos or "\0"):  # Cohere 2 ends with two tokens
        lines.append(
            f"answers end with {end.strip()}, which is not the tokenizer's end token {eos}: where the"
            f" adapter is served, stop at {end.strip()}"
        )
    return lines
