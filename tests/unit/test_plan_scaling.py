"""`glmtune plan --gpus K --nodes N`: time, memory and money on several cards."""

import json
import re
import shlex
from pathlib import Path

import pytest
from toys import draw_rows, save_rows

from glmtune.cards import CARDS, NVLINK, link_of
from glmtune.cli import main
from glmtune.models.chatglm.configuration import ChatGLMConfig

ROOT = Path(__file__).parents[2]
BASE = ("--base", "zai-org/chatglm-6b")


@pytest.fixture
def plan(tmp_path):
    """Run `glmtune plan` on the published model's shape; gives the record."""
    path = tmp_path / "plan.jsonl"

    def run(flags, base=BASE):
        assert main(["plan", *base, *shlex.split(flags), "--json_path", str(path)]) == 0
        return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])

    return run


class TestSettings:
    """Each of them changes something."""

    def test_cards_share_a_step(self, plan, capsys):
        one, eight = (plan(f"--card H200 --gpus {n}")["time"] for n in (1, 8))
        assert (one["num_steps"], eight["num_steps"]) == (1500, 189)
        assert eight["speedup"] == pytest.approx(one["hours"] / eight["hours"], rel=0.01)
        assert 7.8 < eight["speedup"] < 8 < 8.01
        assert eight["steps_of_one"] == 1500
        out = capsys.readouterr().out
        assert "1 node of 8 x H200" in out
        assert "8 times that of one card: 189 steps where that takes 1,500" in out

    def test_nodes_multiply_them_and_sum_over_the_network(self, plan, capsys):
        here, there = (plan(f"--card H200 --gpus {k} --nodes {n}") for k, n in ((8, 1), (4, 2)))
        assert here["time"]["num_steps"] == there["time"]["num_steps"]
        assert there["time"]["step"]["summing"] > 10 * here["time"]["step"]["summing"]
        assert "2 nodes of 4 x H200" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "flags, told",
        [
            ("--card H200 --link_gbit 8", ["link_gbit has no effect of one card in each node"]),
            ("--card H200 --gpus 2 --network_gbit 8", ["network_gbit has no effect of one node"]),
            ("--card H200 --shard_base true", ["shard_base has no effect of one card"]),
            ("--card H200 --gpus 2 --shard_base true", []),
            ("--card H200 --gpus 2 --nodes 2 --network_gbit 8 --link_gbit 8", []),
            (
                "--card T4 --gpus 2 --nodes 2 --network_gbit 8 --link_gbit 8 --price_per_hour 1",
                [
                    f"{name} has no effect where no time is computed"
                    for name in ("link_gbit", "network_gbit", "price_per_hour")
                ],
            ),
            ("--card H200 --price_per_hour 1 --num_rows 400 --row_length 90", []),
            (
                "--card H200 --num_rows 400 --row_length 90 --dataset_path {rows}",
                [
                    f"{name} has no effect beside dataset_path {{rows}}, whose rows have their own"
                    for name in ("row_length", "num_rows")
                ],
            ),
        ],
    )
    def test_what_changes_nothing_is_told(self, plan, flags, told, tmp_path, capsys):
        rows = save_rows(draw_rows([(20, 20)] * 60, ChatGLMConfig()), tmp_path / "rows")
        plan(flags.format(rows=rows))
        notes = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
        assert len(notes) == len(told)
        for line, words in zip(notes, told, strict=True):
            assert line.startswith(f"note: {words.format(rows=rows)}")

    def test_the_memory_of_a_card_does_not_depend_on_how_many_there_are(self, plan):
        one, many = plan("--card 4090"), plan("--card 4090 --gpus 8 --nodes 8")
        assert one["needed_gib"] == many["needed_gib"]

    def test_a_shared_base_takes_its_share_of_memory_and_the_time_to_gather_it(self, plan, capsys):
        flags = "--card H200 --gpus 4 --gradient_checkpointing false"
        whole, shared = (plan(f"{flags} --shard_base {word}") for word in ("false", "true"))
        assert shared["weights_gib"] == pytest.approx(whole["weights_gib"] / 4)
        assert shared["buffers_gib"] > whole["buffers_gib"] + 1.9  # the head, and its message
        added = shared["time"]["step"]["passes"] - whole["time"]["step"]["passes"]
        gathered = 2 * 3 / 4 * whole["weights_gib"] * 2**30 / 225e9
        assert added == pytest.approx(gathered, rel=0.05)
        out = capsys.readouterr().out
        assert "reads the whole base, and holds a share of it, 2.9 GiB, 11.5 a node" in out
        assert "of each pass, in which the other shares come twice" in out

    def test_the_network_counts_between_nodes_alone(self, plan, capsys):
        def summing(flags):
            return plan(f"--card H200 --gpus 8 {flags}")["time"]["step"]["summing"]

        assert summing("--nodes 2 --network_gbit 10") > 2 * summing("--nodes 2 --network_gbit 100")
        assert "--network_gbit 10" in capsys.readouterr().out
        assert summing("--network_gbit 10") == summing("--network_gbit 100")

    def test_the_link_counts_within_a_node_alone(self, plan):
        def summing(flags):
            return plan(f"--card H200 {flags}")["time"]["step"]["summing"]

        slow, fast = (summing(f"--gpus 2 --link_gbit {gbit}") for gbit in (8, 80))
        # 14.7 MB at 1 GB/s and at 10
        assert slow - fast == pytest.approx(14_680_072 * (1e-9 - 1e-10), rel=0.01)
        assert summing("--nodes 2 --link_gbit 8") == summing("--nodes 2 --link_gbit 80")

    def test_a_measured_speed_takes_the_place_of_the_computed_one(self, plan, capsys):
        time = plan("--card 4090 --tokens_per_second 5000")["time"]
        assert time["tokens_per_second"] == pytest.approx(5000)
        four = plan("--card 4090 --tokens_per_second 5000 --gpus 4")["time"]
        assert four["tokens_per_second"] == pytest.approx(5000 * four["speedup"])
        assert "by --tokens_per_second 5000 of one" in capsys.readouterr().out

    def test_with_a_measured_speed_a_cpu_has_a_time(self, plan, capsys, monkeypatch):
        monkeypatch.setattr("glmtune.training.planning.scaling.num_cores", lambda: 2)
        cpu, tiny = "--use_cpu true --num_rows 240 --row_length 50", ("--base", "glm-tiny")
        assert plan(cpu, tiny)["time"] == {}
        assert "(--tokens_per_second: as measured on one)" in capsys.readouterr().out
        two, four = (
            plan(f"{cpu} --tokens_per_second 1000 --gpus {n}", tiny)["time"] for n in (2, 4)
        )
        assert 1.5 < two["speedup"] < 2
        assert 1.5 < four["speedup"] < 2  # two cores
        out = capsys.readouterr().out
        assert "4 processes on 2 core(s), one thread each, so each pass takes 2 times as" in out

    def test_processes_on_a_cpu_share_the_memory_of_the_machine(self, plan):
        one, two = (
            plan(f"--use_cpu true --gpus {n} --num_rows 100", ("--base", "glm-tiny"))["card_gib"]
            for n in (1, 2)
        )
        assert two == pytest.approx(one / 2)

    def test_a_price(self, plan, capsys):
        record = plan("--card H200 --gpus 8 --price_per_hour 2.5 --eval_ratio 0.05")["time"]
        parts = ("start_hours", "hours", "evaluation_hours", "saving_hours")
        assert record["whole_hours"] == pytest.approx(sum(record[p] for p in parts))
        assert all(record[part] > 0 for part in parts)
        assert record["price"] == pytest.approx(record["whole_hours"] * 8 * 2.5)
        assert f"Price: {record['price']:.2f} = " in capsys.readouterr().out
        assert "price" not in plan("--card H200 --gpus 8")["time"]

    def test_one_card_has_a_price_too(self, plan):
        record = plan("--card 4090 --price_per_hour 1")["time"]
        assert record["price"] == pytest.approx(record["whole_hours"])


