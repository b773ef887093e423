"""Code-Feedback: 66,383 conversations about code, of one turn or several."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from fedlora_jax.data import record_files
from fedlora_jax.data.record_files import Record

_URL = "https://huggingface.co/datasets/m-a-p/Code-Feedback/resolve/main/Code-Feedback.jsonl"


class CodeFeedback(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of Zheng et al., "OpenCodeInterpreter" (2024); needs no TensorFlow.

    One split, `train`, with `messages`: the turns of a conversation, each with `role` (user or
    assistant) and `content`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    url_infos: dict[str, Any] = {}  # no checksum is published

    def _info(self) -> tfds.core.DatasetInfo:
        turn = {name: tfds.features.Text() for name in ("role", "content")}
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"messages": tfds.features.Sequence(turn)}),
            homepage="https://huggingface.co/datasets/m-a-p/Code-Feedback",
            license="Apache-2.0",
        )

    def _split_generators(self, manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        return {"train": self._generate_examples(manager.download(_URL))}

    def _generate_examples(
        self, path: Any
    ) -> Iterator[tuple[int, dict[str, list[dict[str, str]]]]]:
        for number, record in enumerate(record_files.read(path, kind=".jsonl")):
            yield number, {"messages": [_turn(record, turn) for turn in _turns(record)]}


def _turns(record: Record) -> list[Any]:
    turns = record.fields.get("messages")
    if not isinstance(turns, list):
        raise ValueError(f"{record.name}: expected a list in a field 'messages', got {turns!r}")
    return turns


def _turn(record: Record, turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise ValueError(f"{record.name}: expected a turn with role and content, got {turn!r}")
    return record_files.strings(Record(record.name, turn), ("role", "content"))
