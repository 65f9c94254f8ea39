"""PipelinePlan: which nano-operation runs on which stream, in which order, as plain data with a JSON form.

The JSON form is an object with the fields of PipelinePlan and ``"version": 1``; ``model``, ``gpu``, ``loads``,
``sms``, ``priority`` and ``lag`` may be left out and then take their defaults.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from nf.errors import PlanError

FORMAT_VERSION = 1
PAIR = 2  # SMs that the hardware gives together: partitions have even numbers of them

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class NanoOperation:
    """One operation of a layer on one nano-batch; in round r it works on layer r − lag."""

    operation: str
    nano_batch: int  # index into PipelinePlan.nano_batches
    lag: int = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """Nano-operations that run one after another, in every round in this order.

    Args:
        name: unique in the plan.
        nano_operations: what the stream runs in one round.
        sms: "all" shares the whole GPU with every other stream; a number is a partition of that many SMs which no
            other numbered stream uses.
        priority: as CUDA counts it: 0 is the default, lower is more urgent.
    """

    name: str
    nano_operations: tuple[NanoOperation, ...]
    sms: int | Literal["all"] = "all"
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """Order and place of all nano-operations of a layer, repeated in rounds over the layers of a model.

    With L layers there are rounds 0 … L − 1 + largest lag. In each one every stream runs its nano-operations in order,
    leaving out those whose layer does not exist. What waits for what across streams is not part of a plan: it follows
    from the operations (see dependencies.py).

    Args:
        name: shown to users.
        dense_batch_size: tokens of the dense batch (B_dense).
        nano_batches: token ranges [start, stop) of the dense batch. Operations may use different ones, but those of
            each operation cover the dense batch exactly once.
        streams: run at the same time.
        model, gpu: what the plan was made for; None if for any.
        loads: of the steps that the plan is for, as (decode tokens, mean number of keys that each of them sees): it
            serves steps like these (see pool.py). Without any: every step.
    """

    name: str
    dense_batch_size: int
    nano_batches: tuple[tuple[int, int], ...]
    streams: tuple[Stream, ...]
    model: str | None = None
    gpu: str | None = None
    loads: tuple[tuple[int, int], ...] = ()

    @property
    def max_lag(self) -> int:
        """Rounds by which the last layer's latest nano-operation trails its earliest possible one."""
        return max((item.lag for stream in self.streams for item in stream.nano_operations), default=0)

    def to_json(self) -> str:
        """The plan as JSON text, a line per nano-operation, so that two plans can be compared with diff."""
        streams = ",\n".join(_stream_to_json(stream) for stream in self.streams)
        return (
            "{\n"
            f'  "version": {FORMAT_VERSION},\n'
            f'  "name": {json.dumps(self.name)},\n'
            f'  "model": {json.dumps(self.model)},\n'
            f'  "gpu": {json.dumps(self.gpu)},\n'
            f'  "dense_batch_size": {self.dense_batch_size},\n'
            f'  "loads": {json.dumps(self.loads)},\n'
            f'  "nano_batches": {json.dumps(self.nano_batches)},\n'
            f'  "streams": [\n{streams}\n  ]\n'
            "}\n"
        )

    @classmethod
    def from_json(cls, text: str) -> PipelinePlan:
        """Read what ``to_json`` wrote, or what a person did.

        Raises:
            PlanError: the text is not JSON, or a field is missing, unknown, repeated or of the wrong type. Whether
                the plan fits a model is for ``validate`` to say.
        """
        fields = _Fields(_parse(text), "")
        version = fields.take("version", _integer)
        if version != FORMAT_VERSION:
            raise PlanError("version", f"format {version} is unknown; this release reads format {FORMAT_VERSION}")
        plan = cls(
            name=fields.take("name", _string),
            dense_batch_size=fields.take("dense_batch_size", _integer),
            nano_batches=fields.take("nano_batches", _list_of(_pair("a token range [start, stop]"))),
            streams=fields.take("streams", _list_of(_stream)),
            model=fields.take("model", _optional(_string), None),
            gpu=fields.take("gpu", _optional(_string), None),
            loads=fields.take("loads", _list_of(_pair("[decode tokens, keys]")), ()),
        )
        fields.finish()
        return plan


