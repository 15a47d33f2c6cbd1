"""What requests may hold. A field that is not here is an error, so that nothing asked for is silently left out; but for
messages, which hold what answers hold (``refusal`` and the like) and of which the template reads three."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dsv3_jax.inference.sequence import MOST_LOGPROBS, Sampling
from dsv3_jax.inference.server.errors import ApiError

MOST_PROMPTS = 64
MOST_CHOICES = 16
Stop = Annotated[str | list[str], Field(max_length=256)] | None


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = ""
    """Any name: the server has one model."""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = None
    stop: Stop = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: "StreamOptions | None" = None
    user: str | None = None
    """Taken and not used."""
    metadata: dict[str, str] | None = None
    """Taken and not used."""
    store: Literal[False] | None = None

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, given: Any) -> Any:
        _refuse_surrogates(given)
        return given

    @field_validator("stop")
    @classmethod
    def _stop_texts(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > 4 or not all(texts) or any(len(text) > 256 for text in texts):
            raise ValueError("must be at most 4 texts of 1 to 256 characters")
        return value

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what it used."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_new_tokens: int, seed: int, choice: int, logprobs: int | None) -> Sampling:
        """How one choice is drawn; the same for equal requests with a seed."""
        return Sampling(
            max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=(seed if self.seed is None else self.seed) % 2**32,
            choice=choice,
            logprobs=logprobs,
            stop=tuple([self.stop] if isinstance(self.stop, str) else self.stop or ()),
        )


class StreamOptions(BaseModel):
    """What a stream holds beside the text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


_Ids = Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=1)]


class CompletionRequest(_Request):
    """Of ``/v1/completions``."""

    prompt: (
        str
        | _Ids
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[_Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as texts or ids."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn; answers may come back as they were sent, so that what the template does not read is no error."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """As :func:`dsv3_jax.data.chat.encode_chat` takes it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content, "tool_calls": self.tool_calls}


class TemplateOptions(BaseModel):
    """Of the chat template."""

    model_config = ConfigDict(extra="forbid")
    thinking: bool | None = None


class ChatRequest(_Request):
    """Of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: "TextFormat | None" = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()


class TextFormat(BaseModel):
    """The one format of answers."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


type _Place = tuple[_Place, str | int] | None
"""Where in a request something stands: in what, and there by which name or number. None is the body."""


def _refuse_surrogates(given: Any) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer reads and no answer can repeat.

    Raises:
        ApiError: a text or a name anywhere in the request has one; a 400 that names the field.
    """
    left: list[tuple[_Place, Any]] = [(None, given)]
    while left:
        place, value = left.pop()
        if isinstance(value, str):
            _refuse_surrogate(value, place)
        elif isinstance(value, list):
            left += [((place, at), item) for at, item in enumerate(value) if isinstance(item, str | list | dict)]
        elif isinstance(value, dict):
            for name, item in value.items():
                _refuse_surrogate(name, place, "the name of a field of ")
                left.append(((place, name), item))


def _refuse_surrogate(text: str, place: _Place, what: str = "") -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        names: list[str | int] = []
        while place is not None:
            place, name = place
            names.insert(0, name)
        path = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix(".")
        told = f"{what}{path or 'the body'} holds half a surrogate pair at character {error.start}"
        param = str(names[0]) if names else None
        raise ApiError(400, f"{told}: send whole characters", param=param) from error
