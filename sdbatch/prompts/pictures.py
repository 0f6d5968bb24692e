"""The pictures of rows: from the table's cells or from where those lead, fitted to the images.

A cell holds a file, or the path or URL of one. For a shard no file is fetched twice, and only a few
are in memory at a time. What cannot be read is the failure of its rows and of no others.
"""

import base64
import binascii
import hashlib
import itertools
import os
import posixpath
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from sdbatch import storage
from sdbatch.errors import StorageError, one_line, short_repr
from sdbatch.inputs import file_kinds
from sdbatch.inputs.picture import read_size
from sdbatch.inputs.prepare import prepare
from sdbatch.job import PICTURES, Sampling, describe_error
from sdbatch.prompts.file_info import MOST_PICTURE
from sdbatch.prompts.types import cells_of
from sdbatch.sampling import SIDE_MULTIPLE
from sdbatch.schema import INPUTS
from sdbatch.urls import without_secrets

_HEAD = 4096  # bytes that say whether a file is a picture
_NO_ROOM = "must have space left for masks from elsewhere. Point TMPDIR to another folder."
THREADS = 8  # that fetch files: the time is the network's
_DECODING = threading.BoundedSemaphore(2)  # a photo of 12 megapixels is 36 MB when it is decoded
_NO_MATTER = ("negative_prompt", "seed", "loras", "variation_seed", "prompt_b", "seed_b", "mix")
_FIT = tuple(name for name in Sampling.model_fields if name not in _NO_MATTER)

Cell: TypeAlias = bytes | str | None  # a file, where one is, or nothing
Requests: TypeAlias = list[dict[str, Any]]


class Pictures:
    """Adds the pictures of rows to their requests.

    Args:
        columns: our name -> the table's name.
        folder: that paths in cells are relative to.
        size_from_image: rows that set no side have the size of their picture.
    """

    def __init__(self, columns: dict[str, str], folder: str, size_from_image: bool) -> None:
        self._columns = columns
        self._folder = folder
        self._size_from_image = size_from_image

    def add(self, resolved: Requests, row_of: NDArray[Any], tables: Iterable[pa.Table]) -> None:
        """Set the inputs and their hashes in requests, or their error.

        Args:
            resolved: the requests; those with an error stay as they are.
            row_of: the number of each one's row.
            tables: the columns with pictures of all rows from number 0 on, a few at a time.
        """
        rows: dict[int, Requests] = defaultdict(list)
        for request, row in zip(resolved, row_of.tolist(), strict=True):
            if request["error"] is None:
                rows[row].append(request)
        with ExitStack() as stack:
            files = _Files(self._folder, stack)
            pool = stack.enter_context(ThreadPoolExecutor(THREADS, "sdbatch-pictures"))
            running: deque[Future[None]] = deque()
            for image, masks in self._grouped(rows, tables):
                running.append(pool.submit(self._add, files, image, masks))
                if len(running) > THREADS:
                    running.popleft().result()
            for each in running:
                each.result()

    def find_broken(self, tables: Iterable[pa.Table]) -> Iterator[str | None]:
        """Yield for each row why it cannot be drawn, as far as the beginning of local files says.

        Args:
            tables: columns with pictures, all or some, a few rows at a time.
        """
        for rows in tables:
            has_images = self._columns.get("image") in (None, *rows.column_names)
            read = _read_cells if has_images else _read_each
            for cells in self._cells([rows]):
                try:
                    for column, named in zip(PICTURES, read(cells), strict=True):
                        if isinstance(named, str) and storage.is_local(locate(named, self._folder)):
                            _check_beginning(column, named, self._folder)
                except ValueError as error:
                    yield str(error)
                else:
                    yield None

    def relative_names(self, tables: Iterable[pa.Table]) -> Iterator[str]:
        """Yield the paths in cells that are relative to the folder of the table."""
        for cell in itertools.chain.from_iterable(self._cells(tables)):
            is_path = isinstance(cell, str) and cell and not cell.startswith("data:")
            if is_path and locate(cell, self._folder) != cell:
                yield cell

    def _grouped(
        self, rows: dict[int, Requests], tables: Iterable[pa.Table]
    ) -> Iterator[tuple[bytes | str, dict[Cell, Requests]]]:
        """Yield each image with the requests of each of its masks.

        Those that are only named come last, each of them once.
        """
        named: dict[str, dict[Cell, Requests]] = {}
        for number, cells in enumerate(self._cells(tables)):
            requests = rows.get(number)
            if not requests:
                continue
            try:
                image, mask = _read_cells(cells)
            except ValueError as error:
                _fail(requests, error)
                continue
            if isinstance(image, str) and not isinstance(mask, bytes):
                named.setdefault(image, {}).setdefault(mask, []).extend(requests)
            elif image is not None:
                yield image, {mask: requests}
        yield from named.items()

    def _cells(self, tables: Iterable[pa.Table]) -> Iterator[tuple[Any, ...]]:
        """Yield the two cells of each row."""
        for rows in tables:
            nulls = [None] * len(rows)
            names = [self._columns.get(ours, "") for ours in PICTURES]
            columns = [
                cells_of(rows, name) if name in rows.column_names else nulls for name in names
            ]
            yield from zip(*columns, strict=True)

    def _add(self, files: "_Files", image: bytes | str, masks: dict[Cell, Requests]) -> None:
        """Add an image to requests, with each of its masks."""
        try:
            file = files.image(image)
        except ValueError as error:
            for requests in masks.values():
                _fail(requests, error)
            return
        for mask, requests in masks.items():
            try:
                mask_file = files.mask(mask)
            except ValueError as error:
                _fail(requests, error)
                continue
            if self._size_from_image:
                _set_sizes(file, [each for each in requests if not each["has_size"]])
            _fit(file, mask_file, [each for each in requests if each["error"] is None])