def _stream_to_json(stream: Stream) -> str:
    items = ",\n".join(
        f'        {{"operation": {json.dumps(item.operation)}, "nano_batch": {item.nano_batch}, "lag": {item.lag}}}'
        for item in stream.nano_operations
    )
    return (
        "    {\n"
        f'      "name": {json.dumps(stream.name)},\n'
        f'      "sms": {json.dumps(stream.sms)},\n'
        f'      "priority": {stream.priority},\n'
        f'      "nano_operations": [\n{items}\n      ]\n'
        "    }"
    )


def _parse(text: str) -> object:
    """JSON text → Python values; a repeated field is an error, where json.loads would let the last one win."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise PlanError(_shown(name), "the field stands twice in one JSON object; it may stand once")
            fields[name] = value
        return fields

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise PlanError(place, f"the plan is not valid JSON ({error.msg})") from None
    except RecursionError:
        raise PlanError("plan", "the JSON is nested too deeply to be a plan") from None
    except PlanError:
        raise
    except ValueError:  # Python refuses integers of thousands of digits
        raise PlanError("plan", "the JSON holds a number that is too long to be read") from None


# Readers of one value: (value, its path in the document) → what it stands for.
Reader = Callable[[object, str], Value]


def _wrong(path: str, expected: str, value: object) -> PlanError:
    return PlanError(path, f"must be {expected}, got {_shown(value)}")


def _shown(value: object) -> str:
    """A value of the document as an error may show it: short, on one line, without control characters."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str) and value.isidentifier() and len(value) <= 40:
        return value
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _integer(value: object, path: str) -> int:
    if type(value) is not int:  # bool is an int to isinstance
        raise _wrong(path, "an integer", value)
    return value


def _string(value: object, path: str) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise _wrong(path, "a string of printable characters", value)
    return value


def _optional(read: Reader[Value]) -> Reader[Value | None]:
    return lambda value, path: None if value is None else read(value, path)


def _list_of(read: Reader[Value]) -> Reader[tuple[Value, ...]]:
    def read_list(value: object, path: str) -> tuple[Value, ...]:
        if not isinstance(value, list):
            raise _wrong(path, "a list", value)
        return tuple(read(item, f"{path}[{index}]") for index, item in enumerate(value))

    return read_list


def _pair(expected: str) -> Reader[tuple[int, int]]:
    def read_pair(value: object, path: str) -> tuple[int, int]:
        if not isinstance(value, list) or len(value) != 2:
            raise _wrong(path, expected, value)
        return _integer(value[0], f"{path}[0]"), _integer(value[1], f"{path}[1]")

    return read_pair


def _sms(value: object, path: str) -> int | Literal["all"]:
    if value == "all":
        return "all"
    if type(value) is not int:
        raise _wrong(path, 'a number of SMs or "all"', value)
    return value


def _nano_operation(value: object, path: str) -> NanoOperation:
    fields = _Fields(value, path)
    item = NanoOperation(
        operation=fields.take("operation", _string),
        nano_batch=fields.take("nano_batch", _integer),
        lag=fields.take("lag", _integer, 0),
    )
    fields.finish()
    return item


def _stream(value: object, path: str) -> Stream:
    fields = _Fields(value, path)
    stream = Stream(
        name=fields.take("name", _string),
        nano_operations=fields.take("nano_operations", _list_of(_nano_operation)),
        sms=fields.take("sms", _sms, "all"),
        priority=fields.take("priority", _integer, 0),
    )
    fields.finish()
    return stream


_REQUIRED = object()


class _Fields:
    """A JSON object while it is read: each field is taken once, and what is left at the end is unknown."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(path or "plan", "a JSON object", value)
        self._left = dict(value)
        self._path = path
        self._known: list[str] = []

    def take(self, name: str, read: Reader[Value], default: object = _REQUIRED) -> Value:
        self._known.append(name)
        if name not in self._left:
            if default is _REQUIRED:
                raise PlanError(self._at(name), "the field is missing; it must be given")
            return cast(Value, default)
        return read(self._left.pop(name), self._at(name))

    def finish(self) -> None:
        for name in self._left:
            raise PlanError(self._at(_shown(name)), f"the field is unknown; known are {', '.join(self._known)}")

    def _at(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name
