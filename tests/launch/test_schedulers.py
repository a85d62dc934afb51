"""launch.sh where a scheduler has set variables: SLURM, Kubernetes, and CUDA_VISIBLE_DEVICES in all its forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.played_launcher import finish, play, start

EIGHT = """for i in 0 1 2 3 4 5 6 7; do
  echo "GPU $i: a card (UUID: GPU-$i$i-abc)"; echo "  MIG 1g.5gb Device 0: (UUID: MIG-9)"
done"""
"""nvidia-smi of a node with eight GPUs."""
ASKED = 'echo "$* | $CUDA_VISIBLE_DEVICES | $CUDA_DEVICE_ORDER | $RANK$WORLD_SIZE$LOCAL_RANK"'
TRAIN = ["tiny", "--data.path", "S", "--out", "run"]
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu-[10,15]", "SLURM_NODEID": "1"}
STEP = JOB | {
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu-[10,15]",
    "SLURM_LOCALID": "0",
}


def launch(
    folder: Path, *options: str, gpus: str = EIGHT, asked: str = ASKED, **environment: str
) -> tuple[int, str, str]:
    play(folder, **{"nvidia-smi": gpus})
    return finish(start(folder, asked, *options, *TRAIN, checked="run", **environment))


@pytest.mark.parametrize("rank", ["3"])
def test_the_number_of_a_pod_is_no_rank(rank: str, train: list[str], tmp_path: Path) -> None:
    """A pod of a PyTorchJob has RANK and WORLD_SIZE, which count pods; the check of the command would read them."""
    pod = {"RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_PORT": "23456"}
    where = ["--no-ssh", "--nnodes", "4", "--node-rank", rank, "--master-addr", "job-master-0", "--ranks", "2"]
    code, out, err = finish(start(tmp_path, ASKED, *where, *train, **pod))
    assert (code, err) == (0, "")
    assert f" --no_ssh --node_rank {rank} --master_addr job-master-0 --master_port 23456 " in out
    assert out.endswith("|  |  | \n"), "the launcher sets them for each rank"
    code, out, err = finish(start(tmp_path, ASKED, "--ranks", "2", *train, **pod))
    assert code == 0
    assert " --hostfile /dev/null --num_gpus 2 " in out
    assert err == (
        f"launch.sh: note: RANK = {rank} and WORLD_SIZE = 4 are set, and this starts one node alone: for all of them "
        "--no-ssh, --nnodes, --node-rank and --master-addr\n"
    )


def test_one_task_a_node_starts_the_ranks_of_its_node(tmp_path: Path) -> None:
    step = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}
    code, out, err = launch(tmp_path, asked=f'{ASKED}; cat "$6"', **step)
    assert code == 0, err
    assert " --no_ssh --node_rank 1 --master_addr gpu-10 --master_port 20080 " in out
    assert out.endswith("node-0 slots=8\nnode-1 slots=8\n")
    code, out, err = launch(tmp_path, "--ranks", "3", asked=f'{ASKED}; cat "$6"', gpus="exit 9", **step)
    assert code == 0, err
    assert out.endswith("node-0 slots=3\nnode-1 slots=3\n")
    code, out, _ = launch(tmp_path, gpus='echo "GPU 0: a card"', **step)
    assert (code, out) == (0, "rank 1 of 2, local 0, at gpu-10:20080, \n"), "one GPU needs no launcher"


@pytest.mark.parametrize(("tasks", "per_node"), [("4", "2(x2)"), ("9", "8,1"), ("3", "2,1")])
def test_gpus_that_would_stay_idle_are_told_of(tasks: str, per_node: str, tmp_path: Path) -> None:
    step = STEP | {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_PROCID": "1"}
    code, _, err = launch(tmp_path, **step)
    assert (code, err.count("\n")) == (2, 1)
    here = {"4": 2, "9": 1, "3": 1}[tasks]
    assert f"srun has started {here} tasks on this node, where each sees 8 GPUs (0,1,2,3,4,5,6,7): expected one" in err


def test_a_task_for_each_gpu_is_a_rank(tmp_path: Path) -> None:
    step = STEP | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_PROCID": "13"}
    code, out, err = launch(tmp_path, **step | {"SLURM_LOCALID": "5"})
    assert (code, out) == (0, "rank 13 of 16, local 5, at gpu-10:20080, \n"), err
    code, out, err = launch(tmp_path, **step | {"SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "5"})
    assert (code, out) == (0, "rank 13 of 16, local 0, at gpu-10:20080, \n"), err
    code, _, err = launch(tmp_path, "--ranks", "8", **step)
    assert (code, err.count("\n")) == (2, 1)
    assert "under srun each task is a rank: expected none of --hostfile, --no-ssh, --ranks" in err


def test_srun_that_was_forgotten(tmp_path: Path) -> None:
    code, _, err = launch(tmp_path, **JOB)
    assert (code, err.count("\n")) == (2, 1)
    assert "this SLURM job has 2 nodes (gpu-[10,15]), and without srun this command would use one of them" in err
    assert "expected `srun ./launch.sh …`" in err
    for meant in (JOB | {"SLURM_STEP_NUM_TASKS": "1"}, JOB | {"SLURM_JOB_NUM_NODES": "1"}):
        code, out, err = launch(tmp_path, **meant)
        assert code == 0, err
        assert "--include localhost:0,1,2,3,4,5,6,7 " in out


@pytest.mark.parametrize(
    ("visible", "asked", "order"),
    [
        ("3, 1", "--include localhost:3,1 ", ""),
        ("2,-1,4", "--include localhost:2 ", ""),
        ("GPU-55,GPU-00-a", "--include localhost:5,0 ", "PCI_BUS_ID"),
        ("-1", "--num_gpus 2 ", ""),
        ("NoDevFiles", "--num_gpus 2 ", ""),
    ],
)
def test_visible_devices(visible: str, asked: str, order: str, tmp_path: Path) -> None:
    """Numbers, or UUIDs or their start; -1 ends the list, as in CUDA."""
    code, out, err = launch(tmp_path, CUDA_VISIBLE_DEVICES=visible)
    assert code == 0, err
    assert asked in out
    assert out.endswith(f"|  | {order} | \n")


@pytest.mark.parametrize("options", [[], ["--ranks", "1"]])
def test_a_slice_is_found_by_its_name(options: list[str], tmp_path: Path) -> None:
    """By one rank without a launcher in between, which could name it by a number alone."""
    visible = "MIG-9,MIG-8" if options else "MIG-9"
    code, out, err = launch(tmp_path, *options, asked="exit 9", CUDA_VISIBLE_DEVICES=visible, HF_TOKEN="its token")
    assert (code, out) == (0, "rank  of , local , at :, its token\n"), err


@pytest.mark.parametrize(
    ("visible", "options", "words"),
    [
        ("8", [], "'8': expected numbers such as 0,1 or UUIDs of the 8 GPUs that nvidia-smi lists, each once"),
        ("0,0", [], "'0,0': expected numbers such as 0,1"),
        ("GPU-", [], "'GPU-': expected numbers such as 0,1"),
        ("0,,1", [], "'' is none"),
        ("all", [], "'all': expected numbers such as 0,1"),
        ("MIG-9,MIG-8", [], "'MIG-9,MIG-8': NCCL joins no MIG slices: expected one of them, or --ranks 1"),
        ("MIG-9", ["--no-ssh", "--nnodes=2", "--node-rank=0", "--master-addr=a"], "'MIG-9': on several nodes"),
    ],
)
def test_visible_devices_that_are_not(visible: str, options: list[str], words: str, tmp_path: Path) -> None:
    code, _, err = launch(tmp_path, *options, CUDA_VISIBLE_DEVICES=visible)
    assert (code, err.count("\n")) == (2, 1)
    assert "launch.sh: error: CUDA_VISIBLE_DEVICES = " in err
    assert words in err


@pytest.mark.parametrize(
    ("name", "value", "environment"),
    [("MASTER_PORT", "many", {}), ("SLURM_PROCID", "x", STEP | {"SLURM_STEP_NUM_TASKS": "2"})],
)
def test_a_variable_that_is_no_number(name: str, value: str, environment: dict[str, str], tmp_path: Path) -> None:
    code, _, err = launch(tmp_path, **environment | {name: value})
    assert (code, err.count("\n")) == (2, 1)
    assert f"environment variable {name} = {value!r}: expected a number" in err