def _read_cells(cells: tuple[Any, ...]) -> tuple[Cell, Cell]:
    """Return the image and the mask of a row; a ValueError if it has none, nor where one is."""
    image, mask = _read_each(cells)
    if image is None and mask is not None:
        raise ValueError("mask_image = given without an image: must have one")
    return image, mask


def _read_each(cells: tuple[Any, ...]) -> tuple[Cell, Cell]:
    """Return the image and the mask of a row, also where one of the two is not known."""
    image, mask = map(_read_cell, PICTURES, cells)
    return image, mask


def _read_cell(column: str, cell: Any) -> Cell:
    """Return what a cell holds.

    Raises:
        ValueError: no picture, nor where one is.
    """
    if isinstance(cell, dict) and cell.keys() == {"bytes", "path"}:
        file = cell["bytes"]
        if isinstance(file, str) and file:
            raise ValueError(
                f"{column}.bytes = {short_repr(file)}: must be binary. In a table of text leave it "
                f"null, and set the path"
            )
        cell = file or cell["path"]
    if cell is None or cell in ("", b""):
        return None
    if isinstance(cell, str) and cell.startswith("data:"):
        head, _, data = cell.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not base64")
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                f"{column} = {short_repr(cell)}: must be a data URI in base64, such as "
                f"data:image/png;base64,iVBORw0..."
            ) from error
    if isinstance(cell, bytes):
        _check_size(column, cell)
    if isinstance(cell, bytes | str):
        return cell
    raise ValueError(
        f"{column} = {short_repr(cell)}: must be a path, a URL or a data URI of a picture"
    )


def _check_size(column: str, file: bytes) -> None:
    if len(file) > MOST_PICTURE:
        raise ValueError(
            f"{column} = a file of more than {MOST_PICTURE // 2**20} MiB: must be smaller"
        )


class _Files:
    """The files that cells name; masks that are fetched from elsewhere are kept on the disk."""

    def __init__(self, folder: str, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._kept: str | None = None
        self._errors: dict[str, ValueError] = {}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def image(self, cell: bytes | str) -> bytes:
        """Return a picture's file; a ValueError if it cannot be read."""
        return cell if isinstance(cell, bytes) else self._fetch("image", cell)

    def mask(self, cell: Cell) -> bytes | None:
        """Return a mask's file, which several pictures may have."""
        if not isinstance(cell, str):
            return cell
        if storage.is_local(locate(cell, self._folder)):
            return self._fetch("mask_image", cell)
        with self._lock:
            lock = self._locks[cell]
            self._kept = self._kept or self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="sdbatch-")
            )
        path = os.path.join(self._kept, hashlib.sha256(cell.encode()).hexdigest())
        with lock:
            if cell in self._errors:
                raise self._errors[cell]
            if not os.path.exists(path):
                try:
                    data = self._fetch("mask_image", cell)
                except ValueError as error:
                    self._errors[cell] = error
                    raise
                with storage.storage_errors(path, _NO_ROOM), open(path, "wb") as file:
                    file.write(data)
                return data
            with open(path, "rb") as file:
                return file.read()

    def _fetch(self, column: str, cell: str) -> bytes:
        file = _read_named(column, cell, self._folder, MOST_PICTURE + 1)
        _check_size(column, file)
        return file


