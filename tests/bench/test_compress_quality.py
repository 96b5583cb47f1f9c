"""What `bench.compress_quality` understands and writes beside its figures."""

from bench.compress_quality import as_json, main


def test_the_old_name_of_the_baselines_is_understood_and_written() -> None:
    context = main.make_context("bench", ["--part", "rivals", "--part", "budgets"])
    assert context.params["parts"] == ("baselines", "budgets")
    document = as_json({"baselines": [{"name": "Q4_K_M", "kl_vs_llamacpp": 1.2}]})
    assert document["rivals"] == document["baselines"]
    assert document["kl_vs_llamacpp"] == {"Q4_K_M": 1.2}
