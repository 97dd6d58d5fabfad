"""OpenAI's requests, as far as a text model of ours can answer them, with vLLM's extra sampling fields."""

from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from altiplano.serve.conversation import Message
from altiplano.serve.structured import FREE_TEXT, ResponseFormat, grammar
from altiplano.serve.tools import MAX_TOOLS, Function, NamedTool, Tool, ToolChoice

MAX_STOPS = 16
MAX_ANSWERS = 256
Stops = str | list[str] | None
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(BaseModel):
    """stream_options."""

    include_usage: bool = False


class _Request(BaseModel):
    # Unknown fields are answered with a header that names them, not dropped in silence and not refused: clients send many.
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())

    n: int = Field(1, ge=1, le=8)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[int, Bias] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = None
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOPS)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=2**31 - 1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """null is how many clients leave a field out."""
        return {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _consistent(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        stops = self.stops
        if len(stops) > MAX_STOPS or any(not s or len(s) > 256 for s in stops):
            raise ValueError(f"stop takes at most {MAX_STOPS} strings of 1 to 256 characters")
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            raise ValueError("min_tokens and ignore_eos do not go with a structured answer: its format decides where it ends")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @cached_property
    def grammar(self) -> str | None:
        """What the answer may be; None when anything goes."""
        rule = self.response_format.rule() if self.response_format is not None else None
        return None if rule is None else grammar(rule)

    @property
    def schemas(self) -> dict[str, Any]:
        """JSON schemas of the request, by the field that holds them."""
        if self.response_format is None or self.response_format.json_schema is None:
            return {}
        return {"response_format": self.response_format.json_schema.schema_}

    @property
    def unknown(self) -> list[str]:
        return sorted(self.model_extra or {})


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, min_length=1, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @model_validator(mode="after")
    def _tools(self) -> "ChatRequest":
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise ValueError("two tools have the same name: rename one")
        if not names and self.tool_choice not in (None, "none"):
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools {', '.join(names)}"
            )
        if self.must_call and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("the answer cannot be a tool call and follow response_format: leave out one of them")
        return self

    @property
    def schemas(self) -> dict[str, Any]:
        return super().schemas | {
            f"tools.{i}.function.parameters": tool.function.parameters or {} for i, tool in enumerate(self.tools or ())
        }

    @property
    def callable(self) -> list[Function]:
        """The functions that the answer may call."""
        functions = [] if self.tool_choice == "none" else [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            return [function for function in functions if function.name == self.tool_choice.function.name]
        return functions

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @cached_property
    def grammar(self) -> str | None:
        """What the answer may be; None when anything goes."""
        calls = [function.rule() for function in self.callable]
        answer = self.response_format.rule() if self.response_format is not None else None
        if self.must_call:
            return grammar(*calls)
        if calls and (answer is not None or any(function.strict for function in self.callable)):
            return grammar(*calls, answer or FREE_TEXT)
        return None if answer is None else grammar(answer)


class CompletionRequest(_Request):
    """POST /v1/completions."""

    model: str
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    @model_validator(mode="after")
    def _bounded(self) -> "CompletionRequest":
        if len(self.prompts()) * self.n > MAX_ANSWERS:
            raise ValueError(f"prompts times n are more than {MAX_ANSWERS}: send several requests")
        return self

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt: text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(item, int) for item in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
