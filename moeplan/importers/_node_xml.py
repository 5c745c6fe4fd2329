"""XML from strangers as plain elements that know their line: no document type, no entities, nothing deep or endless.

Python's parsers expand entities and take any depth; here the guards act while the text is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from xml.parsers import expat

from moeplan.errors import CatalogueError
from moeplan.importers._node_files import MAX_STRING, plain, refusal, shown

MAX_DEPTH, MAX_CHILDREN, MAX_ELEMENTS = 32, 640, 20_000
"""640 children is NCCL's own limit (MAX_SUBS in NCCL 2.30.7, src/graph/xml.h); real trees are about 8 deep."""
_DECLARATION = re.compile(r"<!\s*(DOCTYPE|ENTITY)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """An element with its attributes, its children in order, and where it stands."""

    where: str
    line: int
    name: str
    attributes: Mapping[str, str]
    children: list[Element] = field(default_factory=list)

    def named(self, name: str) -> list[Element]:
        """The children of a name."""
        return [child for child in self.children if child.name == name]

    def text(self, key: str, default: str | None = None) -> str:
        """The text of an attribute; without it `default`, and without that an error."""
        found = self.attributes.get(key, default)
        if found is None:
            raise self.refuse(key, "is missing; add it, or take the file that NCCL_TOPO_DUMP_FILE writes")
        return found

    def whole(self, key: str, *, least: int, most: int, default: int | None = None) -> int:
        """A whole number, decimal or 0x; without it `default`, and without that an error."""
        if key not in self.attributes and default is not None:
            return default
        found = self.text(key)
        value = int(found, 0) if re.fullmatch(r"[+-]?(0[xX][0-9a-fA-F]{1,16}|[1-9][0-9]{0,17}|0)", found) else None
        if value is None or not least <= value <= most:
            allowed = f"allowed is a whole number from {least} to {most}"
            raise self.refuse(key, f"found {shown(found)}, {allowed}; correct the attribute")
        return value

    def maybe(self, key: str, *, least: int, most: int) -> int | None:
        """A whole number, or None where the attribute is absent."""
        return self.whole(key, least=least, most=most) if key in self.attributes else None

    def refuse(self, key: str, sentence: str) -> CatalogueError:
        """The error for one attribute."""
        return refusal(self.where, self.line, f"<{self.name}> {key}", sentence)


def parse(text: str, where: str) -> Element:
    """The root of an XML text. Raises CatalogueError with file, line, found, allowed and remedy."""
    if (match := _DECLARATION.search(text)) is not None:
        line = text.count("\n", 0, match.start()) + 1
        found = f"<!{match.group(1).upper()}"
        raise refusal(where, line, found, "document types and entities are not read; remove it, NCCL writes none")
    builder, parser = _Builder(where), expat.ParserCreate()
    builder.parser = parser
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.buffer_text = True
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        said = expat.ErrorString(error.code)
        raise refusal(where, error.lineno, "not XML", f"{said}; mend it there, or dump the topology again") from None
    assert builder.root is not None
    return builder.root


class _Builder:
    """The elements as the parser meets them, with the guards."""

    def __init__(self, where: str) -> None:
        self.where, self.count = where, 0
        self.parser: expat.XMLParserType
        self.root: Element | None = None
        self.open: list[Element] = []

    def start(self, name: str, attributes: dict[str, str]) -> None:
        line = self.parser.CurrentLineNumber
        self._check(name, attributes, line)
        texts = {key: plain(value) for key, value in attributes.items()}
        element = Element(where=self.where, line=line, name=plain(name), attributes=texts)
        if self.open:
            self.open[-1].children.append(element)
        else:
            self.root = element
        self.open.append(element)
        self.count += 1

    def end(self, name: str) -> None:
        self.open.pop()

    def _check(self, name: str, attributes: dict[str, str], line: int) -> None:
        for text in (name, *attributes, *attributes.values()):
            if len(text) > MAX_STRING:
                sentence = f"a text of {len(text)} characters, allowed are {MAX_STRING}; shorten it"
                raise refusal(self.where, line, f"<{shown(name)[1:-1]}>", sentence)
        if len(self.open) >= MAX_DEPTH:
            raise refusal(self.where, line, f"<{plain(name)}>", f"nested more than {MAX_DEPTH} deep; flatten it")
        if self.open and len(self.open[-1].children) >= MAX_CHILDREN:
            parent = f"<{self.open[-1].name}>"
            raise refusal(self.where, line, parent, f"more than {MAX_CHILDREN} children, NCCL's limit; split it")
        if self.count >= MAX_ELEMENTS:
            raise refusal(
                self.where, line, f"<{plain(name)}>", f"more than {MAX_ELEMENTS} elements; give one machine's"
            )
