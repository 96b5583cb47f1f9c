import json

from click.testing import CliRunner

from bench.api.constraint_cost import FORMS, main


def test_the_last_line_tells_the_cost_of_every_form() -> None:
    done = CliRunner().invoke(main, ["--smoke", "--threads", "1"], catch_exceptions=False)
    document = json.loads(done.stdout.splitlines()[-1])
    ratios = [document[f"{name}_vs_free"] for name in FORMS]
    assert document["worst_vs_free"] == min(ratios) > 0
    assert document["memory_mib"]["trials"] > 0
