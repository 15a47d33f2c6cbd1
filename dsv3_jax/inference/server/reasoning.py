"""What a reasoning model writes, parted into what it thought and what it answers."""

from dsv3_jax.data.chat import END_THINK, THINK


class ReasoningSplit:
    """Parts text as it comes at ``</think>``.

    Args:
        thinking: whether the prompt opened the thought already; else only a text that begins with ``<think>`` has one.
    """

    def __init__(self, thinking: bool):
        self._state = "thought" if thinking else "start"
        self._held = ""

    def add(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """What is new of the thought and of the answer; ``last`` gives out what was held back."""
        self._held += text
        thought = answer = ""
        if self._state == "start":
            if self._held.startswith(THINK):
                self._state, self._held = "thought", self._held[len(THINK) :].removeprefix("\n")
            elif last or not THINK.startswith(self._held):
                self._state = "answer"
        if self._state == "thought":
            thought, mark, rest = self._held.partition(END_THINK)
            if mark:
                self._state, self._held = "gap", rest
            else:
                keep = 0 if last else _overlap(thought)
                self._held = thought[len(thought) - keep :]
                thought = thought[: len(thought) - keep]
        if self._state == "gap":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "answer"
        if self._state == "answer":
            answer, self._held = self._held, ""
        return thought, answer


def _overlap(text: str) -> int:
    """Characters at its end that ``</think>`` begins with."""
    return next((n for n in range(min(len(text), len(END_THINK) - 1), 0, -1) if text.endswith(END_THINK[:n])), 0)
