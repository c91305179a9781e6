"""recipes/distributed/: each file is read by what it is written for, and its command by glmtune."""

import copy
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from glmtune.config.flags import split_arguments
from glmtune.config.reading import read_config
from glmtune.config.settings import SETTINGS, TrainSettings
from glmtune.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "distributed"
LAUNCHERS = sorted(FOLDER.glob("*.yaml"))
SLURM = sorted((FOLDER / "slurm").glob("*.sh"))
KUBERNETES = sorted((FOLDER / "kubernetes").glob("*.yaml"))


def of_name(path):
    return str(path.relative_to(FOLDER))


def plain_lines(path):
    """The lines of a file, with those of comments, and continued lines joined."""
    lines = [re.sub(r"^\s*#(?!!|SBATCH) {0,3}", "", line) for line in path.read_text().splitlines()]
    return re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()


def commands(path):
    """The arguments of each `glmtune train` in a file."""
    if path.name == "trainjob.yaml":
        trainer = yaml.safe_load(path.read_text())["spec"]["trainer"]
        words = [*trainer["command"], *trainer["args"]]
        return [words[words.index("train") + 1 :]]
    lines = plain_lines(path)
    found = [line.split("glmtune train ", 1)[1] for line in lines if "glmtune train " in line]
    return [shlex.split(text) for text in found]


def read(arguments):
    """The settings that `glmtune train` reads from arguments."""
    return read_config(SETTINGS["train"], *split_arguments("train", arguments))


@pytest.mark.parametrize("path", [*LAUNCHERS, *SLURM, *KUBERNETES], ids=of_name)
def test_the_command_is_one_that_train_reads(path):
    found = commands(path)
    assert found, "there is a command in it"
    for arguments in found:
        settings = read(arguments)
        assert isinstance(settings, TrainSettings)
        assert {"dataset_path", "output_dir", "base"} <= settings.model_fields_set
    with pytest.raises(UserError, match="--no_such_flag"):
        read([*found[0], "--no_such_flag", "1"])


def test_a_job_that_comes_back_resumes_or_begins_anew():
    for path in (FOLDER / "slurm" / "requeue.sh", FOLDER / "kubernetes" / "job.yaml"):
        (job,) = map(read, commands(path))
        assert (job.overwrite_output_dir, job.resume_from_checkpoint) == (False, "auto")


class TestAccelerate:
    @pytest.mark.parametrize("path", LAUNCHERS, ids=of_name)
    def test_its_own_loader_reads_it(self, path):
        from accelerate.commands.config.config_args import load_config_from_file

        config = load_config_from_file(str(path))
        content = yaml.safe_load(path.read_text())
        for name, value in content.items():
            kept = getattr(config, name)
            assert getattr(kept, "value", kept) == value, name
        assert config.num_processes == 8
        # A number format of the launcher would be one that the run does not know of.
        assert str(getattr(config.mixed_precision, "value", config.mixed_precision)) == "no"

    @pytest.mark.parametrize("path", LAUNCHERS, ids=of_name)
    def test_its_launcher_knows_every_key_of_a_part(self, path):
        """Accelerate's loader reads any key of `fsdp_config` and `deepspeed_config`."""
        from accelerate.commands.launch import launch_command_parser

        known = vars(launch_command_parser().parse_args(["script.py"]))
        content = yaml.safe_load(path.read_text())
        parts = [content.get(name, {}) for name in ("fsdp_config", "deepspeed_config")]
        assert any(parts) == (path.name != "ddp.yaml")
        for part in parts:
            assert set(part) <= set(known)

    def test_a_key_that_it_does_not_know_is_refused(self, tmp_path):
        from accelerate.commands.config.config_args import load_config_from_file

        path = tmp_path / "config.yaml"
        path.write_text((FOLDER / "ddp.yaml").read_text() + "num_gpus: 8\n")
        with pytest.raises(ValueError, match="num_gpus"):
            load_config_from_file(str(path))


# What sbatch takes, of the options that such a script needs, and how a value looks.
SBATCH = {
    "job-name": r"[\w.-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]?",
    "time": r"(\d+-)?\d{2}:\d{2}:\d{2}",
    "output": r"[\w.%-]+",
    "open-mode": r"append|truncate",
    "signal": r"(B:)?[A-Z0-9]+@\d+",
    "requeue": None,
}
STUBS = {
    "srun": 'for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n "$@" || code=$?; done; '
    "exit ${code:-0}",
    "torchrun": 'echo "torchrun $*"',
    "glmtune": 'echo "rank $RANK $LOCAL_RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT: $*"; '
    "exit ${CODE:-0}",
    "scontrol": '[ "$1" = show ] && printf "one\\ntwo\\n" || echo "scontrol $*"',
}
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "one,two",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
}