class TestParts:
    def test_every_row_takes_time_before_the_first_step(self, plan, capsys):
        flags = "--card H200 --gpus 8 --num_train_epochs 2 --num_rows"
        few, many, in_part, padded, held_out = (
            3600 * plan(f"{flags} {more}")["time"]["start_hours"] - 60
            for more in (
                "1000", "100000000", "100000000 --max_steps 900000", "100000000 --packing false",
                "100000000 --eval_ratio 0.0001",
            )
        )  # fmt: skip
        assert few < 0.01
        assert [many, in_part, padded] == pytest.approx([310, 210, 110])
        assert held_out == pytest.approx(310 + 1100 / 8), "near-equal rows are looked for by all"
        out = capsys.readouterr().out
        assert "a node, and reads all rows\n" in out
        assert "reads all rows, for which its host takes 15.8 GiB, 126.7 a node\n" in out
        assert " with 60 s to start" in out
        assert " with 6.2 minutes to start" in out

    def test_evaluations_are_shared_and_come_as_often_as_in_a_run(self, plan):
        flags = "--card H200 --eval_ratio 0.5 --num_train_epochs 1 --save_steps 100"
        one, two = (plan(f"{flags} --gpus {n}")["time"] for n in (1, 2))
        assert (one["num_steps"], one["num_evaluations"], one["num_saves"]) == (250, 3, 3)
        assert (two["num_steps"], two["num_evaluations"], two["num_saves"]) == (125, 2, 2)
        each = [time["evaluation_hours"] / time["num_evaluations"] for time in (one, two)]
        assert each[0] == pytest.approx(2 * each[1], rel=0.01)
        # 250 packs, of which only the forward pass is computed
        assert each[0] == pytest.approx(one["hours"] / 2, rel=0.01)
        assert plan(f"{flags} --eval_steps 25")["time"]["num_evaluations"] == 10
        by_epoch = plan(f"{flags} --save_strategy epoch --num_train_epochs 3")["time"]
        assert by_epoch["num_evaluations"] == by_epoch["num_saves"] == 3

    def test_the_last_step_of_an_epoch_is_waited_for(self, plan):
        """500 packs: 64 cards take seven whole steps, and one with 52 packs."""
        time = plan("--card H200 --gpus 8 --nodes 8 --num_train_epochs 1")["time"]
        assert time["num_steps"] == 8
        step = time["step"]
        assert step["waiting"] / step["passes"] == pytest.approx(12 / 64 / 8)

    def test_a_billion_rows_are_planned_without_being_packed(self, plan, capsys):
        flags = "--card H200 --gpus 8 --row_length 66 --max_steps -1 --num_train_epochs 1"
        # 124 rows of 66 tokens a pack
        few = plan(f"{flags} --num_rows {10**5}")["time"]
        assert few["num_steps"] == 101  # of 807 packs, eight a step
        assert "scaled up" not in capsys.readouterr().err
        billion = plan(f"{flags} --num_rows {10**9}")["time"]
        assert billion["num_steps"] == pytest.approx(10**9 / 124 / 8, rel=0.01)
        assert billion["num_rows"] == 10**9
        assert billion["tokens_per_second"] == pytest.approx(few["tokens_per_second"], rel=0.01)
        assert "100,000 of these rows are packed, and the figures scaled up" in (
            capsys.readouterr().err
        )

    def test_evaluations_of_a_billion_rows_are_of_their_share(self, plan):
        """10 of the 100,000 rows that are planned are held out, and 64 cards share 100,000."""
        flags = "--card H200 --gpus 8 --nodes 8 --row_length 66 --num_train_epochs 1"
        record = plan(f"{flags} --num_rows {10**9} --eval_ratio 0.0001")
        time = record["time"]
        assert record["held_out"]["rows"] == 100_000
        each = time["evaluation_hours"] / time["num_evaluations"]
        assert each == pytest.approx(time["hours"] * 1e-4 / 2, rel=0.1)

    def test_rows_of_other_folders_are_evaluated_on_as_in_a_run(self, plan, tmp_path):
        config = ChatGLMConfig()
        rows = save_rows(draw_rows([(7, 11)] * 400, config), tmp_path / "rows")
        more = save_rows(draw_rows([(9, 30)] * 200, config), tmp_path / "more")
        flags = f"--card H200 --layout exact --dataset_path {rows}"
        alone = plan(flags)
        both = plan(f"{flags} --eval_dataset_path {more}")
        assert (alone["held_out"]["rows"], both["held_out"]["rows"]) == (0, 200)
        assert (alone["time"]["num_evaluations"], both["time"]["num_evaluations"]) == (0, 1)
        assert both["time"]["num_steps"] == alone["time"]["num_steps"]
        assert both["time"]["num_rows"] == 400
        named = plan(f"{flags} --eval_dataset_path own={rows},{more} --eval_ratio 0.1")
        assert named["held_out"]["rows"] == 40 + 400 + 200


