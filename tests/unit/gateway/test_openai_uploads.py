"""Forms with files, in whatever pieces they come."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketserve.core.errors import BucketServeError
from bucketserve_gateway.openai.errors import status_of
from bucketserve_gateway.openai.uploads import Upload

TYPE = b"multipart/form-data; boundary=b"


def form(
    content: bytes, disposition: bytes = b'form-data; name="file"; filename="a.jsonl"', more: bytes = b""
) -> bytes:
    purpose = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    return purpose + b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\n" + content + b"\r\n--b--\r\n"


def read(body: bytes, cuts: list[int] | None = None) -> tuple[Upload, bytes]:
    upload = Upload(TYPE, "purpose")
    found = b""
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts or [])})
    for start, end in itertools.pairwise(places):
        upload.write(body[start:end])
        found += upload.take(7)
    while upload.num_bytes:
        found += upload.take(7)
    upload.end()
    return upload, found


@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.lists(st.sampled_from([b"\r", b"\n", b"-", b"--", b"b", b"\r\n--", b"\r\n-b", b"x", b"\0"])).map(b"".join),
    ),
    cuts=st.lists(st.integers(0, 500), max_size=20),
)
def test_a_file_is_what_was_sent_however_it_comes(content: bytes, cuts: list[int]) -> None:
    if b"\r\n--b" in b"\r\n" + content:
        return
    upload, found = read(form(content), cuts)
    assert found == content
    assert (upload.file_name, upload.text("purpose")) == ("a.jsonl", "batch")


@given(body=st.one_of(st.binary(max_size=300), st.binary(max_size=60).map(lambda noise: form(noise, noise))))
def test_noise_is_refused_as_a_fault_of_its_sender(body: bytes) -> None:
    try:
        read(body)
    except BucketServeError as error:
        assert 400 <= status_of(error) < 500


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        (b'filename="../../etc/passwd"', "passwd"),
        (b'filename="C:\\\\temp\\\\a.jsonl"', "a.jsonl"),
        (b'filename="a/"', "file"),
        (b'filename=""', "file"),
        (b"", "file"),
        ('filename="größe 🙂.jsonl"'.encode(), "größe 🙂.jsonl"),
        (b'filename="\xff.jsonl"', "\ufffd.jsonl"),
    ],
)
def test_names_of_files_are_without_folders(given_name: bytes, name: str) -> None:
    disposition = b'form-data; name="file"; ' + given_name
    assert read(form(b"{}", disposition))[0].file_name == name


def test_what_was_taken_is_not_held() -> None:
    upload = Upload(TYPE, "purpose")
    upload.write(form(b"x" * 1000).removesuffix(b"\r\n--b--\r\n"))
    assert upload.take(600) == b"x" * 600
    assert upload.num_bytes == 400
    assert upload.take(600) == b"x" * 400
    with pytest.raises(BucketServeError, match="last boundary"):
        upload.end()
