"""The OpenAPI document: bodies are checked by our own reader, so the document names them here."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"


class ErrorDetail(BaseModel):
    """What is wrong, and what to change."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """A route's request body, for `openapi_extra`."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=kind.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def query_of(**schemas: dict[str, Any]) -> dict[str, Any]:
    """A route's optional query parameters by their JSON schemas, for `openapi_extra`."""
    return {"parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in schemas.items()]}


def answers(*fields: str, streamed: bool = False) -> dict[int | str, dict[str, Any]]:
    """A route's responses: an object that has `fields`, perhaps also as server-sent events, or an error."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object", "required": list(fields)}}}
    if streamed:
        content["text/event-stream"] = {"schema": {"type": "object", "properties": {"data": {"type": "string"}}}}
    error = {"application/json": {"schema": {"$ref": _REF.format(model=ErrorBody.__name__)}}}
    return {200: {"description": "the answer", "content": content}, "default": {"description": "an error", "content": error}}


def describe(app: FastAPI, bodies: list[type[BaseModel]]) -> None:
    """Give `app` a document that knows `bodies`; made at the first request for it."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            kinds: list[type[BaseModel]] = [*bodies, ErrorBody]
            _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
            found.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # how FastAPI wants it replaced
