"""docker/Dockerfile: hadolint, its pins, its documentation, and a real build that trains."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
IMAGE_EXTRAS = ("s3", "fast", "flash")


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_library_is_pinned_to_a_version_that_the_project_allows():
    lines = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [word for name in IMAGE_EXTRAS for word in project["optional-dependencies"][name]]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"docker/constraints.txt lacks {name}"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement}: {pins[name]}"
    assert f'ARG TORCH="torch=={pins["torch"]}+cpu ' in DOCKERFILE.read_text()


def test_the_documentation_builds_with_arguments_that_there_are():
    known = set(re.findall(r"^ARG (\w+)", DOCKERFILE.read_text(), re.M))
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "docker.md").read_text(), re.S)
    commands = [shlex.split(line) for line in "".join(blocks).splitlines()]
    builds = [command for command in commands if command[1] == "build"]
    assert len(builds) == 3
    for command in builds:
        assert ROOT / command[command.index("-f") + 1] == DOCKERFILE
        given = {word.split("=")[0] for before, word in pairwise(command) if before == "--build-arg"}
        assert given <= known
    assert {command[0] for command in commands} == {"docker"}


class Buildah:
    """A builder without an engine, with its images in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self.command = ["buildah", "--root", folder / "store", "--runroot", folder / "runroot"]
        self.command += ["--storage-driver", os.environ.get("STORAGE_DRIVER", "overlay")]

    def __call__(self, *words: str | Path) -> str:
        done = subprocess.run([*self.command, *words], capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout.strip()

    def build(self, tag: str, context: Path, *words: str) -> None:
        policy = str(self.folder / "policy.json")
        self("bud", "--isolation", "chroot", "--signature-policy", policy, "-t", tag, *words, str(context))

    def run(self, container: str, *words: str) -> str:
        at = words.index("--")
        return self("run", "--isolation", "chroot", *words[:at], container, *words[at:])


def pip_settings() -> dict[str, str]:
    """Where pip of this machine looks for packages, and what else it is told."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key.split(".")[-1]: value for key, value in re.findall(r"^(\S+)='(.*)'$", listed, re.M)}


def debian(buildah: Buildah, folder: Path) -> list[str]:
    """Bare Debian as `localhost/debian`, with pip's settings of this machine as `localhost/debian-pip`.

    Returns the volumes in which pip finds what these settings name.
    """
    (folder / "bare").mkdir()
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", folder / "root"], check=True, stdout=2)
    subprocess.run(["tar", "-C", folder / "root", "-cf", folder / "bare" / "root.tar", "."], check=True)
    (folder / "bare" / "Containerfile").write_text("FROM scratch\nADD root.tar /\n")
    buildah.build("localhost/debian", folder / "bare")
    settings = pip_settings()
    named = {place for value in settings.values() for place in re.findall(r"(?<![\w/])/+[\w./-]+", value)}
    (folder / "pip").mkdir()
    lines = ["FROM localhost/debian"]
    if certificate := settings.pop("cert", None):
        shutil.copy(certificate, folder / "pip" / "host.crt")
        lines += ["COPY host.crt /host.crt", "ENV PIP_CERT=/host.crt"]
    lines += [f'ENV PIP_{key.upper().replace("-", "_")}="{value}"' for key, value in settings.items()]
    (folder / "pip" / "Containerfile").write_text("\n".join(lines) + "\n")
    buildah.build("localhost/debian-pip", folder / "pip")
    folders = {Path(re.sub("^/+", "/", place)) for place in named if Path(place).is_dir()}
    # The pages of an index name files beside it.
    whole = sorted({folder.parent if folder.name == "simple" else folder for folder in folders})
    return [f"--volume={folder}:{folder}:ro" for folder in whole]


@pytest.fixture(scope="module")
def container(tmp_path_factory) -> Iterator[tuple[Buildah, str]]:
    """A container of the CPU image, built by the Dockerfile on Debian."""
    folder = tmp_path_factory.mktemp("docker")
    buildah = Buildah(folder)
    volumes = debian(buildah, folder)
    arguments = {"BUILD": "localhost/debian-pip", "BASE": "localhost/debian"}
    if "find-links" in pip_settings():
        arguments["TORCH"] = f"torch=={version('torch')}"  # the wheel that this environment has
    given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
    buildah.build("localhost/llmtrain", ROOT, "-f", str(DOCKERFILE), *volumes, *given)
    yield buildah, buildah("from", "localhost/llmtrain")
    buildah("rm", "--all")
    shutil.rmtree(folder / "store", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(3000)
@pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("buildah") and shutil.which("debootstrap")),
    reason="needs root, buildah and debootstrap",
)
def test_the_image_is_built_and_trains_as_anybody_but_root(container, tiny, corpus, tmp_path):
    buildah, name = container
    config = json.loads(buildah("inspect", "--type", "image", "localhost/llmtrain"))["OCIv1"]["config"]
    small = [word for word in tiny if "data" not in word.split("=")[0] and "_dir=" not in word]
    text = shutil.copytree(corpus, tmp_path / "corpus")
    text.chmod(0o755)  # pytest's own folders are for their user alone
    for user in (config["User"], "12345"):
        runs = tmp_path / user
        runs.mkdir()
        os.chown(runs, int(user), 0)
        job = [*config["Entrypoint"], *small, "max_steps=2", "data=files"]
        job += ["data.sources.text.path=/corpus/prose.jsonl", "name=image"]
        mounts = [f"--volume={runs}:/llmtrain/runs", f"--volume={text}:/corpus:ro"]
        buildah.run(name, "--user", user, *mounts, "--", *job)
        assert (runs / "image" / "DONE").stat().st_uid == int(user)