@pytest.fixture
def run_script(tmp_path):
    """Run a bash script where Slurm, torchrun and glmtune only print what they are asked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in STUBS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)

    def run(*script, **variables):
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", *script],
            cwd=tmp_path,
            env={"PATH": path, **JOB, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


class TestSlurm:
    @pytest.mark.parametrize("path", SLURM, ids=of_name)
    def test_bash_reads_it_and_sbatch_its_options(self, path):
        subprocess.run(["bash", "-n", str(path)], check=True)
        lines = path.read_text().splitlines()
        assert lines[0] == "#!/bin/bash"
        places = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
        assert max(places) < first, "sbatch stops reading at the first command"
        for line in (lines[place] for place in places):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            assert re.fullmatch(SBATCH[name] or "", value), line
        assert {"nodes", "gpus-per-node", "time"} <= {
            lines[place].removeprefix("#SBATCH --").partition("=")[0] for place in places
        }

    def test_a_node_and_several_start_torchrun(self, run_script):
        one = run_script(str(FOLDER / "slurm" / "node.sh"))
        assert one.returncode == 0, one.stderr
        assert "torchrun --standalone --nproc_per_node 8 -m glmtune train --base" in one.stdout
        several = run_script(str(FOLDER / "slurm" / "nodes.sh"))
        assert several.returncode == 0, several.stderr
        meet = "--nnodes 2 --nproc_per_node 8 --rdzv_id 7 --rdzv_backend c10d --rdzv_endpoint"
        assert f"torchrun {meet} one:29500 -m glmtune train --base" in several.stdout

    def test_a_run_that_was_interrupted_is_put_back_into_the_queue(self, run_script):
        script = str(FOLDER / "slurm" / "requeue.sh")
        first = run_script(script, CODE="130")
        assert first.returncode == 130
        start, other, requeue = first.stdout.splitlines()
        assert start.startswith("rank 0 0 of 2 at one:29500: train --base models/chatglm-6b")
        assert start.endswith("--resume_from_checkpoint auto")
        assert other.startswith("rank 1 1 of 2")
        assert requeue == "scontrol requeue 7"
        again = run_script(script, CODE="0")
        assert again.returncode == 0
        assert "scontrol" not in again.stdout

    def test_a_run_that_failed_is_not(self, run_script):
        failed = run_script(str(FOLDER / "slurm" / "requeue.sh"), CODE="2")
        assert failed.returncode == 2
        assert "scontrol" not in failed.stdout


def object_of(required=(), **properties):
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


def list_of(items, most):
    return {"type": "array", "maxItems": most, "items": items}


def text(most, least=0):
    return {"type": "string", "minLength": least, "maxLength": most}


NAMES = {"type": "object", "additionalProperties": {"type": "string"}}
META = object_of(
    ("name",),
    name={"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
    labels=NAMES,
    annotations=NAMES,
)
ENV = list_of(object_of(("name", "value"), name=text(253, 1), value={"type": "string"}), 128)
AMOUNT = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^\d+(\.\d+)?[KMGT]?i?$"}]}
AMOUNTS = {"type": "object", "additionalProperties": AMOUNT}
RESOURCES = object_of(limits=AMOUNTS, requests=AMOUNTS)
MOUNTS = list_of(
    object_of(("name", "mountPath"), name=text(253, 1), mountPath=text(4096, 1)),
    128,
)
VOLUMES = list_of(
    object_of(
        ("name",),
        name=text(253, 1),
        persistentVolumeClaim=object_of(("claimName",), claimName=text(253, 1)),
        emptyDir=object_of(medium={"enum": ["", "Memory"]}, sizeLimit=AMOUNT),
    ),
    128,
)
GRACE = {"type": "integer", "minimum": 0}
# The part of the published definition (kubeflow/trainer, manifests/base/crds) that a job of ours
# uses: names, which are required, types and limits.
TRAIN_JOB = object_of(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=META,
    spec=object_of(
        ("runtimeRef",),
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        suspend={"type": "boolean"},
        runtimeRef=object_of(
            ("name",),
            apiGroup=text(253),
            kind={"enum": ["ClusterTrainingRuntime", "TrainingRuntime"]},
            name=text(253, 1),
        ),
        trainer=object_of(
            image=text(500),
            numNodes={"type": "integer", "minimum": 0},
            numProcPerNode={"type": "integer", "minimum": 1},
            command=list_of(text(1 << 20), 128),
            args=list_of(text(1 << 20), 128),
            env=ENV,
            resourcesPerNode=RESOURCES,
        ),
        runtimePatches=list_of(
            object_of(
                ("manager",),
                manager=text(253, 1),
                trainingRuntimeSpec=object_of(
                    template=object_of(
                        spec=object_of(
                            replicatedJobs=list_of(
                                object_of(
                                    ("name",),
                                    name=text(253, 1),
                                    template=object_of(
                                        spec=object_of(
                                            template=object_of(
                                                spec=object_of(
                                                    terminationGracePeriodSeconds=GRACE,
                                                    volumes=VOLUMES,
                                                    nodeSelector=NAMES,
                                                    containers=list_of(
                                                        object_of(
                                                            ("name",),
                                                            name=text(253, 1),
                                                            env=ENV,
                                                            volumeMounts=MOUNTS,
                                                        ),
                                                        64,
                                                    ),
                                                )
                                            )
                                        )
                                    ),
                                ),
                                100,
                            )
                        )
                    )
                ),
            ),
            16,
        ),
    ),
)
PLAIN_JOB = object_of(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "batch/v1"},
    kind={"const": "Job"},
    metadata=META,
    spec=object_of(
        ("template",),
        backoffLimit={"type": "integer", "minimum": 0},
        template=object_of(
            ("spec",),
            metadata=object_of(labels=NAMES),
            spec=object_of(
                ("containers", "restartPolicy"),
                # A job takes no other.
                restartPolicy={"enum": ["Never", "OnFailure"]},
                terminationGracePeriodSeconds=GRACE,
                volumes=VOLUMES,
                containers=list_of(
                    object_of(
                        ("name", "image"),
                        name=text(63, 1),
                        image=text(500, 1),
                        workingDir=text(4096, 1),
                        command=list_of(text(1 << 20), 128),
                        args=list_of(text(1 << 20), 128),
                        env=ENV,
                        resources=RESOURCES,
                        volumeMounts=MOUNTS,
                    ),
                    64,
                ),
            ),
        ),
    ),
)
SCHEMAS = {"trainjob.yaml": TRAIN_JOB, "job.yaml": PLAIN_JOB}


def check(name, content):
    Draft202012Validator(SCHEMAS[name]).validate(content)


class TestKubernetes:
    @pytest.mark.parametrize("path", KUBERNETES, ids=of_name)
    def test_it_fits_the_published_schema(self, path):
        check(path.name, yaml.safe_load(path.read_text()))

    @pytest.mark.parametrize(
        ("name", "place", "value"),
        [
            ("trainjob.yaml", ("spec", "trainer", "numProcPerNode"), "auto"),
            ("trainjob.yaml", ("spec", "trainer", "gpus"), 8),
            ("trainjob.yaml", ("spec", "runtimeRef"), {"kind": "ClusterTrainingRuntime"}),
            ("trainjob.yaml", ("metadata", "name"), "glmtune_6b"),
            ("trainjob.yaml", ("apiVersion",), "kubeflow.org/v1"),
            ("job.yaml", ("spec", "template", "spec", "restartPolicy"), "Always"),
            ("job.yaml", ("spec", "replicas"), 2),
        ],
    )
    def test_another_would_not(self, name, place, value):
        content = copy.deepcopy(yaml.safe_load((FOLDER / "kubernetes" / name).read_text()))
        *path, last = place
        part = content
        for key in path:
            part = part[key]
        part[last] = value
        with pytest.raises(ValidationError):
            check(name, content)

    @pytest.mark.parametrize("path", KUBERNETES, ids=of_name)
    def test_what_is_mounted_is_a_volume_and_a_process_has_a_card(self, path):
        content = yaml.safe_load(path.read_text())["spec"]
        if path.name == "trainjob.yaml":
            (patch,) = content["runtimePatches"]
            (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
            pod, trainer = node["template"]["spec"]["template"]["spec"], content["trainer"]
            num_processes, limits = trainer["numProcPerNode"], trainer["resourcesPerNode"]["limits"]
            assert node["name"] == pod["containers"][0]["name"] == "node", "as the runtime has it"
        else:
            pod = content["template"]["spec"]
            limits = pod["containers"][0]["resources"]["limits"]
            script = pod["containers"][0]["args"][0]
            num_processes = int(re.search(r"--nproc_per_node (\d+)", script)[1])
        assert num_processes == limits["nvidia.com/gpu"]
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}

    def test_a_pod_that_comes_back_resumes(self, run_script):
        job = yaml.safe_load((FOLDER / "kubernetes" / "job.yaml").read_text())
        container = job["spec"]["template"]["spec"]["containers"][0]
        assert container["command"] == ["bash", "-c"]
        first = run_script("-c", *container["args"])
        assert first.returncode == 0, first.stderr
        assert first.stdout.startswith("torchrun --standalone --nproc_per_node 8 -m glmtune train")
        assert first.stdout.rstrip().endswith("--resume_from_checkpoint auto")


def test_the_image_is_built_from_files_that_are_there():
    root, lines = FOLDER.parents[1], plain_lines(FOLDER / "Containerfile")
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "src"} <= set(copied)
    for name in copied:
        assert (root / name).exists(), name
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (installed,) = re.findall(r"/opt/glmtune\[(.*?)\]", "\n".join(lines))
    assert installed in extras["optional-dependencies"]
