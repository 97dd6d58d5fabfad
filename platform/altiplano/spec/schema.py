"""The pipeline file described for editors (JSON schema) and for people (a page of documentation)."""

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from altiplano.spec.loader import model_of
from altiplano.spec.sections import Pipeline


def json_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a pipeline file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Pipeline.model_json_schema()}


def docs_page() -> str:
    """docs/pipeline-file.md: every section and key with its default and its trade-off."""
    lines = [
        "# The pipeline file",
        "",
        "Generated from `altiplano.spec` by `python -m altiplano.spec.schema > docs/pipeline-file.md`; a test keeps them equal.",
        "",
        "Unknown keys are errors. `altiplano config FILE` prints the resolved file with the origin of each value,",
        "`altiplano schema` its JSON schema. Any value can be changed on the command line: `training.learning_rate=2e-4`.",
    ]
    for name, field in Pipeline.model_fields.items():
        model = model_of(field.annotation)
        assert model is not None
        lines += ["", f"## {name}", "", (model.__doc__ or "").strip(), ""]
        lines += _table(model)
        for key, inner in model.model_fields.items():
            nested = model_of(inner.annotation)
            if nested is not None:
                lines += ["", f"### {name}.{key}", "", (nested.__doc__ or "").strip(), "", *_table(nested)]
    return "\n".join(lines) + "\n"


def _table(model: type[BaseModel]) -> list[str]:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    return rows + [f"| `{key}` | {_default(field)} | {field.description or ''} |" for key, field in model.model_fields.items()]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    return "`null`" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(docs_page(), end="")