class TestRefusals:
    def refused(self, flags, capsys):
        assert main(["plan", *BASE, *shlex.split(flags)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert line.startswith("error: ")
        return line

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("--card 4091", "card '4091' is not known here; there are RTX 4090, "),
            ("--card blackbird", "there are RTX 3090, RTX 4090, RTX 5090, L40S, A100 80GB, H100"),
            ("--card a100 --gpus 8", "A100 40GB or A100 80GB"),
            ("--gpus 0", "--gpus '0' should be a whole number, at least 1"),
            ("--nodes 0", "--nodes '0' should be a whole number, at least 1"),
            ("--network_gbit 0", "--network_gbit '0' should be a number, above 0"),
            ("--tokens_per_second 0", "should be a number, above 0"),
            ("--price_per_hour -1", "should be a number, above 0"),
            ("--tokens_per_step 128 --card H200", "--row_length 200: row 1 has 200 tokens"),
        ],
    )
    def test_mistakes(self, flags, words, capsys):
        assert words in self.refused(flags, capsys)

    @pytest.mark.parametrize(
        "flags",
        [
            "--card H200 --gpus 8 --nodes 100",
            "--card H200 --gpus 8 --nodes 1 --num_rows 200",
            "--card H200 --gpus 8 --nodes 8 --layout exact --per_device_train_batch_size 400",
        ],
    )
    def test_more_cards_than_passes_and_each_advice_runs(self, flags, capsys):
        line = self.refused(flags, capsys)
        assert re.search(r"\d cards: an epoch is \d+ (packs|passes) of \d", line)
        advice = line.rpartition("; ")[2].split(", or ")
        assert len(advice) == 2
        for setting in advice:
            more = shlex.split(setting.removesuffix(" at most"))
            assert main(["plan", *BASE, *shlex.split(flags), *more]) == 0, setting

    def test_a_share_that_does_not_fit(self, capsys):
        line = self.refused("--memory_gib 3 --gpus 8 --shard_base true", capsys)
        assert "each of 8 cards holds one of 8 shares of the base" in line
        assert "quantization_bit 8" not in line

    def test_one_node_more_than_advised_is_refused(self, capsys):
        line = self.refused("--card H200 --gpus 8 --nodes 100", capsys)
        most = int(re.search(r"--nodes (\d+) at most", line)[1])
        self.refused(f"--card H200 --gpus 8 --nodes {most + 1}", capsys)

    def test_a_base_that_does_not_fit_on_one_card_and_each_advice_runs(self, capsys):
        line = self.refused("--card 4060 --gpus 8", capsys)
        assert "12.9 GiB of 7.8 (RTX 4060): does not fit" in line
        assert "each of 8 cards holds the whole base" in line
        flags = [*BASE, "--gpus", "8", "--card"]
        for name, value in (("shard_base", "true"), ("quantization_bit", "4")):
            assert f"{name} {value} would take" in line
            assert main(["plan", *flags, "4060", f"--{name}", value]) == 0
        larger = re.search(r"--card '(.+?)' has (\d+) GiB", line)
        assert CARDS[larger[1]][0] == pytest.approx(int(larger[2]), abs=0.5)
        assert main(["plan", *flags, larger[1]]) == 0


