"""The files for Kubernetes and SkyPilot in docs/cluster/: right for their API, and starting what they say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from data_prep.options import COMMANDS
from data_prep.parts.part import parse_part
from megapix.cli.parse import parse_run
from megapix.console import parse
from megapix.dist import World
from megapix.resilience.stopping import EXIT_STOPPED
from megapix.resilience.watchdog import EXIT_LOST
from tests.support.launch import ROOT
from tests.support.played_launcher import finish, play, start

FOLDER = ROOT / "docs" / "cluster"
KUBERNETES = "1.31"
"""The first release in which a Job's podFailurePolicy is stable."""
EIGHT = 'for i in 0 1 2 3 4 5 6 7; do echo "GPU $i: a card"; done'
ASKED = 'echo "$@"; cat "$6"'


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def started(folder: Path, arguments: list[str], **environment: str) -> str:
    """What DeepSpeed's launcher is asked by these arguments of `megapix launch` on a node of eight GPUs."""
    play(folder, **{"nvidia-smi": EIGHT})
    code, out, err = finish(start(folder, ASKED, *arguments, checked="run", **environment))
    assert (code, err) == (0, "")
    assert out.endswith("node-0 slots=8\nnode-1 slots=8\n")
    words = out.splitlines()[0].partition(" --module megapix train ")[2].split()
    run = parse_run(words, World(1, 16, 1))
    assert (run.data.path, str(run.out)) == ("/shared/imagenet-256", "/shared/runs/xl-256")
    return out


def arguments_of(pod: dict[str, Any], **environment: str) -> list[str]:
    """Those of its container, with $(NAME) as Kubernetes replaces it."""
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["megapix", "launch"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    return [re.sub(r"\$\((\w+)\)", lambda name: environment[name[1]], argument) for argument in container["args"]]


def test_the_indexed_job(tmp_path: Path) -> None:
    service, job = documents("indexed-job.yaml")
    for document in (service, job):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    spec, pod = job["spec"], job["spec"]["template"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert pod["spec"]["restartPolicy"] == "Never", "which podFailurePolicy asks for"
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    codes = {
        code: rule["action"] for rule in spec["podFailurePolicy"]["rules"][:2] for code in rule["onExitCodes"]["values"]
    }
    assert codes == {1: "FailJob", 2: "FailJob", EXIT_LOST: "Ignore", EXIT_STOPPED: "Ignore"}
    environment = {"JOB_COMPLETION_INDEX": "1"}
    out = started(tmp_path, arguments_of(pod, **environment), **environment)
    assert " --no_ssh --node_rank 1 --master_addr megapix-0.megapix --master_port 29500 " in out


def test_the_job_that_prepares() -> None:
    """Each pod does a part of its own, of as many as there are pods."""
    (job,) = documents("prepare-job.yaml")
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["data_prep"]
    assert job["spec"]["parallelism"] <= job["spec"]["completions"]
    for index in range(job["spec"]["completions"]):
        command = parse(COMMANDS[container["args"][0]], container["args"][1:], "data_prep write")
        part = parse_part(command.part, {"JOB_COMPLETION_INDEX": str(index)})
        assert part == (index, job["spec"]["completions"])


def test_the_pytorchjob(tmp_path: Path) -> None:
    """Its own fields by hand, as kubeflow.org/v1 has them; its pods by the schema of Kubernetes."""
    (job,) = documents("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert job["spec"].keys() == {"runPolicy", "pytorchReplicaSpecs"}
    policy = job["spec"]["runPolicy"]
    assert policy.keys() <= {"activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "ttlSecondsAfterFinished"}
    assert policy["cleanPodPolicy"] in ("None", "Running", "All")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"}
    for rank, kind in enumerate(("Master", "Worker")):
        assert replicas[kind].keys() == {"replicas", "restartPolicy", "template"}
        assert (replicas[kind]["replicas"], replicas[kind]["restartPolicy"]) == (1, "OnFailure")
        pod = replicas[kind]["template"]
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod}
        kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)
        assert pod["spec"]["containers"][0]["name"] == "pytorch"
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "megapix-master-0", "MASTER_PORT": "23456"}
        out = started(tmp_path, arguments_of(pod, **environment), **environment)
        assert f" --no_ssh --node_rank {rank} --master_addr megapix-master-0 --master_port 23456 " in out


def test_the_schema_sees_mistakes() -> None:
    for wrong in ({"completion": 2}, {"completions": "two"}, {"template": {"spec": {"containers": [{"image": "x"}]}}}):
        _, job = documents("indexed-job.yaml")
        job["spec"] |= wrong
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_skypilot(tmp_path: Path) -> None:
    """Its fields by hand, as `sky/utils/schemas.py` of 0.10 has them; its script is run."""
    (task,) = documents("skypilot.yaml")
    assert task.keys() <= {
        "name",
        "num_nodes",
        "workdir",
        "resources",
        "envs",
        "file_mounts",
        "volumes",
        "setup",
        "run",
    }
    assert task["resources"].keys() <= {"accelerators", "infra", "image_id", "use_spot", "disk_size", "job_recovery"}
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [EXIT_LOST, EXIT_STOPPED]}
    assert task["setup"].split() == ["make", ".venv/.installed"]
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True).returncode == 0
    play(tmp_path, **{"nvidia-smi": EIGHT})
    script = tmp_path / "run.sh"
    script.write_text(f"#!/usr/bin/env bash\n{task['run']}")
    script.chmod(0o755)
    environment = {
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
    }
    code, out, err = finish(start(tmp_path, ASKED, script=script, checked="run", **environment))
    assert (code, err) == (0, "")
    assert " --no_ssh --node_rank 1 --master_addr 10.0.0.4 --master_port 29500 " in out
    assert out.endswith("node-0 slots=8\nnode-1 slots=8\n")
    assert " train xl-256 --data.path /shared/imagenet-256 --out /shared/runs/xl-256\n" in out


def test_every_file_is_shown_in_the_document() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert all(f"(cluster/{path.name})" in text for path in FOLDER.iterdir())
