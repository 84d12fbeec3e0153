"""launch/k8s: valid by the schemas of Kubernetes and Kubeflow, true to the exit codes, run as pods are."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from llmtrain.config import ExitCode
from llmtrain.config.hydra import compose
from llmtrain.training.config import TrainConfig
from tests.launch.conftest import LAUNCH
from tests.ranks import free_port

sys.path.insert(0, str(LAUNCH))
import supervise
import supervise_kubeflow

K8S = LAUNCH / "k8s"
JOB, PYTORCH_JOB = K8S / "job" / "job.yaml", K8S / "pytorchjob" / "pytorchjob.yaml"
VOLUME = K8S / "volume" / "volume.yaml"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("*/kustomization.yaml"))

FINAL = {ExitCode.LOCKED, ExitCode.CONFIG, ExitCode.NON_FINITE, ExitCode.CORRUPTION}
"""Another start would end in the same way."""


def needs_kubectl(test: Callable[..., None]) -> Any:
    missing = shutil.which("kubectl") is None
    return pytest.mark.system(pytest.mark.skipif(missing, reason="needs kubectl")(test))


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def built(overlay: str | Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    command = ["kubectl", "kustomize", str(K8S / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return list(yaml.safe_load_all(done.stdout))


def the(kind: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    (one,) = (document for document in found if document["kind"] == kind)
    return one


def pod_specs(document: dict[str, Any]) -> list[dict[str, Any]]:
    if document["kind"] == "Job":
        return [document["spec"]["template"]["spec"]]
    return [replica["template"]["spec"] for replica in document["spec"]["pytorchReplicaSpecs"].values()]


def every_pod() -> list[dict[str, Any]]:
    return [*pod_specs(the("Job", documents(JOB))), *pod_specs(the("PyTorchJob", documents(PYTORCH_JOB)))]


@pytest.fixture
def validate() -> Callable[..., None]:
    """By Kubernetes' own schema; a PyTorchJob by the SDK's models, and its pods by the schema of pods.

    Both come with the extra `dev`; without it the tests of the exit codes and of the pods run all the same.
    """
    schemas = pytest.importorskip("kubernetes_validate")
    client = pytest.importorskip("kubeflow.training").ApiClient()

    def check(document: dict[str, Any], version: str = schemas.latest_version()) -> None:
        if document["kind"] != "PyTorchJob":
            schemas.validate(document, version, strict=True)
            return
        job = client.deserialize(SimpleNamespace(data=json.dumps(document)), "KubeflowOrgV1PyTorchJob")
        assert client.sanitize_for_serialization(job) == document, "fields that a PyTorchJob has not"
        for spec in pod_specs(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
            schemas.validate(pod, version, strict=True)

    return check


@pytest.mark.parametrize("file", [JOB, PYTORCH_JOB, VOLUME], ids=lambda file: file.stem)
@pytest.mark.parametrize("version", [("1.31",), ()], ids=["1.31", "newest"])
def test_a_manifest_is_valid(validate, file, version):
    for document in documents(file):
        validate(document, *version)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_kustomize_builds_is_valid(validate, overlay):
    for document in built(overlay):
        validate(document)


def test_the_validation_sees_mistakes(validate):
    job, pytorch_job = the("Job", documents(JOB)), the("PyTorchJob", documents(PYTORCH_JOB))
    job["spec"]["template"]["spec"]["containers"][0]["arg"] = []
    with pytest.raises(Exception, match="'arg' was unexpected"):
        validate(job)
    pytorch_job["spec"]["runPolicy"]["cleanPodPolice"] = "All"
    with pytest.raises(AssertionError):
        validate(pytorch_job)


def asked_of_job(code: int) -> str:
    """What the Job does about a pod that ends with `code`: the first rule that fits."""
    for rule in the("Job", documents(JOB))["spec"]["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", ()):
            return rule["action"]
    return "Count"


@pytest.mark.parametrize("code", [1, 137, 143, *(code for code in ExitCode if code)])
def test_an_exit_code_restarts_or_ends_the_job(code):
    assert (asked_of_job(code) == "FailJob") == (code in FINAL)
    assert (supervise_kubeflow.retryable(code) < 128) == (code in FINAL)
    assert (asked_of_job(code) == "Ignore") == (code == ExitCode.PREEMPTED)
    assert 0 < supervise_kubeflow.retryable(code) < 256


def test_a_pod_has_time_to_save():
    grace = compose(TrainConfig, ["data=embedded"]).grace_seconds
    for spec in every_pod():
        assert spec["terminationGracePeriodSeconds"] > grace + supervise.SPARE_SECONDS


def test_pods_run_without_rights_as_the_image_s_user():
    (user,) = (line.split()[1] for line in (LAUNCH.parent / "docker/Dockerfile").read_text().splitlines()
               if line.startswith("USER"))  # fmt: skip
    for spec in every_pod():
        pod, (container,) = spec["securityContext"], spec["containers"]
        assert pod["runAsNonRoot"]
        assert pod["runAsUser"] == int(user)
        assert pod["fsGroup"] == pod["runAsGroup"]
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


def test_pods_have_shared_memory():
    for spec in every_pod():
        (container,) = spec["containers"]
        places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes[places["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_the_nodes_agree_on_their_number_and_the_first_one_s_name():
    service, job = documents(JOB)
    (spec,) = pod_specs(job)
    environment = {entry["name"]: entry.get("value") for entry in spec["containers"][0]["env"]}
    assert service["spec"]["clusterIP"] == "None"
    assert spec["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert environment["PET_MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["PET_NNODES"])


@needs_kubectl
@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "volume"])
def test_the_arguments_are_a_config(overlay):
    for document in built(overlay):
        for spec in pod_specs(document) if document["kind"].endswith("Job") else ():
            config = compose(TrainConfig, spec["containers"][0]["args"])
            mounts = [mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]]
            assert any(str(config.output_dir).startswith(f"{mount}/") for mount in mounts)
            assert any(str(config.cache_dir).startswith(mount) for mount in mounts)


@needs_kubectl
def test_the_documentation_s_kustomization_builds(validate, tmp_path):
    page = (LAUNCH.parent / "docs" / "kubernetes.md").read_text()
    named = re.findall(r"kubectl (?:apply -k|kustomize) launch/k8s/(\S+)", page)
    assert set(OVERLAYS) > set(named) >= {"job", "object-storage"}
    (own,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    shutil.copytree(K8S, tmp_path / "launch" / "k8s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(own)
    job = the("Job", built(tmp_path / "mine"))
    (container,) = pod_specs(job)[0]["containers"]
    assert container["image"] == "registry.example.org/llmtrain:1"
    assert container["env"][0] == {"name": "PET_NNODES", "value": "4"}
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (4, 4)
    assert compose(TrainConfig, container["args"]).name
    validate(job)


# Pods of the manifests, as processes: the first of a PID namespace each, over one network.

PID_ONE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]


class Pod:
    """The container's command under the environment of the pod with this index; /shared is elsewhere."""

    def __init__(self, manifest: Path, index: int, shared: Path, port: int, overrides: list[str]) -> None:
        document = documents(manifest)[-1]
        (container,) = pod_specs(document)[0]["containers"]
        given = self._given(document, container, index) | {
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
            "PET_NPROC_PER_NODE": "1",
        }
        words = [*container["command"], *container["args"]]
        prefix = PID_ONE if subprocess.run([*PID_ONE, "true"], capture_output=True).returncode == 0 else []
        self.output = shared / f"pod-{index}-{port}.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*prefix, *(word.replace("/shared", str(shared)) for word in words), *overrides],
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **given},
                cwd=LAUNCH.parent,
                stdout=output,
                stderr=output,
            )
        self.nested = bool(prefix)

    @staticmethod
    def _given(document: dict[str, Any], container: dict[str, Any], index: int) -> dict[str, str]:
        if document["kind"] == "Job":
            return {entry["name"]: entry.get("value", str(index)) for entry in container["env"]}
        replicas = document["spec"]["pytorchReplicaSpecs"].values()  # envvar.go of Kubeflow's operator, 1.9
        nodes = str(sum(replica["replicas"] for replica in replicas))
        return {"PET_NNODES": nodes, "PET_NODE_RANK": str(index), "RANK": str(index), "WORLD_SIZE": nodes}

    def terminate(self) -> None:
        """SIGTERM to the container's first process, as the kubelet does."""
        process = psutil.Process(self.process.pid)
        (process.children()[0] if self.nested else process).terminate()

    def wait(self) -> int:
        return self.process.wait(timeout=240)

    def close(self) -> None:
        """End it and what it started."""
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
            self.process.kill()
            self.process.wait()


