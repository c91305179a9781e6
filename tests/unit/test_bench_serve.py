"""`bench serve`: its figures agree, and every answer is that of its prompt alone."""

import json

import pytest

from glmtune.cli import main


@pytest.mark.slow  # a server and its clients are processes of their own
def test_clients_are_answered_without_errors(tmp_path, capsys):
    line = "bench serve --shape small --clients 4 --slots 3 --seconds 1 --prompts 2 --adapters 2 "
    line += "--prompt_length 9 --max_new_tokens 6 --use_cpu --json_path"
    assert main([*line.split(), str(tmp_path / "figures.jsonl")]) == 0
    plain, mixed = map(json.loads, (tmp_path / "figures.jsonl").read_text().splitlines())
    assert (plain["adapters"], mixed["adapters"]) == (0, 2)
    for figures in (plain, mixed):
        assert figures["errors"] == figures["other_answers"] == 0
        assert figures["requests"] >= 8
        share = figures["tokens_per_second"] / figures["decoder_tokens_per_second"]
        assert figures["share_of_decoder"] == pytest.approx(share)
        assert 0 < figures["first_token_ms_p50"] <= figures["first_token_ms_p99"]
    assert "mixing" in capsys.readouterr().out
