"""benchmarks/busy_machine.py without a demo: ratios, the table of the page, what a run inherits, and a run that fails."""

from types import SimpleNamespace

import busy_machine
import pytest
from record import read_csv, write_csv

from llava.common.errors import UserError


def test_ratios_and_the_table_of_the_page(tmp_path):
    seconds = {("default", False): [10.0, 12.0, 11.0], ("default", True): [16.5, 20.0, 15.0]}
    rows = busy_machine.rows_of(seconds)
    assert [row["busy_of_idle"] for row in rows] == [1.5]
    assert (rows[0]["idle_s_min"], rows[0]["idle_s_max"], rows[0]["busy_s_min"]) == (10.0, 12.0, 15.0)
    facts = {"command": "python x.py", "commit": "0" * 40, "written": "now", "device": "a CPU", "dtype": "float32"}
    facts |= {"threads": None, "torch": "2", "transformers": "5", "cores": 2, "repeats": 3}
    page, results = tmp_path / "page.md", tmp_path / "b.csv"
    write_csv(results, rows, facts)
    assert read_csv(results, "busy_of_idle")[0]["threads"] is None
    page.write_text("before\n<!-- busy_machine -->\n<!-- end of busy_machine -->\n")
    busy_machine.main(["--table", str(results), "--document", str(page)])
    text = page.read_text()
    assert "now: a CPU, float32, torch 2" in text and "2 cores, medians of 3." in text
    assert "| 11.0 (10.0 to 12.0) | 16.5 (15.0 to 20.0)" in text and "1.50" in text


def test_settings_and_states_take_turns(monkeypatch):
    seen, busy = [], []
    monkeypatch.setattr(busy_machine, "run_demo", lambda setting, limit: seen.append((setting, limit)) or 1.0)
    monkeypatch.setattr(
        busy_machine.subprocess, "Popen", lambda command: SimpleNamespace(kill=lambda: busy.append(1), wait=int)
    )
    found = busy_machine.measure(["default", "one"], 2, 50)
    assert seen == [("default", 20), *[("default", 50), ("default", 50), ("one", 50), ("one", 50)] * 2]
    assert {key: len(times) for key, times in found.items()} == {
        (s, b): 2 for s in ("default", "one") for b in (False, True)
    }
    assert len(busy) == 4, "and the other process is ended"


def test_a_run_decides_its_threads_itself(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    seen = []

    def run(command, env, **_):
        seen.append((command, env))
        return SimpleNamespace(returncode=int(len(seen) > 2), stderr="error: no\n")

    monkeypatch.setattr(busy_machine.subprocess, "run", run)
    assert busy_machine.run_demo("default", None) > 0 and busy_machine.run_demo("active", 7) > 0
    (default, without), (active, spinning) = seen
    assert "OMP_NUM_THREADS" not in without and "OMP_WAIT_POLICY" not in without and "--threads" not in default
    assert spinning["OMP_WAIT_POLICY"] == "ACTIVE" and active[-2:] == ["--limit", "7"] and "--shards" in active
    with pytest.raises(UserError, match="llava.eval.demo.*: failed .error: no"):
        busy_machine.run_demo("one", None)


def test_an_unknown_setting_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        busy_machine.main(["--settings", "fast"])
    assert ended.value.code == 2 and '--settings has "fast", allowed are default, one' in capsys.readouterr().err
