"""The embedded model as what a pipeline takes without a model."""

from __future__ import annotations

from collections.abc import Iterator

from transformers.pipelines import PIPELINE_REGISTRY

from ..pipeline_iclip import PIPELINES
from .embedded import embedded_model


class _Embedded:
    """A model and its revision, as transformers unpacks them. Only then is the model downloaded."""

    def __iter__(self) -> Iterator[str | None]:
        return iter((str(embedded_model()), None))


_TASKS = PIPELINE_REGISTRY.supported_tasks
for _task in PIPELINES:
    _TASKS[_task] = {
        **_TASKS[_task],
        "default": {"model": _Embedded()},
    }  # a copy, because a saved pipeline holds the original
