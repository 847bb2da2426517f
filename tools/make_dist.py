"""Builds sdist and wheel, the same bytes from the same commit: ``python tools/make_dist.py dist`` (``make dist``).

Built are the files that git knows, in a folder of their own: what lies about stays out. Times are those of the last commit, or of
SOURCE_DATE_EPOCH; owners and permissions are always the same.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 6_000_000
"""Bytes of a wheel, at most."""

_PASSED = {".venv", "build", "dist", "runs"}


def _git(*words: str) -> str | None:
    """What git says of this folder; None without git, or outside of a repository."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def sources() -> list[Path]:
    """The files to build from, below the repository; in an unpacked sdist all that are there."""
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed is not None:
        found = [Path(name) for name in listed.split("\0") if name]
    else:
        found = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        found = [path for path in found if not (_PASSED & set(path.parts) or path.suffix == ".pyc" or ".egg-info" in str(path))]
    return sorted(path for path in found if (ROOT / path).is_file() and not (ROOT / path).is_symlink())


def epoch() -> int:
    """Seconds since 1970 of the files that are built."""
    said = os.environ.get("SOURCE_DATE_EPOCH") or _git("log", "-1", "--format=%ct")
    return int(said) if said else int((ROOT / "setup.cfg").stat().st_mtime)


def repack(path: Path, when: int) -> None:
    """An sdist written again: members in order, with one time, one owner and two kinds of permissions."""
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member)) for member in archive.getmembers()]
        contents = sorted(((member, b"" if file is None else file.read()) for member, file in members), key=lambda x: x[0].name)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, content in contents:
            member.mtime, member.uid, member.gid, member.uname, member.gname = when, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            archive.addfile(member, io.BytesIO(content))
    with path.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=when) as zipped:
        zipped.write(packed.getvalue())


def build(output: Path) -> tuple[Path, Path]:
    """Sdist and wheel in ``output``; the wheel is made from the sdist.

    Raises:
        RuntimeError: the build failed, or the wheel is larger than :data:`MOST`.
    """
    when = epoch()
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(when)}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "source"
        for path in sources():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, copy / path)
            (copy / path).chmod(0o755 if os.access(ROOT / path, os.X_OK) else 0o644)
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(Path(folder) / "dist"), str(copy)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, umask=0o022)
        if done.returncode:
            raise RuntimeError(f"the build failed:\n{done.stdout}{done.stderr}")
        output.mkdir(parents=True, exist_ok=True)
        for path in (Path(folder) / "dist").iterdir():
            shutil.copyfile(path, output / path.name)
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    repack(sdist, when)
    if wheel.stat().st_size > MOST:
        raise RuntimeError(f"{wheel.name} must have at most {MOST:,} bytes, got {wheel.stat().st_size:,}")
    return sdist, wheel


def main() -> None:
    """Build into a folder that is emptied before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    for old in (*output.glob("*.whl"), *output.glob("*.tar.gz")):
        old.unlink()
    for path in build(output):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