class TestLinks:
    def test_every_card_has_a_link(self):
        for name, (_, capability, _) in CARDS.items():
            kind, rate = link_of(name, capability)
            assert (kind == "NVLink") == (name in NVLINK)
            assert rate >= 15

    @pytest.mark.parametrize(
        ("card", "link"),
        [
            ("H200", ("NVLink", 450)), ("A100 80GB", ("NVLink", 300)), ("RTX 4090", ("PCIe", 31.5)),
            ("RTX 3090", ("PCIe", 31.5)), ("H100 PCIe", ("PCIe", 63)), ("T4", ("PCIe", 15.8)),
            ("RTX 5090", ("PCIe", 63)),
        ],
    )  # fmt: skip
    def test_which(self, card, link):
        assert link_of(card, CARDS[card][1]) == link

    def test_cards_without_nvlink_sum_more_slowly(self, plan):
        fast, slow = (plan(f"--card '{card}' --gpus 8")["time"]["step"]["summing"]
                      for card in ("H100", "H100 PCIe"))  # fmt: skip
        assert slow > 3 * fast


class TestPage:
    """The examples of docs/scaling.md are what the code prints."""

    @staticmethod
    def examples(page):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        found = re.findall(r"```bash\n([^`]*)\n```\n\n```text\n([^`]*)\n```", text)
        return [(command.replace("\\\n", " "), output) for command, output in found]

    def test_both_languages_have_the_same(self):
        assert self.examples("scaling.md") == self.examples("scaling.zh.md")

    def test_each_is_printed(self, capsys):
        examples = self.examples("scaling.md")
        assert len(examples) == 5
        for command, output in examples:
            assert main(shlex.split(command)[1:]) == 0
            assert output in capsys.readouterr().out, command
