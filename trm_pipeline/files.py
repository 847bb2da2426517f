"""Where files go; files that are there as a whole or not at all, and the state of a training run in one of them."""

from __future__ import annotations

import argparse
import codecs
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

CACHE = "~/.cache/trm_losses"
_FORMAT = 2


def folder_argument(text: str) -> Path:
    """A folder out of a command line. A home is looked for only if the folder lies in it: not every user has one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no home folder for {text}; give another folder") from None


def text_of(path: Path, what: str) -> str:
    """The text of a file; ``what`` names its kind in a message.

    Raises:
        FileNotFoundError: no such file. ValueError: another encoding than UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the {what} {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save it as UTF-8, a spreadsheet as 'CSV UTF-8'") from None


def check_writable(folder: Path, option: str) -> None:
    """Refuse at the door a folder that cannot be made or written into."""
    place = next((path for path in (folder, *folder.parents) if os.path.exists(path)), Path())
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: {folder} must be a folder that can be written into, {place} is none; give another folder")


def hold(folder: Path, option: str) -> IO[str]:
    """The lock of a folder that one process at a time may write into; held until it is closed or the process ends."""
    lock = (folder / ".lock").open("a", encoding="utf-8")
    try:
        import fcntl

        # Of this process alone. With flock, image readers that outlive a killed run for some seconds would hold the folder too.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"{option}: {folder} must be a folder that no other run writes into; wait for its end, or give another folder"
        ) from None
    except (ImportError, OSError):
        pass  # a file system without locks, or Windows: nothing is held
    return lock


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, which takes its place as a whole.

    Where writing fails, such as on a full disk, what was there before stays and nothing else does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """A hidden folder in ``folder``, which is made where it is missing; what is left in it at the end goes with it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder, ignore_cleanup_errors=True) as made:
        yield Path(made)


@contextmanager
def making_folder(folder: Path, there: Callable[[], bool]) -> Iterator[Path]:
    """A folder to fill beside ``folder``, whose name it gets as a whole.

    Nothing of it stays where filling it fails, or where another process was quicker, so that what is wanted is ``there``.
    """
    with scratch_in(folder.parent) as partial:
        yield partial
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not there():
                raise


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    """JSON, replaced as a whole."""
    _replace(path, f"{json.dumps(value, indent=1)}\n".encode())


def read_json(path: Path, what: str = "JSON that a run wrote", fix: str = "start the run afresh", **hooks: Any) -> Any:
    """What a file of JSON holds; ``hooks`` are those of :func:`json.loads`."""
    text = ""
    try:
        with path.open("rb") as file:
            for part in codecs.iterdecode(iter(lambda: file.read(1 << 22), b""), "utf-8-sig"):
                text += part  # grows in place: a file of COCO decoded as a whole would be in memory twice
        return json.loads(text, **hooks)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be {what}, and cannot be read ({error}); {fix}") from error


def tensor_digest(tensor: Tensor) -> str:
    """Hash of a tensor's shape, type and values."""
    content = tensor.detach().cpu().contiguous()
    name = f"{tuple(content.shape)} {content.dtype}".encode()
    return hashlib.blake2b(name + content.view(torch.uint8).numpy().tobytes(), digest_size=12).hexdigest()


def differences(wanted: object, found: object, name: str = "") -> list[str]:
    """What two JSON-like values differ in, as ``name: found, now wanted``."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        keys = dict.fromkeys([*wanted, *found])
        return [line for key in keys for line in differences(wanted.get(key), found.get(key), str(key))]
    wanted, found = json.dumps(wanted), json.dumps(found)
    return [] if wanted == found else [f"{name} was {found}, now {wanted}"]


@dataclass(frozen=True)
class Checkpoint:
    """Where the state of a run in progress is kept, and what it was made with: preset, labels, weights."""

    path: Path
    made_with: dict[str, Any]

    def save(self, state: Mapping[str, Any]) -> None:
        """Write tensors and plain values; the file of the epoch before stays until this one is complete."""
        content = io.BytesIO()  # not a file: on a full disk torch would hide the error behind one of its own
        torch.save({"format": _FORMAT, "made_with": json.dumps(self.made_with), **state}, content)
        _replace(self.path, content.getvalue())

    def load(self) -> dict[str, Any] | None:
        """The state to go on from; None where there is none."""
        if not self.path.exists():
            return None
        content = io.BytesIO(self.path.read_bytes())  # not the file: to torch one cut short is an invalid argument
        try:
            state: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
            found, version = json.loads(state.pop("made_with")), state.pop("format", 0)
        except Exception as error:  # whatever bytes may lead to; code that they hold is refused, not run
            raise ValueError(
                f"{self.path} must be a checkpoint of this run, and cannot be read ({type(error).__name__}); delete it"
            ) from error
        if version != _FORMAT:
            raise ValueError(
                f"{self.path} is of version {version}, this program of {_FORMAT}; start without --resume, or delete it"
            )
        if changed := differences(json.loads(json.dumps(self.made_with)), found):
            raise ValueError(f"{self.path} is of another run ({'; '.join(changed)}); start without --resume, or delete it")
        return state
