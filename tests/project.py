"""A clone of the project in which commands run as a user would type them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from src import yaml12

ROOT = Path(__file__).parent.parent


class Project:
    """A folder with a clone, and the commands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: str, code: int | None = 0, timeout: float = 300, **env: str) -> str:
        """Run a command and return all that it printed; it must end with `code`."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, "PATH": path, "COLUMNS": "200", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
        )
        assert code is None or done.returncode == code, done.stdout
        return done.stdout

    def dvc(self, *words: str, code: int | None = 0, **env: str) -> str:
        return self.run("dvc", *words, code=code, **env)

    def git(self, *words: str) -> str:
        return self.run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", *words)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "state")

    def set(self, **values: object) -> None:
        """Set params, written as section__key=value or section__section__key=value."""
        file = self.folder / "params.yaml"
        params = yaml12.read(file)
        for name, value in values.items():
            *sections, key = name.split("__")
            section = params
            for inner in sections:
                section = section[inner]
            section[key] = value
        file.write_text(yaml12.dump(params), encoding="utf-8")

    def json(self, name: str) -> dict[str, object]:
        loaded: dict[str, object] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        return loaded

    def bytes(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def clone(folder: Path) -> Project:
    """Copy the project as it stands, with what is not committed yet, and commit it as one state."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    project = Project(folder)
    project.git("init", "--quiet")
    project.commit()
    return project


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]
