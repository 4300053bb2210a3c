import json

from lpl_jax.training.progress import STARTUP_FILE, Startup


def test_parts_add_up(tmp_path):
    now = [0.0]

    def pass_time(seconds):
        now[0] += seconds

    now[0] = 2.0
    startup = Startup(began=0.5, clock=lambda: now[0])
    for name, seconds in (("state", 1.0), ("compile", 4.0), ("state", 0.5)):
        with startup.part(name):
            pass_time(seconds)
    pass_time(0.25)
    assert startup.finish() == "first step after 7.2 s: imports 1.5, state 1.5, compile 4.0, other 0.2"
    startup.write(tmp_path, 7)
    startup.write(tmp_path, 9)
    lines = [json.loads(line) for line in (tmp_path / STARTUP_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 9]
    assert lines[0]["seconds"] == {"imports": 1.5, "state": 1.5, "compile": 4.0, "other": 0.25}
