"""Write an OpenVINO IR whose weights stream from the checkpoint into the .bin: peak memory is a slice, not a model.

OpenVINO's own writer wants every constant in memory. Here a model is built over *ghosts*: constants of the right type
and shape over untouched memory, which the kernel backs by no page. OpenVINO writes the .xml from them, each ghost gets
a place of its own in a .bin of our layout, and whoever knows the values writes them there, slice by slice.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

XML, BIN = "openvino_model.xml", "openvino_model.bin"
_ALIGNMENT = 64
"""Of every constant in the .bin: a cache line, so that a mapped weight is aligned for every kernel."""

BITS = {"f32": 32, "f16": 16, "bf16": 16, "i64": 64, "i32": 32, "u8": 8, "i8": 8, "u4": 4, "i4": 4, "boolean": 8}
"""Width of OpenVINO's element types, by the name that the .xml has."""


@dataclass
class _Place:
    size: int
    offset: int = -1
    written: int = 0


class Ghosts:
    """The constants of a model under construction that have a place in the .bin and no values yet."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._memory: list[mmap.mmap] = []
        self.kept: set[str] = set()
        """Names of Converts that plugins leave where they are: without the mark each compiles its weights to fp32."""

    def constant(self, name: str, shape: tuple[int, ...], kind: str) -> Any:
        """An OpenVINO Constant node of the element type `kind` (`u4`, `f16`, ...). Its bytes come by `Bin.write`."""
        import openvino as ov

        if name in self._places:
            raise ValueError(f"constant '{name}' is declared twice")
        size = -(-int(np.prod(shape, dtype=np.int64)) * BITS[kind] // 8)
        self._places[name] = _Place(size)
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.append(memory)  # OpenVINO points into it until the .xml is written
        flat = np.frombuffer(memory, np.uint8, size)
        if kind == "u8":
            tensor = ov.Tensor(flat.reshape(shape), shared_memory=True)
        else:
            tensor = ov.Tensor(flat, ov.Shape(list(shape)), getattr(ov.Type, kind))
        node = ov.op.Constant(tensor, shared_memory=True)
        node.set_friendly_name(name)
        return node

    def write(self, model: Any, out: Path, fill: Callable[[Bin], None], name: str = "openvino_model") -> None:
        """Write `name`.xml and `name`.bin; `fill` brings the values of every ghost. ValueError if it leaves one out."""
        from openvino.passes import Manager, Serialize

        _name(model)
        values = {
            node.get_friendly_name(): bytes(np.ascontiguousarray(node.data).reshape(-1).view(np.uint8).data)
            for node in model.get_ops()
            if node.get_type_name() == "Constant" and node.get_friendly_name() not in self._places
        }
        xml = out / f"{name}.xml"
        manager = Manager()
        manager.register_pass(Serialize(str(xml), "/dev/null"))
        manager.run_passes(model)
        size = self._lay_out(xml, values)
        with (out / f"{name}.bin").open("wb") as file:
            file.truncate(size)
            target = Bin(file, self._places)
            for each, value in values.items():
                target.write(each, np.frombuffer(value, np.uint8))
            fill(target)
        for each, place in self._places.items():
            if place.written != place.size:
                raise ValueError(f"constant '{each}': {place.written} of {place.size} bytes were written")

    def _lay_out(self, xml: Path, values: dict[str, bytes]) -> int:
        """Give every constant of the .xml its place, in the order in which they stand there; the .bin's size."""
        tree = ElementTree.parse(xml)
        end = 0
        for layer in tree.iterfind("layers/layer[@type='Const']"):
            data, name = layer.find("data"), layer.attrib["name"]
            assert data is not None
            place = self._places.setdefault(name, _Place(len(values.get(name, b""))))
            if place.size != int(data.attrib["size"]):
                raise ValueError(f"constant '{name}' has {place.size} bytes, the .xml says {data.attrib['size']}")
            place.offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = place.offset + place.size
            data.attrib["offset"] = str(place.offset)
        for layer in tree.iterfind("layers/layer[@type='Convert']"):
            if layer.attrib["name"] in self.kept:
                mark = ElementTree.Element("rt_info")
                ElementTree.SubElement(mark, "attribute", name="decompression", version="0")
                layer.insert(1, mark)  # behind <data>
        for name in [name for name, place in self._places.items() if place.offset < 0]:
            raise ValueError(f"constant '{name}' is not part of the model")
        tree.write(xml, encoding="utf-8", xml_declaration=True)
        return end


class Bin:
    """The .bin being filled."""

    def __init__(self, file: BinaryIO, places: dict[str, _Place]) -> None:
        self._file = file
        self._places = places

    def write(self, name: str, values: npt.NDArray[Any], offset: int = 0) -> int:
        """Put an array's bytes (C order) at `offset` bytes into a constant. Returns where the next would go."""
        place = self._places[name]
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if offset + flat.size > place.size:
            raise ValueError(f"constant '{name}' has {place.size} bytes, {offset + flat.size} were written")
        self._file.seek(place.offset + offset)
        self._file.write(flat.data)
        place.written += flat.size
        return offset + int(flat.size)


def _name(model: Any) -> None:
    """Name every node that has OpenVINO's running number for a name by its place: the number counts what else the
    process has made."""
    for index, node in enumerate(model.get_ordered_ops()):
        if re.fullmatch(rf"{node.get_type_name()}_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}.{index}")


def save(model: Any, out: Path, *, half: bool = False, name: str = "openvino_model") -> None:
    """Write a model whose weights are in memory; `half` stores those that are fp32 in fp16. The bytes are the same from
    run to run: running numbers in names are replaced, and so is what OpenVINO notes of paths."""
    import openvino as ov

    _name(model)
    ov.save_model(model, out / f"{name}.xml", compress_to_fp16=half)
