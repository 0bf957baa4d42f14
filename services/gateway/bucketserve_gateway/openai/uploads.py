"""Forms with a file (multipart/form-data), read as they arrive: nothing is held but fields and what has just come."""

from __future__ import annotations

import logging

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from bucketserve_gateway.openai.errors import HttpError, ParameterError
from bucketserve_gateway.openai.fields import MAX_NAME_CHARACTERS

__all__ = ["Upload"]

FORM = b"multipart/form-data"
MAX_PARTS = 16
MAX_FIELD_BYTES = 1024
MAX_FILE_NAME_CHARACTERS = 255
# What clients do wrong is no event of ours.
logging.getLogger("python_multipart.multipart").disabled = True


class Upload:
    """A form that is arriving: one file, and small fields."""

    def __init__(self, content_type: bytes, *field_names: str) -> None:
        """Takes the type with the boundary, and the names that fields may have.

        Raises:
            HttpError: it is no form, or has no boundary.
        """
        kind, options = parse_options_header(content_type.decode("latin-1"))
        if kind != FORM:
            raise HttpError(415, "send the file as content-type multipart/form-data, without content-encoding")
        boundary = options.get(b"boundary", b"")
        if not 1 <= len(boundary) <= 70:
            raise HttpError(400, "multipart/form-data needs a boundary of 1 to 70 characters", "invalid_form")
        self._field_names = field_names
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_data,
                "on_part_data": self._take_data,
                "on_end": self._end,
            },
        )
        self._num_parts = 0
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._name = ""
        self._is_whole = False
        self._content = bytearray()
        self.fields: dict[str, bytearray] = {}
        """What has come of the small ones."""
        self.file_name: str | None = None
        """None: there is no file yet."""

    def write(self, data: bytes) -> None:
        """Reads more of the form.

        Raises:
            HttpError: it is no form, or not the right one.
        """
        try:
            self._parser.write(data)
        except FormParserError:
            raise HttpError(400, "the body is no multipart/form-data of this boundary", "invalid_form") from None

    def take(self, most: int) -> bytes:
        """Returns what has come of the file and was not taken, at most so many bytes."""
        taken = bytes(self._content[:most])
        del self._content[:most]
        return taken

    @property
    def num_bytes(self) -> int:
        """How much of the file has come and was not taken."""
        return len(self._content)

    def end(self) -> None:
        """Checks that all has come.

        Raises:
            HttpError: it has not.
            ParameterError: there is no file.
        """
        if not self._is_whole:
            raise HttpError(400, "the form ends before its last boundary", "invalid_form")
        if self.file_name is None:
            raise ParameterError("file", "you must provide one", "missing_required_parameter")

    def text(self, name: str) -> str | None:
        """Returns a small field; None if there is none.

        Raises:
            ParameterError: it is no UTF-8.
        """
        value = self.fields.get(name)
        try:
            return None if value is None else value.decode()
        except UnicodeDecodeError:
            raise ParameterError(name, "invalid type: a string is needed", "invalid_type") from None

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise HttpError(400, f"a form has at most {MAX_PARTS} parts", "invalid_form")
        self._disposition = b""

    def _end_header(self) -> None:
        name, value = (bytes(part) for part in self._header)
        if name.lower() == b"content-disposition":
            self._disposition = value
        elif name.lower() in (b"content-encoding", b"content-transfer-encoding") and value.lower() not in (
            b"binary",
            b"8bit",
            b"7bit",
        ):
            raise HttpError(415, "parts of a form have no encoding", "invalid_form")
        for part in self._header:
            part.clear()

    def _begin_data(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self.file_name is not None:
                raise ParameterError("file", "there is one already", "invalid_value")
            self.file_name = _base_name(options.get(b"filename", b""))
        elif self._name not in self._field_names:
            raise ParameterError(self._name[:MAX_NAME_CHARACTERS], "unknown parameter", "unknown_parameter")
        elif self._name in self.fields:
            raise ParameterError(self._name, "there is one already", "invalid_value")
        else:
            self.fields[self._name] = bytearray()

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._content += data[start:end]
            return
        field = self.fields[self._name]
        if len(field) + end - start > MAX_FIELD_BYTES:
            raise ParameterError(self._name, f"at most {MAX_FIELD_BYTES} bytes", "invalid_value")
        field += data[start:end]

    def _end(self) -> None:
        self._is_whole = True


def _base_name(raw: bytes) -> str:
    """Returns a file's name without the folders that its sender has it in."""
    name = raw.decode(errors="replace").replace("\\", "/").rpartition("/")[2]
    if len(name) > MAX_FILE_NAME_CHARACTERS or not (name or "x").isprintable():
        problem = f"a name of at most {MAX_FILE_NAME_CHARACTERS} printable characters is needed"
        raise ParameterError("file", problem, "invalid_value")
    return name or "file"
