"""Noticing that nothing happens any more."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from lit_gpt.training.watch import Watch

ROOT = Path(__file__).resolve().parents[2]
SECOND = 1 / 60


def test_silence_is_reported_once_until_there_is_life_again(tmp_path, capsys):
    path = tmp_path / "stacks" / "rank3.txt"
    with Watch(path, 3, 0.2 * SECOND, exit_code=None) as watch:
        watch.beat()
        time.sleep(1.0)
        assert path.read_text().count("nothing done for") == 1
        watch.beat()
        time.sleep(1.0)
    text = path.read_text()
    assert text.count("rank 3, process") == 2 and "test_silence_is_reported_once" in text
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and all(line.startswith("rank 3: nothing done for") and str(path) in line for line in err)


def test_life_and_patience_keep_it_quiet(tmp_path):
    path = tmp_path / "rank0.txt"
    with Watch(path, 0, 0.5 * SECOND, exit_code=9) as watch:  # 9 would end this process
        for _ in range(10):
            time.sleep(0.1)
            watch.beat()
        watch.beat(patience=4)
        time.sleep(1.2)
    with Watch(path, 0, 0, exit_code=9):  # switched off
        time.sleep(0.3)
    assert not path.exists()


def end_of(path, *lines):
    """Exit code and standard error of a program that does `lines` under a watch of 0.6 seconds that ends it with 75."""
    program = ["import sys, time", "from pathlib import Path", "from lit_gpt.training.watch import Watch"]
    program += ["with Watch(Path(sys.argv[1]), 0, 0.01, exit_code=75) as watch:", "    watch.beat()"]
    program = "\n".join(program + ["    " + line for line in lines])
    done = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_hang_may_end_the_process(tmp_path):
    path = tmp_path / "rank0.txt"
    code, err = end_of(path, "time.sleep(60)")
    assert code == 75 and "Exiting, if it lasts: the same command goes on" in err and path.exists()
    code, err = end_of(path / "not a folder" / "rank0.txt", "time.sleep(60)")
    assert code == 75 and "in <module>" in err and "printed above. Exiting" in err


def test_a_rank_that_loses_another_after_reporting_a_hang_ends_like_it(tmp_path):
    wait = "while not Path(sys.argv[1]).exists(): time.sleep(0.01)"
    code, err = end_of(tmp_path / "1", wait, "raise RuntimeError('connection closed by peer')")
    assert code == 75 and "RuntimeError: connection closed by peer" in err
    code, err = end_of(tmp_path / "2", "raise RuntimeError('no hang before it')")
    assert code == 1 and "RuntimeError: no hang before it" in err and "nothing done" not in err


def test_life_after_a_report_keeps_the_process(tmp_path):
    wait = "while not Path(sys.argv[1]).exists(): time.sleep(0.01)"
    code, err = end_of(tmp_path / "1", wait, "for _ in range(20): watch.beat(); time.sleep(0.1)", "sys.exit(3)")
    assert code == 3 and "nothing done" in err
    code, err = end_of(tmp_path / "2", wait, "from lit_gpt.errors import UserError", "raise UserError('its own')")
    assert code == 1 and "UserError: its own" in err and "nothing done" in err
    code, err = end_of(tmp_path / "3", wait)  # its last step took long, and was the last
    assert code == 0 and "nothing done" in err


def test_sigquit_prints_the_stacks_at_any_time(tmp_path):
    program = "import time\nfrom pathlib import Path\nfrom lit_gpt.training.watch import Watch\n"
    program += "def stuck():\n    print('ready', flush=True)\n    time.sleep(60)\n"
    program += "with Watch(Path('unused'), 0, 10, exit_code=None):\n    stuck()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGQUIT)
        time.sleep(1)
        assert process.poll() is None
    finally:
        process.kill()
        _, err = process.communicate()
    assert "in stuck" in err