@pytest.fixture
def start_pods(tiny, corpus, tmp_path) -> Iterator[Any]:
    """Start both pods of a manifest, with a tiny model over a corpus in the shared place."""
    (tmp_path / "corpus").mkdir()
    shutil.copy(corpus / "prose.jsonl", tmp_path / "corpus")
    small = [word for word in tiny if "data" not in word.split("=")[0] and "_dir=" not in word]
    started: list[Pod] = []

    def start(manifest: Path, *overrides: str) -> list[Pod]:
        port = free_port()
        pods = [Pod(manifest, index, tmp_path, port, [*small, *overrides]) for index in (0, 1)]
        started.extend(pods)
        return pods

    yield start
    for pod in started:
        pod.close()


def lines(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def until_trained(run: Path, pods: list[Pod]) -> None:
    deadline = time.monotonic() + 240
    while len(lines(run)) < 2:
        said = "\n".join(pod.output.read_text() for pod in pods)
        assert time.monotonic() < deadline, said
        assert [pod.process.poll() for pod in pods] == [None, None], said
        time.sleep(0.2)


@pytest.mark.parametrize(("manifest", "code"), [(JOB, 85), (PYTORCH_JOB, 213)], ids=["Job", "PyTorchJob"])
def test_a_pod_that_is_evicted_takes_the_others_along_and_loses_nothing(start_pods, tmp_path, manifest, code):
    run = tmp_path / "runs" / "llmtrain"
    pods = start_pods(manifest, "max_steps=200")
    until_trained(run, pods)
    pods[1].terminate()
    assert [pod.wait() for pod in pods] == [code, code], pods[0].output.read_text()
    (saved, *_) = sorted(path.name for path in (run / "checkpoints").glob("step_*"))[::-1]
    assert saved == f"step_{lines(run)[-1]['step']:08d}"
    if manifest == JOB:
        pods = start_pods(manifest, "max_steps=200")
        assert [pod.wait() for pod in pods] == [0, 0], pods[0].output.read_text()
        assert (run / "DONE").exists()
        assert [line["step"] for line in lines(run)] == list(range(1, 201))


def test_a_mistake_ends_the_job_at_once(start_pods):
    """78 on every node, which stops a Job and is final to Kubeflow."""
    pods = start_pods(PYTORCH_JOB, "model.d_modle=3")
    assert [pod.wait() for pod in pods] == [78, 78], pods[0].output.read_text()
    assert signal.SIGTERM not in (pod.process.returncode for pod in pods)