def _check_beginning(column: str, cell: str, folder: str) -> None:
    """Raise a ValueError if the beginning of a file is not that of a picture."""
    head = _read_named(column, cell, folder, _HEAD)
    if file_kinds.name_picture(head) is None:
        raise ValueError(f"{column} = {file_kinds.refuse(head)}")


def _read_named(column: str, cell: str, folder: str, most: int) -> bytes:
    """Return a file that a cell names, or the first of its bytes; a ValueError if it cannot be."""
    url = locate(cell, folder)
    try:
        return storage.read_whole(url, partial(_read, most=most))
    except StorageError as error:
        reason = str(error).removeprefix(f"{without_secrets(url)} = ").rstrip(".")
        raise ValueError(f"{column} = {short_repr(cell)}: {reason}") from error
    except Exception as error:  # noqa: BLE001  a cell decides which filesystem reads it
        reason = one_line(error).strip(": .") or type(error).__name__
        raise ValueError(
            f"{column} = {short_repr(cell)}: {reason}: must be reachable. Check the address"
        ) from None


def _read(fs: Any, path: str, most: int) -> bytes:
    # Of HTTP as a stream whose size counts as known, so that one request is sent.
    options = {"block_size": 0, "size": 1} if "http" in fs.protocol else {}
    parts, left = [], most
    with fs.open(path, "rb", **options) as file:
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)


def locate(reference: str, folder: str) -> str:
    """Return the path or URL of a file that a cell of a table in `folder` names."""
    if "://" in reference or os.path.isabs(reference):
        return reference
    inside, *around = folder.split("::")  # zip://FOLDER::s3://BUCKET/FILE.zip
    return "::".join([posixpath.join(inside, reference), *around])


def folder_of(url: str) -> str:
    """Return the folder of a table's file."""
    inside, *around = url.split("::")
    inside = inside.partition("?")[0] if "://" in inside else inside
    return "::".join([posixpath.dirname(inside), *around])


def _set_sizes(image: bytes, requests: Requests) -> None:
    """Set height and width of requests to those of their picture, rounded down."""
    if not requests:
        return
    try:
        with _DECODING:
            width, height = read_size(image)
        sides = {
            "height": height // SIDE_MULTIPLE * SIDE_MULTIPLE,
            "width": width // SIDE_MULTIPLE * SIDE_MULTIPLE,
        }
        for request in requests:
            request.update(sides)
        Sampling.model_validate(sides)
    except ValidationError as error:
        found = f"image = {width} x {height} pixels, whose size prompts.size_from_image uses"
        _fail(requests, ValueError(f"{found}: {describe_error(error).rstrip('.')}"))
    except ValueError as error:
        _fail(requests, error)


def _fit(image: bytes, mask: bytes | None, requests: Requests) -> None:
    """Fit the files to the image of each request; those that agree in all but text share it."""
    alike: dict[str, Requests] = defaultdict(list)
    for request in requests:
        alike[repr([request[name] for name in _FIT])].append(request)
    for same in alike.values():
        values = {name: same[0][name] for name in Sampling.model_fields}
        try:
            with _DECODING:
                prepared = prepare(Sampling.model_validate(values), image, mask)
                inputs = prepared.to_bytes()
        except ValidationError as error:  # of the picture's size with the row's other values
            _fail(same, ValueError(describe_error(error).rstrip(".")))
            continue
        except ValueError as error:
            _fail(same, error)
            continue
        for request in same:
            request[INPUTS.name] = inputs
            request["image_sha256"] = prepared.sha256["image"]
            request["mask_sha256"] = prepared.sha256.get("mask")


def _fail(requests: Requests, error: ValueError) -> None:
    for request in requests:
        request["error"] = str(error)
