"""A process that is killed at a chosen syscall of a save, by strace: `python kills.py HOME SYSCALL`.

Prints one JSON line for each place at which it killed: the checkpoints complete afterwards, and what is wrong with the
newest. Forks a child for each: the child saves step 2 beside the complete checkpoint of step 1, of which one is kept.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.train.runs import recipe_of

from shardwright.checkpoint.training import TrainingCheckpoint, complete
from shardwright.comm.single import SingleGroup
from shardwright.train.trainer import Trainer


def attached(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return "TracerPid:\t0" not in status


def main(home: Path, syscall: str) -> None:
    trainer = Trainer(recipe_of(home, output={"keep": 1}), SingleGroup())
    assert trainer.saver.save(1, {"losses": []}) is None
    for number in range(1, 200):
        sys.stdout.flush()
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGSTOP)
            trainer.saver.save(2, {"losses": []})
            os._exit(0)
        os.waitpid(child, os.WUNTRACED)
        inject = f"inject={syscall}:signal=KILL:when={number}"
        command = ["strace", "-q", "-f", "-o", "/dev/null", "-e", f"trace={syscall}", "-e", inject, "-p", str(child)]
        with subprocess.Popen(command) as tracer:
            while not attached(child) and tracer.poll() is None:
                time.sleep(0.001)
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
        found = complete(trainer.recipe.directory)
        wrong = "no complete checkpoint"
        if found:
            with TrainingCheckpoint(found[0]) as checkpoint:
                wrong = checkpoint.damaged() or ""
        killed = os.WIFSIGNALED(status)
        told = {"killed": killed, "at": number, "complete": [path.name for path in found], "wrong": wrong}
        sys.stdout.write(json.dumps(told) + "\n")
        if not killed:
            break
        shutil.rmtree(trainer.recipe.directory / "checkpoints")
        assert trainer.saver.save(1, {"losses": []}) is None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
