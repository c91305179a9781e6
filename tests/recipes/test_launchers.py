"""finetune.py under torch's launchers, some of which pass the rank as a flag."""

import json
import os
import subprocess
import sys

import pytest

from glmtune import cli

RECORDS = [{"instruction": f"Name tree {n}.", "input": "", "output": "Oak."} for n in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    data, lines = str(folder / "data.json"), str(folder / "data.jsonl")
    (folder / "data.json").write_text(json.dumps(RECORDS))
    assert cli.main(["convert", "--data_path", data, "--save_path", lines]) == 0
    assert cli.main(["tokenize", "--jsonl_path", lines, "--save_path", str(folder / "rows")]) == 0
    return folder


@pytest.mark.parametrize("flag", ["", pytest.param("--local_rank=0", marks=pytest.mark.slow)])
def test_a_launcher_may_tell_the_rank(folder, root, flag):
    """`torch.distributed.launch` appends the flag itself, in its old spelling."""
    launch = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node", "1"]
    launch += ["--standalone", str(root / "finetune.py")]
    arguments = f"--dataset_path rows --output_dir out{len(flag)} --max_steps 1 --use_cpu true"
    done = subprocess.run(
        [*launch, *arguments.split(), *flag.split()],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / f"out{len(flag)}" / "adapter_model.safetensors").is_file()
    assert ("note: local_rank has no effect here" in done.stderr) or not flag
