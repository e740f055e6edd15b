"""Launching on clusters: files in run_scripts name what exists and have the fields their programs ask for."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from evlgen.config.config import Config

SCRIPTS = Path(__file__).resolve().parent.parent / "run_scripts"
SLURM = SCRIPTS / "slurm" / "train.sbatch"


def check_launch(command: str) -> None:
    """That torchrun takes the options before the script, and the project the options behind it."""
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word in ("torchrun", "torch.distributed.run"))
    words = [re.sub(r"^\$.*", "1", word) for word in words[start + 1 :]]
    args = get_args_parser().parse_args(words)
    assert args.max_restarts == 3 and args.nproc_per_node and args.nnodes
    script = [args.training_script, *args.training_script_args]
    if args.module:
        assert script[:2] == ["evlgen", "train"]
    else:
        assert script[0] == "train.py" and (SCRIPTS.parent / "train.py").is_file()
    if "--options" in script:
        project = script[script.index("--cfg-path") + 1]
        options = script[script.index("--options") + 1 :]
        project = "projects/evlgen/pretrain_opt2.7b.yaml" if project == "1" else project
        assert Config.load(project, options).run.resume == "auto"


@pytest.mark.parametrize("script", sorted(SCRIPTS.rglob("*.s[hb]*")), ids=lambda path: path.name)
def test_shell_scripts_are_shell(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_slurm_script_starts_one_torchrun_a_node(tmp_path):
    for name, answer in (("scontrol", "host1\nhost2"), ("srun", "")):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\n[ {name} = srun ] && printf "%s\\n" "$@" || printf "{answer}\\n"\n')
        program.chmod(0o755)
    variables = {
        **{
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "host[1-2]",
            "SLURM_JOB_ID": "1234",
            "CONTAINER": "e.sqsh",
        },
        **{"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_GPUS_ON_NODE": "4"},
    }
    command = ["bash", str(SLURM), "--cfg-path", "projects/a b.yaml"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, cwd=tmp_path)
    words = done.stdout.splitlines()
    assert words[:2] == ["--kill-on-bad-exit=1", "--container-image=e.sqsh"]
    launch = words[words.index("torchrun") :]
    check_launch(shlex.join(launch))
    assert launch[1:5] == ["--nnodes", "2", "--nproc-per-node", "4"] and "host1:29734" in launch
    assert launch[-3:] == ["train.py", "--cfg-path", "projects/a b.yaml"]
    helped = subprocess.run(["bash", str(SLURM)], capture_output=True, text=True)
    assert helped.returncode == 2 and "sbatch --nodes 2" in helped.stderr
    directives = re.findall(r"^#SBATCH --([\w-]+)=", SLURM.read_text(), re.M)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "time", "signal", "output"} <= set(directives)


def test_the_skypilot_task_has_known_fields():
    task = yaml.safe_load((SCRIPTS / "skypilot" / "train.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert set(task["resources"]) <= {"accelerators", "use_spot", "disk_size"}
    assert set(task["file_mounts"]["/outputs"]) == {"name", "mode"}
    (script,) = re.findall(r"^bash (\S+)", task["setup"], re.M)
    assert (SCRIPTS.parent / script).is_file()
    assert all(
        f"${name}" in task["run"] or f"${{{name}}}" in str(task["file_mounts"]) for name in task["envs"]
    )
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    check_launch(task["run"].replace("\\\n", " "))


def test_skypilots_schema_takes_the_task():
    schemas = pytest.importorskip("sky.utils.schemas", reason="not installed: pip install skypilot")
    from jsonschema import Draft7Validator

    task = yaml.safe_load((SCRIPTS / "skypilot" / "train.yaml").read_text())
    parts = (
        (schemas.get_task_schema(), task),
        (schemas.get_resources_schema(), task["resources"]),
        (schemas.get_storage_schema(), task["file_mounts"]["/outputs"]),
    )
    for schema, part in parts:
        assert not [error.message for error in Draft7Validator(schema).iter_errors(part)]


def test_the_schema_of_the_training_operator_takes_the_job():
    """With EVLGEN_PYTORCHJOB_CRD=FILE, manifests/base/crds/kubeflow.org_pytorchjobs.yaml of the operator."""
    path = os.environ.get("EVLGEN_PYTORCHJOB_CRD")
    if path is None:
        pytest.skip("EVLGEN_PYTORCHJOB_CRD does not name the operator's definition of a PyTorchJob")
    jsonschema = pytest.importorskip("jsonschema", reason="not installed: pip install jsonschema")
    (version,) = yaml.load(Path(path).read_text(), yaml.CSafeLoader)["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}  # which is Kubernetes' own
    _refuse_others(schema)
    job = yaml.safe_load((SCRIPTS / "kubernetes" / "pytorchjob.yaml").read_text())
    assert not [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(job)]


def _refuse_others(schema):
    """Makes fields errors that a schema does not know, as ``kubectl apply --validate=strict`` does."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
            schema.setdefault("additionalProperties", False)
        for part in list(schema.values()):
            _refuse_others(part)
    elif isinstance(schema, list):
        for part in schema:
            _refuse_others(part)


def test_the_kubernetes_job_is_a_pytorchjob():
    job = yaml.safe_load((SCRIPTS / "kubernetes" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]) == {"runPolicy", "pytorchReplicaSpecs"}
    assert set(job["spec"]["runPolicy"]) <= {"cleanPodPolicy", "backoffLimit"}
    assert set(job["spec"]["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        assert replica["replicas"] == 1 and replica["restartPolicy"] == "OnFailure"
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch" and container["command"] == ["bash", "-c"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert all(isinstance(variable["value"], str) for variable in container["env"])
        (script,) = container["args"]
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        check_launch(script)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_the_slurm_script():
    subprocess.run(["shellcheck", str(SLURM)], check=True)
